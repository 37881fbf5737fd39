"""The house keeps itself in order: each kind of disorder is made in a small copy, and the right tool says so."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import longva

root = Path(__file__).resolve().parents[1]
settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
settings.read(root / "settings.ini", encoding="utf-8")


def run(*args, cwd, **env):
    return subprocess.run(
        list(map(str, args)), cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=240
    )


def write_notebook(path, title, *code):
    """A clean notebook: a title and code cells."""
    cells = [{"cell_type": "markdown", "id": "cell0", "metadata": {}, "source": [f"# {title}\n", "> for tests"]}]
    for number, text in enumerate(code, 1):
        cells.append(
            {
                "cell_type": "code",
                "id": f"cell{number}",
                "metadata": {},
                "execution_count": None,
                "outputs": [],
                "source": text.splitlines(True),
            }
        )
    write_json(path, {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def write_json(path, notebook):
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def change_cell(path, cell=1, **fields):
    """Change a cell of a notebook (1: the first code cell), as an editor would."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"][cell].update(fields)
    write_json(path, notebook)


def printed(text):
    return [{"name": "stdout", "output_type": "stream", "text": [text]}]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A small house in order: the real tools and settings, two notebooks of its own, and a path with odd characters."""
    house = tmp_path_factory.mktemp("houses") / "it's a hoüse"
    for name in ("tools", "tests"):
        shutil.copytree(root / name, house / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "pyproject.toml", "setup.py", "constraints.txt", "Makefile"):
        shutil.copy(root / name, house / name)
    (house / "nbs").mkdir()
    (house / "longva").mkdir()
    shutil.copy(root / "longva" / "__init__.py", house / "longva" / "__init__.py")
    write_notebook(house / "nbs" / "index.ipynb", "House", "import longva\nlongva.__version__")
    write_notebook(
        house / "nbs" / "210_room.thing.ipynb",
        "Thing",
        "#| default_exp room.thing",
        "#| export\ndef twice(x): return 2*x",
        "assert twice(2) == 4",
    )
    done = run(sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=house)
    assert done.returncode == 0, done.stderr
    (house / "nbs" / "images").mkdir()
    done = run(sys.executable, "tools/house.py", cwd=house)
    assert done.returncode == 0, done.stderr
    done = run(sys.executable, "tools/readme.py", cwd=house)
    assert done.returncode == 0, done.stderr
    done = run(sys.executable, "tools/check_tree.py", cwd=house)
    assert done.returncode == 0, done.stderr
    return house


@pytest.fixture
def house(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


def edit_module(house):
    module = house / "longva" / "room" / "thing.py"
    module.write_text(module.read_text().replace("2*x", "x+x"))


def rename_notebook(house):
    old = house / "nbs" / "210_room.thing.ipynb"
    old.write_text(old.read_text().replace("room.thing", "room.other"))
    old.rename(house / "nbs" / "210_room.other.ipynb")
    run(sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=house)


def forget_export(house):
    write_notebook(house / "nbs" / "220_room.new.ipynb", "New", "#| default_exp room.new", "#| export\ny = 1")


def soil_notebook(house):
    change_cell(house / "nbs" / "210_room.thing.ipynb", execution_count=7)


def swell_notebook(house):
    change_cell(house / "nbs" / "210_room.thing.ipynb", outputs=printed("x" * 310 * 1024))


def show_path(house):
    change_cell(house / "nbs" / "210_room.thing.ipynb", outputs=printed("saved in /home/me/longva/runs/x.html\n"))


def edit_readme(house):
    (house / "README.md").write_text("# Another house\n")


def break_export(house):
    change_cell(
        house / "nbs" / "210_room.thing.ipynb", source=["#| default_exp room.thing\n", "#| export nowhere at all"]
    )
    (house / "nbs" / "12_torn.ipynb").write_text('{"cells": [')


def add_module(house, name, *code):
    """A notebook in the house, and on the map."""
    write_notebook(house / "nbs" / f"{name}.ipynb", name, f"#| default_exp {name.split('_')[1]}", *code)
    run(sys.executable, "tools/house.py", cwd=house)


def import_in_a_function(house, code):
    """Let room.thing import something late."""
    source = f"#| export\ndef twice(x):\n    {code}\n    return 2 * x"
    change_cell(house / "nbs" / "210_room.thing.ipynb", cell=2, source=source.splitlines(True))


def import_upward(house):
    add_module(house, "310_top.thing", "#| export\ndef three(): return 3", "three()")
    import_in_a_function(house, "from longva.top.thing import three")


def import_sideways(house):
    add_module(house, "205_beside.thing", "#| export\ndef three(): return 3", "three()")
    import_in_a_function(house, "importlib.import_module('longva.beside.thing')")


def import_in_a_circle(house):
    add_module(
        house, "220_room.other", "#| export\nfrom longva.room.thing import twice\ndef four(): return twice(2)", "four()"
    )
    import_in_a_function(house, "import longva.room.other")


def show_nothing(house):
    cells = [f"#| export\ndef f{i}(): return {i}" for i in range(3)]
    add_module(house, "220_room.new", *cells, "f0() + f1() + f2()")


def leave_the_map_stale(house):
    write_notebook(house / "nbs" / "220_room.new.ipynb", "New", "#| default_exp room.new", "#| export\ny = 1")


order_disorders = [
    (import_upward, "nbs/210_room.thing.ipynb imports longva.top.thing, which is 1 floors up"),
    (import_sideways, "nbs/210_room.thing.ipynb imports longva.beside.thing, another room of its floor"),
    (import_in_a_circle, "in a circle: room.thing, room.other, room.thing."),
    (show_nothing, "nbs/220_room.new.ipynb exports 3 cells in a row up to cell 4"),
    (leave_the_map_stale, "nbs/images/house.svg is not what the imports make of it: run `make map`"),
]


@pytest.mark.parametrize(
    "disorder, sentence", order_disorders, ids=[disorder.__name__ for disorder, _ in order_disorders]
)
def test_the_order_is_kept(house, disorder, sentence):
    assert run(sys.executable, "tools/house.py", "--check", cwd=house).returncode == 0
    disorder(house)
    done = run(sys.executable, "tools/house.py", "--check", cwd=house)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


def break_the_order(house):
    import_upward(house)
    done = run(sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=house)
    assert done.returncode == 0, done.stderr


disorders = [
    (break_the_order, "nbs/210_room.thing.ipynb imports longva.top.thing, which is 1 floors up"),
    (edit_module, "longva/room/thing.py is not what nbs/210_room.thing.ipynb exports"),
    (rename_notebook, "longva/room/thing.py is stale, no notebook exports it"),
    (forget_export, "longva/room/new.py is missing, a notebook exports it: run `make export`"),
    (soil_notebook, "nbs/210_room.thing.ipynb is not clean: run `make export`"),
    (swell_notebook, "nbs/210_room.thing.ipynb has 31"),
    (show_path, "nbs/210_room.thing.ipynb shows a path of this machine in the output of cell 1 (/home/me/longva"),
    (edit_readme, "README.md is out of step with nbs/index.ipynb: run `make readme`"),
    (break_export, "nbdev_export fails"),
]


@pytest.mark.parametrize("disorder, sentence", disorders, ids=[disorder.__name__ for disorder, _ in disorders])
def test_check_tree_finds(house, disorder, sentence):
    disorder(house)
    before = {p: p.read_bytes() for p in house.rglob("*") if p.suffix in (".py", ".ipynb", ".md")}
    done = run(sys.executable, "tools/check_tree.py", cwd=house)
    assert done.returncode == 1
    assert sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert before == {p: p.read_bytes() for p in house.rglob("*") if p.suffix in (".py", ".ipynb", ".md")}, (
        "the check wrote into the tree"
    )


def test_notebooks_that_fail_or_test_nothing(house):
    write_notebook(house / "nbs" / "20_wrong.ipynb", "Wrong", "assert 1 + 1 == 3, 'sums are off'")
    write_notebook(house / "nbs" / "21_skipped.ipynb", "Skipped", "#| gpu\nassert False", "#| slow\nassert False")
    done = run(sys.executable, "-m", "pytest", "tests/test_notebooks.py", "-p", "no:anyio", cwd=house)
    assert done.returncode == 1 and "2 failed, 2 passed" in done.stdout, done.stdout
    assert "20_wrong.ipynb fails" in done.stdout and "sums are off" in done.stdout
    assert "21_skipped.ipynb tests nothing: every code cell is skipped" in done.stdout


def test_run_notebooks(house):
    path = house / "nbs" / "20_run.ipynb"
    write_notebook(path, "Run", "import sys; print('to stderr', file=sys.stderr); 6 * 7", "#| slow\n1 / 0")
    tool = [sys.executable, "tools/run_notebooks.py", path]
    done = run(*tool, "--check", cwd=house)
    assert done.returncode == 1 and "not what the code prints today in cells [1]" in done.stderr, done.stderr
    assert run(*tool, cwd=house).returncode == 0
    outputs = json.loads(path.read_text())["cells"][1]["outputs"]
    assert [out["data"]["text/plain"] for out in outputs] == [["42"]]
    assert run(*tool, "--check", cwd=house).returncode == 0
    saved = path.read_bytes()
    done = run(*tool, "--flags", "slow", cwd=house)
    assert done.returncode == 1 and "20_run.ipynb fails in cell 2 and was left as it was" in done.stderr
    assert path.read_bytes() == saved


def test_docs(house, chromium):
    figure = {
        "data": {"application/vnd.plotly.v1+json": {"data": [{"type": "bar", "y": [3, 1]}], "layout": {}}},
        "metadata": {},
        "output_type": "display_data",
    }
    change_cell(house / "nbs" / "index.ipynb", outputs=[figure])
    (house / "nbs" / "paper").mkdir()
    write_notebook(
        house / "nbs" / "paper" / "table1.ipynb",
        "Table 1\n\nSee [thing](../210_room.thing.ipynb) and `twice`, $x^2$ and `$HOME`.\n",
        "#| hide\n1/0",
        "2 + 2",
    )
    assert (
        run(sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=house).returncode == 0
    )
    done = run(sys.executable, "tools/docs.py", cwd=house)
    assert done.returncode == 0 and "3 notebooks are pages now: open _docs/index.html" in done.stdout, done.stderr
    pages = {
        page.relative_to(house / "_docs").as_posix(): page.read_text() for page in (house / "_docs").glob("**/*.html")
    }
    assert 'id="twice"' in pages["room.thing.html"] and "default_exp" not in pages["room.thing.html"]
    table = pages["paper/table1.html"]
    assert 'href="../room.thing.html"' in table and "<math" in table and "$HOME" in table and "1/0" not in table
    assert (
        "Plotly.newPlot" in pages["index.html"] and (house / "_docs" / "assets" / "plotly.min.js").stat().st_size > 1e6
    )
    names = pages["names.html"]
    assert 'href="room.thing.html#twice"' in names and "longva.room.thing" in names
    assert found_in_docs(house / "_docs" / "index.html", "twice", chromium) >= 1
    fetched = (
        r'<(?:script|img|iframe|link)\b(?=[^>]*\b(?:rel="(?:stylesheet|preconnect|preload)"|src=))'
        r'[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"'
    )
    assert not [(name, found[0]) for name, text in pages.items() if (found := re.search(fetched, text))]


def found_in_docs(page, word, chromium):
    """Open a page from disk, search for a word, and count the results; nothing may be asked of another host."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: the docs were not opened"
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        asked = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        tab.locator("input.md-search__input").click()
        tab.keyboard.type(word)
        tab.locator(".md-search-result__item").first.wait_for()
        found = tab.locator(".md-search-result__item").count()
        browser.close()
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked
    return found


