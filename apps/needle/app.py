"""Hide a needle in a film, move it about, and watch a miniature find it or lose it.

    python apps/needle/app.py [--model mini-longva] [--demo runs/demo] [--host 127.0.0.1] [--port 7860] [--share]
"""
import os
import sys
from functools import lru_cache
from html import escape
from pathlib import Path

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}  # before gradio: nothing is fetched, nothing is sent

from longva import mini
from longva.web.serve import check_address, keep_listening, launch, remove_uploads, server_options, upload_folder

DEMO = Path(__file__).resolve().parents[2] / "runs" / "demo"
FILM_BYTES, PICTURE_BYTES, MOST_NEEDLES = 512 << 20, 20 << 20, 20  # of an upload; needles that one visitor may bring
MEAN = "mean of all layers and heads"
ABOUT = """
# Needle in a haystack
One foreign picture, the **needle**, is hidden in a film. The model gets the film and a question that only this picture answers: which colour, \
and on which ground? None of the three was ever trained on a film. `mini-longva` and `mini-anyres` (two ways to cut pictures) have a language model \
that was trained on long *text*, `mini-short` has not. **Try this:** take 256 frames, move the needle along the strip, then switch to `mini-short`. \
At how many frames does it begin to fail?
"""
LEGEND = """<div class="small pale">Each cell: right of all its trials; click it to see them. Ring: the needle now. Dotted: the longest text the language model was trained on, \
counted in frames. Grey: not run yet.</div>"""
LIMITS = """The miniature's world is small: drawn objects in eight colours on eight grounds. It answers `find OBJECT` with a colour and a ground, such as `pink checks`, and \
knows only {} words. Of a real film it sees 28 pixels a side. Uploads are removed as soon as they are read.
<details><summary>The words it knows</summary>{}</details>"""
SAVE = """text => {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([text], {type: 'application/jsonl'}));
    link.download = 'trials.jsonl';
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""


@lru_cache(maxsize=len(mini.NAMES))
def bench(name):
    "The bench of a miniature, shared by all visitors; its film is encoded the first time only."
    from longva.mini.bench import mini_bench
    return mini_bench(name)


def heads(config):
    "What the attention under the film can be: {name: index into layers and heads}."
    layers, each = config.num_hidden_layers, config.num_attention_heads
    return {MEAN: ...} | {f"layer {i}, mean of heads": i for i in range(layers)} | {f"layer {i}, head {j}": (i, j) for i in range(layers) for j in range(each)}


def heat_map(visit, demo, palette):
    "The map of a demo run with these weights, or of what was decided here."
    from longva.needle.bench import FRAMES, recorded
    from longva.study.demo import TRAIN_FRAMES
    from longva.web.page import map_html
    from longva.web.visit import lengths
    here = visit.bench(bench)
    columns, source = lengths(len(here.film)), visit.film[0] if visit.film else "filled here"
    trials, before = list(here.kept.values()), [] if visit.film or visit.filled else recorded(here, demo / visit.model)
    if before: trials, source, columns = before, "from the demo", FRAMES
    return map_html(trials, f"{visit.model}, {source}", columns, palette=palette, train_frames=TRAIN_FRAMES.get(visit.model), spot=(visit.frames, visit.depth), opened=visit.opened), trials


def opened(visit, trials):
    "The trials of the open cell."
    from longva.web.page import trials_html
    return trials_html([t for t in trials if (t.frames, t.depth) == visit.opened], visit.bench(bench).processor.tokenizer)


def look(visit, demo, palette, which):
    "Everything that follows from where the needle is."
    import numpy as np

    from longva.needle.bench import one_pass, strip
    from longva.web.page import card_html, needles_html, strip_html
    from longva.web.visit import look_here
    visit.palette = palette
    with one_pass:  # so that of two events at once the later one shows both changes
        here = visit.bench(bench)
        answer, seen = look_here(visit, here)
        weights = seen[heads(here.model.config.get_text_config())[which]]
        weights = weights.mean(tuple(range(np.ndim(weights) - 1)))
        film = strip_html(strip(here, visit.needle, visit.frames, visit.depth), visit.frames, visit.depth, weights, which)
        picture, trials = heat_map(visit, demo, palette)
        return film, needles_html(here.needles, visit.needle), card_html(answer), picture, opened(visit, trials)


def brought(path, most, read):
    "Read an upload that is not too large; it is removed, whatever comes of it."
    from longva.needle.trials import NeedleError
    try:
        if Path(path).stat().st_size > most: raise NeedleError(f"{Path(path).name} is larger than {most >> 20} MiB: make it smaller.")
        return read(path)
    finally: remove_uploads(path)


def trouble(error):
    return f'<div class="trouble" role="alert">{escape(str(error))}</div>'


def build(gr, first, demo):
    "The page."
    import json
    from dataclasses import asdict

    from longva.needle.bench import FRAMES, NEEDLES
    from longva.needle.needles import Needle
    from longva.needle.trials import NeedleError
    from longva.web.page import CLICK, DRAG
    from longva.web.visit import Visit, fill_here, read_picture, take_film, take_needle

    def shown(visit, palette, which):
        try: return visit, *look(visit, demo, palette, which)
        except (NeedleError, mini.UnknownModel) as error: raise gr.Error(str(error)) from None

    def sliders(visit):
        most = len(visit.bench(bench).film)
        return gr.update(minimum=min(FRAMES[0], most), maximum=most, step=16 if most == FRAMES[-1] else 1, value=visit.frames), round(100 * visit.depth, 2)

    def choose(visit, name, palette, which):
        visit.model, visit.opened = name, None
        return shown(visit, palette, which)

    def lengthen(visit, n, palette, which):
        visit.frames = int(n)
        return shown(visit, palette, which)

    def move(visit, percent, palette, which):
        visit.depth = percent / 100
        return shown(visit, palette, which)

    def drag(visit, palette, which, event: gr.EventData):
        visit.depth = min(max(float(event.depth), 0.0), 1.0)
        return round(100 * visit.depth, 2), *shown(visit, palette, which)

    def click_needle(visit, palette, which, event: gr.EventData):
        visit.needle = int(event.index)
        return shown(visit, palette, which)

    def click_cell(visit, palette, event: gr.EventData):
        cell = int(event.frames), float(event.depth)
        visit.opened = None if visit.opened == cell else cell
        picture, trials = heat_map(visit, demo, palette)
        return visit, picture, opened(visit, trials)

    def click_trial(visit, palette, which, event: gr.EventData):
        names = [n.name for n in visit.bench(bench).needles]
        if event.needle in names: visit.needle = names.index(event.needle)
        visit.frames, visit.depth = int(event.frames), float(event.depth)
        return *sliders(visit), *shown(visit, palette, which)

    def fill_map(visit):
        # while the map grows, the ring follows the needle, and colours can be changed; another model or film ends it
        visit.filled, here = True, visit.bench(bench)
        for _ in fill_here(here, len(visit.own)):
            if visit.benches.get(visit.model) is not here: break
            picture, trials = heat_map(visit, demo, visit.palette)
            if visit.benches.get(visit.model) is here: yield picture, opened(visit, trials)  # else it is the other one's picture that is wanted
        yield gr.skip(), gr.skip()  # Gradio sends what came last once more when all is over, and by then the page may show something newer

    def give_film(visit, path, palette, which):
        if path is None: return [gr.skip()] * 10
        try: brought(path, FILM_BYTES, lambda path: take_film(visit, bench, path))
        except NeedleError as error: return None, trouble(error), gr.skip(), gr.skip(), *shown(visit, palette, which)
        count = len(visit.film[1])
        said = f'<div class="small" role="status">The film is {escape(visit.film[0])} now, {count} of its frames, equally spaced.</div>'
        return None, said, *sliders(visit), *shown(visit, palette, which)

    def drawn_film(visit, palette, which):
        take_film(visit, bench, None)
        return None, "", *sliders(visit), *shown(visit, palette, which)

    def give_picture(visit, path):
        if path is None: return visit, gr.skip(), gr.skip()
        try: visit.picture = Path(path).stem, brought(path, PICTURE_BYTES, read_picture)
        except NeedleError as error: return visit, None, trouble(error)
        return visit, None, f'<div class="small" role="status">{escape(visit.picture[0])} is here. Now its question and its answer.</div>'

    def give_needle(visit, question, answer, palette, which):
        try:
            if visit.picture is None: raise NeedleError("There is no picture yet: give one first.")
            if len(visit.own) >= MOST_NEEDLES: raise NeedleError(f"{MOST_NEEDLES} needles were brought already: load the page again to begin anew.")
            name, taken = visit.picture[0], {n.name for n in visit.bench(bench).needles}
            name = next(n for n in (name, *(f"{name} {i}" for i in range(2, 99))) if n not in taken)
            take_needle(visit, bench, Needle(name, visit.picture[1], (question or "").strip(), (answer or "").strip()))
        except NeedleError as error: return trouble(error), *shown(visit, palette, which)
        return f'<div class="small" role="status">{escape(name)} is a needle now.</div>', *shown(visit, palette, which)

    def log(visit):
        return "".join(json.dumps(asdict(t), allow_nan=False) + "\n" for t in visit.bench(bench).kept.values())

    with gr.Blocks(title="Needle in a haystack", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        visit = gr.State(Visit(first))
        gr.Markdown(ABOUT, elem_classes="about")
        with gr.Row():
            with gr.Column(scale=5, min_width=430):
                model = gr.Radio(mini.NAMES, value=first, label="Model", elem_id="model")
                frames = gr.Slider(FRAMES[0], FRAMES[-1], 256, step=16, label="Frames of the film", elem_id="frames", buttons=[])
            with gr.Column(scale=6, min_width=430): needles = gr.HTML(elem_id="needles", js_on_load=CLICK, apply_default_css=False)
        film = gr.HTML(elem_id="strip", js_on_load=DRAG, apply_default_css=False)
        percent = gr.Slider(0, 100, 50, step=0.25, label="Depth of the needle, in percent of the film", elem_id="depth", buttons=[])
        with gr.Row():
            with gr.Column(scale=5, min_width=430):
                verdict = gr.HTML(elem_id="verdict", apply_default_css=False, js_on_load=None)
                which = gr.Dropdown(list(heads(bench(first).model.config.get_text_config())), value=MEAN, label="Attention under the film", elem_id="which")
            with gr.Column(scale=6, min_width=430):
                heat = gr.HTML(elem_id="heat", js_on_load=CLICK, apply_default_css=False)
                with gr.Row():
                    button = gr.Button(f"Fill the heat map ({NEEDLES} needles in each cell)", size="sm", elem_id="fill")
                    save = gr.Button("Download trials.jsonl", size="sm", elem_id="save")
                palette = gr.Radio([("the field's colours", "field"), ("for colour-blind eyes", "cividis")], value="field", show_label=False, container=False, elem_id="palette")
                gr.HTML(LEGEND, apply_default_css=False, js_on_load=None)
                listed = gr.HTML(elem_id="trials", js_on_load=CLICK, apply_default_css=False)
        with gr.Accordion("Bring your own film and needle", open=False, elem_id="own"):
            words = sorted(word for word in bench(first).processor.tokenizer.get_vocab() if word.isalpha())
            gr.Markdown(LIMITS.format(len(words), ", ".join(words)), elem_classes="about small")
            with gr.Row():
                with gr.Column(min_width=320):
                    video = gr.File(label=f"A film, up to {FILM_BYTES >> 20} MiB: 512 of its frames are taken", elem_id="video", height=160)
                    back = gr.Button("Back to the drawn film", size="sm", elem_id="back")
                    film_said = gr.HTML(elem_id="film-said", apply_default_css=False, js_on_load=None)
                with gr.Column(min_width=320):
                    picture = gr.File(label=f"A needle: a picture, up to {PICTURE_BYTES >> 20} MiB", elem_id="picture", height=160)
                    with gr.Row():
                        question = gr.Textbox(label="Question", placeholder="find heart", max_length=200, elem_id="question")
                        answer = gr.Textbox(label="Right answer", placeholder="pink checks", max_length=200, elem_id="answer")
                    hide = gr.Button("Hide this needle", size="sm", elem_id="hide")
                    needle_said = gr.HTML(elem_id="needle-said", apply_default_css=False, js_on_load=None)
        text = gr.Textbox(visible=False)

        views, looks = [visit, film, needles, verdict, heat, listed], [palette, which]
        quiet = dict(show_progress="hidden", trigger_mode="always_last", api_visibility="private", concurrency_limit=4, concurrency_id="look")
        clicked = quiet | dict(trigger_mode="multiple")  # what was clicked comes with the event, and "always_last" would keep the first
        page.load(shown, [visit, *looks], views, **quiet)
        gr.on([palette.input, which.input], shown, [visit, *looks], views, **quiet)
        model.input(choose, [visit, model, *looks], views, **quiet)
        frames.input(lengthen, [visit, frames, *looks], views, **quiet)
        percent.input(move, [visit, percent, *looks], views, **quiet)
        film.input(drag, [visit, *looks], [percent, *views], **clicked)
        needles.click(click_needle, [visit, *looks], views, **clicked)
        heat.click(click_cell, [visit, palette], [visit, heat, listed], **clicked)
        listed.click(click_trial, [visit, *looks], [frames, percent, *views], **clicked)
        button.click(fill_map, visit, [heat, listed], show_progress="minimal", api_visibility="private", concurrency_limit=4)
        save.click(log, visit, text, **quiet).then(None, text, None, js=SAVE, api_visibility="private")
        reading = quiet | dict(show_progress="minimal", trigger_mode="once", concurrency_limit=2, concurrency_id="read")
        video.upload(give_film, [visit, video, *looks], [video, film_said, frames, percent, *views], **reading)
        back.click(drawn_film, [visit, *looks], [video, film_said, frames, percent, *views], **reading)
        picture.upload(give_picture, [visit, picture], [visit, picture, needle_said], **reading)
        hide.click(give_needle, [visit, question, answer, *looks], [needle_said, *views], **reading)
        keep_listening(gr)
    return page.queue(max_size=64)


def options():
    parser = server_options("The needle app.", 7860)
    parser.add_argument("--model", default="mini-longva", help=f"the first to be shown: {', '.join(mini.NAMES)}")
    parser.add_argument("--demo", type=Path, default=DEMO, help="results of `longva demo`, for the heat maps")
    return parser.parse_args()


def main():
    asked = options()
    try: mini.folder(asked.model)
    except mini.UnknownModel as error: sys.exit(str(error))
    check_address(asked.host, asked.port)
    with upload_folder("longva-needle-"):
        print(f"Loading {asked.model} and its film …", flush=True)
        import gradio as gr
        from transformers.utils import logging

        from longva.web.page import CSS
        logging.disable_progress_bar()
        try: bench(asked.model)
        except mini.UnknownModel as error: sys.exit(str(error))
        page = build(gr, asked.model, asked.demo)
        launch(gr, page, asked, css=CSS, max_file_size=FILM_BYTES)


if __name__ == "__main__":
    main()
