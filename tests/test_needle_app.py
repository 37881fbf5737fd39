"""The needle app in a real browser: nothing leaves the machine, and what the page says is what the bench says."""

import importlib.util
import socket
import time
from html import unescape
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from app_toy import PALE, flags, free_port, patience, root, start, tab_stops, wait_for


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    "Where the app keeps its temporary files."
    return tmp_path_factory.mktemp("rooms")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A demo's video and needles, of which only mini-anyres was asked, among 16 frames: other maps begin empty."
    from longva.mini import load
    from longva.mini.world import write_mini_video, write_needles
    from longva.needle.vniah import run

    folder = tmp_path_factory.mktemp("demo")
    video = write_mini_video(folder / "haystack.mp4", 512, seed=20261101)
    needles = write_needles(folder / "needles", 20, seed=20261101)
    run(load("mini-anyres"), video, needles, [16], [0.0, 0.5], folder / "mini-anyres", progress=False)
    return folder


@pytest.fixture(scope="module")
def process(chromium, rooms, demo):
    pytest.importorskip("gradio", reason="gradio is not installed, so the needle app is not tested (make env)")
    process = start("needle", "--port", free_port(), "--demo", demo, TMPDIR=str(rooms))
    yield process
    process.terminate()
    process.wait(30)
    assert not list(rooms.glob("longva-needle-*")), "the app left its folder"


@pytest.fixture(scope="module")
def bench_of(demo):
    "What the app shows, made without the app: (name of a model) -> bench of the demo's video and needles."
    from longva.mini import load
    from longva.needle.bench import NeedleBench
    from longva.needle.needles import load_needles
    from longva.vision.video import read_frames

    film = read_frames(demo / "haystack.mp4").array
    needles = load_needles(demo / "needles")
    return lambda name: NeedleBench(*load(name), film, needles, name)


@pytest.fixture(scope="module")
def bench(process, bench_of):  # made while the app starts
    return bench_of("mini-longva")


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
    assert said == [word.predicted for word in answer.words]
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
    assert page.locator("#strip button.here").count() == 1
    assert ring(page) == pytest.approx((4, 0.6))

    box = page.locator("#strip .film .pictures").bounding_box()

    def x(depth):
        return box["x"] + box["width"] * (0.5 + 20 * depth) / 21

    page.mouse.move(x(0.8), box["y"] + 15)
    page.mouse.down()
    for depth in (0.7, 0.5, 0.35, 0.3, 0.25):
        page.mouse.move(x(depth), box["y"] + 15)
    page.mouse.up()
    shows(page, bench.ask(0, 256, 0.25))

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
    clean(page)


def test_attention(page, bench):
    page.click('#strip button[data-index="4"]')
    shows(page, bench.ask(0, 256, 0.2))
    seen = bench.attention(0, 256, 0.2)
    strip = page.locator("#strip .attention")
    assert float(strip.get_attribute("data-needle")) == pytest.approx(seen[51], abs=1e-3)
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
    assert float(strip.get_attribute("data-needle")) == pytest.approx(bench.attention(0, 256, 0.2, 1, 2)[51], abs=1e-3)
    clean(page)


def test_heat_map_cells_log_and_short_twin(page, bench, bench_of, tmp_path):
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
    shows(page, bench_of("mini-short").ask(4, 16, 0.5))
    time.sleep(1)
    assert page.locator("#heat button[data-all]").count() == 1, "the other model's map went on growing"
    clean(page)


@pytest.fixture
def real_film(tmp_path):
    "A film from a telephone where it is there; a drawn one elsewhere. (path, frames taken)"
    from longva.mini.world import write_mini_video

    film = root.parent / "shared" / "data" / "media" / "jobs.mp4"
    return (film, 512) if film.exists() else (write_mini_video(tmp_path / "jobs.mp4", 40, seed=3, side=56), 40)


def test_own_film_and_needle(page, rooms, tmp_path, bench, real_film):
    from PIL import Image

    from longva.mini.world import draw_frame, write_mini_video
    from longva.needle.needles import Needle
    from longva.web.visit import add_needle, with_film

    film, count = real_film
    page.locator("#own > button").click()
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    page.set_input_files("#video input[type=file]", tmp_path / "noise.mp4")
    page.wait_for_selector("#film-said [role=alert] >> text=noise.mp4 cannot be read as a video")
    shows(page, bench.ask(0, 256, 0.5))  # what was there stays
    write_mini_video(tmp_path / "one.mp4", 1, seed=3, side=56)
    Image.fromarray(draw_frame(("heart", "pink", "checks"), 112)).save(tmp_path / "photo.png")
    for name in ("one.mp4", "photo.png"):
        page.set_input_files("#video input[type=file]", tmp_path / name)
        page.wait_for_selector(f"#film-said [role=alert] >> text={name} holds one picture: give a video")
    shows(page, bench.ask(0, 256, 0.5))
    page.set_input_files("#video input[type=file]", write_mini_video(tmp_path / "two.mp4", 2, seed=3, side=56))
    page.wait_for_selector("#film-said >> text=two.mp4 now, 2 of its frames")
    shows(page, with_film(bench, tmp_path / "two.mp4").ask(0, 2, 0.5))
    length = page.locator("#frames input[type=range]")
    page.wait_for_function("document.querySelector('#frames input[type=range]').value === '2'")
    assert (length.get_attribute("min"), length.get_attribute("max")) == ("1", "2")
    assert page.locator("#strip button").count() == 3 and page.locator("#strip img").first.bounding_box()["width"] < 113
    page.fill("#frames input[type=range]", "1")
    shows(page, with_film(bench, tmp_path / "two.mp4").ask(0, 1, 0.5))
    assert "of 1 frame," in page.inner_text("#verdict") and page.locator(".error").count() == 0
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


