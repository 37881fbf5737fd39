"""Talk with a LongVA about images and films; the miniature that comes with the package is the default.

    python apps/chat/app.py [--model mini-longva] [--device-map auto] [--memory GIB] [--host 127.0.0.1] [--port 7861] [--share]
"""
import argparse
import os
import sys
from html import escape
from pathlib import Path

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}  # before gradio: nothing is sent

from longva import mini
from longva.web.serve import check_address, keep_listening, launch, server_options, upload_folder

LARGEST = 2 << 30  # bytes of an upload
FILM, SEED = 96, 11  # frames of the example film, and what it shows
SHEET = [("heart", "blue", "rows"), ("cup", "yellow", "dots"), ("cloud", "pink", "checks"), ("bolt", "green", "slant")]  # on the example picture, and not in the film
RIGHT = {"mini-longva": "213 of 214", "mini-anyres": "103 of 107", "mini-short": "only 15 of 107"}  # objects that are shown once in films of 96 frames
ABOUT = """
# Chat about films
Give images or videos to **{}**, and ask. What was read stays in the model's memory (its key/value cache), so that the next question does not read it again. {}\
Uploads are removed as soon as they are answered.
"""
MINIATURE = """
It is a miniature and knows a tiny world: {} drawn objects in eight colours on eight grounds. **Ask** `find OBJECT`, and it answers with the colour and the ground.{} \
**Don't ask** anything else: it cannot describe, count or read, it knows nothing of real films, and of an object that is shown several times, or never, it says something all the same. \
The buttons give it a film or a picture, once, and ask.
<details><summary>The objects</summary>{}</details>
"""
CSS = """
.gradio-container {max-width: 1080px !important; width: 100%; margin: 0 auto !important} .gradio-container .fillable {max-width: none !important; padding-left: 0; padding-right: 0}
.gradio-container main {padding: 0 24px 8px !important} .gradio-container main .column, .gradio-container main .row {gap: 8px}
.gradio-container .html-container {padding: 4px 0} #history .top-panel {display: none}  /* a second New conversation, which would forget the page's lines only */
.about h1 {font-size: 1.4rem; margin: 0 0 .1rem} .about p {margin: 0 0 .2rem; line-height: 1.4} .about summary {cursor: pointer}
.takes {color: var(--body-text-color); line-height: 1.4; font-size: 14px; overflow-x: auto} .takes table {border-collapse: collapse}
.takes td, .takes th {padding: 1px 18px 1px 0; text-align: left; font-weight: 400; white-space: nowrap} .takes th {color: var(--neutral-600)}
.dark .takes th {color: var(--neutral-300)} .takes .small {font-size: 13px}
.trouble {border-left: 4px solid #d55e00; padding: 2px 10px; margin: 2px 0; color: var(--body-text-color); line-height: 1.4}
.seen {display: flex; gap: 3px; flex-wrap: wrap} .seen img {width: 56px; height: 56px; object-fit: cover; border-radius: 4px; margin: 0}
"""


