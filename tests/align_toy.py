"""A small world to align with: images of one colour, a video, text, a broken image; and one rank of a run."""

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from longva.model.config import mini_config
from longva.model.modeling import LongVA
from longva.model.processing import LongVAProcessor
from longva.testing import chat_tokenizer
from longva.train.align import align
from longva.train.order import Samples
from longva.vision.video import write_video

colours = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "grey": (128, 128, 128)}
names = list(colours)
question = "which colour?"
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TOWER = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)


def talk(*turns):
    """Make the turns of a row: human, gpt, human, ..."""
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def draw(colour, width, height, rng):
    """Draw an image of one noisy colour."""
    return np.clip(rng.normal(colours[colour], 20, (height, width, 3)), 0, 255).astype(np.uint8)


def tokenizer():
    """Make a tokenizer that knows what the rows say."""
    return chat_tokenizer("You are a helpful assistant. system user which colour? red green blue grey say\n")


def make_model(folder):
    """Save a small LongVA and its processor."""
    words = tokenizer()
    text = TEXT | dict(head_dim=8, initializer_range=0.1)
    config = mini_config(len(words), *words.convert_tokens_to_ids(["<image>", "<video>"]), text=text, tower=TOWER)
    torch.manual_seed(0)
    LongVA(config).save_pretrained(folder)
    LongVAProcessor.from_config(config, words).save_pretrained(folder)
    return folder


def make_world(folder):
    """Make captions.json, model/, and talk.jsonl: rows of one image, two, a video, text, and a broken image."""
    rng = np.random.default_rng(0)
    shapes = [(60, 40), (40, 60), (84, 28), (28, 28)]
    for i in range(24):
        Image.fromarray(draw(names[i % 3], *shapes[i % 4], rng)).save(folder / f"{i}.png")
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:300])
    write_video([draw("grey", 64, 48, rng) for _ in range(6)], folder / "grey.mp4", fps=2)
    rows = []
    for i in range(24):
        rows.append(dict(id=i, image=f"{i}.png", conversations=talk(f"<image>\n{question}", names[i % 3])))
    (folder / "captions.json").write_text(json.dumps(rows))
    for i in range(8):
        turns = talk(f"<image> <image>\n{question}", f"{names[i % 3]} {names[(i + 1) % 3]}")
        rows.append(dict(image=[f"{i}.png", f"{i + 1}.png"], conversations=turns))
    rows += [dict(video="grey.mp4", conversations=talk(f"<image>\n{question}", "grey"))] * 4
    rows += [dict(conversations=talk(f"say {colour}", colour, f"say {colour}", colour)) for colour in names]
    rows.append(dict(rows[0], image="half.png"))
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_model(folder / "model")
    return folder


def one_rank(out, settings):
    """Run one rank of `align`; `slow` seconds a row."""
    slow = settings.pop("slow", 0)
    if slow:
        read = Samples.__call__

        def read_slowly(self, step, place):
            time.sleep(slow)
            return read(self, step, place)

        Samples.__call__ = read_slowly
    world = Path(settings.pop("folder"))
    stage = settings.pop("stage", "mini-2")
    data = world / settings.pop("data", "talk.jsonl")
    align(stage, data, Path(out), world / "model", **{"bad_share": 0.1, "workers": 1, **settings})


def command(out, settings):
    """Run `longva align`; what it prints goes where its errors go."""
    from longva.cli import app

    os.dup2(2, 1)
    app(["align", *map(str, settings["args"])])
