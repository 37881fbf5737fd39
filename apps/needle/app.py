"""Hide a needle in a film, move it about, and watch a miniature find it or lose it.

    python apps/needle/app.py [--model mini-longva] [--demo runs/demo] [--host 127.0.0.1] [--port 7860] [--share]
"""
import base64
import io
import os
import sys
from functools import lru_cache
from html import escape
from pathlib import Path

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}  # before gradio: nothing is fetched, nothing is sent

from longva import mini
from longva.lab.serve import check_address, launch, server_options

DEMO = Path(__file__).resolve().parents[2] / "runs" / "demo"
ABOUT = """
# Needle in a haystack
One foreign picture, the **needle**, is hidden in a film. The model gets the film and a question that only this picture answers: which colour, \
and on which ground? None of the three was ever trained on a film. `mini-longva` and `mini-anyres` (two ways to cut pictures) have a language model \
that was trained on long *text*, `mini-short` has not. **Try this:** take 256 frames, move the needle along the strip, then switch to `mini-short`. \
At how many frames does it begin to fail?
"""
LEGEND = """<div class="small pale">Ring: the needle now. Dotted: the longest text the language model was trained on, counted in frames. \
Grey: not run yet. Point at a cell to see its trials.</div>"""
CSS = """
.gradio-container {max-width: 1280px !important}
.gradio-container main {padding: 0 24px 8px !important} .gradio-container main .column, .gradio-container main .row {gap: 8px}
.gradio-container .html-container {padding: 4px 0}
.about h1 {font-size: 1.4rem; margin: 0 0 .1rem} .about p {margin: 0; line-height: 1.4}
.gradio-container .pale {color: var(--neutral-600)} .dark .gradio-container .pale, .dark.gradio-container .pale {color: var(--neutral-300)}
.pictures {display: flex; gap: 3px}
.pictures button {flex: 1 1 0; min-width: 0; padding: 0; border: 0; background: none; cursor: pointer; font-size: 11px; line-height: 1.3}
.pictures img {display: block; width: 100%; aspect-ratio: 1; margin: 0; border-radius: 4px; box-sizing: border-box; border: 4px solid transparent}
.pictures button:hover img, .pictures button:focus-visible img {border-color: var(--neutral-400)}
.gradio-container .pictures .here {color: var(--body-text-color); font-weight: 700}
.pictures .here img, .pictures .here:hover img {border-color: #d55e00}
.needles {display: grid; grid-template-columns: repeat(10, 1fr)}
.head {font-size: 14px; line-height: 1.4; margin-bottom: 4px; color: var(--body-text-color)}
.card {color: var(--body-text-color); line-height: 1.4}
.verdict {display: inline-block; padding: 2px 14px; border-radius: 6px; color: white; font-size: 1.3rem; font-weight: 700}
.verdict.right, .bar.right {background: #00735a} .verdict.wrong, .bar.wrong {background: #b34700}
.card, .card td {overflow-wrap: anywhere} .card td:first-child {white-space: nowrap}
.card table {border-collapse: collapse; margin: 6px 0} .card td {padding: 3px 14px 3px 0; vertical-align: top}
.word {margin-right: 14px; font-weight: 700; font-size: 1.15rem; white-space: nowrap}
.scale {position: relative; height: 12px; margin: 4px 0; background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); width: 300px; max-width: 100%}
.bar {position: absolute; top: 0; bottom: 0} .scale i {position: absolute; left: 50%; top: -3px; bottom: -3px; border-left: 2px solid var(--body-text-color)}
.small {font-size: 13px}
@media (max-width: 900px) {.pictures {gap: 0} .pictures button {font-size: 8px} .pictures img {border-width: 2px}}
"""
CLICK = """element.addEventListener('click', event => {
    const button = event.target.closest('button[data-index]');
    if (button) trigger('click', {index: Number(button.dataset.index)});
});"""


@lru_cache(maxsize=len(mini.NAMES))
def bench(name):
    "The bench of a miniature; its film is encoded the first time only."
    from longva.lab.bench import mini_bench
    return mini_bench(name)


