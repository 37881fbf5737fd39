"""The chat app in a real browser: it answers about uploads, stops, refuses in sentences, keeps no upload, and sends
nothing out."""

import asyncio
import importlib.util
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from app_toy import PALE, flags, free_port, patience, root, start, wait_for
from PIL import Image

from longva import mini
from longva.mini.world import OBJECTS, draw_frame, scene_words, video_scenes, write_mini_video
from longva.model.chat import Chat
from longva.model.modeling import LongVA, mini_config
from longva.vision.video import write_video
from longva.web.desk import Desk, Settings


def the_app():
    "Its file as a module."
    spec = importlib.util.spec_from_file_location("chat_app", root / "apps" / "chat" / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    "Where the app keeps its temporary files."
    return tmp_path_factory.mktemp("rooms")


def serve(rooms, *options):
    "Yields the address of an app, and ends it."
    pytest.importorskip("gradio", reason="gradio is not installed, so the chat app is not tested (make env)")
    process = start("chat", "--port", free_port(), *options, TMPDIR=str(rooms))
    yield wait_for(process, "http://").split()[1].rstrip("/")
    process.terminate()
    process.wait(30)
    assert not list(rooms.glob("longva-chat-*")), "the app left its folder"


@pytest.fixture(scope="module")
def address(chromium, rooms):
    yield from serve(rooms, "--memory", "0.03")


@pytest.fixture(scope="module")
def endless(chromium, tmp_path_factory):
    "An app whose model never ends an answer of its own."
    _, processor = mini.load("mini-longva")
    for seed in range(20):
        torch.manual_seed(seed)
        model = LongVA(mini_config(158, 3, 4, eos_token_id=5, pad_token_id=0)).eval()
        if len(list(Chat(model, processor).ask("find heart", max_new_tokens=60))) == 60:
            break  # it repeats itself
    folder, rooms = tmp_path_factory.mktemp("endless"), tmp_path_factory.mktemp("endless-rooms")
    for part in (model, processor):
        part.save_pretrained(folder)
    yield from serve(rooms, "--model", folder)


@pytest.fixture(scope="module")
def browser(address, chromium):
    sync = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed, so the chat app is not tested (make env)"
    )
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    "Opens pages, and sees that nothing went out and nothing broke."
    asked, broken, contexts = [], [], []

    def visit(address):
        contexts.append(browser.new_context(viewport=dict(width=1280, height=900)))
        page = contexts[-1].new_page()
        page.set_default_timeout(patience * 1000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda websocket: asked.append(websocket.url))
        page.on(
            "response", lambda response: response.status >= 400 and broken.append(f"{response.status} {response.url}")
        )
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#box textarea")
        return page

    yield visit
    assert [
        url
        for url in asked
        if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname not in ("127.0.0.1", "localhost")
    ] == []
    assert broken == []
    for context in contexts:
        context.close()


@pytest.fixture
def page(visit, address):
    return visit(address)


def give(page, *files):
    before = page.locator("#box .thumbnail-item").count()
    page.set_input_files("#box input[type=file]", files)
    page.wait_for_function(f"document.querySelectorAll('#box .thumbnail-item').length === {before + len(files)}")


def say(page, text):
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")


def hears(page, number, text):
    "Wait until the answer of this number is this text."
    page.wait_for_function(
        "([n, text]) => document.querySelectorAll('#history [data-testid=bot]')[n]?.innerText.trim() === text",
        arg=[number, text],
    )


def kept_uploads(rooms):
    "Uploads that are still there a moment after the answer."
    end = time.time() + 20
    while (files := [p for p in rooms.glob("longva-chat-*/uploads/**/*") if p.is_file()]) and time.time() < end:
        time.sleep(0.2)
    return files


def once(seed, frames):
    "{object: colour and ground} of a film's objects that are shown once."
    words = [scene_words(scene) for scene in video_scenes(frames, seed)]
    return {thing: f"{colour} {ground}" for thing, colour, ground in words if [w[0] for w in words].count(thing) == 1}


