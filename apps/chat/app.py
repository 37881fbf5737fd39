"""Talk with a LongVA about images and videos; the miniature that comes with the package is the default.

python apps/chat/app.py [--model mini-longva] [--device-map auto] [--memory GIB]
                        [--host 127.0.0.1] [--port 7861] [--share]
"""

import argparse
import os
import sys
from html import escape
from pathlib import Path
from types import SimpleNamespace

# before gradio: nothing is sent
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}

from longva import mini
from longva.web.serve import check_address, keep_listening, launch, server_options, upload_folder

LARGEST = 2 << 30  # bytes of an upload
FILM = 96  # frames of the example video
SEED = 11  # what it shows
# on the example image, and not in the video
SHEET = [
    ("heart", "blue", "rows"),
    ("cup", "yellow", "dots"),
    ("cloud", "pink", "checks"),
    ("bolt", "green", "slant"),
]
# objects that are shown once in videos of 96 frames
RIGHT = {"mini-longva": "213 of 214", "mini-anyres": "103 of 107", "mini-short": "only 15 of 107"}
ABOUT = """
# Chat about videos
Give images or videos to **{}**, and ask. What was read stays in the model's memory (its key/value cache), so that \
the next question does not read it again. {}Uploads are removed as soon as they are answered.
"""
WELCOME = "Give a video or an image with the paper clip below, or take an example above, and ask about it."
MINIATURE = """
It is a miniature: **ask** `find OBJECT`, and it answers with a colour and a background. The buttons give it a \
video or an image, and ask.
<details><summary>What it knows</summary>

It knows {} drawn objects in eight colours on eight backgrounds.{} It cannot describe, count or read. Real videos, \
absent objects and objects shown more than once get an answer, too, but a meaningless one.

The objects: {}.</details>
"""
CSS = """
.gradio-container {max-width: 1080px !important; width: 100%; margin: 0 auto !important}
.gradio-container .fillable {max-width: none !important; padding-left: 0; padding-right: 0}
.gradio-container main {padding: 0 24px 8px !important}
.gradio-container main .column, .gradio-container main .row {gap: 8px}
.gradio-container .html-container {padding: 4px 0}
#history .top-panel {display: none}  /* a second New conversation, which would forget the page's lines only */
.about h1 {font-size: 1.4rem; margin: 0 0 .1rem}
.about p {margin: 0 0 .2rem; line-height: 1.4} .about summary {cursor: pointer}
.about summary, .gradio-container .label-wrap, .gradio-container input[type=number] {min-height: 24px}
.takes {color: var(--body-text-color); line-height: 1.4; font-size: 14px}
.takes table {border-collapse: collapse}
.takes .wide {overflow-x: auto}
.takes td, .takes th {padding: 1px 18px 1px 0; text-align: left; font-weight: 400; white-space: nowrap}
.takes th {color: var(--neutral-600)} .dark .takes th {color: var(--neutral-300)}
.takes .small {font-size: 13px}
.note {display: inline-block; border-left: 4px solid #d55e00; padding-left: 8px; margin-top: 4px; font-size: 13px}
#stop {background: #b91c1c; color: #fff}
.gradio-container:not(:has(#history .busy)) #stop {display: none}
.given {display: flex; gap: 4px 16px; flex-wrap: wrap; margin-bottom: 4px}
.given span {display: flex; align-items: center; gap: 8px; overflow-wrap: anywhere}
.given img {width: 56px; height: 56px; object-fit: cover; border-radius: 4px; margin: 0; flex: none}
.trouble {border-left: 4px solid #d55e00; padding: 2px 10px; margin: 2px 0; color: var(--body-text-color); \
line-height: 1.4}
.seen {display: flex; gap: 3px; flex-wrap: wrap; max-height: 186px; overflow-y: auto; margin: 2px 0 6px}
.seen img {width: 44px; height: 44px; object-fit: cover; border-radius: 4px; margin: 0}
@media (max-width: 640px) {
    .gradio-container main {padding: 0 8px 8px !important}
    .takes td, .takes th {white-space: normal; padding-right: 8px; font-size: 12px; vertical-align: top}
}
"""


