"""Talk with a LongVA about images and films; the miniature that comes with the package is the default.

    python apps/chat/app.py [--model mini-longva] [--device-map auto] [--host 127.0.0.1] [--port 7861] [--share]
"""
import base64
import io
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from html import escape
from pathlib import Path

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}  # before gradio: nothing is sent

from longva import mini
from longva.lab.serve import check_address, launch, server_options

FILM, SEED, LARGEST = 96, 11, 2 << 30  # frames of the film to try, what it shows, bytes of an upload
ABOUT = """
# Chat about films
Give an image or a video, and ask. What you gave stays in the model's memory (its key/value cache), so that the next question is answered without \
reading it again. Nothing leaves this machine, and uploads are removed as soon as they are read.
"""
MINIATURE = """The miniature knows a tiny world: {} drawn objects in eight colours on eight grounds. It answers one kind of question, `find OBJECT`, \
such as *find {}*. **Try this:** press the button below, then ask for other objects of the same film."""
CSS = """
.gradio-container {max-width: 1080px !important}
.gradio-container main {padding: 0 24px 8px !important} .gradio-container main .column, .gradio-container main .row {gap: 8px}
.gradio-container .html-container {padding: 4px 0}
.about h1 {font-size: 1.4rem; margin: 0 0 .1rem} .about p {margin: 0; line-height: 1.4}
.takes {color: var(--body-text-color); line-height: 1.4; font-size: 14px} .takes table {border-collapse: collapse}
.takes td, .takes th {padding: 1px 18px 1px 0; text-align: left; font-weight: 400; white-space: nowrap} .takes th {color: var(--neutral-600)}
.dark .takes th {color: var(--neutral-300)} .takes .small {font-size: 13px}
.trouble {border-left: 4px solid #d55e00; padding: 2px 10px; margin-bottom: 4px}
.seen {display: flex; gap: 3px; flex-wrap: wrap} .seen img {width: 56px; height: 56px; object-fit: cover; border-radius: 4px; margin: 0}
"""


@dataclass
class Talk:
    "What one visitor's page has: a conversation, and what its last turn took."
    chat: object = None
    takes: str = ""
    seen: str = ""


def picture(array):
    "A thumbnail as a data URL, so that no file is needed to show it."
    from PIL import Image
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.convert("RGB").resize((84, 84)).save(file, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}" alt="">'


def sort_files(paths):
    "Uploads by what is in them, not by what they are called: (images, videos)."
    from PIL import Image
    images, videos = [], []
    for path in paths:
        try:
            with Image.open(path) as opened: still = getattr(opened, "n_frames", 1) == 1
        except Exception: still = False  # Pillow raises whatever comes to hand; the video reader has the last word, and a sentence
        (images if still else videos).append(path)
    return images, videos


def takes_html(chat, turn, name, most, speed):
    "What the turn takes, here and with LongVA-7B."
    from longva.model.prefill import say_bytes, say_seconds
    here = "this GPU" if chat.model.device.type == "cuda" else "this CPU"
    rows = []
    for who, e in ((f"{name} on {here}", chat.estimate(turn, most, tflops=speed[0], bandwidth=speed[1])), ("LongVA-7B on one H100", chat.estimate_7b(turn, most))):
        cells = (who, f"{e.tokens:,}", say_bytes(e.parts["KV cache"]), say_bytes(e.total), say_seconds(e.seconds["tower"] + e.seconds["prefill"]), say_seconds(e.seconds["answer"]))
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("", "tokens", "KV cache", "memory in all", "to the first word", f"{most} words more"))
    note = f"Seconds are assumptions: {e.efficiency:.0%} of what products reach here, and of {e.tflops:g} TFLOPS there; an answer reads all weights and the cache for each word."
    return f'<table><tr>{head}</tr>{"".join(rows)}</table><div class="small">{note}</div>'


def seen_html(turn):
    "A dozen of the frames, and the images, as they were given."
    import numpy as np
    pictures = []
    for part in turn.message["content"] if isinstance(turn.message["content"], list) else []:
        if part["type"] == "image":
            from longva.vision.image import open_image
            pictures.append(picture(open_image(part["image"])))
        elif part["type"] == "video":
            from longva.vision.video import read_frames, video_info
            pictures += [picture(np.ascontiguousarray(frame)) for frame in read_frames(part["video"], n=min(12, video_info(part["video"]).frames)).array]
    return f'<div class="seen">{"".join(pictures)}</div>' if pictures else ""


def panel(talk, trouble=""):
    words = f'<div class="trouble" role="alert">{escape(trouble)}</div>' if trouble else ""
    return f'<div class="takes">{words}{talk.seen}{talk.takes}</div>'


def remove(paths, kept):
    "Uploads go when they have been read; each lies in a folder of its own."
    for path in map(Path, paths):
        if path != kept: path.unlink(missing_ok=True)
        if path != kept and path.parent.is_dir() and not any(path.parent.iterdir()): path.parent.rmdir()