@lru_cache(maxsize=2048)
def _data_url(pixels, size):
    from PIL import Image
    file = io.BytesIO()
    Image.frombytes("RGB", size, pixels).resize((84, 84)).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def pictures(rows, kind=""):
    "A row of buttons from (picture, text below, text for screen readers, is it marked?)."
    button = '<button data-index="{}" class="{}" title="{}" aria-label="{}" aria-pressed="{}"><img src="{}" alt="">{}</button>'
    buttons = [button.format(i, "here" if here else "pale", escape(long), escape(long), str(here).lower(), _data_url(picture.tobytes(), picture.size), escape(text))
               for i, (picture, text, long, here) in enumerate(rows)]
    return f'<div class="pictures {kind}" role="group">{"".join(buttons)}</div>'


def strip_html(places, frames):
    "The film with the needle in it."
    rows = [(p.picture, "▲" if p.here else f"{p.depth:.0%}", f"{'The needle is here' if p.here else 'Put the needle here'}: {p.depth:.3g} deep", p.here) for p in places]
    head = f"The film: {len(places) - 1} of its {frames} frames, and the needle (▲). Click where it should go."
    return f'<div class="head">{head}</div>{pictures(rows)}'


def needles_html(needles, chosen):
    "All needles."
    rows = [(n.image, "", f"{n.question}? {n.answer}", i == chosen) for i, n in enumerate(needles)]
    return f'<div class="head">The needle: {escape(needles[chosen].question.removeprefix("find "))}</div>{pictures(rows, "needles")}'


def card(answer):
    "Question, answer and verdict, in words, symbols and colours."
    t, worst = answer.trial, answer.closest
    kind, symbol = ("right", "✓") if t.correct else ("wrong", "✗")
    said = "".join(f'<span class="word" title="probability {w.sure:.2f}">{"✓" if w.said == w.right else "✗"} {escape(w.said)}</span>' for w in answer.words)
    length = min(abs(t.margin) / 12, 1) * 50
    left = 50 if t.margin >= 0 else 50 - length
    why = f"“{escape(worst.right)}” is ahead of “{escape(worst.rival)}”" if t.correct else f"“{escape(worst.right)}” is behind “{escape(worst.rival)}”"
    return f"""<div class="card" data-correct="{str(t.correct).lower()}" data-insert="{t.insert}" data-frames="{t.frames}" data-margin="{t.margin:.4f}">
<span class="verdict {kind}" role="status">{symbol} {kind}</span>
<table><tr><td class="pale">Question</td><td class="question">{escape(answer.question)}</td></tr>
<tr><td class="pale">Answer</td><td class="answer">{said}</td></tr>
<tr><td class="pale">Should be</td><td>{escape(answer.right)}</td></tr>
<tr><td class="pale">Margin</td><td><b class="margin">{f"{t.margin:+.2f}".replace("-", "−")}</b> logits: {why}
<div class="scale"><span class="bar {kind}" style="left:{left:.1f}%;width:{length:.1f}%"></span><i></i></div></td></tr>
<tr><td class="pale">Place</td><td>behind <b class="insert">{t.insert}</b> of {t.frames} frames, {t.depth * 100:.4g}% deep</td></tr>
<tr><td class="pale">Time</td><td>{t.seconds * 1000:.0f} ms</td></tr></table>
<div class="small pale">As in the paper, each word is judged with the right words before it, and the answer is right if every word comes first.
The margin is the smallest lead of a right word over all others.</div></div>"""


def picture_of(model, spot, demo):
    "The heat map: of a demo run with these weights, or of what was filled here."
    from longva.lab.bench import growing_map, recorded
    from longva.lab.demo import TRAIN_FRAMES
    trials, source = list(bench(model).kept.values()), "filled here"
    if not trials: trials, source = recorded(bench(model), demo / model), "from the demo"
    figure = growing_map(trials, f"{model}, {source}" if trials else model, train_frames=TRAIN_FRAMES.get(model), spot=spot)
    return figure.update_layout(height=290, margin=dict(l=55, r=10, t=45, b=55))