def takes_panel(takes, seen=""):
    return f'<div class="takes">{seen}{takes}</div>'


def panel(talk):
    "What the last turn takes, and what it showed."
    return takes_panel(talk.takes, talk.seen) if talk.lines else ""


# The handlers of events; each is a method of the desk. Whenever a value follows on gr.skip(), Gradio keeps one more
# copy of the component with its value for as long as it knows the page. So what is shown is sent again, and skips are
# for the rare cases and for the small box.


def question_handlers(gr, desk):
    "A question comes in, from the box or from a button."
    from longva.web.desk import Settings, Trouble, trouble_html

    def shown(who):
        "The lines of a conversation as Gradio wants them."
        lines = []
        talk = desk.talk(who)
        open_lines = [id(question.line) for question in talk.open]
        for line in talk.lines:
            content = line["content"]
            if isinstance(content, Trouble):
                content = gr.HTML(trouble_html(content))
            else:  # Gradio takes text for HTML, whoever wrote it
                content = escape(content)
            if id(line) in open_lines:
                content = f'<span class="busy">{content}</span>'  # while there is one, the page shows Stop
            if line.get("note"):
                content += f'<br><span class="note" role="note">{escape(line["note"])}</span>'
            lines.append(dict(role=line["role"], content=content))
        return lines

    def ask(who, text, files, given):
        "(box, history)"
        if not text.strip() and not files:
            return gr.skip(), gr.skip()
        taken = desk.take(who, text, files, Settings(*given))
        return dict(text="", files=[]) if taken else gr.skip(), shown(who)

    def submit(request: gr.Request, box, *given):
        box = box or {}
        return ask(request.session_hash, box.get("text") or "", box.get("files") or [], given)

    return SimpleNamespace(shown=shown, ask=ask, submit=submit)


def answer_handlers(gr, desk, shown):
    "Answers, and what a box takes."
    from longva.web.desk import Settings

    def answer(request: gr.Request):
        """(history, panel, box), again and again. A question that needs a change comes back into the box together with
        the sentence that says so: a moment later it would overwrite what the visitor writes on having read that."""
        who = request.session_hash
        for _ in desk.answer(who):
            yield shown(who), panel(desk.talk(who)), desk.take_back(who) or gr.skip()
        # Gradio sends the last value again when all is done; by then the page may show a new conversation, or be closed
        if who in desk.talks:
            yield shown(who), panel(desk.talk(who)), gr.skip()
        else:
            yield gr.skip(), gr.skip(), gr.skip()

    def weigh(request: gr.Request, box, *given):
        takes = desk.weigh(request.session_hash, (box or {}).get("files") or [], Settings(*given))
        return panel(desk.talk(request.session_hash)) if takes is None else takes_panel(takes)

    return SimpleNamespace(answer=answer, weigh=weigh)


def session_handlers(gr, desk, shown):
    "Stop, a new conversation, the end of a page."

    def stop(request: gr.Request):
        desk.stop(request.session_hash)

    def renew(request: gr.Request):
        desk.renew(request.session_hash)
        return shown(request.session_hash), ""

    def look(request: gr.Request):
        return shown(request.session_hash), panel(desk.talk(request.session_hash))

    def leave(request: gr.Request):
        desk.leave(request.session_hash)

    return SimpleNamespace(stop=stop, renew=renew, look=look, leave=leave)


def example(gr, ask, text, file):
    "A button that asks; what it gives is read once."

    def click(request: gr.Request, *given):
        return ask(request.session_hash, text, [file], given)

    return click


# The layout, in the order of the page.