def build(gr, model, processor, name, hint, film):
    "The page."
    from longva.model.chat import Chat, ChatError, UnknownWord
    from longva.model.prefill import measure_speed
    from longva.vision.video import VideoError
    speed = measure_speed(model.device, model.dtype)

    def answer(box, history, talk, frames, temperature, most, seed):
        "Read what was given and stream the answer: (box, history, panel, talk)."
        text, files = (box or {}).get("text") or "", (box or {}).get("files") or []
        frames, most, seed = int(frames), int(most), int(seed or 0)
        talk = talk or Talk()
        if talk.chat is None: talk.chat = Chat(model, processor)
        talk.chat.num_frames = frames
        history = list(history or [])
        try:
            images, videos = sort_files(files)
            turn = talk.chat.prepare(text, images, videos)
            pieces = talk.chat.ask(turn, max_new_tokens=most, temperature=float(temperature), seed=seed)
            talk.takes, talk.seen = takes_html(talk.chat, turn, name, most, speed), seen_html(turn) or talk.seen
            given = [f"{len(images)} image{'s' * (len(images) > 1)}"] * bool(images) + [f"{len(videos)} video{'s' * (len(videos) > 1)}, {turn.frames} frames"] * bool(videos)
            history += [dict(role="user", content=f"[{', '.join(given)}] {text}" if given else text), dict(role="assistant", content="")]
            yield dict(text="", files=[]), history, panel(talk), talk
            for piece in pieces:
                remove(files, film)  # they have been read
                history[-1]["content"] += piece
                yield gr.skip(), history, gr.skip(), gr.skip()
            if not history[-1]["content"]: history[-1]["content"] = "(nothing)"
            yield gr.skip(), history, gr.skip(), gr.skip()
        except (ChatError, VideoError) as error:
            history = history[:-2] if history and history[-1] == dict(role="assistant", content="") else history
            yield dict(text=text, files=[]), history, panel(talk, f"{error}{hint if isinstance(error, UnknownWord) else ''}"), talk
        finally: remove(files, film)

    def halt(talk):
        if talk and talk.chat: talk.chat.stop()

    def forget(talk):
        if talk and talk.chat: talk.chat.stop()
        return None, [], ""

    with gr.Blocks(title="Chat about films", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        talk = gr.State(None, time_to_live=3600)
        gr.Markdown(ABOUT + (f"\n{MINIATURE.format(*about_world())}" if film else ""), elem_classes="about")
        history = gr.Chatbot(show_label=False, height=380, elem_id="history", render_markdown=False, buttons=[], layout="bubble")
        box = gr.MultimodalTextbox(show_label=False, file_types=["image", "video"], file_count="multiple", sources=["upload"], elem_id="box", max_lines=4,
                                   placeholder="Ask; the paper clip takes images and videos", max_plain_text_length=100_000)
        with gr.Row():
            stop = gr.Button("Stop", elem_id="stop", variant="stop", size="sm")
            fresh = gr.Button("New conversation", elem_id="fresh", size="sm")
            if film: example = gr.Button(f"A film of its world, {FILM} frames", elem_id="example", size="sm")
        about = gr.HTML(elem_id="takes", apply_default_css=False, js_on_load=None)
        with gr.Accordion("Settings", open=False):
            frames = gr.Slider(1, 3000, 64 if not film else FILM, step=1, label="Frames of a video, at most", elem_id="frames", buttons=[])
            temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature; 0 always takes the likeliest word", elem_id="temperature", buttons=[])
            most = gr.Slider(1, 1024, 16 if film else 256, step=1, label="Longest answer, in tokens", elem_id="most", buttons=[])
            seed = gr.Number(0, precision=0, minimum=0, label="Seed: the same one gives the same text", elem_id="seed")
        box.submit(answer, [box, history, talk, frames, temperature, most, seed], [box, history, about, talk], concurrency_limit=1, show_progress="hidden", api_visibility="private")
        stop.click(halt, talk, None, concurrency_limit=None, show_progress="hidden", queue=False, api_visibility="private")
        history.clear(forget, talk, [talk, history, about], concurrency_limit=None, show_progress="hidden", api_visibility="private")
        fresh.click(forget, talk, [talk, history, about], concurrency_limit=None, show_progress="hidden", api_visibility="private")
        if film: example.click(lambda: dict(text=f"find {about_world()[1]}", files=[str(film)]), None, box, show_progress="hidden", api_visibility="private")
    return page.queue(max_size=32)


def about_world():
    "(how many objects, one that the film to try shows once)."
    from longva.mini.world import OBJECTS, film_scenes, scene_words
    shown = [scene_words(scene)[0] for scene in film_scenes(FILM, SEED)]
    return len(OBJECTS), next(thing for thing in OBJECTS if shown.count(thing) == 1)


def options():
    parser = server_options("The chat app.", 7861)
    parser.add_argument("--model", default="mini-longva", help=f"{', '.join(mini.NAMES)}, a folder, or a name on the Hugging Face hub (with HF_HUB_OFFLINE=0)")
    parser.add_argument("--device-map", help="for transformers: auto, cpu, cuda:1; by default the GPU if there is one")
    return parser.parse_args()


def main():
    asked = options()
    check_address(asked.host, asked.port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder of uploads goes then, too
    print(f"Loading {asked.model} …", flush=True)
    from longva.cli import Usage, chat_model, what_it_knows
    from longva.model.prefill import ChatError
    try: model, processor = chat_model(asked.model, asked.device_map)
    except (ChatError, Usage, mini.UnknownModel) as error: sys.exit(str(error))
    hint, rooms = what_it_knows(processor), Path(tempfile.mkdtemp(prefix="longva-chat-"))
    os.environ["GRADIO_TEMP_DIR"] = str(rooms / "uploads")  # uploads go with the folder when the app ends
    import gradio as gr
    film = None
    try:
        if hint:
            from longva.mini.world import write_film
            film = write_film(rooms / "film.mp4", FILM, SEED, side=56)
        page = build(gr, model, processor, asked.model, hint, film)
        launch(gr, page, asked, css=CSS, max_file_size=LARGEST)
    finally: shutil.rmtree(rooms, ignore_errors=True)


if __name__ == "__main__":
    main()