def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import longva; "
        "print(time.perf_counter() - t, *{'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    seconds, *heavy = run(sys.executable, "-c", code, cwd=root).stdout.split()
    assert float(seconds) < 1 and not heavy


def test_import_beside_a_folder_of_the_same_name(tmp_path):
    """People clone into `longva` and start Python in the folder above; the empty namespace must not win."""
    (tmp_path / "longva" / "nbs").mkdir(parents=True)
    code = "import longva; print(longva.__version__)"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.stdout.strip() == longva.__version__, done.stderr


def test_version_and_names():
    assert longva.__version__ == settings["DEFAULT"]["version"]
    assert {"LongVA", "extend_rope", "read_frames"} <= set(dir(longva))
    with pytest.raises(AttributeError, match="module 'longva' has no attribute 'nonsense'"):
        longva.nonsense


def test_requirements_and_pins(tmp_path):
    done = run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, cwd=root)
    assert done.returncode == 0, done.stderr
    extras, name = {"": []}, ""
    for line in (tmp_path / "longva.egg-info" / "requires.txt").read_text().splitlines():
        if line.startswith("["):
            name = line.strip("[]").partition(":")[0]
            extras.setdefault(name, [])
        elif line:
            extras[name].append(Requirement(line))
    assert set(extras) == {"", "lab", "apps", "train", "hub", "gpu", "dev", "docs"}
    pins = dict(
        line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for need in (need for name, needs in extras.items() if name != "gpu" for need in needs):
        assert pins[canonicalize_name(need.name)] in need.specifier, f"constraints.txt does not pin {need}"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on this system")
def test_make_without_a_python(pristine, tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python, sentence in [("no-such-python", "there is no no-such-python here"), (old, "is older")]:
        done = run("make", "env", f"PYTHON={python}", cwd=pristine)
        assert (
            done.returncode == 2 and "longva needs Python 3.11 or newer" in done.stdout and sentence in done.stdout
        ), done.stdout
        assert not (pristine / ".venv").exists()


def test_names_in_python():
    """`longva.mini` is there without an import, `dir` lists what is meant to be used, `help` is a page."""
    code = (
        "import longva, pydoc; print(longva.mini.NAMES[0], len(pydoc.render_doc(longva)), *dir(longva)); "
        "import sys; sys.modules['ipywidgets'] = None; import longva.workbench.widgets"
    )
    done = run(sys.executable, "-c", code, cwd=root)
    name, length, *names = done.stdout.split()
    assert name == "mini-longva" and int(length) < 5000
    assert {"mini", "LongVA"} <= set(names) and not {"_homes", "import_module"} & set(names)
    assert done.stderr.strip().splitlines()[-1].endswith('The explorers need more packages: pip install "longva[lab]".')
    assert (root / "longva" / "py.typed").exists()