def place_conversation(gr, c, examples):
    from longva.web.desk import MOST_LETTERS

    with gr.Row(elem_id="examples"):
        c.buttons = []
        for i, (name, _, _) in enumerate(examples):
            c.buttons.append(gr.Button(name, size="sm", min_width=100, elem_id=f"example-{i}"))
    look = dict(render_markdown=False, buttons=[], layout="bubble")
    c.history = gr.Chatbot(show_label=False, height=340, elem_id="history", placeholder=WELCOME, **look)
    files = dict(file_count="multiple", sources=["upload"])  # of any name: what is in them decides
    text = dict(placeholder="Ask; the paper clip takes images and videos", max_plain_text_length=MOST_LETTERS)
    c.box = gr.MultimodalTextbox(show_label=False, elem_id="box", max_lines=4, **files, **text)
    with gr.Row():
        c.stop = gr.Button("Stop", elem_id="stop", variant="stop", size="sm")
        c.fresh = gr.Button("New conversation", elem_id="fresh", size="sm")
    c.about = gr.HTML(elem_id="takes", apply_default_css=False, js_on_load=None)


def place_settings(gr, c, start):
    from longva.web.desk import BY_NUMBER, BY_RATE

    def slider(low, high, value, step, label, name):
        return gr.Slider(low, high, value, step=step, label=label, elem_id=name, buttons=[])

    with gr.Accordion("Settings", open=False):
        with gr.Row():
            c.way = gr.Radio([BY_NUMBER, BY_RATE], value=start.way, label="Frames of a video", elem_id="way")
            c.frames = slider(1, 3000, start.frames, 1, "Frames, at most", "frames")
            c.rate = gr.Number(start.rate, label="Frames per second", minimum=0.001, elem_id="rate", visible=False)
        with gr.Row():
            c.temperature = slider(0, 2, start.temperature, 0.05, "Temperature (0: greedy)", "temperature")
            c.most = slider(1, 1024, start.most, 1, "Longest answer, in tokens", "most")
            c.seed = gr.Number(start.seed, precision=0, minimum=0, label="Seed of sampling", elem_id="seed")
    c.given = [c.frames, c.way, c.rate, c.temperature, c.most, c.seed]


# The events: which component calls which handler.

QUIET = dict(show_progress="hidden", api_visibility="private")
OFTEN = QUIET | dict(trigger_mode="multiple")  # by default Gradio drops what is asked while an answer is under way
IN_ORDER = OFTEN | dict(concurrency_id="order", concurrency_limit=1)  # else what came together is done in any order
ANSWERING = OFTEN | dict(concurrency_id="answer", concurrency_limit=1)


def connect_questions(gr, c, desk, question, examples):
    asked = [c.box.submit(question.submit, [c.box, *c.given], [c.box, c.history], **IN_ORDER)]
    for button, (_, text, file) in zip(c.buttons, examples):
        click = example(gr, question.ask, text, file)
        asked.append(button.click(click, c.given, [c.box, c.history], **IN_ORDER))
    reply = answer_handlers(gr, desk, question.shown)
    for event in asked:
        event.then(reply.answer, None, [c.history, c.about, c.box], **ANSWERING)
    changes = [c.box.change, c.frames.change, c.way.change, c.rate.change]
    weighing = dict(trigger_mode="always_last", concurrency_limit=4)
    gr.on(changes, reply.weigh, [c.box, *c.given], c.about, **QUIET, **weighing)


def connect_session(gr, page, c, desk, question):
    from longva.web.desk import BY_RATE

    c.way.change(lambda way: gr.update(visible=way == BY_RATE), c.way, c.rate, **QUIET)
    session = session_handlers(gr, desk, question.shown)
    c.stop.click(session.stop, None, None, concurrency_limit=None, **QUIET)
    # An answer's last words may come to the page after the empty conversation; once no answer is under way, they can't.
    renewed = c.fresh.click(session.renew, None, [c.history, c.about], **IN_ORDER)
    renewed.then(session.look, None, [c.history, c.about], **ANSWERING)
    page.unload(session.leave)


