"""Run the reduced experiments behind nbs/paper/ and `longva paper`, and record them.

    .venv/bin/python benchmarks/paper.py                 all, ten minutes on one core
    .venv/bin/python benchmarks/paper.py bases images    these

Parts: bases (RoPE bases without training), sampling (more frames of the same video), images (UniRes and AnyRes on
images), text (the text needle test with distractors, after training the reader), dpo (a preference learned from
pairs), beyond (videos longer than the text that was trained on), generated (forced verdicts beside generated
answers). Each leaves one JSON file in benchmarks/results/paper/, with its settings, versions and machine, and keeps
its work in runs/paper/. Videos, needles and images come from seeds that nothing was trained or chosen on. Shares
are pairs [right, trials].
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

RESULTS = Path(__file__).resolve().parent / "results" / "paper"
WORK = Path("runs/paper")
DEPTHS, SEED = (0, 0.25, 0.5, 0.75, 1), 20270114


def film(frames, seed):
    """Write a video and needles of the miniature's world."""
    from longva.mini.world import draw_needles, write_mini_video
    from longva.needle.needles import keep_needles

    WORK.mkdir(parents=True, exist_ok=True)
    file = WORK / f"film-{seed}.mp4"
    needles = keep_needles(draw_needles(20, seed), WORK / f"needles-{seed}")
    return file if file.exists() else write_mini_video(file, frames, seed), needles


def bases():
    """mini-short with other RoPE bases, mini-longva beside it: shares by base and length."""
    from longva.mini import TEXT_FRAMES
    from longva.study.ablate import ablate, product

    haystack, needles = film(512, SEED)
    tried = (1e3, 1e4, 1e5, 1e6, 1e9)
    settings = product(model="mini-short", theta=[None, *tried]) + product(model="mini-longva")
    runs = ablate(
        settings,
        WORK / "bases",
        haystack=haystack,
        needles=needles,
        frames=(16, 64, 256),
        depths=(0.25, 0.75),
        seed=SEED,
    )
    rows = [
        dict(
            model=r.setting["model"],
            theta=r.setting.get("theta"),
            by_frames={str(n): list(k) for n, k in r.counts.items()},
        )
        for r in runs
    ]
    return dict(
        seed=SEED,
        depths=[0.25, 0.75],
        needles=20,
        text_frames={m: TEXT_FRAMES[m] for m in ("mini-longva", "mini-short")},
        runs=rows,
    )


def shot_trials(reader, needles, starts, count, seconds, shot):
    """Ask for each needle at each start, with `count` of the frames read: (how often right, how often seen)."""
    import numpy as np

    from longva.needle.sweep import judge
    from longva.needle.vniah import Spot, answer_logits

    prompts = [reader.prompt(needle) for needle in needles]
    hidden = reader.encode_needles(needles)
    taken = np.linspace(0, seconds - 1, count).astype(int)
    right = 0
    seen = 0
    for j, prompt in enumerate(prompts):
        for start in starts[j]:
            tokens = reader.haystack.clone()
            tokens[start : start + shot] = hidden[j]
            seen += int(((taken >= start) & (taken < start + shot)).any())
            logits = answer_logits(reader.with_tokens(tokens[taken]), prompts, [Spot(j, count, 0.0)])[0]
            right += bool(judge(logits, prompt.answer)[1])
    return right, seen


def sampling():
    """Read a video of 512 seconds with a shot of 8 seconds in it through more and more frames."""
    import numpy as np

    from longva.mini import load
    from longva.mini.world import video_frames
    from longva.needle.needles import load_needles
    from longva.needle.reader import Reader

    seconds = 512
    shot = 8
    places = 5
    needles = load_needles(film(512, SEED + 1)[1])
    trials = len(needles) * places
    found = {}
    visible = {}
    for name in ("mini-longva", "mini-short"):
        reader = Reader(*load(name))
        reader = reader.with_tokens(reader.encode(video_frames(seconds, SEED + 1)))
        starts = np.random.default_rng(SEED + 1).integers(0, seconds - shot, (len(needles), places))
        found[name] = {}
        for count in (4, 8, 16, 32, 64, 128, 256, 512):
            right, seen = shot_trials(reader, needles, starts, count, seconds, shot)
            found[name][str(count)] = [right, trials]
            visible[str(count)] = [seen, trials]
    return dict(seed=SEED + 1, seconds_of_film=seconds, seconds_of_shot=shot, by_frames=found, shot_was_seen=visible)


