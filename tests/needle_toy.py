"""A model with random weights, a film of noise and three needles: enough to run the bench, shared by its tests."""

import numpy as np
import torch
from PIL import Image

from longva.model.modeling import LongVA, mini_config
from longva.model.processing import LongVAProcessor
from longva.needle.needles import Needle
from longva.testing import word_tokenizer
from longva.vision.video import Frames

SPECIAL = ["<|im_start|>", "<|im_end|>", "<image>", "<video>"]
WORDS = ["<unk>", *SPECIAL, *"system user assistant You are a helpful . which colour ? red green blue pink".split()]


def toy(seed=0):
    tokenizer = word_tokenizer(WORDS, SPECIAL, eos="<|im_end|>")
    torch.manual_seed(seed)
    config = mini_config(
        len(WORDS),
        image_token_id=WORDS.index("<image>"),
        video_token_id=WORDS.index("<video>"),
        text={"num_hidden_layers": 2},
    )
    model = LongVA(config).eval()
    with torch.no_grad():  # larger weights, so that what it says depends on what it sees
        for p in model.model.layers.parameters():
            p.mul_(8 if p.ndim == 2 else 1)
    return model, LongVAProcessor.from_config(config, tokenizer)


def film(n, seed=0):
    draw = np.random.default_rng(seed)
    return Frames(
        draw.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8).repeat(7, 1).repeat(7, 2), np.arange(n, dtype=float), 1.0
    )


def needles():
    return [
        Needle(c, Image.new("RGB", (28, 28), c), "which colour ?", a)
        for c, a in [("red", "red"), ("green", "green"), ("blue", "pink blue")]
    ]
