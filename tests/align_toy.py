"""A small world to align with: pictures of one colour, a film, text, and a picture that broke off; and one rank of a run."""
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longva.model.modeling import LongVA, mini_config
from longva.model.processing import LongVAProcessor
from longva.train.align import Rows, align
from longva.vision.video import write_video

colours = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "grey": (128, 128, 128)}
names, question = list(colours), "which colour?"
said = "You are a helpful assistant. system user which colour? red green blue grey say\n"
words = [*sorted(set(re.findall(r"\w+|\W", said))), "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]


def talk(*turns):
    return [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]


def draw(colour, width, height, rng):
    return np.clip(rng.normal(colours[colour], 20, (height, width, 3)), 0, 255).astype(np.uint8)


def tokenizer():
    "A token for a word, a space, a sign."
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>", "<image>", "<video>"])


def make_model(folder):
    config = mini_config(len(words), words.index("<image>"), words.index("<video>"), text={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}, tower={"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64})
    config.text_config.initializer_range = 0.1
    torch.manual_seed(0)
    LongVA(config).save_pretrained(folder)
    LongVAProcessor.from_config(config, tokenizer()).save_pretrained(folder)
    return folder


def make_world(folder):
    "captions.json; talk.jsonl with rows of one picture, two, a film and text, the last line's picture is broken; model/."
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(draw(names[i % 3], *[(60, 40), (40, 60), (84, 28), (28, 28)][i % 4], rng)).save(folder / f"{i}.png")
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:300])
    write_video([draw("grey", 64, 48, rng) for _ in range(6)], folder / "grey.mp4", fps=2)
    shown = [dict(id=i, image=f"{i}.png", conversations=talk(f"<image>\n{question}", names[i % 3])) for i in range(24)]
    both = [dict(image=[f"{i}.png", f"{i + 1}.png"], conversations=talk(f"<image> <image>\n{question}", f"{names[i % 3]} {names[(i + 1) % 3]}")) for i in range(8)]
    films = [dict(video="grey.mp4", conversations=talk(f"<image>\n{question}", "grey")) for _ in range(4)]
    text = [dict(conversations=talk(f"say {c}", c, f"say {c}", c)) for c in names]
    (folder / "captions.json").write_text(json.dumps(shown))
    (folder / "talk.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*shown, *both, *films, *text, dict(shown[0], image="half.png")]))
    make_model(folder / "model")
    return folder


def one_rank(out, settings):
    "One rank of `align`; `slow` seconds a row."
    slow, read = settings.pop("slow", 0), Rows.__call__
    if slow:
        Rows.__call__ = lambda *at: (time.sleep(slow), read(*at))[1]
    world = Path(settings.pop("folder"))
    align(settings.pop("stage", "mini-2"), world / settings.pop("data", "talk.jsonl"), Path(out), world / "model", **{"bad_share": 0.1, "workers": 1, **settings})


def command(out, settings):
    "`longva align`; what it prints goes where its errors go."
    from longva.cli import app
    os.dup2(2, 1)
    app(["align", *map(str, settings["args"])])