def takes(page, frames, tokens):
    "Wait until the panel says that a turn has so many frames and tokens."
    page.wait_for_function(
        "([frames, tokens]) => { const t = document.querySelector('#takes table'); return t?.rows[0].cells[0].innerText"
        " === frames && t.rows[1].cells[1].innerText === tokens }",
        arg=[f"{frames:,} frames", f"{tokens:,}"],
    )


def take_frames(page, frames):
    for _ in range(
        9
    ):  # Gradio puts the old number back if an answer to something else comes between a key and the next
        page.fill("#frames input[type=number]", str(frames))
        page.press("#frames input[type=number]", "Tab")
        page.wait_for_timeout(150)
        if page.input_value("#frames input[type=number]") == str(frames):
            break


def hears_two_words(page, number):
    "Wait for a whole answer, right or wrong."
    line = "document.querySelectorAll('#history [data-testid=bot]')[n]"
    page.wait_for_function(f"n => /^[a-z]+ [a-z]+(\\n|$)/.test({line}?.innerText.trim())", arg=number)


def take_frames_in_settings(page, frames):
    page.click("text=Settings")
    take_frames(page, frames)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    "A film of 3000 frames."
    rng = np.random.default_rng(0)
    return write_video(
        (rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(3000)),
        tmp_path_factory.mktemp("long") / "long.mp4",
        fps=30,
    )


def test_examples(page, rooms, tmp_path):
    "Three questions about a film that is read once, two about a picture; all answered rightly."
    right = once(11, 96) | dict(heart="blue rows", cup="yellow dots")
    things = [name.split()[-1] for name in page.locator("#examples button").all_inner_texts()]
    assert len(things) == 5 and set(things) <= set(right)
    for number, thing in enumerate(things):
        page.click(f"#example-{number}")
        hears(page, number, right[thing])
        if number == 0:
            takes(page, 96, 96 * 4 + 2)
        if number == 0:
            assert (
                page.locator("#takes tr").nth(2).inner_text().split("\t")[1] == f"{96 * 144 + 2:,}"
                and page.locator("#takes .seen img").count() == 96
            )
        if number == 2:
            assert (
                int(page.locator("#takes tr").nth(1).inner_text().split("\t")[1]) == 96 * 4 + 2 + 2 * 5
            ), "the film was read again, or forgotten"
    assert kept_uploads(rooms) == [] and "213 of 214" in page.text_content(".about")
    page.screenshot(path=tmp_path / "chat.png", full_page=True)
    assert (tmp_path / "chat.png").stat().st_size > 20_000
    for width in (1280, 820, 390):
        page.set_viewport_size(dict(width=width, height=900))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
        cut = "[...document.querySelectorAll('#takes .wide')].some(box => box.scrollWidth > box.clientWidth)"
        assert not page.evaluate(cut), "the table is cut"


def test_the_miniature_is_as_good_as_the_page_says(tmp_path):
    "All examples, in any order, and other films than those that were counted."
    app = the_app()
    model, processor = mini.load("mini-longva")
    examples, right = (
        app.write_examples(tmp_path),
        once(11, 96) | {thing: f"{colour} {ground}" for thing, colour, ground in app.SHEET},
    )
    assert not {thing for thing, *_ in app.SHEET} & {scene_words(scene)[0] for scene in video_scenes(96, 11)}
    for order in (examples, examples[::-1], examples[2:] + examples[:2]):
        desk = Desk(model, processor, "mini-longva", own=[file for *_, file in examples])
        for _, text, file in order:
            desk.take("a", text, [file], Settings(frames=96, most=16))
            assert list(desk.answer("a")) and desk.talk("a").lines[-1]["content"] == right[text.split()[1]]
    said, wanted = [], []
    for seed in range(500, 504):
        chat = Chat(model, processor, num_frames=96)
        film = write_mini_video(tmp_path / f"{seed}.mp4", 96, seed, side=56)
        for thing in once(seed, 96):
            said.append("".join(chat.ask(f"find {thing}", videos=() if chat.turns else film)))
        wanted += once(seed, 96).values()
    assert len(said) > 6 and np.mean([a == b for a, b in zip(said, wanted)]) > 0.85