def build(gr, desk, about, examples):
    "The page; each of its events is a method of the desk."
    from longva.web.desk import BY_NUMBER, BY_RATE, Settings, Trouble, trouble_html
    start = Settings(frames=FILM, most=16) if examples else Settings()

    # Whenever a value follows on gr.skip(), Gradio keeps one more copy of the component with its value for as long as it knows the page. So what is
    # shown is said again, and skips are for the rare cases and for the small box.

    def shown(who):
        "The lines of a conversation as Gradio wants them."
        return [line | dict(content=gr.HTML(trouble_html(line["content"]))) if isinstance(line["content"], Trouble) else dict(line) for line in desk.talk(who).lines]

    def panel(talk): return takes_panel(talk.takes, talk.seen) if talk.lines else ""

    def ask(who, text, files, given):
        "(box, history)"
        if not text.strip() and not files: return gr.skip(), gr.skip()
        taken = desk.take(who, text, files, Settings(*given))
        return dict(text="", files=[]) if taken else gr.skip(), shown(who)

    def submit(request: gr.Request, box, *given):
        return ask(request.session_hash, (box or {}).get("text") or "", (box or {}).get("files") or [], given)

    def answer(request: gr.Request):
        "(history, panel), again and again."
        who = request.session_hash
        for _ in desk.answer(who):
            talk = desk.talk(who)
            yield shown(who), panel(talk)
        # Gradio says the last one again when all is done, and by then the page may show a new conversation, or be closed
        yield (shown(who), panel(desk.talk(who))) if who in desk.talks else (gr.skip(), gr.skip())

    def back(request: gr.Request): return desk.back(request.session_hash) or gr.skip()

    def weigh(request: gr.Request, box, *given):
        takes = desk.weigh(request.session_hash, (box or {}).get("files") or [], Settings(*given))
        return panel(desk.talk(request.session_hash)) if takes is None else takes_panel(takes)

    def stop(request: gr.Request): desk.stop(request.session_hash)

    def renew(request: gr.Request):
        desk.renew(request.session_hash)
        return shown(request.session_hash), ""

    def look(request: gr.Request):
        talk = desk.talk(request.session_hash)
        return shown(request.session_hash), panel(talk)

    def leave(request: gr.Request): desk.leave(request.session_hash)

    with gr.Blocks(title="Chat about films", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(about, elem_classes="about")
        with gr.Row(elem_id="examples"): buttons = [gr.Button(name, size="sm", min_width=100, elem_id=f"example-{i}") for i, (name, _, _) in enumerate(examples)]
        history = gr.Chatbot(show_label=False, height=340, elem_id="history", render_markdown=False, buttons=[], layout="bubble")
        box = gr.MultimodalTextbox(show_label=False, file_types=["image", "video"], file_count="multiple", sources=["upload"], elem_id="box", max_lines=4,
                                   placeholder="Ask; the paper clip takes images and videos", max_plain_text_length=100_000)
        with gr.Row():
            halt = gr.Button("Stop", elem_id="stop", variant="stop", size="sm")
            fresh = gr.Button("New conversation", elem_id="fresh", size="sm")
        about = gr.HTML(elem_id="takes", apply_default_css=False, js_on_load=None)
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                way = gr.Radio([BY_NUMBER, BY_RATE], value=start.way, label="Take of a video", elem_id="way")
                frames = gr.Slider(1, 3000, start.frames, step=1, label="Frames, at most", elem_id="frames", buttons=[])
                rate = gr.Number(start.rate, label="Frames per second", minimum=0.001, elem_id="rate", visible=False)
            with gr.Row():
                temperature = gr.Slider(0, 2, start.temperature, step=0.05, label="Temperature (0: the likeliest word)", elem_id="temperature", buttons=[])
                most = gr.Slider(1, 1024, start.most, step=1, label="Longest answer, in tokens", elem_id="most", buttons=[])
                seed = gr.Number(start.seed, precision=0, minimum=0, label="Seed (one seed, one text)", elem_id="seed")
        given, quiet = [frames, way, rate, temperature, most, seed], dict(show_progress="hidden", api_visibility="private")
        often = quiet | dict(trigger_mode="multiple")  # by default Gradio drops what is asked while an answer is under way
        in_order = often | dict(concurrency_id="order", concurrency_limit=1)  # and does what came together in any order
        asked = [box.submit(submit, [box, *given], [box, history], **in_order)]
        for button, (_, text, file) in zip(buttons, examples):
            asked.append(button.click(example(gr, ask, text, file), given, [box, history], **in_order))
        for event in asked: event.then(answer, None, [history, about], **often, concurrency_limit=1, concurrency_id="answer").then(back, None, box, concurrency_limit=None, **often)
        gr.on([box.change, frames.change, way.change, rate.change], weigh, [box, *given], about, **quiet, trigger_mode="always_last", concurrency_limit=4)
        way.change(lambda way: gr.update(visible=way == BY_RATE), way, rate, **quiet)
        halt.click(stop, None, None, queue=False, **quiet)
        # An answer's last words may come to the page after the empty conversation; when no answer is under way, they can't any more.
        fresh.click(renew, None, [history, about], **in_order).then(look, None, [history, about], **often, concurrency_limit=1, concurrency_id="answer")
        page.unload(leave)
        keep_listening(gr)
    return page.queue(max_size=200)  # of all events; the desk has its own limit for questions


def takes_panel(takes, seen=""):
    return f'<div class="takes">{seen}{takes}</div>'


def example(gr, ask, text, file):
    "A button that asks; what it gives is read once."
    def click(request: gr.Request, *given): return ask(request.session_hash, text, [file], given)
    return click


def write_examples(folder):
    "A film and a picture of the miniature's world: [(name of a button, question, file)]."
    import numpy as np
    from PIL import Image

    from longva.mini.world import OBJECTS, draw_frame, film_scenes, scene_words, write_film
    film, sheet = write_film(folder / "film.mp4", FILM, SEED, side=56), folder / "picture.png"
    drawn, things = [draw_frame(scene) for scene in SHEET], [scene_words(scene)[0] for scene in film_scenes(FILM, SEED)]
    Image.fromarray(np.vstack([np.hstack(drawn[:2]), np.hstack(drawn[2:])])).save(sheet)
    once = [thing for thing in OBJECTS if things.count(thing) == 1]
    return [(f"Film: find {thing}", f"find {thing}", str(film)) for thing in once[:3]] + [(f"Picture: find {thing}", f"find {thing}", str(sheet)) for thing, *_ in SHEET[:2]]


def about(name, hint, share):
    "What the page says about the model."
    from longva.mini.world import OBJECTS
    text = ABOUT.format(escape(name), "" if share else "Nothing leaves this machine. ")
    if not hint: return text
    right = f" Of objects that a film of {FILM} frames shows once, it named {RIGHT[name]} rightly." if name in RIGHT else ""
    return text + MINIATURE.format(len(OBJECTS), right, ", ".join(OBJECTS))


def gibibytes(text):
    "An amount of memory from the command line."
    try: amount = float(text)
    except ValueError: amount = 0
    if not 0 < amount < float("inf"): raise argparse.ArgumentTypeError(f"an amount of memory is a number of GiB above 0, not {text}")
    return amount


def options():
    parser = server_options("The chat app.", 7861)
    parser.add_argument("--model", default="mini-longva", help=f"{', '.join(mini.NAMES)}, a folder, or a name on the Hugging Face hub (with HF_HUB_OFFLINE=0 it is fetched)")
    parser.add_argument("--device-map", help="for transformers: auto, cpu, cuda:1; by default the GPU if there is one")
    parser.add_argument("--memory", type=gibibytes, metavar="GIB", help="what one conversation may take beside the model; by default what is free")
    return parser.parse_args()


def load(asked):
    "(model, processor), or the end with a sentence."
    from longva.commands.base import Usage
    from longva.commands.chat import chat_model
    from longva.model.prefill import ChatError
    try: return chat_model(asked.model, asked.device_map)
    except (ChatError, Usage, mini.UnknownModel) as error:
        hub = asked.model.count("/") == 1 and not Path(asked.model).exists() and os.environ["HF_HUB_OFFLINE"] != "0"
        sys.exit(f"{error}{' It was looked for on this machine only; with HF_HUB_OFFLINE=0 it is fetched from the hub.' * hub}")


def main():
    asked = options()
    check_address(asked.host, asked.port)
    with upload_folder("longva-chat-") as room:
        print(f"Loading {asked.model} …", flush=True)
        model, processor = load(asked)
        import gradio as gr

        from longva.commands.chat import what_it_knows
        from longva.web.desk import Desk
        hint = what_it_knows(processor)
        examples, sample = (write_examples(room), "find heart") if hint else ([], "What happens here?")
        desk = Desk(model, processor, asked.model, sample, hint, own=[file for *_, file in examples], most_bytes=asked.memory and asked.memory * 2**30)
        launch(gr, build(gr, desk, about(asked.model, hint, asked.share), examples), asked, css=CSS, max_file_size=LARGEST)


if __name__ == "__main__":
    main()
