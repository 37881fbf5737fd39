"""The needle app in a real browser: nothing leaves the machine, and what the page says is what the bench says."""
import socket
from urllib.parse import urlsplit

import pytest
from app_toy import flags, free_port, patience, start, wait_for


@pytest.fixture(scope="module")
def process(chromium, tmp_path_factory):
    pytest.importorskip("gradio", reason="gradio is not installed, so the needle app is not tested (make env)")
    process = start("needle", "--port", free_port(), "--demo", tmp_path_factory.mktemp("none"))  # whatever runs/demo holds, the maps begin empty
    yield process
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def bench(process):  # made while the app starts
    from longva.lab.bench import mini_bench
    return mini_bench("mini-longva")


@pytest.fixture(scope="module")
def address(process, bench):
    return wait_for(process, "http://").split()[1].rstrip("/")


@pytest.fixture
def page(address, chromium):
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, so the needle app is not tested (make env)")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport=dict(width=1280, height=800))
        page.set_default_timeout(patience * 1000)
        page.asked, page.broken = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("websocket", lambda websocket: page.asked.append(websocket.url))
        page.on("response", lambda response: response.status >= 400 and page.broken.append(f"{response.status} {response.url}"))
        page.on("pageerror", lambda error: page.broken.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#verdict .card")
        page.wait_for_selector(".js-plotly-plot .main-svg")
        yield page
        browser.close()


def outside(urls):
    return [url for url in urls if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname not in ("127.0.0.1", "localhost")]


def shows(page, answer):
    "Wait until the page shows this answer, then compare all it says about it."
    t = answer.trial
    page.wait_for_selector(f'#verdict .card[data-insert="{t.insert}"][data-frames="{t.frames}"]')
    card = page.locator("#verdict .card")
    said = [word.split()[1] for word in card.locator(".word").all_inner_texts()]
    assert said == [word.said for word in answer.words]
    assert card.locator(".verdict").inner_text() == ("✓ right" if t.correct else "✗ wrong")
    assert card.get_attribute("data-correct") == str(t.correct).lower()
    assert abs(float(card.get_attribute("data-margin")) - t.margin) < 2e-3
    assert card.locator(".insert").inner_text() == str(t.insert) and card.locator(".question").inner_text() == answer.question


def ring(page):
    "Where the heat map shows the needle: (column, row)."
    return page.evaluate("(() => { const d = document.querySelector('.js-plotly-plot').data.at(-1); return [d.x[0], d.y[0]]; })()")


def test_click_slider_and_model(page, bench, tmp_path):
    shows(page, bench.ask(0, 256, 0.5))
    page.click('#strip button[data-index="3"]')
    page.wait_for_selector('#strip button.here[data-index="3"]')
    shows(page, bench.ask(0, 256, 0.15))
    assert page.input_value("#depth input[type=number]") == "15"
    assert page.locator("#strip button.here").count() == 1
    page.wait_for_function("document.querySelector('.js-plotly-plot').data.at(-1).y[0] < 1")
    assert ring(page) == pytest.approx([4, 0.6])

    page.fill("#depth input[type=range]", "80.25")
    shows(page, bench.ask(0, 256, 0.8025))
    page.wait_for_selector('#strip button.here[data-index="16"]')

    page.click('#needles button[data-index="7"]')
    page.wait_for_selector('#needles button.here[data-index="7"]')
    shows(page, bench.ask(7, 256, 0.8025))

    page.fill("#frames input[type=range]", "32")
    shows(page, bench.ask(7, 32, 0.8025))

    page.screenshot(path=tmp_path / "needle.png", full_page=True)
    assert (tmp_path / "needle.png").stat().st_size > 20_000
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    assert outside(page.asked) == [] and page.broken == []


def test_heat_map_and_short_twin(page, bench):
    from longva.lab.bench import fill, mini_bench
    from longva.needle.trials import cells
    cell = "document.querySelector('.js-plotly-plot').data[0].z"
    title = "document.querySelector('.js-plotly-plot .annotation-text').textContent"
    page.click("#fill")
    page.wait_for_function(f"{title}.includes('filled here') && {cell}[0][0] !== null")
    page.click('#strip button[data-index="20"]')  # the needle can be moved while the map grows
    shows(page, bench.ask(0, 256, 1.0))
    page.wait_for_function(f"{cell}[4][0] !== null")
    assert ring(page) == [4, 4]
    counts = cells(list(fill(bench, frames=(16,)))[-1])
    assert [page.evaluate(f"{cell}[{row}][0]") for row in range(5)] == [counts[16, d][0] / 10 for d in (0, 0.25, 0.5, 0.75, 1)]

    page.locator("#model label", has_text="mini-short").click()
    page.wait_for_function(f"{title}.includes('mini-short')")
    shows(page, mini_bench("mini-short").ask(0, 256, 1.0))
    assert page.evaluate(f"{cell}.flat().every(v => v === null) && {title}.includes('mini-short')"), "the other model's map went on growing"
    assert outside(page.asked) == [] and page.broken == []


def refusal(*options):
    process = start("needle", *options)
    said, _ = process.communicate(timeout=patience)
    assert process.returncode != 0 and "Traceback" not in said
    assert len(said.strip().splitlines()) == 1 and said.strip().endswith("."), said
    return said


def test_refusals():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "in use" in refusal("--port", server.getsockname()[1])
    assert "mini-giant" in refusal("--model", "mini-giant")
    for port in ("99999", "²"): assert "from 1 to 65535" in refusal("--port", port)
    assert "no-such-host" in refusal("--host", "no-such-host.invalid")
