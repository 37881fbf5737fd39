"""The chat app in a real browser: it answers about uploads, stops, refuses in sentences, keeps no upload, and sends nothing out."""
import socket
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from app_toy import flags, free_port, patience, start, wait_for
from PIL import Image

from longva.mini.world import draw_frame, film_scenes, scene_words, write_film
from longva.vision.video import write_video


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    "Where the app keeps its temporary files."
    return tmp_path_factory.mktemp("rooms")


@pytest.fixture(scope="module")
def address(chromium, rooms):
    pytest.importorskip("gradio", reason="gradio is not installed, so the chat app is not tested (make env)")
    process = start("chat", "--port", free_port(), TMPDIR=str(rooms))
    yield wait_for(process, "http://").split()[1].rstrip("/")
    process.terminate()
    process.wait(30)
    assert not list(rooms.glob("longva-chat-*")), "the app left its folder"


@pytest.fixture(scope="module")
def browser(address, chromium):
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, so the chat app is not tested (make env)")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport=dict(width=1280, height=900))
    page.set_default_timeout(patience * 1000)
    page.asked, page.broken = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("websocket", lambda websocket: page.asked.append(websocket.url))
    page.on("response", lambda response: response.status >= 400 and page.broken.append(f"{response.status} {response.url}"))
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#box textarea")
    yield page
    assert [url for url in page.asked if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname not in ("127.0.0.1", "localhost")] == []
    assert page.broken == []
    page.close()


def give(page, *files):
    before = page.locator("#box .thumbnail-item").count()
    page.set_input_files("#box input[type=file]", files)
    page.wait_for_function(f"document.querySelectorAll('#box .thumbnail-item').length === {before + len(files)}")


def say(page, text):
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")


def hears(page, number, text):
    "Wait until the answer of this number is this text."
    page.wait_for_function("([n, text]) => document.querySelectorAll('#history [data-testid=bot]')[n]?.innerText.trim() === text", arg=[number, text])


def kept_uploads(rooms):
    "Uploads that are still there a moment after the answer."
    end = time.time() + 20
    while (files := [p for p in rooms.glob("longva-chat-*/uploads/**/*") if p.is_file()]) and time.time() < end: time.sleep(0.2)
    return files


def once(seed, frames):
    "{object: colour and ground} of a film's objects that are shown once."
    words = [scene_words(scene) for scene in film_scenes(frames, seed)]
    return {thing: f"{colour} {ground}" for thing, colour, ground in words if [w[0] for w in words].count(thing) == 1}


def test_its_own_film_and_two_questions(page, rooms, tmp_path):
    page.click("#example")
    page.wait_for_function("document.querySelector('#box textarea').value.startsWith('find ')")
    page.wait_for_selector("#box .thumbnail-item")
    thing = page.input_value("#box textarea").removeprefix("find ")
    right = once(11, 96)
    page.press("#box textarea", "Enter")
    hears(page, 0, right[thing])
    assert page.locator("#takes tr").nth(1).inner_text().split("\t")[1] == f"{96 * 4 + 2}"
    assert page.locator("#takes tr").nth(2).inner_text().split("\t")[1] == f"{96 * 144 + 2:,}"
    assert page.locator("#takes .seen img").count() == 12 and kept_uploads(rooms) == []
    other = [t for t in right if t != thing][0]
    say(page, f"find {other}")
    hears(page, 1, right[other])
    kept = int(page.locator("#takes tr").nth(1).inner_text().split("\t")[1])
    assert kept == 96 * 4 + 2 + 2 + 3, "the film was read again, or forgotten"
    page.screenshot(path=tmp_path / "chat.png", full_page=True)
    assert (tmp_path / "chat.png").stat().st_size > 20_000
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"


def test_uploads_of_both_kinds(page, rooms, tmp_path):
    scenes = [("star", "red", "checks"), ("heart", "blue", "rows")]
    Image.fromarray(np.concatenate([draw_frame(scene, 28) for scene in scenes], 1)).save(tmp_path / "sheet.png")
    film = write_film(tmp_path / "film.mp4", 40, seed=5, side=56)
    give(page, tmp_path / "sheet.png")
    say(page, "find heart")
    hears(page, 0, "blue rows")
    page.click("#fresh")
    page.wait_for_function("document.querySelectorAll('#history [data-testid=bot]').length === 0")
    give(page, film)
    thing, right = next(iter(once(5, 40).items()))
    say(page, f"find {thing}")
    hears(page, 0, right)
    assert kept_uploads(rooms) == []


def test_what_it_cannot_read_or_does_not_know(page, rooms, tmp_path):
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    give(page, tmp_path / "noise.mp4")
    say(page, "find heart")
    page.wait_for_selector("#takes [role=alert] >> text=noise.mp4 cannot be read as a video")
    assert kept_uploads(rooms) == [] and page.locator("#history [data-testid=bot]").count() == 0
    say(page, "who is the wizard")
    page.wait_for_selector("#takes [role=alert] >> text=does not know the words 'who', 'the', 'wizard'".replace("'the', ", ""))
    assert page.input_value("#box textarea") == "who is the wizard"


def test_stop(page, rooms, tmp_path):
    rng = np.random.default_rng(0)
    write_video((rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(3000)), tmp_path / "long.mp4", fps=30)
    page.click("text=Settings")
    page.fill("#frames input[type=number]", "3000")
    page.press("#frames input[type=number]", "Tab")
    give(page, tmp_path / "long.mp4")
    say(page, "find heart")
    page.wait_for_function("document.querySelectorAll('#history [data-testid=user]').length === 1")
    page.click("#stop")
    began = time.time()
    page.wait_for_selector("#takes [role=alert] >> text=Stopped before the answer began")
    assert time.time() - began < patience and kept_uploads(rooms) == []
    say(page, "heart red rows . find heart")  # the conversation goes on
    hears(page, 0, "red rows")


def test_refusals(tmp_path):
    def refusal(*options):
        process = start("chat", *options)
        said, _ = process.communicate(timeout=patience)
        said = [line for line in said.strip().splitlines() if not line.startswith("Loading")]
        assert process.returncode != 0 and len(said) == 1 and said[0].endswith("."), said
        return said[0]

    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "in use" in refusal("--port", server.getsockname()[1])
    assert "from 1 to 65535" in refusal("--port", "99999")
    assert "no-such-folder" in refusal("--model", "no-such-folder", "--port", free_port())