def build(gr, desk, about, examples):
    "The page."
    from longva.web.desk import Settings

    start = Settings(frames=FILM, most=16) if examples else Settings()
    question = question_handlers(gr, desk)
    with gr.Blocks(title="Chat about videos", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        c = SimpleNamespace()
        gr.Markdown(about, elem_classes="about")
        place_conversation(gr, c, examples)
        place_settings(gr, c, start)
        connect_questions(gr, c, desk, question, examples)
        connect_session(gr, page, c, desk, question)
        keep_listening(gr)
    return page.queue(max_size=2000)  # of all events; the desk has its own limit for questions


def write_examples(folder):
    "A video and an image of the miniature's world: [(name of a button, question, file)]."
    import numpy as np
    from PIL import Image

    from longva.mini.world import OBJECTS, draw_frame, scene_words, video_scenes, write_mini_video

    film = write_mini_video(folder / "film.mp4", FILM, SEED, side=56)
    sheet = folder / "picture.png"
    drawn = [draw_frame(scene) for scene in SHEET]
    Image.fromarray(np.vstack([np.hstack(drawn[:2]), np.hstack(drawn[2:])])).save(sheet)
    things = [scene_words(scene)[0] for scene in video_scenes(FILM, SEED)]
    once = [thing for thing in OBJECTS if things.count(thing) == 1]
    examples = [(f"Video: find {thing}", f"find {thing}", str(film)) for thing in once[:3]]
    return examples + [(f"Image: find {thing}", f"find {thing}", str(sheet)) for thing, *_ in SHEET[:2]]


def about(name, hint, share):
    "What the page says about the model."
    from longva.mini.world import OBJECTS

    text = ABOUT.format(escape(name), "" if share else "Nothing leaves this machine. ")
    if not hint:
        return text
    right = ""
    if name in RIGHT:
        right = f" Of objects that a video of {FILM} frames shows once, it named {RIGHT[name]} rightly."
    return text + MINIATURE.format(len(OBJECTS), right, ", ".join(OBJECTS))


def gibibytes(text):
    "An amount of memory from the command line."
    try:
        amount = float(text)
    except ValueError:
        amount = 0
    if 0 < amount < float("inf"):
        return amount
    raise argparse.ArgumentTypeError(f"an amount of memory is a number of GiB above 0, not {text}")


def options():
    parser = server_options("The chat app.", 7861)
    names = ", ".join(mini.NAMES)
    model = f"{names}, a folder, or a name on the Hugging Face hub (with HF_HUB_OFFLINE=0 it is fetched)"
    device = "for transformers: auto, cpu, cuda:1; by default the GPU if there is one"
    memory = "what one conversation may take beside the model; by default what is free"
    parser.add_argument("--model", default="mini-longva", help=model)
    parser.add_argument("--device-map", help=device)
    parser.add_argument("--memory", type=gibibytes, metavar="GIB", help=memory)
    return parser.parse_args()


def load(asked):
    "(model, processor), or the end with a sentence."
    from longva.commands.base import Usage
    from longva.commands.chat import chat_model
    from longva.model.prefill import ChatError

    try:
        return chat_model(asked.model, asked.device_map)
    except (ChatError, Usage, mini.UnknownModel) as error:
        sentence = str(error)
    is_hub_name = asked.model.count("/") == 1 and not Path(asked.model).exists()
    if is_hub_name and os.environ["HF_HUB_OFFLINE"] != "0":
        sentence += " It was looked for on this machine only; with HF_HUB_OFFLINE=0 it is fetched from the hub."
    sys.exit(sentence)


def make_desk(asked, model, processor, hint, examples):
    from longva.web.desk import Desk

    sample = "find heart" if hint else "What happens here?"
    own = [file for *_, file in examples]
    most_bytes = asked.memory and asked.memory * 2**30
    return Desk(model, processor, asked.model, sample, hint, own=own, most_bytes=most_bytes)


def main():
    asked = options()
    check_address(asked.host, asked.port)
    with upload_folder("longva-chat-") as room:
        print(f"Loading {asked.model} …", flush=True)
        model, processor = load(asked)
        import gradio as gr

        from longva.commands.chat import what_it_knows

        hint = what_it_knows(processor)
        examples = write_examples(room) if hint else []
        desk = make_desk(asked, model, processor, hint, examples)
        page = build(gr, desk, about(asked.model, hint, asked.share), examples)
        launch(gr, page, asked, css=CSS, max_file_size=LARGEST)


if __name__ == "__main__":
    main()