def test_a_question_while_another_one_is_answered(page, long):
    "Both are answered, in their order; Gradio by itself would drop the second."
    take_frames_in_settings(page, 1500)
    give(page, long)
    say(page, "find heart")
    page.wait_for_function(
        "document.querySelectorAll('#history [data-testid=user]').length === 1 && document.querySelector('#box"
        " textarea').value === ''"
    )
    say(page, "find star")
    page.wait_for_function("document.querySelectorAll('#history [data-testid=user]').length === 2")
    assert (
        page.locator("#history [data-testid=bot]").nth(1).inner_text().strip() == "…"
    ), "the first answer came too soon for this test"
    hears_two_words(page, 1)
    assert page.locator("#history [data-testid=bot]").count() == 2 and not page.locator("#history [role=alert]").count()


def test_uploads_of_both_kinds(page, rooms, tmp_path):
    scenes = [("star", "red", "checks"), ("heart", "blue", "rows")]
    Image.fromarray(np.concatenate([draw_frame(scene, 28) for scene in scenes], 1)).save(tmp_path / "sheet.png")
    film = write_mini_video(tmp_path / "film.mp4", 40, seed=5, side=56)
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


def test_two_visitors_give_the_same_film(visit, address, rooms, tmp_path):
    "Gradio keeps it once; the first who is answered must not take it from the other."
    film, (thing, right) = write_mini_video(tmp_path / "film.mp4", 40, seed=5, side=56), next(iter(once(5, 40).items()))
    pages = [visit(address), visit(address)]
    for page in pages:
        give(page, film)
        takes(page, 40, 40 * 4 + 2)
    for page in pages:
        say(page, f"find {thing}")
        hears(page, 0, right)
    assert kept_uploads(rooms) == []


def test_a_rate_and_its_cap(page, tmp_path):
    "What a film takes is said when it lies in the box, for so many frames a second, and at most so many."
    give(page, write_mini_video(tmp_path / "film.mp4", 40, seed=5, side=56))
    takes(page, 40, 40 * 4 + 2)
    page.click("text=Settings")
    page.click("#way >> text=frames per second")
    page.fill("#rate input", "0.5")
    takes(page, 20, 20 * 4 + 2)
    take_frames(page, 12)
    takes(page, 12, 12 * 4 + 2)
    assert page.locator("#history [data-testid=user]").count() == 0
    say(page, "find heart")
    hears_two_words(page, 0)
    takes(page, 12, 12 * 4 + 2)


def test_too_large(page, rooms, long, tmp_path):
    """Two long films need more than this app gives a conversation; half of their frames fit, and they need not be
    given again."""
    (tmp_path / "again.mp4").write_bytes(long.read_bytes())
    take_frames_in_settings(page, 3000)
    give(page, long, tmp_path / "again.mp4")
    page.wait_for_selector(
        "#takes [role=alert] >> text=of memory beside the model, and there is 30.7 MiB for it"
    )  # before it was asked
    say(page, "heart red rows . find heart")
    page.wait_for_selector("#history [role=alert] >> text=take at most")
    page.wait_for_function("document.querySelectorAll('#box .thumbnail-item').length === 2")
    take_frames(page, 100)
    takes(page, 200, 200 * 4 + 2)
    page.press("#box textarea", "Enter")
    hears_two_words(page, 1)
    assert kept_uploads(rooms) == []


def test_what_it_cannot_read_or_does_not_know(page, rooms, tmp_path):
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    give(page, tmp_path / "noise.mp4")
    page.wait_for_selector("#takes [role=alert] >> text=noise.mp4 cannot be read as a video")
    say(page, "find heart")
    page.wait_for_selector("#history [data-testid=bot] [role=alert] >> text=noise.mp4 cannot be read as a video")
    assert kept_uploads(rooms) == [] and "uploads" not in page.inner_text("#history")
    say(page, "who is the wizard")
    page.wait_for_selector("#history [data-testid=bot] [role=alert] >> text=does not know the words 'who', 'wizard'")
    page.wait_for_function("document.querySelector('#box textarea').value === 'who is the wizard'")
    say(page, "heart red rows . find heart")  # the conversation goes on
    hears(page, 2, "red rows")


