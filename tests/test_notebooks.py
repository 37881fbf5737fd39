"""Every notebook runs, each in a fresh process, so that nothing leaks from one to the next."""

import os
import select
import signal
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from execnb.nbio import read_nb
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

root = Path(__file__).resolve().parents[1]
notebooks = sorted(
    p for p in (root / "nbs").glob("**/*.ipynb") if not any(part[0] in "._" for part in p.relative_to(root).parts)
)
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(root / "settings.ini", encoding="utf-8")
flags = settings["DEFAULT"]["tst_flags"].split()
seconds = 300


@pytest.fixture(scope="module")
def server():
    env = os.environ | {"PLOTLY_RENDERER": "plotly_mimetype"}
    process = subprocess.Popen(
        [sys.executable, root / "tests" / "notebook_server.py", root, *flags],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    yield process
    process.stdin.close()
    process.wait(60)


def hear(server, timeout):
    "A line of the server; the empty one if it says nothing in time, or is gone."
    return os.read(server.stdout.fileno(), 100).decode() if select.select([server.stdout], [], [], timeout)[0] else ""


def all_skipped(path):
    "Does every code cell carry a flag that CI skips, so that nothing would be tested?"
    nb = NBProcessor(nb=read_nb(path), procs=FrontmatterProc, process=True).nb  # takes the #| lines out of the source
    if str(getattr(nb, "frontmatter_", {}).get("skip_exec", False)).lower() == "true":
        return True
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    return bool(code) and all(
        set(flags) & cell.directives_.keys() or cell.directives_.get("eval:") == ["false"] for cell in code
    )


@pytest.mark.parametrize(
    "path", notebooks, ids=lambda path: path.relative_to(root / "nbs").as_posix().removesuffix(".ipynb")
)
def test_notebook(path, server, tmp_path):
    name, log = path.relative_to(root), tmp_path / "log"
    if all_skipped(path):
        pytest.fail(f"{name} tests nothing: every code cell is skipped", pytrace=False)
    server.stdin.write(f"{path.parent}\t{path.name}\t{log}\n".encode())
    server.stdin.flush()
    process, *code = hear(server, seconds).split()
    code = code or hear(server, seconds).split()
    if not code:
        os.killpg(int(process), signal.SIGKILL)  # the notebook's own children as well
        hear(server, 60)
        pytest.fail(f"{name} did not end within {seconds} seconds", pytrace=False)
    if code != ["0"]:
        pytest.fail(f"{name} fails:\n{log.read_text(errors='replace')[-4000:]}", pytrace=False)
