"""The workbench notebook in a real JupyterLab and a real browser: sliders and clicks reach the kernel, and nothing leaves the machine."""
import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from app_toy import flags, free_port, patience

root = Path(__file__).resolve().parents[1]
# Not proven yet: on a busy machine some figures came up empty in the page, and it has not been run to its end since they are sent whole. `pytest --runxfail` runs it all the same.
pytestmark = pytest.mark.xfail(run=False, reason="the workbench has not yet been seen to pass in a browser")
settings = {
    "notebook-extension/tracker": dict(windowingMode="none"),  # all cells in the page, whether seen or not
    "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
}


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    "The address of a JupyterLab that has a copy of the notebook and folders of its own."
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed, so the workbench is not tested (make env)")
    home, token, port = tmp_path_factory.mktemp("lab"), secrets.token_hex(16), free_port()
    notebook = json.loads((root / "nbs" / "tutorials" / "workbench.ipynb").read_text())
    for cell in notebook["cells"]: cell |= dict(outputs=[]) if cell["cell_type"] == "code" else {}  # what is seen is what ran
    (home / "workbench.ipynb").write_text(json.dumps(notebook))
    for name, values in settings.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    own = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    own |= dict(JUPYTERLAB_SETTINGS_DIR=str(home / "settings"), JUPYTERLAB_WORKSPACES_DIR=str(home / "workspaces"), NO_PROXY="127.0.0.1,localhost")
    own |= dict(PYTHONPATH=os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home}"]
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
    yield f"{address}/lab/tree/workbench.ipynb?token={token}"
    process.terminate()  # its kernels end with it
    process.wait(30)
    log.close()


@pytest.fixture(scope="module")
def page(lab, chromium):
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, so the workbench is not tested (make env)")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport=dict(width=1500, height=1100))
        page.set_default_timeout(patience * 1000)
        page.asked, page.broken = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("websocket", lambda websocket: page.asked.append(websocket.url))
        page.on("pageerror", lambda error: page.broken.append(str(error)))
        page.goto(lab)
        page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
        page.wait_for_selector("#jp-main-statusbar :text('| Idle')")  # JupyterLab runs nothing before its kernel is there
        page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        page.wait_for_selector(".longva-plan-length")
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 6 && document.querySelector('.longva-verdict')")
        yield page
        browser.close()


plot = "[...document.querySelectorAll('.js-plotly-plot')]"


def title(page, words):
    "The number of the plot with these words in its title."
    page.wait_for_function(f"{plot}.some(p => p.layout && JSON.stringify([p.layout.title, p.layout.annotations]).includes({json.dumps(words)}))")
    return page.evaluate(f"{plot}.findIndex(p => p.layout && JSON.stringify([p.layout.title, p.layout.annotations]).includes({json.dumps(words)}))")


def verdict(page):
    return {name: float(value) for name, value in page.evaluate("({...document.querySelector('.longva-verdict').dataset})").items()}


def move(page, name, *keys):
    "Move a slider as a hand on the keyboard does."
    handle = page.locator(f".longva-{name} .noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    for key in keys:
        page.keyboard.press(key)


@pytest.fixture(scope="module")
def bench(lab):  # made while JupyterLab starts
    from longva.lab.bench import mini_bench
    return mini_bench("mini-longva")


def settles(page, bench, frames, depth):
    "Wait until the page shows this trial, and compare it with the bench."
    trial = bench.ask(0, frames, depth).trial
    page.wait_for_function(f"document.querySelector('.longva-verdict').dataset.insert == {trial.insert} && document.querySelector('.longva-verdict').dataset.frames == {frames}")
    assert abs(verdict(page)["margin"] - trial.margin) < 2e-3
    return trial


def test_depth_slider_moves_answer_and_plot(page, bench):
    settles(page, bench, 256, 0.25)
    film = title(page, "Attention over frames")
    before = page.evaluate(f"{plot}[{film}].data[2].x[0]")
    move(page, "depth", *["ArrowRight"] * 5)
    trial = settles(page, bench, 256, 0.3)
    page.wait_for_function(f"{plot}[{film}].data[2].x[0] == {trial.insert}")
    assert before == 64
    assert "find umbrella" in page.locator(".longva-said").first.inner_text()


def test_rope_sliders(page, bench):
    before = verdict(page)["margin"]
    move(page, "base", "PageDown", "PageDown")
    page.wait_for_function(f"Math.abs(document.querySelector('.longva-verdict').dataset.margin - {before}) > 0.001")
    rope = title(page, "RoPE of 64 pairs")
    slowest = f"Math.max(...{plot}[{rope}].data.slice(2, 5).flatMap(t => [...t.y].filter(Number.isFinite)))"
    seen = page.evaluate(slowest)
    move(page, "rope-base", "PageUp")
    page.wait_for_function(f"{slowest} > 1.5 * {seen}")


def test_click_on_a_cell_loads_its_trial(page):
    grid = title(page, "nothing filled yet")
    page.evaluate(f"{plot}[{grid}].scrollIntoView({{block: 'center'}})")
    at = page.evaluate(f"""(() => {{ const p = {plot}[{grid}], b = p.getBoundingClientRect(), f = p._fullLayout;
        return [b.x + f.xaxis._offset + f.xaxis.d2p(1), b.y + f.yaxis._offset + f.yaxis.d2p(4)]; }})()""")
    page.mouse.move(*at)
    page.mouse.click(*at)
    page.wait_for_function("document.querySelector('.longva-verdict').dataset.frames == 32 && document.querySelector('.longva-verdict').dataset.insert == 32")
    page.wait_for_function("document.querySelector('.longva-cell').innerText.includes('32 frames, depth 100%')")


def test_nothing_leaves_the_machine(page, tmp_path):
    outside = [url for url in page.asked if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname != "127.0.0.1"]
    assert len(page.asked) > 20 and outside == []
    errors = page.locator(".jp-OutputArea [data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
    assert not [e for e in errors if re.search("Error|Traceback", e)] and page.broken == []
    if folder := os.environ.get("LONGVA_SCREENSHOTS"):  # a folder to look at them
        for number, name in enumerate(("needle", "rope", "picture", "ring", "plan")):
            area = page.locator(".jp-OutputArea-output:has(.js-plotly-plot)").nth(number)
            area.scroll_into_view_if_needed()
            area.screenshot(path=Path(folder) / f"{name}.png")
