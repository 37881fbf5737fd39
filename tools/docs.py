"""The notebooks as pages in _docs, with search, without any address but its own.

    python tools/docs.py            write _docs
    python tools/docs.py --serve    and show it on 127.0.0.1:8000

nbdev's processors prepare the notebooks (directives and hidden cells removed, names linked), mkdocs makes the
pages. nbdev_docs would do the same with quarto, which it fetches from the network. Nothing is fetched here, and no
code is run: the pages show the saved outputs. Search works from disk, too.
"""

import ast
import functools
import html
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

procs = [
    p.populate_language,
    p.strip_ansi,
    p.hide_line,
    p.filter_stream_,
    p.rm_header_dash,
    p.clean_magics,
    p.hide_,
    p.add_links,
]
rooms = {  # titles of the navigation; other rooms stand under their own name
    "files": "Files and testing",
    "testing": "Files and testing",
    "context": "Long context",
    "vision": "Videos and images",
    "model": "The model",
    "train": "Training",
    "needle": "Needles",
    "mini": "The miniatures",
    "study": "Studies",
    "workbench": "The workbench",
    "web": "Inside the apps",
    "lmms": "lmms-eval",
    "commands": "The command line",
    "cli": "The command line",
    "paper": "The paper",
    "tutorials": "How to",
}
CSS = """
.jp-InputPrompt, .jp-OutputPrompt { display: none !important }
.md-grid { max-width: 88rem }
.jupyter-wrapper .highlight pre, .jupyter-wrapper pre { font-size: .62rem !important }
.jupyter-wrapper svg, .jupyter-wrapper img { max-width: 100%; height: auto }
.jupyter-wrapper .plotly-graph-div { max-width: 100% }
"""
LIGHT = {
    "media": "(prefers-color-scheme: light)",
    "scheme": "default",
    "primary": "blue grey",
    "toggle": {"icon": "material/weather-night", "name": "Dark"},
}
DARK = {
    "media": "(prefers-color-scheme: dark)",
    "scheme": "slate",
    "primary": "blue grey",
    "toggle": {"icon": "material/weather-sunny", "name": "Light"},
}


def page_of(notebook):
    """Where a notebook's page lies below _site_src: without its number, so that nbdev's links fit."""
    relative = notebook.relative_to(root / "nbs")
    return relative.with_name(re.sub(r"^\d+[a-z]?_", "", relative.name))


def link(match, folder):
    """A link to a notebook, made one to its page; a link to a file of the repository stays text."""
    text, target, anchor = match.groups()
    path = (folder / target).resolve()
    if path.suffix == ".ipynb" and path.is_relative_to(root / "nbs") and path.exists():
        page = str(page_of(path)).removesuffix(".ipynb") + ".html"
        page = os.path.relpath(page, folder.relative_to(root / "nbs"))
        return f"[{text}]({page}{anchor or ''})"
    if path.suffix in (".png", ".svg", ".jpg") or not path.exists():
        return match[0]
    return text


def maths(text):
    """Formulas as MathML, which browsers draw themselves."""

    def block(match):
        return match[0] if match[0].startswith("`") else mathml(match[1], display="block")

    def inline(match):
        return match[0] if match[0].startswith("`") else mathml(match[1], display="inline")

    text = re.sub(r"`[^`]*`|\$\$(.+?)\$\$", block, text, flags=re.S)
    return re.sub(r"`[^`]*`|(?<![\w$\\])\$([^\s$][^$\n]*?)\$(?![\w$])", inline, text)


def prose(text, notebook, depth):
    """A markdown cell: links to pages, formulas, and nbdev's absolute links made relative."""
    config = get_config()
    text = text.replace(f"{config.doc_host}{config.doc_baseurl}/", "../" * depth)
    parts = re.split(r"(```.*?```)", text, flags=re.S)
    for number, part in enumerate(parts):
        if not part.startswith("```"):
            to_page = functools.partial(link, folder=notebook.parent)
            part = re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)", to_page, part)
            parts[number] = maths(part)
    return "".join(parts)


def drawn(output, depth):
    """Turn a plotly figure into a piece of the page, as wide as its column."""
    data = output.get("data", {})
    figure = data.pop("application/vnd.plotly.v1+json", None)
    if figure is None:
        return
    figure.get("layout", {}).pop("width", None)
    picture = from_json(json.dumps({k: v for k, v in figure.items() if k != "config"}), skip_invalid=True)
    plotly = f"{'../' * depth}assets/plotly.min.js"
    data["text/html"] = [to_html(picture, full_html=False, include_plotlyjs=plotly, config={"responsive": True})]
    data.pop("text/plain", None)


def anchors(cell):
    """Names that an exported cell defines, as places to link to."""
    if "export" not in cell.get("directives_", {}):
        return ""
    names = re.findall(r"^(?:async )?(?:def|class) ([A-Za-z]\w*)", cell["source"], flags=re.M)
    return "".join(f'<a id="{name}"></a>' for name in names)


def prepare(notebook):
    """Write one notebook's page source."""
    page = page_of(notebook)
    depth = len(page.parts) - 1
    done = NBProcessor(nb=read_nb(notebook), procs=procs, process=True)
    cells = []
    for cell in done.nb.cells:
        if cell.cell_type == "code" and re.fullmatch(r"\s*(#\|\s*default_exp.*)?\s*", cell.source):
            continue
        if cell.cell_type == "markdown":
            cell.source = prose(cell.source, notebook, depth)
        elif names := anchors(cell):
            cells.append({"cell_type": "markdown", "id": f"{cell.id}-names", "metadata": {}, "source": names})
        for output in cell.get("outputs", []):
            drawn(output, depth)
        cells.append(cell)
    done.nb["cells"] = cells
    kept = ("cell_type", "id", "metadata", "source", "outputs", "execution_count")
    whole = nb2dict(done.nb)
    whole["cells"] = [{key: value for key, value in cell.items() if key in kept} for cell in cells]
    (source / "pages" / page).parent.mkdir(parents=True, exist_ok=True)
    (source / "pages" / page).write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    return page


