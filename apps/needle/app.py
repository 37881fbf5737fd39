"""Hide a needle in a video, move it about, and watch a miniature find it or lose it.

python apps/needle/app.py [--model mini-longva] [--demo runs/demo] [--host 127.0.0.1] [--port 7860] [--share]
"""

import json
import os
import sys
from dataclasses import asdict
from html import escape
from pathlib import Path
from types import SimpleNamespace

# before gradio: nothing is fetched, nothing is sent
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}

from longva import mini
from longva.web.serve import check_address, keep_listening, launch, remove_uploads, server_options, upload_folder

DEMO = Path(__file__).resolve().parents[2] / "runs" / "demo"
FILM_BYTES = 512 << 20  # of an uploaded video
PICTURE_BYTES = 20 << 20  # of an uploaded picture
MOST_NEEDLES = 20  # that one visitor may upload
MEAN = "mean of all layers and heads"
ABOUT = """
# Needle in a haystack
One foreign picture, the **needle**, is hidden in a video. The model gets the video and a question that only this \
picture answers: which colour, and on which background? None of the three models was ever trained on a video. \
`mini-longva` and `mini-anyres` (two ways to cut images into grids) have a language model that was trained on long \
*text*, `mini-short` has not. **Try this:** take 256 frames, move the needle along the strip, then switch to \
`mini-short`. At how many frames does it begin to fail?
"""
LEGEND = """
<div class="small pale">Each cell: right of all its trials; click it to see them. Ring: the needle now. \
Dotted: the longest text the language model was trained on, counted in frames. Grey: not run yet.</div>
"""
LIMITS = """
The miniature's world is small: drawn objects in eight colours on eight backgrounds. It answers `find OBJECT` with a \
colour and a background, such as `pink checks`, and knows only the words below. Of a real video it sees 28 pixels a \
side. Uploads are removed as soon as they are read.
<details><summary>The words it knows</summary>{}</details>
"""
# Gradio gives each radio button a name of its own; with one name for all, the tab key stops once and arrow keys choose.
RADIOS = """() => {
    for (const id of ['model', 'palette']) {
        const group = document.querySelector(`#${id} .wrap:has(input)`);
        group.setAttribute('role', 'radiogroup');
        group.setAttribute('aria-label', id === 'model' ? 'Model' : 'Colours of the heat map');
        const name = () => {
            for (const radio of group.querySelectorAll('input')) if (radio.name !== id) radio.name = id;
        };
        new MutationObserver(name).observe(group, {subtree: true, attributeFilter: ['name']});
        name();
    }
}"""
SAVE = """text => {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([text], {type: 'application/jsonl'}));
    link.download = 'trials.jsonl';
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""


def heads(config):
    "What the attention under the video can be: {name: index into layers and heads}."
    choices = {MEAN: ...}
    for layer in range(config.num_hidden_layers):
        choices[f"layer {layer}, mean of heads"] = layer
    for layer in range(config.num_hidden_layers):
        for head in range(config.num_attention_heads):
            choices[f"layer {layer}, head {head}"] = (layer, head)
    return choices


def demo_trials(visit, shared):
    "The demo's trials of this model, while the map shows them."
    return [] if visit.film or visit.filled else shared.recorded(visit.model)


def heat_map(visit, shared, palette):
    "The map of a demo run with these weights, or of what was decided here; and its trials."
    from longva.needle.bench import FRAMES
    from longva.study.demo import TRAIN_FRAMES
    from longva.web.page import map_html
    from longva.web.visit import lengths

    here = visit.bench(shared)
    trials = list(here.kept.values())
    columns = lengths(len(here.video))
    source = visit.film[0] if visit.film else "filled here"
    before = demo_trials(visit, shared)
    if before:
        trials = before
        columns = FRAMES
        source = "from the demo"
    marks = dict(train_frames=TRAIN_FRAMES.get(visit.model), spot=(visit.frames, visit.depth), opened=visit.opened)
    return map_html(trials, f"{visit.model}, {source}", columns, palette=palette, **marks), trials


def opened(visit, shared, trials):
    "The trials of the open cell."
    from longva.web.page import trials_html

    listed = [t for t in trials if (t.frames, t.depth) == visit.opened]
    return trials_html(listed, visit.bench(shared).processor.tokenizer)


def look(visit, shared, palette, which):
    "Everything that follows from where the needle is."
    import numpy as np

    from longva.needle.bench import one_pass, strip
    from longva.web.page import card_html, needles_html, strip_html
    from longva.web.visit import look_here

    visit.palette = palette
    with one_pass:  # so that of two events at once the later one shows both changes
        here = visit.bench(shared)
        answer, seen = look_here(visit, here)
        weights = seen[heads(here.model.config.get_text_config())[which]]
        weights = weights.mean(tuple(range(np.ndim(weights) - 1)))
        places = strip(here, visit.needle, visit.frames, visit.depth, visit.places)
        film = strip_html(places, visit.frames, visit.depth, weights, which)
        picture, trials = heat_map(visit, shared, palette)
        listed = opened(visit, shared, trials)
        return film, needles_html(here.needles, visit.needle), card_html(answer), picture, listed


def read_upload(path, most, read):
    "Read an upload that is not too large; it is removed, whatever comes of it."
    from longva.needle.trials import NeedleError

    try:
        if Path(path).stat().st_size > most:
            raise NeedleError(f"{Path(path).name} is larger than {most >> 20} MiB: make it smaller.")
        return read(path)
    finally:
        remove_uploads(path)


def trouble(error):
    return f'<div class="trouble" role="alert">{escape(str(error))}</div>'


def status(sentence):
    return f'<div class="small" role="status">{escape(sentence)}</div>'


# The handlers of events. Each gets a visit and what the page has chosen, and gives what changes on the page.


def view_handlers(gr, shared):
    "What every handler ends with: the page as it is after a change."
    from longva.needle.bench import FRAMES
    from longva.needle.trials import NeedleError

    def shown(visit, palette, which):
        try:
            return visit, *look(visit, shared, palette, which)
        except (NeedleError, mini.UnknownModel) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def slider(visit):
        most = len(visit.bench(shared).video)
        least = FRAMES[0] if most == FRAMES[-1] else 1  # which is below the shortest video, of two frames
        return gr.update(minimum=least, maximum=most, step=least, value=visit.frames)

    return SimpleNamespace(shown=shown, slider=slider)


def slider_handlers(view, shared):
    "Model and length."

    def choose(visit, name, palette, which):
        visit.model = name
        visit.opened = None
        return view.shown(visit, palette, which)

    def lengthen(visit, n, palette, which):
        visit.frames = min(max(int(n), 1), len(visit.bench(shared).video))
        return view.shown(visit, palette, which)

    return SimpleNamespace(choose=choose, lengthen=lengthen)


def click_handlers(gr, view, shared):
    "Clicks and drags; what was clicked comes with the event, and is checked before the visit changes."
    from longva.needle.bench import FRAMES
    from longva.needle.trials import NeedleError
    from longva.web.visit import event_number

    def number(event, name, high, low=0):
        try:
            return event_number(event, name, low, high)
        except NeedleError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def drag(visit, palette, which, event: gr.EventData):
        depth = number(event, "depth", 1)
        visit.places = int(number(event, "places", 21, 2))
        visit.depth = depth
        return view.shown(visit, palette, which)

    def click_needle(visit, palette, which, event: gr.EventData):
        visit.needle = int(number(event, "index", len(visit.bench(shared).needles) - 1))
        return view.shown(visit, palette, which)

    def click_cell(visit, palette, event: gr.EventData):
        cell = int(number(event, "frames", FRAMES[-1], 1)), number(event, "depth", 1)
        visit.opened = None if visit.opened == cell else cell
        picture, trials = heat_map(visit, shared, palette)
        return visit, picture, opened(visit, shared, trials)

    def click_trial(visit, palette, which, event: gr.EventData):
        frames = int(number(event, "frames", len(visit.bench(shared).video), 1))
        depth = number(event, "depth", 1)
        names = [needle.name for needle in visit.bench(shared).needles]
        why_not = shared.why_not(visit.model) if demo_trials(visit, shared) else ""
        needle = str(getattr(event, "needle", ""))[:80]
        if needle not in names:
            why_not = why_not or "this needle is not here any more"
        if why_not:
            _, trials = heat_map(visit, shared, palette)
            said = trouble(f"The trial of {needle} can't be repeated: {why_not}.")
            return [gr.skip()] * 6 + [said + opened(visit, shared, trials)]
        visit.needle = names.index(needle)
        visit.frames = frames
        visit.depth = depth
        return view.slider(visit), *view.shown(visit, palette, which)

    return SimpleNamespace(drag=drag, click_needle=click_needle, click_cell=click_cell, click_trial=click_trial)


def map_handlers(gr, shared):
    "The heat map fills, and the log is downloaded."
    from longva.web.visit import fill_here

    def fill_map(visit):
        # while the map grows, the ring follows the needle, and colours can be changed; another model or film ends it
        visit.filled = True
        here = visit.bench(shared)
        for _ in fill_here(here, len(visit.own)):
            if visit.benches.get(visit.model) is not here:
                break
            picture, trials = heat_map(visit, shared, visit.palette)
            if visit.benches.get(visit.model) is here:  # else the page shows another map by now
                yield picture, opened(visit, shared, trials)
        # Gradio sends the last value again when all is over, and by then the page may show something newer
        yield gr.skip(), gr.skip()

    def log(visit):
        lines = [json.dumps(asdict(t), allow_nan=False) + "\n" for t in visit.bench(shared).kept.values()]
        return "".join(lines)

    return SimpleNamespace(fill_map=fill_map, log=log)


def film_handlers(gr, view, shared):
    "A video of the visitor's, and the drawn one again."
    from longva.needle.trials import NeedleError
    from longva.web.visit import take_film

    def give_film(visit, path, palette, which):
        if path is None:
            return [gr.skip()] * 9
        try:
            read_upload(path, FILM_BYTES, lambda path: take_film(visit, shared, path))
        except NeedleError as error:
            return None, trouble(error), gr.skip(), *view.shown(visit, palette, which)
        name, film, _ = visit.film
        sentence = f"The video is {name} now, {len(film)} of its frames, equally spaced."
        return None, status(sentence), view.slider(visit), *view.shown(visit, palette, which)

    def drawn_film(visit, palette, which):
        take_film(visit, shared, None)
        return None, "", view.slider(visit), *view.shown(visit, palette, which)

    return SimpleNamespace(give_film=give_film, drawn_film=drawn_film)


def new_needle(visit, shared, question, answer):
    "Hide the visitor's picture under a name of its own; the name."
    from longva.needle.needles import Needle
    from longva.needle.trials import NeedleError
    from longva.web.visit import take_needle

    if visit.picture is None:
        raise NeedleError("There is no picture yet: give one first.")
    if len(visit.own) >= MOST_NEEDLES:
        raise NeedleError(f"{MOST_NEEDLES} needles were added already: load the page again to start over.")
    name, picture = visit.picture
    taken = {needle.name for needle in visit.bench(shared).needles}
    names = [name, *(f"{name} {i}" for i in range(2, 99))]
    name = next(free for free in names if free not in taken)
    take_needle(visit, shared, Needle(name, picture, (question or "").strip(), (answer or "").strip()))
    return name


def picture_handlers(gr, view, shared):
    "A needle of the visitor's."
    from longva.needle.trials import NeedleError
    from longva.web.visit import read_picture

    def give_picture(visit, path):
        if path is None:
            return visit, gr.skip(), gr.skip()
        name = Path(path).stem
        try:
            visit.picture = name, read_upload(path, PICTURE_BYTES, read_picture)
        except NeedleError as error:
            return visit, None, trouble(error)
        return visit, None, status(f"{name} is here. Now its question and its answer.")

    def give_needle(visit, question, answer, palette, which):
        try:
            name = new_needle(visit, shared, question, answer)
        except NeedleError as error:
            return trouble(error), *view.shown(visit, palette, which)
        return status(f"{name} was added as a needle."), *view.shown(visit, palette, which)

    return SimpleNamespace(give_picture=give_picture, give_needle=give_needle)


# The layout, in the order of the page. Each function puts its components where it is called.


def html(gr, name, script=None):
    return gr.HTML(elem_id=name, js_on_load=script, apply_default_css=False)


def place_controls(gr, c, first):
    from longva.needle.bench import FRAMES
    from longva.web.page import CLICK, DRAG

    with gr.Row():
        with gr.Column(scale=5, min_width=400):
            c.model = gr.Radio(mini.NAMES, value=first, label="Model", elem_id="model")
            length = dict(step=16, label="Frames of the video", elem_id="frames", buttons=[])
            c.frames = gr.Slider(FRAMES[0], FRAMES[-1], 256, **length)
        with gr.Column(scale=6, min_width=400):
            c.needles = html(gr, "needles", CLICK)
    c.film = html(gr, "strip", DRAG)


def place_results(gr, c, here):
    from longva.needle.bench import NEEDLES
    from longva.web.page import CLICK

    with gr.Row():
        with gr.Column(scale=5, min_width=400):
            c.verdict = html(gr, "verdict")
            choices = list(heads(here.model.config.get_text_config()))
            c.which = gr.Dropdown(choices, value=MEAN, label="Attention under the video", elem_id="which")
        with gr.Column(scale=6, min_width=400):
            c.heat = html(gr, "heat", CLICK)
            with gr.Row():
                c.fill = gr.Button(f"Fill the heat map ({NEEDLES} needles in each cell)", size="sm", elem_id="fill")
                c.save = gr.Button("Download trials.jsonl", size="sm", elem_id="save")
            palettes = [("standard colours", "field"), ("colour-blind safe", "cividis")]
            c.palette = gr.Radio(palettes, value="field", show_label=False, container=False, elem_id="palette")
            gr.HTML(LEGEND, apply_default_css=False, js_on_load=None)
            c.listed = html(gr, "trials", CLICK)


def place_uploads(gr, c, here):
    words = sorted(word for word in here.processor.tokenizer.get_vocab() if word.isalpha())
    with gr.Accordion("Use your own video and needle", open=False, elem_id="own"):
        gr.Markdown(LIMITS.format(", ".join(words)), elem_classes="about small")
        with gr.Row():
            with gr.Column(min_width=400):
                label = f"A video, up to {FILM_BYTES >> 20} MiB: 512 of its frames are taken"
                c.video = gr.File(label=label, elem_id="video", height=160)
                c.back = gr.Button("Back to the drawn video", size="sm", elem_id="back")
                c.film_said = html(gr, "film-said")
            with gr.Column(min_width=400):
                label = f"A needle: a picture, up to {PICTURE_BYTES >> 20} MiB"
                c.picture = gr.File(label=label, elem_id="picture", height=160)
                with gr.Row():
                    text = dict(max_length=200)
                    c.question = gr.Textbox(label="Question", placeholder="find heart", elem_id="question", **text)
                    c.answer = gr.Textbox(label="Right answer", placeholder="pink checks", elem_id="answer", **text)
                c.hide = gr.Button("Hide this needle", size="sm", elem_id="hide")
                c.needle_said = html(gr, "needle-said")
    c.log_text = gr.Textbox(visible=False)


# The events: which component calls which handler.

QUIET = dict(
    show_progress="hidden",
    trigger_mode="always_last",
    api_visibility="private",
    concurrency_limit=4,
    concurrency_id="look",
)
CLICKED = QUIET | dict(trigger_mode="multiple")  # "always_last" would keep what the first click brought
READING = QUIET | dict(show_progress="minimal", trigger_mode="once", concurrency_limit=2, concurrency_id="read")


def connect_views(gr, page, c, view, shared):
    looks = [c.palette, c.which]
    views = [c.visit, c.film, c.needles, c.verdict, c.heat, c.listed]
    slide = slider_handlers(view, shared)
    page.load(view.shown, [c.visit, *looks], views, **QUIET)
    page.load(None, None, None, js=RADIOS, api_visibility="private")
    gr.on([c.palette.input, c.which.input], view.shown, [c.visit, *looks], views, **QUIET)
    c.model.input(slide.choose, [c.visit, c.model, *looks], views, **QUIET)
    c.frames.input(slide.lengthen, [c.visit, c.frames, *looks], views, **QUIET)
    click = click_handlers(gr, view, shared)
    c.film.input(click.drag, [c.visit, *looks], views, **CLICKED)
    c.needles.click(click.click_needle, [c.visit, *looks], views, **CLICKED)
    c.heat.click(click.click_cell, [c.visit, c.palette], [c.visit, c.heat, c.listed], **CLICKED)
    c.listed.click(click.click_trial, [c.visit, *looks], [c.frames, *views], **CLICKED)


def connect_map(gr, c, shared):
    grow = map_handlers(gr, shared)
    filling = dict(show_progress="minimal", api_visibility="private", concurrency_limit=4)
    c.fill.click(grow.fill_map, c.visit, [c.heat, c.listed], **filling)
    saved = c.save.click(grow.log, c.visit, c.log_text, **QUIET)
    saved.then(None, c.log_text, None, js=SAVE, api_visibility="private")


def connect_uploads(gr, c, view, shared):
    looks = [c.palette, c.which]
    views = [c.visit, c.film, c.needles, c.verdict, c.heat, c.listed]
    films = film_handlers(gr, view, shared)
    after_film = [c.video, c.film_said, c.frames, *views]
    c.video.upload(films.give_film, [c.visit, c.video, *looks], after_film, **READING)
    c.back.click(films.drawn_film, [c.visit, *looks], after_film, **READING)
    pictures = picture_handlers(gr, view, shared)
    c.picture.upload(pictures.give_picture, [c.visit, c.picture], [c.visit, c.picture, c.needle_said], **READING)
    c.hide.click(pictures.give_needle, [c.visit, c.question, c.answer, *looks], [c.needle_said, *views], **READING)


def build(gr, first, shared):
    "The page."
    from longva.web.visit import Visit

    view = view_handlers(gr, shared)
    with gr.Blocks(title="Needle in a haystack", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        c = SimpleNamespace(visit=gr.State(Visit(first)))
        gr.Markdown(ABOUT, elem_classes="about")
        place_controls(gr, c, first)
        place_results(gr, c, shared(first))
        place_uploads(gr, c, shared(first))
        connect_views(gr, page, c, view, shared)
        connect_map(gr, c, shared)
        connect_uploads(gr, c, view, shared)
        keep_listening(gr)
    return page.queue(max_size=1000)  # so that one visitor with many events does not shut the others out


def options():
    parser = server_options("The needle app.", 7860)
    parser.add_argument("--model", default="mini-longva", help=f"the first to be shown: {', '.join(mini.NAMES)}")
    parser.add_argument("--demo", type=Path, default=DEMO, help="results of `longva demo`, for the heat maps")
    return parser.parse_args()


def main():
    asked = options()
    try:
        mini.folder(asked.model)
    except mini.UnknownModel as error:
        sys.exit(str(error))
    check_address(asked.host, asked.port)
    with upload_folder("longva-needle-"):
        print(f"Loading {asked.model} and its video …", flush=True)
        import gradio as gr
        from transformers.utils import logging

        from longva.web.page import CSS
        from longva.web.visit import SharedBenches

        logging.disable_progress_bar()
        shared = SharedBenches(asked.demo)
        try:
            shared(asked.model)
        except mini.UnknownModel as error:
            sys.exit(str(error))
        launch(gr, build(gr, asked.model, shared), asked, css=CSS, max_file_size=FILM_BYTES)


if __name__ == "__main__":
    main()
