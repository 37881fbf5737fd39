"""README.md is nbs/index.ipynb, as Markdown.

    python tools/readme.py           write README.md
    python tools/readme.py --check   exit 1 if README.md is out of step

nbdev_readme does the same with quarto; this needs only nbconvert and no network.
"""

import os
import posixpath
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
os.chdir(root / "nbs")  # nbdev finds settings.ini from here
sys.path.insert(0, str(root))

import nbformat  # noqa: E402
from execnb.nbio import nb2str, read_nb  # noqa: E402
from nbconvert import MarkdownExporter  # noqa: E402
from nbdev.frontmatter import FrontmatterProc  # noqa: E402
from nbdev.processors import FilterDefaults, add_links  # noqa: E402


class Filter(FilterDefaults):
    "nbdev's own, but the title stays a title, and nothing links to a documentation site."

    def base_procs(self):
        return [proc for proc in super().base_procs() if proc not in (FrontmatterProc, add_links)]


def from_root(match):
    """A link that is right beside the notebook, made right beside README.md."""
    head, link, tail = match.groups()
    path, mark, anchor = link.partition("#")
    moved = posixpath.normpath(posixpath.join("nbs", path))
    return f"{head}{moved}{mark}{anchor}{tail}" if path and (root / moved).exists() else match[0]


def build():
    """The text of README.md."""
    nb = read_nb("index.ipynb")
    Filter()(nb)
    nb = nbformat.reads(nb2str(nb), 4)
    nb.metadata["language_info"] = {"name": "python"}  # so that code fences say python
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get("outputs"):
        sys.exit(
            "nbs/index.ipynb has a picture in a saved output, which README.md cannot hold: "
            "link to a committed picture instead."
        )
    text = re.sub(r"(\]\()([^)\s]+)(\))", from_root, text)
    text = re.sub(r"""((?:src|href)=["'])([^"']+)(["'])""", from_root, text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main():
    text, readme = build(), root / "README.md"
    if sys.argv[1:] != ["--check"]:
        readme.write_text(text, encoding="utf-8")
    elif not readme.exists() or readme.read_text(encoding="utf-8") != text:
        sys.exit("README.md is out of step with nbs/index.ipynb: run `make readme`.")


if __name__ == "__main__":
    main()
