"""The notebooks as pages: _docs/index.html, with search, without any address but its own.

    python tools/docs.py            write _docs
    python tools/docs.py --serve    and show it on 127.0.0.1:8000

nbdev's processors prepare the notebooks (directives out, hidden cells out, names linked), mkdocs makes the pages. nbdev_docs would do
the same with quarto, which it fetches from the network; nothing is fetched here, and no code is run: the pages show the saved outputs.
"""
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
source, site = root / "_site_src", root / "_docs"
os.chdir(root / "nbs")  # nbdev finds settings.ini from here
sys.path.insert(0, str(root))

from execnb.nbio import nb2dict, read_nb  # noqa: E402
from latex2mathml.converter import convert as mathml  # noqa: E402
from nbdev import processors as p  # noqa: E402
from nbdev.config import get_config  # noqa: E402
from nbdev.process import NBProcessor  # noqa: E402
from plotly.io import from_json, to_html  # noqa: E402
from plotly.offline import get_plotlyjs  # noqa: E402

procs = [p.populate_language, p.strip_ansi, p.hide_line, p.filter_stream_, p.rm_header_dash, p.clean_magics, p.hide_, p.add_links]
rooms = {"context": "Long context", "vision": "Vision", "model": "The model", "train": "Training", "needle": "Needles", "lmms": "Needles", "lab": "The lab", "mini": "The miniature",
         "cli": "The command", "paper": "The paper", "tutorials": "How to"}


def page_of(notebook):
    "Where a notebook's page lies below _site_src: without its number, so that nbdev's links fit."
    relative = notebook.relative_to(root / "nbs")
    return relative.with_name(re.sub(r"^\d+[a-z]?_", "", relative.name))


def link(match, folder):
    "A link to a notebook, made one to its page; a link to a file of the repository stays text."
    text, target, anchor = match.groups()
    path = (folder / target).resolve()
    if path.suffix == ".ipynb" and path.is_relative_to(root / "nbs") and path.exists():
        page = os.path.relpath(str(page_of(path)).removesuffix(".ipynb") + ".html", folder.relative_to(root / "nbs"))
        return f"[{text}]({page}{anchor or ''})"
    if path.suffix in (".png", ".svg", ".jpg") or not path.exists(): return match[0]
    return text


def maths(text):
    "Formulas as MathML, which browsers draw themselves."
    turn = lambda display: lambda m: m[0] if m[0].startswith("`") else mathml(m[1], display=display)
    text = re.sub(r"`[^`]*`|\$\$(.+?)\$\$", turn("block"), text, flags=re.S)
    return re.sub(r"`[^`]*`|(?<![\w$\\])\$([^\s$][^$\n]*?)\$(?![\w$])", turn("inline"), text)


def prose(text, notebook, depth):
    "A markdown cell: links to pages, formulas, and nbdev's absolute links made relative."
    config = get_config()
    text = text.replace(f"{config.doc_host}{config.doc_baseurl}/", "../" * depth)
    parts = re.split(r"(```.*?```)", text, flags=re.S)
    return "".join(part if part.startswith("```") else maths(re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)", lambda m: link(m, notebook.parent), part)) for part in parts)


def drawn(output, depth):
    "A plotly figure as a piece of the page."
    data = output.get("data", {})
    if (figure := data.pop("application/vnd.plotly.v1+json", None)) is None: return
    picture = from_json(json.dumps({k: v for k, v in figure.items() if k != "config"}), skip_invalid=True)
    data["text/html"] = [to_html(picture, full_html=False, include_plotlyjs=f"{'../' * depth}assets/plotly.min.js")]
    data.pop("text/plain", None)


def anchors(cell):
    "Names that an exported cell defines, as places to link to."
    names = re.findall(r"^(?:async )?(?:def|class) ([A-Za-z]\w*)", cell["source"], flags=re.M) if "export" in cell.get("directives_", {}) else []
    return "".join(f'<a id="{name}"></a>' for name in names)


def prepare(notebook):
    "Write one notebook's page source."
    page = page_of(notebook)
    depth = len(page.parts) - 1
    done = NBProcessor(nb=read_nb(notebook), procs=procs, process=True)
    cells = []
    for cell in done.nb.cells:
        if cell.cell_type == "code" and re.fullmatch(r"\s*(#\|\s*default_exp.*)?\s*", cell.source): continue
        if cell.cell_type == "markdown": cell.source = prose(cell.source, notebook, depth)
        elif names := anchors(cell): cells.append(dict(cell_type="markdown", id=f"{cell.id}-names", metadata={}, source=names))
        for output in cell.get("outputs", []): drawn(output, depth)
        cells.append(cell)
    for cell in cells: cell.pop("directives_", None)
    done.nb["cells"] = cells
    (source / "pages" / page).parent.mkdir(parents=True, exist_ok=True)
    whole = dict(nb2dict(done.nb), cells=[{k: v for k, v in c.items() if k in ("cell_type", "id", "metadata", "source", "outputs", "execution_count")} for c in cells])
    (source / "pages" / page).write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    return page


def title(notebook):
    "What its first line says."
    return "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"]).strip().splitlines()[0].lstrip("# ").strip()