def title(notebook):
    """What its first line says."""
    first = json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]
    return "".join(first["source"]).strip().splitlines()[0].lstrip("# ").strip()


def room_of(notebook):
    page = page_of(notebook)
    room = page.parts[0] if len(page.parts) > 1 else page.stem.split(".")[0]
    return rooms.get(room, room)


def navigation(notebooks):
    """Pages by room, in the order of their numbers."""
    groups = {}
    for notebook in notebooks:
        page = page_of(notebook)
        if page.stem != "index":
            groups.setdefault(room_of(notebook), []).append({title(notebook): str(page)})
    return [{"Start": "index.ipynb"}, {"All names": "names.md"}, *({name: pages} for name, pages in groups.items())]


def public_names(notebook):
    """Functions and classes that a notebook exports, with the first line of their docstrings."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or not re.match(r"#\| *export\b", code):
            continue
        for node in ast.parse(code).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                text = (ast.get_docstring(node) or "").strip()
                yield node.name, text.splitlines()[0] if text else ""


def write_names(notebooks):
    """Write the index of all public names, one section a module, each linked to its place."""
    lines = ["# All names", ""]
    for notebook in notebooks:
        names = list(public_names(notebook))
        if not names:
            continue
        page = page_of(notebook)
        module = ".".join(page.with_suffix("").parts)
        lines += [f"## longva.{module.removesuffix('.__init__')}", ""]
        for name, text in names:
            text = html.escape(text).replace("*", "&#42;").replace("_", "&#95;")
            lines.append(f'- <a href="{page.with_suffix(".html")}#{name}"><code>{name}</code></a> {text}')
        lines.append("")
    (source / "pages" / "names.md").write_text("\n".join(lines), encoding="utf-8")


def settings(notebooks):
    """What mkdocs reads. The plugin `offline` makes search work from disk, with our script in place of one from the
    network."""
    return {
        "site_name": "longva",
        "docs_dir": "pages",
        "site_dir": str(site),
        "use_directory_urls": False,
        "nav": navigation(notebooks),
        "extra_css": ["assets/extra.css"],
        "extra": {"polyfills": ["assets/iframe-worker.js"]},
        "theme": {
            "name": "material",
            "font": False,
            "features": ["navigation.sections", "navigation.top", "toc.follow", "search.highlight"],
            "palette": [LIGHT, DARK],
        },
        "plugins": [
            "search",
            "offline",
            {
                "mkdocs-jupyter": {
                    "execute": False,
                    "include_source": False,
                    "ignore_h1_titles": True,
                    "show_input": True,
                }
            },
        ],
        "validation": {"links": {"not_found": "info"}},
    }


def build():
    """Write _docs; give the number of notebooks."""
    for folder in (source, site):
        shutil.rmtree(folder, ignore_errors=True)
    notebooks = []
    for notebook in sorted((root / "nbs").glob("**/*.ipynb")):
        if not any(part.startswith((".", "_")) for part in notebook.relative_to(root).parts):
            notebooks.append(notebook)
            prepare(notebook)
    for folder in (root / "nbs").glob("**/images"):
        shutil.copytree(folder, source / "pages" / folder.relative_to(root / "nbs"))
    (source / "pages" / "assets").mkdir(parents=True)
    (source / "pages" / "assets" / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    (source / "pages" / "assets" / "extra.css").write_text(CSS, encoding="utf-8")
    shutil.copy(root / "tools" / "iframe-worker.js", source / "pages" / "assets")
    write_names(notebooks)
    (source / "mkdocs.yml").write_text(json.dumps(settings(notebooks), indent=1), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(source / "mkdocs.yml")]
    done = subprocess.run(command, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mkdocs fails:\n{done.stderr[-2000:]}")
    for page in site.glob("**/*.html"):
        page.write_text(without_strangers(page.read_text(encoding="utf-8")), encoding="utf-8")
    return len(notebooks)


def without_strangers(page):
    """Take out scripts and styles that templates would fetch from other hosts."""
    page = re.sub(r'<script[^>]*\bsrc="(?:https?:)?//[^"]*"[^>]*>\s*</script>', "", page)
    page = re.sub(
        r'<link[^>]*\bhref="(?:https?:)?//[^"]*"[^>]*rel="(?:stylesheet|preconnect)"[^>]*>'
        r'|<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*\bhref="(?:https?:)?//[^"]*"[^>]*>',
        "",
        page,
    )
    hosts = r"(?:unpkg\.com|cdnjs\.cloudflare\.com|cdn\.jsdelivr\.net)"
    inside = r"(?:(?!</script>).)*"
    return re.sub(rf"<script[^>]*>{inside}?{hosts}{inside}</script>", "", page, flags=re.S)


def main():
    print(f"{build()} notebooks are pages now: open {site.relative_to(root)}/index.html")
    if sys.argv[1:] == ["--serve"]:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
        print("Open http://127.0.0.1:8000 (ctrl-c stops it)", flush=True)
        try:
            http.server.ThreadingHTTPServer(("127.0.0.1", 8000), handler).serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