def sheets(count, grids, seed):
    """Images of so many grids, with one question each: (image, thing, [colour, background])."""
    import numpy as np
    from PIL import Image

    from longva.mini import load
    from longva.mini.recipe import FramePool
    from longva.mini.world import VOCABULARY

    pool, rng = FramePool(load("mini-longva")[0], seed, copies=2, variants=24), np.random.default_rng(seed)
    for _ in range(count):
        picked, layout, asked = pool.image((grids, grids), 1, rng)
        yield (
            Image.fromarray(pool.sheet(picked, *layout)),
            *[VOCABULARY[i] for i in asked[1:2]],
            [VOCABULARY[i] for i in asked[2:4]],
        )


def image_logits(model, processor, image, thing, answer):
    """Logits at the answer's words, teacher forced."""
    import torch

    said = [dict(role="user", content=[dict(type="image"), dict(type="text", text=f"find {thing}")])]
    given = processor(
        text=processor.apply_chat_template(said, tokenize=False, add_generation_prompt=True),
        images=[image],
        return_tensors="pt",
    )
    ids = processor.tokenizer(" ".join(answer), add_special_tokens=False)["input_ids"]
    given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([ids[:-1]], dtype=torch.long)], 1)
    given.pop("attention_mask", None)
    with torch.no_grad():
        return model(**given, use_cache=False, logits_to_keep=len(ids)).logits[0].float(), ids


def images():
    """Both encodings on the same images, of 2 to 49 grids; alignment had at most 24."""
    from longva.mini import load
    from longva.needle.statistics import newcombe
    from longva.needle.sweep import judge

    models = {name: load(name) for name in ("mini-longva", "mini-anyres")}
    rows = []
    for grids in (2, 6, 12, 24, 35, 49):
        verdicts = {name: [] for name in models}
        for image, thing, answer in sheets(150, grids, SEED + 2 + grids):
            for name, (model, processor) in models.items():
                logits, ids = image_logits(model, processor, image, thing, answer)
                verdicts[name].append(judge(logits, ids)[1])
        a = verdicts["mini-longva"]
        b = verdicts["mini-anyres"]
        pairs = list(zip(a, b))
        kinds = [(True, True), (True, False), (False, True), (False, False)]
        difference, *interval = newcombe(*[pairs.count(kind) for kind in kinds])
        counts = dict(unires=[sum(a), len(a)], anyres=[sum(b), len(b)])
        rows.append(dict(grids=grids, **counts, difference=difference, interval=interval))
    return dict(seed=SEED + 2, most_grids_in_training=24, rows=rows)


def text():
    """The text needle test with 0, 3 and 5 distractors, before and after the first step of the paper."""
    from longva.mini.reader import DIGITS, WORDING, extend_reader, write_book
    from longva.model.open import open_language
    from longva.needle import niah
    from longva.needle.book import TextTest, TextWording
    from longva.needle.trials import cells

    trained, book, panels = extend_reader(WORK / "reader"), write_book(WORK / "book"), []
    for name, folder in zip(("unextended", "extended"), trained):
        reader = niah.TextReader(*open_language(folder), name)
        for k in (0, 3, 5):
            test = TextTest(book, 10, k, DIGITS, wording=TextWording(**WORDING))
            trials = niah.run(reader, test, [64, 128, 256, 384, 496], DEPTHS, WORK / f"text-{name}-{k}")
            rows = [[n, depth, *count] for (n, depth), count in cells(trials).items()]
            panels.append(dict(model=name, distractors=k, cells=rows))
    return dict(text_tokens=dict(unextended=128, extended=512), panels=panels)