def test_stop(page, rooms, long):
    take_frames_in_settings(page, 3000)
    give(page, long)
    say(page, "find heart")
    page.wait_for_function("document.querySelectorAll('#history [data-testid=user]').length === 1")
    page.click("#stop")
    began = time.time()
    page.wait_for_selector("#history [role=alert] >> text=Stopped before the answer began")
    assert time.time() - began < patience
    page.wait_for_function(
        "document.querySelectorAll('#box .thumbnail-item').length === 1"
    )  # not read, so it is still there
    page.click("#box .delete-button")
    assert kept_uploads(rooms) == []
    say(page, "heart red rows . find heart")  # the conversation goes on
    hears(page, 1, "red rows")


# Press Stop as soon as an answer has six words; `window.visible` says whether the button was there.
STOP_SOON = """() => {
    new MutationObserver(() => {
        const bot = document.querySelector('#history [data-testid=bot]');
        if (window.visible !== undefined || !bot || bot.innerText.trim().split(' ').length < 6) return;
        const button = document.querySelector('#stop');
        window.visible = button.offsetParent !== null;
        button.click();
    }).observe(document.querySelector('#history'), {childList: true, subtree: true, characterData: true});
}"""


def test_a_new_conversation_while_the_old_one_is_answered(visit, endless):
    "The answer streams, and nothing of it comes into the new conversation."
    page = visit(endless)
    page.click("text=Settings")
    page.fill("#most input[type=number]", "1024")
    page.press("#most input[type=number]", "Tab")
    for _ in range(3):
        say(page, "find heart")
        page.wait_for_function(
            "document.querySelector('#history [data-testid=bot]')?.innerText.trim().split(' ').length > 5"
        )
        page.click("#fresh")
        page.wait_for_function("document.querySelectorAll('#history [data-testid=user]').length === 0")
        page.evaluate(
            "window.late = 0; window.look = new MutationObserver(() => window.late +="
            " document.querySelectorAll('#history [data-testid=bot]').length);"
            " window.look.observe(document.querySelector('#history'), {childList: true, subtree: true})"
        )
        page.wait_for_timeout(700)
        assert page.evaluate("window.look.disconnect() ?? window.late") == 0
    say(page, "find heart")
    page.click("#fresh")  # before the page shows the question: it belongs to the old conversation
    page.wait_for_timeout(1500)
    assert page.locator("#history [data-testid=user]").count() == 0
    page.evaluate(STOP_SOON)  # a slow page would press the button when the answer has ended by itself
    say(page, "find heart")
    page.wait_for_function("window.visible !== undefined")
    assert page.evaluate("window.visible")
    page.wait_for_selector("#stop", state="hidden")
    said = page.inner_text("#history [data-testid=bot]")
    page.wait_for_timeout(300)
    assert page.inner_text("#history [data-testid=bot]") == said and len(said.split()) < 1000


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
    assert "GiB above 0" in refusal("--memory", "0")
    assert "with HF_HUB_OFFLINE=0 it is fetched" in refusal("--model", "nobody/nothing", "--port", free_port())
    assert "no-such-folder" in refusal("--model", "no-such-folder", "--port", free_port())


def test_gradio_keeps_no_copies_of_what_was_shown():
    """Each value that follows on a skip leaves a copy of the component in Gradio's memory of the page; a hundred
    answers leave none."""
    import gradio as gr
    from gradio.state_holder import SessionState

    app = the_app()
    talk = SimpleNamespace(
        open=[],
        lines=[dict(role="user", content="find heart"), dict(role="assistant", content="red rows")],
        takes="takes",
        seen="seen",
    )
    desk = SimpleNamespace(
        talks=dict(me=talk), talk=lambda who: talk, answer=lambda who: iter(range(3)), weigh=lambda *given: None,
        take_back=lambda who: None,
    )
    page, me = app.build(gr, desk, "", []), SimpleNamespace(session_hash="me")
    memory, fns = SessionState(page), {fn.name: fn for fn in page.fns.values()}
    before = len(memory.blocks_config.blocks)

    async def converse():
        for _ in range(100):
            await page.postprocess_data(fns["weigh"], fns["weigh"].fn(me, None, 64), memory)
            for said in fns["answer"].fn(me):
                await page.postprocess_data(fns["answer"], list(said), memory)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, converse()).result()  # the browser's event loop has this thread
    assert len(memory.blocks_config.blocks) == before