def test_a_trial_of_the_demo_is_repeated_with_its_own_needle(page, demo, bench_of):
    from longva.needle.trials import read_trials

    bench = bench_of("mini-anyres")
    names = [needle.name for needle in bench.needles]
    page.locator("#model label", has_text="mini-anyres").click()
    page.wait_for_selector("#heat .title >> text=mini-anyres, from the demo")
    page.click('#heat button[data-frames="16"][data-depth="0.0"]')
    trials = [t for t in read_trials(demo / "mini-anyres" / "trials.jsonl") if t.depth == 0]
    worst, best = min(trials, key=lambda t: t.margin), max(trials, key=lambda t: t.margin)
    for t in (worst, best):
        page.click(f'#trials button[data-needle="{t.needle}"]')
        page.wait_for_selector(f'#needles button.here[data-index="{names.index(t.needle)}"]')
        answer = bench.ask(names.index(t.needle), 16, 0.0)
        shows(page, answer)
        assert answer.trial.correct == t.correct and abs(answer.trial.margin - t.margin) < 2e-3
    clean(page)


def test_a_trial_of_the_demo_without_its_video_is_not_repeated(demo, tmp_path):
    gr = pytest.importorskip("gradio", reason="gradio is not installed (make env)")
    from longva.needle.trials import read_trials
    from longva.web.visit import SharedBenches, Visit

    spec = importlib.util.spec_from_file_location("needle_app", root / "apps" / "needle" / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    (tmp_path / "mini-anyres").symlink_to(demo / "mini-anyres")
    shared = SharedBenches(tmp_path)
    visit = Visit("mini-anyres", opened=(16, 0.0))
    t = read_trials(demo / "mini-anyres" / "trials.jsonl")[0]
    click = app.click_handlers(gr, app.view_handlers(gr, shared), shared).click_trial
    event = SimpleNamespace(needle=t.needle, frames=t.frames, depth=t.depth)
    *same, said = click(visit, "field", app.MEAN, event)
    assert (visit.needle, visit.frames, visit.depth) == (0, 256, 0.5) and same == [gr.skip()] * len(same)
    assert f"The trial of {t.needle} can't be repeated: the demo's video or needles could not be read" in unescape(said)
    assert str(tmp_path) not in said and said.count("data-needle") == 20


def test_on_a_phone(page):
    page.set_viewport_size(dict(width=390, height=800))
    page.wait_for_selector('#strip .film[data-places="11"]')
    page.locator("#model label", has_text="mini-anyres").click()
    page.click('#heat button[data-frames="16"][data-depth="0.0"]')
    page.wait_for_selector("#trials td")
    page.locator("#own > button").click()
    page.wait_for_selector("#hide")
    boxes = """selector => [...document.querySelectorAll(selector)].map(e => {
        const b = e.getBoundingClientRect();
        return [e.textContent.slice(0, 30), b.left, b.right, b.width, b.height, e.scrollWidth - e.clientWidth];
    })"""
    for text, left, right, *_ in page.evaluate(boxes, "main *:not(script, style)"):
        assert left >= 0 and right <= 390, f"{text} is cut off"
    shown = page.evaluate(boxes, "#needles button, #strip button, #heat button, #trials button")
    assert len(shown) == 20 + 11 + 30 + 20
    for text, _, _, width, height, hidden in shown:
        assert width >= 24 and height >= 24, f"{text} is too small to touch"
        assert hidden <= 0, f"{text} does not fit"
    assert page.locator("#strip").bounding_box()["x"] <= 12
    page.click('#strip button[data-index="3"]')
    page.wait_for_selector('#verdict .card[data-insert="76"]')  # 30% of 256 frames
    page.set_viewport_size(dict(width=1280, height=800))
    page.wait_for_selector('#strip .film[data-places="21"]')
    clean(page)


def test_by_keyboard(page, bench):
    page.locator("#model label", has_text="mini-anyres").click()
    page.wait_for_selector("#heat .title >> text=from the demo")
    stops = tab_stops(page)
    blocks = [block for block, _, _ in stops]
    for once in ("model", "needles", "strip", "which", "heat", "palette", "own"):
        assert blocks.count(once) == 1, (once, stops)
    assert len(stops) <= 12 and all(name for *_, name in stops), stops
    page.focus("#model input:checked")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#heat .title >> text=mini-longva")
    shows(page, bench.ask(0, 256, 0.5))

    page.focus('#needles button[tabindex="0"]')
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    index = int(page.evaluate("document.activeElement.dataset.index"))
    assert index > 3
    page.keyboard.press("Enter")
    page.wait_for_selector(f'#needles button.here[data-index="{index}"]')
    page.wait_for_function(f"document.activeElement.dataset.index === '{index}'")  # the focus stays
    shows(page, bench.ask(index, 256, 0.5))
    assert blocks.count("needles") == page.locator('#needles [tabindex="0"]').count() == 1
    clean(page)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(page, address, theme):
    page.goto(f"{address}/?__theme={theme}")
    page.locator("#model label", has_text="mini-anyres").click()
    page.click('#heat button[data-frames="16"][data-depth="0.0"]')
    page.wait_for_selector("#trials td")
    page.locator("#own > button").click()
    page.wait_for_selector("#hide")
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    assert page.evaluate(PALE) == []


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
