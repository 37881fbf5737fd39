"""The needle app in a real browser: nothing leaves the machine, and what the page says is what the bench says."""

import socket
import time
from urllib.parse import urlsplit

import pytest
from app_toy import flags, free_port, patience, root, start, wait_for


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    "Where the app keeps its temporary files."
    return tmp_path_factory.mktemp("rooms")


@pytest.fixture(scope="module")
def process(chromium, rooms, tmp_path_factory):
    pytest.importorskip("gradio", reason="gradio is not installed, so the needle app is not tested (make env)")
    process = start(
        "needle", "--port", free_port(), "--demo", tmp_path_factory.mktemp("none"), TMPDIR=str(rooms)
    )  # whatever runs/demo holds, the maps begin empty
    yield process
    process.terminate()
    process.wait(30)
    assert not list(rooms.glob("longva-needle-*")), "the app left its folder"


@pytest.fixture(scope="module")
def bench(process):  # made while the app starts
    from longva.mini.bench import mini_bench

    return mini_bench("mini-longva")


@pytest.fixture(scope="module")
def address(process, bench):
    return wait_for(process, "http://").split()[1].rstrip("/")


@pytest.fixture
def page(address, chromium):
    sync = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed, so the needle app is not tested (make env)"
    )
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport=dict(width=1280, height=800))
        page.set_default_timeout(patience * 1000)
        page.asked, page.broken = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("websocket", lambda websocket: page.asked.append(websocket.url))
        page.on(
            "response",
            lambda response: response.status >= 400 and page.broken.append(f"{response.status} {response.url}"),
        )
        page.on("pageerror", lambda error: page.broken.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#verdict .card")
        yield page
        browser.close()


def outside(urls):
    return [
        url
        for url in urls
        if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname not in ("127.0.0.1", "localhost")
    ]


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
    assert (
        card.locator(".insert").inner_text() == str(t.insert)
        and card.locator(".question").inner_text() == answer.question
    )


def ring(page):
    "Where the heat map shows the needle: (column, row)."
    return tuple(float(page.locator("#heat .ring").get_attribute(f"data-{axis}")) for axis in "xy")


def clean(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    assert outside(page.asked) == [] and page.broken == []


def kept_uploads(rooms):
    "Uploads that are still there a moment after they were read."
    end = time.time() + 20
    while (files := [p for p in rooms.glob("longva-needle-*/uploads/**/*") if p.is_file()]) and time.time() < end:
        time.sleep(0.2)
    return files


def test_click_slider_drag_keys_and_model(page, bench, tmp_path):
    shows(page, bench.ask(0, 256, 0.5))
    page.click('#strip button[data-index="3"]')
    page.wait_for_selector('#strip button.here[data-index="3"]')
    shows(page, bench.ask(0, 256, 0.15))
    page.wait_for_function("document.querySelector('#depth input[type=number]').value === '15'")
    assert page.locator("#strip button.here").count() == 1
    assert ring(page) == pytest.approx((4, 0.6))

    page.fill("#depth input[type=range]", "80.25")
    shows(page, bench.ask(0, 256, 0.8025))
    page.wait_for_selector('#strip button.here[data-index="16"]')

    box = page.locator("#strip .film .pictures").bounding_box()

    def x(depth):
        return box["x"] + box["width"] * (0.5 + 20 * depth) / 21

    page.mouse.move(x(0.8), box["y"] + 15)
    page.mouse.down()
    for depth in (0.7, 0.5, 0.35, 0.3, 0.25):
        page.mouse.move(x(depth), box["y"] + 15)
    page.mouse.up()
    shows(page, bench.ask(0, 256, 0.25))
    page.wait_for_function("document.querySelector('#depth input[type=number]').value === '25'")

    page.focus("#strip .grip")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector('#verdict .card[data-insert="65"]')
    page.keyboard.press("ArrowRight")  # the needle is still in focus
    page.wait_for_selector('#verdict .card[data-insert="66"]')
    page.keyboard.press("Home")
    shows(page, bench.ask(0, 256, 0.0))

    page.click('#needles button[data-index="7"]')
    page.wait_for_selector('#needles button.here[data-index="7"]')
    shows(page, bench.ask(7, 256, 0.0))
    page.fill("#frames input[type=range]", "32")
    shows(page, bench.ask(7, 32, 0.0))
    page.screenshot(path=tmp_path / "needle.png", full_page=True)
    assert (tmp_path / "needle.png").stat().st_size > 20_000
    page.set_viewport_size(dict(width=420, height=800))
    clean(page)


def test_attention(page, bench):
    seen = bench.attention(0, 256, 0.5)
    strip = page.locator("#strip .attention")
    assert float(strip.get_attribute("data-needle")) == pytest.approx(seen[128], abs=1e-3)
    assert float(strip.get_attribute("data-text")) == pytest.approx(1 - seen.sum(), abs=1e-3)
    needle = page.evaluate(
        "(() => { const b = document.querySelector('#strip .attention path.needle').getBoundingClientRect(); return b.x"
        " + b.width / 2; })()"
    )
    grip = page.locator("#strip .grip").bounding_box()
    assert abs(needle - grip["x"] - grip["width"] / 2) < 2, "the bar of the needle is not under the needle"
    page.click("#which input")
    page.click("[role=option] >> text=layer 1, head 2")
    page.wait_for_selector(".axis >> text=layer 1, head 2")
    assert float(strip.get_attribute("data-needle")) == pytest.approx(bench.attention(0, 256, 0.5, 1, 2)[128], abs=1e-3)
    clean(page)


def test_heat_map_cells_log_and_short_twin(page, bench, tmp_path):
    from longva.mini.bench import mini_bench
    from longva.needle.bench import fill
    from longva.needle.trials import cells, read_trials
    from longva.web.page import shade

    page.click("#fill")
    page.wait_for_selector('#heat button[data-frames="16"][data-all="10"]')
    page.click('#strip button[data-index="20"]')  # the needle can be moved while the map grows
    shows(page, bench.ask(0, 256, 1.0))
    page.wait_for_selector('#heat button[data-frames="16"][data-depth="1.0"][data-all="10"]')
    page.wait_for_function("document.querySelector('#heat .ring').dataset.y === '4.000'")
    assert ring(page) == (4, 4)
    counts = cells(list(fill(bench, frames=(16,)))[-1])

    def cell(d):
        return page.locator(f'#heat button[data-frames="16"][data-depth="{d}"]')

    assert [int(cell(d).get_attribute("data-right")) for d in (0.0, 0.25, 0.5, 0.75, 1.0)] == [
        counts[16, d][0] for d in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert "Num. of Frames" in page.inner_text("#heat") and "Depth Percent" in page.inner_text("#heat")

    page.locator("#palette label").nth(1).click()
    back = shade(counts[16, 0.5][0] / 10, "cividis")[0].replace(",", ", ")
    page.wait_for_function(
        "back => getComputedStyle(document.querySelector('#heat button[data-depth=\"0.5\"]')).backgroundColor === back",
        arg=back,
    )

    cell(0.5).click()  # opens its trials
    page.wait_for_selector("#trials td")
    assert page.locator("#trials tr").count() == 11 and "16 frames, 50% deep" in page.inner_text("#trials")
    page.click(f'#trials button[data-needle="{bench.needles[4].name}"]')
    shows(page, bench.ask(4, 16, 0.5))
    page.wait_for_function("document.querySelector('#frames input[type=number]').value === '16'")

    with page.expect_download() as given:
        page.click("#save")
    assert given.value.suggested_filename == "trials.jsonl"
    given.value.save_as(tmp_path / "trials.jsonl")
    trials = {(t.needle, t.frames, t.depth): t for t in read_trials(tmp_path / "trials.jsonl")}
    assert len(trials) >= 51 and (bench.needles[0].name, 256, 1.0) in trials, "a trial of this visit is missing"
    assert all(trials[k].argmax_ids == t.argmax_ids for k, t in bench.kept.items())

    page.locator("#model label", has_text="mini-short").click()
    page.wait_for_selector("#heat .title >> text=mini-short")
    shows(page, mini_bench("mini-short").ask(4, 16, 0.5))
    time.sleep(1)
    assert page.locator("#heat button[data-all]").count() == 1, "the other model's map went on growing"
    clean(page)


@pytest.fixture
def real_film(tmp_path):
    "A film from a telephone where it is there; a drawn one elsewhere. (path, frames taken)"
    from longva.mini.world import write_film

    film = root.parent / "shared" / "data" / "media" / "jobs.mp4"
    return (film, 512) if film.exists() else (write_film(tmp_path / "jobs.mp4", 40, seed=3, side=56), 40)


def test_own_film_and_needle(page, rooms, tmp_path, bench, real_film):
    from PIL import Image

    from longva.mini.world import draw_frame
    from longva.needle.needles import Needle
    from longva.web.visit import add_needle, with_film

    film, count = real_film
    page.locator("#own > button").click()
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    page.set_input_files("#video input[type=file]", tmp_path / "noise.mp4")
    page.wait_for_selector("#film-said [role=alert] >> text=noise.mp4 cannot be read as a video")
    shows(page, bench.ask(0, 256, 0.5))  # what was there stays
    page.set_input_files("#video input[type=file]", film)
    page.wait_for_selector(f"#film-said >> text={film.name} now, {count} of its frames")
    other, n = with_film(bench, film), min(256, count)
    shows(page, other.ask(0, n, 0.5))
    page.click('#strip button[data-index="5"]')
    shows(page, other.ask(0, n, 0.25))
    assert kept_uploads(rooms) == []

    picture = Image.fromarray(draw_frame(("heart", "pink", "checks"), 112))
    picture.save(tmp_path / "valentine.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files("#picture input[type=file]", tmp_path / "broken.png")
    page.wait_for_selector("#needle-said [role=alert] >> text=broken.png cannot be read as an image")
    page.set_input_files("#picture input[type=file]", tmp_path / "valentine.png")
    page.wait_for_selector("#needle-said >> text=valentine is here")
    page.fill("#question textarea, #question input", "find wizard")
    page.fill("#answer textarea, #answer input", "pink checks")
    page.click("#hide")
    page.wait_for_selector("#needle-said [role=alert] >> text=does not know the word 'wizard'")
    page.fill("#question textarea, #question input", "find heart")
    page.click("#hide")
    page.wait_for_selector("#needle-said >> text=valentine was added")
    shows(page, other.ask(add_needle(other, Needle("valentine", picture, "find heart", "pink checks")), n, 0.25))
    assert page.locator("#needles button").count() == 21 and kept_uploads(rooms) == []
    page.click("#back")
    page.wait_for_function("document.querySelectorAll('#film-said [role=status]').length === 0")
    page.wait_for_selector('#verdict .card[data-frames="256"]')
    clean(page)


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
    for port in ("99999", "²"):
        assert "from 1 to 65535" in refusal("--port", port)
    assert "no-such-host" in refusal("--host", "no-such-host.invalid")