def test_messages_are_text(page):
    """What a visitor writes, and what the model answers, is shown and never rendered: no picture is fetched, no form
    stands there. The page asks for nothing outside, which `visit` checks."""
    text = '<img src=http://127.0.0.1:9/leak> <a href="//x">a</a> <form><input><button>b</button></form>'
    say(page, text)
    page.wait_for_selector("#history [data-testid=bot] [role=alert] >> text=does not know")
    assert page.inner_text("#history [data-testid=user]").strip() == text
    inside = page.locator("#history .message").locator("img, a, form, input")
    assert inside.count() == 0 and not page.locator("#history .busy").count()
    assert page.locator("#stop").is_hidden()


def test_a_note_where_the_answer_means_nothing(page, tmp_path):
    "Without a picture, and about an object that is absent; but not where it is there."
    say(page, "find moon")
    page.wait_for_selector("#history [role=note] >> text=No image or video was given")
    page.click("#fresh")
    page.wait_for_function("document.querySelectorAll('#history [data-testid=bot]').length === 0")
    give(page, write_mini_video(tmp_path / "film.mts.mp4", 40, seed=5, side=56).rename(tmp_path / "film"))
    page.wait_for_selector("#takes .given >> text=film: 40 s, 40 of its 40 frames are read")
    right = once(5, 40)
    shown = {scene_words(scene)[0] for scene in video_scenes(40, 5)}
    thing = next(iter(right))
    say(page, f"find {thing}")
    hears(page, 0, right[thing])
    assert page.locator("#history [role=note]").count() == 0
    say(page, f"find {next(name for name in OBJECTS if name not in shown)}")
    page.wait_for_selector("#history [role=note] >> text=not sure")


def test_long_questions_are_refused_by_the_server(page):
    "The browser's own limit binds no script; here it is taken away."
    page.evaluate("document.querySelector('#box textarea').removeAttribute('maxlength')")
    say(page, "heart " * 4000)
    page.wait_for_selector("#history [role=alert] >> text=24,000 characters, and 20,000 are the most")


def test_the_page_listens_on_when_an_answer_to_its_listening_is_lost(page):
    """The event that fetches what was left behind may itself be left behind. Here the second one is, for ever; the next
    ones come all the same."""
    sent = []

    def join(route):
        sent.append(route.request.post_data_json["fn_index"])
        if len(sent) == 2:
            route.fulfill(json=dict(event_id="lost"))
        else:
            route.continue_()

    page.route("**/queue/join*", join)
    end = time.time() + patience
    while len(sent) < 4 and time.time() < end:
        page.wait_for_timeout(500)
    assert len(set(sent)) == 1 and len(sent) == 4, sent


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_and_buttons_touched(visit, address, theme):
    "On the page as it comes, and with an answer, a refusal and all settings."
    page = visit(f"{address}/?__theme={theme}")
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    assert page.evaluate(PALE) == []
    page.click("#example-0")
    hears_two_words(page, 0)
    say(page, "who is the wizard")
    page.wait_for_selector("#history [role=alert]")
    page.click("text=What it knows")
    page.click("text=Settings")
    page.wait_for_selector("#way")
    assert page.evaluate(PALE) == []
    low = page.evaluate(
        "[...document.querySelectorAll('main button, main summary, main input[type=number]')].map(e => [e.innerText"
        " || e.ariaLabel, e.getBoundingClientRect()]).filter(([, box]) => box.height && box.height < 24).map(x => x[0])"
    )
    assert low == [], "too low to touch"
