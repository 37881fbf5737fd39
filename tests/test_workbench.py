"""The workbench notebook in a real JupyterLab and browser: sliders and clicks work, nothing leaves the machine."""

import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
from app_toy import flags, free_port, patience

root = Path(__file__).resolve().parents[1]
# Read by the server and by its kernels at their start: the hosts they speak to or ask for, in a file.
watch = """
import os, sys

def heard(event, args):
    where = args[1] if event == "socket.connect" else args[:1] if event == "socket.getaddrinfo" else None
    if isinstance(where, tuple): open(os.environ["LONGVA_WATCH"], "a").write(f"{where[0]}\\n")

sys.addaudithook(heard)
"""


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    "The address of a JupyterLab that has a copy of the notebook and folders of its own."
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed, so the workbench is not tested (make env)")
    home, token, port = tmp_path_factory.mktemp("lab"), secrets.token_hex(16), free_port()
    notebook = json.loads((root / "nbs" / "tutorials" / "workbench.ipynb").read_text())
    for cell in notebook["cells"]:
        cell |= dict(outputs=[]) if cell["cell_type"] == "code" else {}  # what is seen is what ran
    (home / "workbench.ipynb").write_text(json.dumps(notebook))
    file = home / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(dict(windowingMode="none")))  # all cells in the page, whether seen or not
    (home / "watch").mkdir()
    (home / "watch" / "sitecustomize.py").write_text(watch)
    own = {
        name: str(home / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    own |= dict(
        JUPYTERLAB_SETTINGS_DIR=str(home / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(home / "workspaces"),
        NO_PROXY="127.0.0.1,localhost",
    )
    own |= dict(
        PYTHONPATH=os.pathsep.join(filter(None, [str(home / "watch"), str(root), os.environ.get("PYTHONPATH")])),
        LONGVA_WATCH=str(home / "heard"),
    )
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--config={root / 'tools' / 'jupyter_config.py'}",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={home}",
    ]
    log = (home / "log").open("w")
    process = subprocess.Popen(command, env=os.environ | own, cwd=home, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    until = time.monotonic() + patience
    while True:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/api?token={token}", timeout=5)
            break
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                process.kill()
                pytest.fail(f"JupyterLab did not start:\n{(home / 'log').read_text()[-3000:]}")
            time.sleep(0.2)
    yield SimpleNamespace(address=f"{address}/lab/tree/workbench.ipynb?token={token}", heard=home / "heard")
    process.terminate()  # its kernels end with it
    process.wait(30)
    log.close()


@pytest.fixture(scope="module")
def page(lab, chromium):
    sync = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed, so the workbench is not tested (make env)"
    )
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport=dict(width=1500, height=1100))
        page.set_default_timeout(patience * 1000)
        page.asked, page.broken = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("websocket", lambda websocket: page.asked.append(websocket.url))
        # anywidget drops all messages to a widget that isn't ready in two seconds. Here none ever is: what a slow
        # machine shows now and then.
        page.add_init_script(
            "{ const timeout = AbortSignal.timeout; "
            "AbortSignal.timeout = ms => timeout.call(AbortSignal, ms == 2000 ? 0 : ms); }"
        )
        page.on("pageerror", lambda error: page.broken.append(str(error)))
        page.goto(lab.address)
        page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
        page.wait_for_selector("#jp-main-statusbar :text('| Idle')")  # nothing runs before the kernel is there
        page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        page.wait_for_selector(".longva-plan-length")
        page.wait_for_function(
            "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 6 && "
            "document.querySelector('.longva-verdict')"
        )
        yield page
        browser.close()


plot = "[...document.querySelectorAll('.js-plotly-plot')]"
data = "document.querySelector('.longva-verdict').dataset"
SHOWS = f"{data}.frames == {{}} && {data}.insert == {{}}"  # frames, and the frame that the needle stands before


def title(page, words):
    "The number of the plot with these words in its title."
    text = "JSON.stringify([p.layout.title, p.layout.annotations])"
    has_words = f"p => p.layout && {text}.includes({json.dumps(words)})"
    page.wait_for_function(f"{plot}.some({has_words})")
    return page.evaluate(f"{plot}.findIndex({has_words})")


def drawn(number, trace, axis="y"):
    "JavaScript: the numbers that a plot was drawn from."
    return f"[...{plot}[{number}]._fullData[{trace}].{axis}]"


def verdict(page):
    return {
        name: float(value)
        for name, value in page.evaluate("({...document.querySelector('.longva-verdict').dataset})").items()
    }


def move(page, name, *keys):
    "Move a slider as a hand on the keyboard does."
    handle = page.locator(f".longva-{name} .noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    for key in keys:
        page.keyboard.press(key)


def click(page, number, x, y, axes=("xaxis", "yaxis")):
    "Click on a point of a plot."
    page.evaluate(f"{plot}[{number}].scrollIntoView({{block: 'center'}})")
    at = page.evaluate(f"""(() => {{
        const plot = {plot}[{number}], b = plot.getBoundingClientRect();
        const {{{axes[0]}: h, {axes[1]}: v}} = plot._fullLayout;
        return [b.x + h._offset + h.d2p({x}), b.y + v._offset + v.d2p({y})];
    }})()""")
    page.mouse.move(*at)
    page.mouse.click(*at)


@pytest.fixture(scope="module")
def bench(lab):  # made while JupyterLab starts
    from longva.mini.bench import mini_bench

    return mini_bench("mini-longva")


def settles(page, bench, frames, depth):
    "Wait until the page shows this trial and its attention, and compare both with the bench."
    answer, weights = bench.look(0, frames, depth)
    trial = answer.trial
    video = title(page, "Attention over frames")
    page.wait_for_function(SHOWS.format(frames, trial.insert))
    assert abs(verdict(page)["margin"] - trial.margin) < 2e-3
    page.wait_for_function(f"{drawn(video, 1)}.length == {frames + 1} && {drawn(video, 2, 'x')}[0] == {trial.insert}")
    assert np.allclose(page.evaluate(drawn(video, 1)), weights.mean((0, 1)), atol=1e-4)


def test_depth_slider_moves_answer_and_plot(page, bench):
    settles(page, bench, 256, 0.25)
    move(page, "depth", *["ArrowRight"] * 5)
    settles(page, bench, 256, 0.3)
    assert "find umbrella" in page.locator(".longva-text").first.inner_text()


def test_rope_sliders_move_answer_and_plots(page):
    film, before = title(page, "Attention over frames"), verdict(page)["margin"]
    seen = page.evaluate(drawn(film, 1))
    move(page, "base", "PageDown", "PageDown")
    page.wait_for_function(f"Math.abs(document.querySelector('.longva-verdict').dataset.margin - {before}) > 0.001")
    page.wait_for_function(f"{drawn(film, 1)}.some((y, i) => Math.abs(y - {seen}[i]) > 1e-5)")
    rope = title(page, "RoPE of 64 pairs")
    slowest = f"Math.max(...[2, 3, 4].flatMap(k => [...{plot}[{rope}]._fullData[k].y].filter(Number.isFinite)))"
    seen = page.evaluate(slowest)
    move(page, "rope-base", "PageUp")
    page.wait_for_function(f"{slowest} > 1.5 * {seen}")


def test_clicks_load_a_trial(page):
    grid, film = title(page, "nothing filled yet"), title(page, "Attention over frames")
    click(page, grid, 1, 4)
    page.wait_for_function(SHOWS.format(32, 32))
    page.wait_for_function("document.querySelector('.longva-cell').innerText.includes('32 frames, depth 100%')")
    page.wait_for_function(f"{drawn(film, 2, 'x')}[0] == 32")
    click(page, film, 5, 0)  # the sixth of the 21 pictures
    page.wait_for_function(SHOWS.format(32, 8))
    page.click(".longva-fill button, button.longva-fill")
    page.wait_for_function(
        f"{plot}[{grid}]._fullData[0].z.every(row => row[0] == 1)"
    )  # it finds every needle among 16 frames
    page.click(".longva-fill button, button.longva-fill")
    page.wait_for_selector("button.longva-fill:has-text('Fill the map')")


def test_figures_fit_their_column_and_sliders_have_names(page):
    page.set_viewport_size(dict(width=1000, height=1100))
    right = "getBoundingClientRect().right"
    page.wait_for_function(
        f"{plot}.every(p => p.querySelector('.main-svg').{right} <= p.closest('.jp-OutputArea-output').{right} + 1)"
    )
    names = page.locator(".noUi-handle").evaluate_all("handles => handles.map(handle => handle.ariaLabel)")
    assert len(names) > 10 and all(names), names
    page.set_viewport_size(dict(width=1500, height=1100))


def test_nothing_leaves_the_machine(page, lab):
    outside = [
        url
        for url in page.asked
        if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname != "127.0.0.1"
    ]
    assert len(page.asked) > 20 and outside == []
    assert set(lab.heard.read_text().split()) <= {"127.0.0.1", "localhost", "None"}  # the server and its kernels
    errors = page.locator(".jp-OutputArea [data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
    assert not [e for e in errors if re.search("Error|Traceback", e)]
    assert {*page.broken} <= {"[anywidget] Failed to initialize model."}  # see the fixture
    assert page.locator(":text('official Jupyter news')").count() == 0
    if folder := os.environ.get("LONGVA_SCREENSHOTS"):  # a folder to look at them
        for number, name in enumerate(("needle", "rope", "picture", "ring", "plan")):
            area = page.locator(".jp-OutputArea-output:has(.js-plotly-plot)").nth(number)
            area.scroll_into_view_if_needed()
            area.screenshot(path=Path(folder) / f"{name}.png")