def look(place, demo):
    "Everything that follows from where the needle is."
    from longva.lab.bench import strip
    here, where = bench(place["model"]), (place["needle"], place["frames"], place["depth"])
    answer = here.ask(*where)
    return strip_html(strip(here, *where), place["frames"]), needles_html(here.needles, place["needle"]), card(answer), picture_of(place["model"], where[1:], demo)


def build(gr, first, demo):
    "The page."
    from longva.lab.bench import FRAMES, NEEDLES, fill, strip
    from longva.needle.trials import NeedleError

    def shown(place):
        try: return look(place, demo)
        except (NeedleError, mini.UnknownModel) as error: raise gr.Error(str(error)) from None

    def move(place, model, frames, percent):
        place |= dict(model=model, frames=frames, depth=percent / 100)
        return shown(place)

    def click_strip(place, model, frames, percent, event: gr.EventData):
        places = strip(bench(model), place["needle"], frames, percent / 100)
        depth = places[min(max(int(event.index), 0), len(places) - 1)].depth
        return 100 * depth, *move(place, model, frames, 100 * depth)

    def click_needle(place, model, frames, percent, event: gr.EventData):
        place["needle"] = int(event.index)
        return move(place, model, frames, percent)

    def fill_map(place, model):
        # `place` is the session's own: while the map grows, the ring follows the needle, and another model ends it
        for _ in fill(bench(model)):
            if place["model"] != model: return
            yield picture_of(model, (place["frames"], place["depth"]), demo)

    with gr.Blocks(title="Needle in a haystack", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        place = gr.State(dict(model=first, needle=0, frames=256, depth=0.5))
        gr.Markdown(ABOUT, elem_classes="about")
        with gr.Row():
            with gr.Column(scale=5, min_width=430):
                model = gr.Radio(mini.NAMES, value=first, label="Model", elem_id="model")
                frames = gr.Slider(FRAMES[0], FRAMES[-1], 256, step=16, label="Frames of the film", elem_id="frames", buttons=[])
            with gr.Column(scale=6, min_width=430): needles = gr.HTML(elem_id="needles", js_on_load=CLICK, apply_default_css=False)
        film = gr.HTML(elem_id="strip", js_on_load=CLICK, apply_default_css=False)
        percent = gr.Slider(0, 100, 50, step=0.25, label="Depth of the needle, in percent of the film", elem_id="depth", buttons=[])
        with gr.Row():
            with gr.Column(scale=5, min_width=430): verdict = gr.HTML(elem_id="verdict", apply_default_css=False, js_on_load=None)
            with gr.Column(scale=6, min_width=430):
                heat = gr.Plot(show_label=False, elem_id="heat")
                button = gr.Button(f"Fill the heat map ({NEEDLES} needles in each cell)", size="sm", elem_id="fill")
                gr.HTML(LEGEND, apply_default_css=False, js_on_load=None)
        inputs, outputs = [place, model, frames, percent], [film, needles, verdict, heat]
        quiet = dict(show_progress="hidden", trigger_mode="always_last", api_visibility="private")
        page.load(move, inputs, outputs, **quiet)
        gr.on([model.input, frames.input, percent.input], move, inputs, outputs, **quiet)
        film.click(click_strip, inputs, [percent, *outputs], **quiet)
        needles.click(click_needle, inputs, outputs, **quiet)
        button.click(fill_map, [place, model], heat, show_progress="minimal", api_visibility="private")
    return page.queue(max_size=32)


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
    print(f"Loading {asked.model} and its film …", flush=True)
    import gradio as gr
    from transformers.utils import logging
    logging.disable_progress_bar()
    try: bench(asked.model)
    except mini.UnknownModel as error: sys.exit(str(error))
    page = build(gr, asked.model, asked.demo)
    launch(gr, page, asked, css=CSS)


if __name__ == "__main__":
    main()