def navigation(notebooks):
    "Pages by room, in the order of their numbers."
    groups = {}
    for notebook in notebooks:
        page = page_of(notebook)
        if page.stem == "index": continue
        room = page.parts[0] if len(page.parts) > 1 else page.stem.split(".")[0]
        groups.setdefault(rooms.get(room, room), []).append({title(notebook): str(page)})
    return [{"Start": "index.ipynb"}, *({name: pages} for name, pages in groups.items())]


def build():
    "Write _docs."
    for folder in (source, site): shutil.rmtree(folder, ignore_errors=True)
    notebooks = sorted(n for n in (root / "nbs").glob("**/*.ipynb") if not any(part.startswith((".", "_")) for part in n.relative_to(root).parts))
    for notebook in notebooks: prepare(notebook)
    for folder in (root / "nbs").glob("**/images"): shutil.copytree(folder, source / "pages" / folder.relative_to(root / "nbs"))
    (source / "pages" / "assets").mkdir(parents=True)
    (source / "pages" / "assets" / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    (source / "pages" / "assets" / "extra.css").write_text(".jp-InputPrompt, .jp-OutputPrompt {display: none !important} .md-grid {max-width: 88rem} .jupyter-wrapper .highlight pre, .jupyter-wrapper pre {font-size: .62rem !important}\n", encoding="utf-8")
    settings = dict(site_name="longva", docs_dir="pages", site_dir=str(site), use_directory_urls=False, nav=navigation(notebooks), extra_css=["assets/extra.css"],
                    theme=dict(name="material", font=False, features=["navigation.sections", "navigation.top", "toc.follow", "search.highlight"], palette=dict(scheme="default", primary="blue grey")),
                    plugins=["search", {"mkdocs-jupyter": dict(execute=False, include_source=False, ignore_h1_titles=True, show_input=True)}], validation=dict(links=dict(not_found="info")))
    (source / "mkdocs.yml").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(source / "mkdocs.yml")], env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    if done.returncode: sys.exit(f"mkdocs fails:\n{done.stderr[-2000:]}")
    for page in site.glob("**/*.html"): page.write_text(without_strangers(page.read_text(encoding="utf-8")), encoding="utf-8")
    return len(notebooks)


def without_strangers(html):
    "Take out scripts and styles that nbconvert's template would fetch from other hosts."
    html = re.sub(r'<script[^>]*\bsrc="(?:https?:)?//[^"]*"[^>]*>\s*</script>', "", html)
    html = re.sub(r'<link[^>]*\bhref="(?:https?:)?//[^"]*"[^>]*rel="(?:stylesheet|preconnect)"[^>]*>|<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*\bhref="(?:https?:)?//[^"]*"[^>]*>', "", html)
    return re.sub(r'<script[^>]*>(?:(?!</script>).)*?(?:unpkg\.com|cdnjs\.cloudflare\.com|cdn\.jsdelivr\.net)(?:(?!</script>).)*</script>', "", html, flags=re.S)


def main():
    print(f"{build()} notebooks are pages now: open {site.relative_to(root)}/index.html")
    if sys.argv[1:] == ["--serve"]:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
        print("Open http://127.0.0.1:8000 (ctrl-c stops it)", flush=True)
        try: http.server.ThreadingHTTPServer(("127.0.0.1", 8000), handler).serve_forever()
        except KeyboardInterrupt: pass


if __name__ == "__main__":
    main()
