"""Every notebook runs, each in a fresh process, so that nothing leaks from one to the next."""
import os
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
notebooks = sorted(p for p in (root / "nbs").glob("**/*.ipynb") if not any(part[0] in "._" for part in p.relative_to(root).parts))
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(root / "settings.ini", encoding="utf-8")
flags = settings["DEFAULT"]["tst_flags"].split()
seconds = 300
run = """
import sys
from pathlib import Path
from nbdev.test import test_nb
ok, _ = test_nb(Path(sys.argv[1]), skip_flags=sys.argv[3:], basepath=sys.argv[2])
sys.exit(not ok)
"""


def all_skipped(path):
    "Does every code cell carry a flag that CI skips, so that nothing would be tested?"
    nb = NBProcessor(nb=read_nb(path), procs=FrontmatterProc, process=True).nb  # takes the #| lines out of the source
    if str(getattr(nb, "frontmatter_", {}).get("skip_exec", False)).lower() == "true":
        return True
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    return bool(code) and all(set(flags) & cell.directives_.keys() or cell.directives_.get("eval:") == ["false"] for cell in code)


@pytest.mark.parametrize("path", notebooks, ids=lambda path: path.relative_to(root / "nbs").as_posix().removesuffix(".ipynb"))
def test_notebook(path):
    name = path.relative_to(root)
    if all_skipped(path):
        pytest.fail(f"{name} tests nothing: every code cell is skipped", pytrace=False)
    env = os.environ | {"PLOTLY_RENDERER": "plotly_mimetype"}
    # run beside the notebook and name it by its name alone, so that the path of the checkout may be anything
    process = subprocess.Popen([sys.executable, "-c", run, path.name, str(root), *flags], cwd=path.parent, env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the notebook's own children as well
        process.wait()
        pytest.fail(f"{name} did not end within {seconds} seconds", pytrace=False)
    if process.returncode:
        pytest.fail(f"{name} fails:\n{output[-4000:]}", pytrace=False)