def write_pairs(folder):
    """Write images with a preference each: the background alone is the better answer, the colour the worse."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (image, thing, (colour, background)) in enumerate(sheets(64, 6, SEED + 3)):
        image.save(folder / f"{i}.png")
        pair = dict(image=f"{i}.png", prompt=f"<image>\nfind {thing}", chosen=background, rejected=colour)
        lines.append(json.dumps(pair) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder / "pairs.jsonl"


def preferences(model, processor):
    """Ask 150 held-out images: how much likelier is the background than the colour, in nats?"""
    leads = []
    model.eval()
    for image, thing, (colour, background) in sheets(150, 6, SEED + 4):
        logits, (better,) = image_logits(model, processor, image, thing, [background])
        _, (worse,) = image_logits(model, processor, image, thing, [colour])
        scores = logits.log_softmax(-1)[0]
        leads.append((scores[better] - scores[worse]).item())
    return leads


def dpo():
    """Learn from pairs in which the background alone is the better answer; ask held-out images before and after."""
    from longva.mini import folder, load
    from longva.train.dpo import dpo as train

    here = WORK / "dpo"
    before = preferences(*load("mini-longva"))
    made = train("mini", write_pairs(here), here / "run", model=str(folder("mini-longva")))
    after = preferences(*load(str(made)))
    moved = [b - a for a, b in zip(before, after)]  # times beta, the reward margin
    held_out = dict(
        moved_to_the_better=[sum(m > 0 for m in moved), 150],
        preferred_before=[sum(x > 0 for x in before), 150],
        preferred_after=[sum(x > 0 for x in after), 150],
        reward_margin=0.1 * sum(moved) / 150,
    )
    steps = []
    for line in (here / "run/metrics.jsonl").read_text().splitlines():
        r = json.loads(line)
        steps.append(dict(step=r["step"], margin=r["reward_margin"], accuracy=r["reward_accuracy"], loss=r["loss"]))
    return dict(seed=SEED + 3, pairs=64, epochs=3, beta=0.1, held_out=held_out, steps=steps)


def beyond():
    """Ask mini-longva in videos of up to three times its text-training length."""
    from longva.mini import load
    from longva.mini.world import draw_needles, write_mini_video
    from longva.needle.needles import keep_needles
    from longva.needle.trials import cells
    from longva.needle.vniah import run

    model, processor = load("mini-longva")
    haystack = WORK / "film-long.mp4"
    WORK.mkdir(parents=True, exist_ok=True)
    if not haystack.exists():
        write_mini_video(haystack, 1536, SEED + 5)
    needles = keep_needles(draw_needles(10, SEED + 5), WORK / "needles-long")
    trials = run((model, processor), haystack, needles, (512, 1024, 1536), (0, 0.5, 1), WORK / "beyond", seed=SEED + 5)
    return dict(
        seed=SEED + 5, text_frames=512, cells=[[n, depth, *count] for (n, depth), count in cells(trials).items()]
    )


def generated():
    """The verdict of one forward pass beside what the model really says, word by word."""
    import torch

    from longva.mini import load
    from longva.mini.world import video_frames
    from longva.needle.needles import load_needles
    from longva.needle.reader import Reader
    from longva.needle.vniah import Spot, decide

    model, processor = load("mini-short")
    needles = load_needles(film(512, SEED)[1])
    reader = Reader(model, processor)
    reader = reader.with_tokens(reader.encode(video_frames(64, SEED)), reader.encode_needles(needles))
    prompts = [reader.prompt(n) for n in needles]
    agree = right = count = 0
    for n in (16, 32, 64):
        for j, prompt in enumerate(prompts):
            for depth in (0.0, 0.5, 1.0):
                spot = Spot(j, n, depth)
                forced = decide(reader, prompts, [spot])[0][1]
                with torch.no_grad():
                    rows = reader.embed(spot.path(prompt))["inputs_embeds"]
                    said = model.generate(inputs_embeds=rows, max_new_tokens=len(prompt.answer), do_sample=False)[
                        0
                    ].tolist()
                agree, right, count = agree + (forced == (said == prompt.answer)), right + forced, count + 1
    return dict(seed=SEED, model="mini-short", frames=[16, 32, 64], agree=[agree, count], right=[right, count])


PARTS = dict(bases=bases, sampling=sampling, images=images, text=text, dpo=dpo, beyond=beyond, generated=generated)


def main():
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    given = ask.parse_args()
    from longva.files import versions, write_whole
    from longva.study.ablate import machine

    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in given.parts or PARTS:
        start = time.perf_counter()
        found = PARTS[name]()
        found |= dict(
            seconds=round(time.perf_counter() - start, 1),
            command=f"python benchmarks/paper.py {name}",
            versions=versions(),
            machine=machine(),
        )
        print(
            write_whole(RESULTS / f"{name}.json", json.dumps(found, indent=1) + "\n").name,
            f"{found['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
