"""Mistakes on the command line of `longva align` and `longva dpo`: one sentence each, nothing half-written."""

import json
import os
import shutil
from pathlib import Path

import align_toy as small
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from longva.cli import app
from longva.mini import folder
from longva.model.original import CheckpointError
from longva.model.processing import LongVAProcessor
from longva.train.conversations import parse_row
from longva.train.rows import open_data
from longva.vision.video import write_video

PAIR = dict(prompt="find owl", chosen="red", rejected="blue")


def write_rows(file, *rows):
    """Write a .jsonl file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows for both commands, and files that show nothing."""
    place = small.make_world(tmp_path_factory.mktemp("world"))
    frames = np.random.default_rng(0).integers(0, 255, (4, 28, 28, 3), dtype=np.uint8)
    write_video(frames, place / "0.mp4", fps=1)
    Image.new("RGB", (28, 28)).save(place / "a.png")
    (place / "empty.mp4").touch()
    video = PAIR | dict(video="0.mp4", prompt="<video> find owl")
    write_rows(place / "pairs.jsonl", video, PAIR, PAIR | dict(image="a.png"))
    return place


def is_sentence(line):
    """Leave out empty lines and progress bars."""
    return line.strip() and "it/s]" not in line and "%|" not in line


@pytest.fixture
def say(world, tmp_path, monkeypatch):
    """The command in a folder of its own: (exit code, sentences on stderr, names of files in the run's folder)."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def invoke(*args):
        done = CliRunner().invoke(app, [*map(str, args), "--out", str(tmp_path / "run")])
        assert isinstance(done.exception, SystemExit | None), done.exception
        lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if is_sentence(line)]
        return done.exit_code, lines, sorted(path.name for path in (tmp_path / "run").glob("*"))

    return invoke


ALIGN = ("align", "--preset", "mini-2", "--steps", 2, "--rows", 4)
DPO = ("dpo", "--preset", "mini", "--steps", 2, "--rows", 2)
EMPTY_MODEL = "--model is empty: name a miniature, a folder or a model on the hub."


def test_lines_are_read_one_by_one(tmp_path):
    """A byte-order mark is no fault, and half a letter or a bottomless bracket spoils its own line only."""
    file = tmp_path / "rows.jsonl"
    row = dict(conversations=small.talk("say red", "red"))
    line = json.dumps(row).encode()
    file.write_bytes(b"\n".join([b"\xef\xbb\xbf" + line, b'{"a": "\xff"}\r', b"[" * 100_000, line]))
    rows = open_data(file)
    assert [r.number for r in rows] == [1, 2, 3, 4] and rows[0].data == rows[3].data == row
    assert rows[1].data == "it is no UTF-8 text" and rows[2].data.startswith("broken JSON")
    assert parse_row(rows[0].data).messages[0]["role"] == "user"
    whole = tmp_path / "rows.json"
    whole.write_bytes(b"\xef\xbb\xbf" + json.dumps([row]).encode())
    assert open_data(whole)[0].data == row


@pytest.mark.parametrize(
    "options, code, sentence",
    [
        (["--fps", "0"], 2, "--fps must be a number above 0, and not 0."),
        (["--fps", "nan"], 2, "--fps must be a number above 0, and not nan."),
        (["--fps", "-1"], 2, "--fps must be a number above 0, and not -1."),
        (["--model", " "], 2, EMPTY_MODEL),
    ],
)
def test_dpo_options(say, options, code, sentence):
    assert say(*DPO, "--data", "pairs.jsonl", *options) == (code, [sentence], [])


@pytest.mark.parametrize(
    "options, model",
    [
        ((), str(folder("mini-longva"))),
        (("--model", "mini-short"), str(folder("mini-short"))),
        (("--preset", "paper"), None),
        (("--preset", "paper", "--model", "owner/name"), "owner/name"),
    ],
)
def test_where_dpo_starts(say, monkeypatch, options, model):
    """The paper's preset keeps its own model unless another is named."""
    seen = {}
    monkeypatch.setattr("longva.train.dpo.dpo", lambda *args, **changes: seen.update(changes))
    assert say(*DPO, "--data", "pairs.jsonl", *options)[0] == 0
    assert seen.get("model") == model and ("model" in seen) == (model is not None)


def test_dpo_says_once_what_is_bad(say, world):
    write_rows(world / "lost.jsonl", PAIR | dict(video="gone.mp4"))
    sentence = "lost.jsonl holds no pair: lost.jsonl, line 1: there is no video gone.mp4."
    assert say(*DPO, "--data", "lost.jsonl") == (1, [sentence], [])
    write_rows(world / "empty.jsonl", PAIR | dict(video="empty.mp4"))
    sentence = (
        "1 of 1 rows are bad, more than the share of 0.25 that is allowed: empty.jsonl, line 1: "
        "empty.mp4 is empty (0 bytes): copy or download it again."
    )
    assert say(*DPO, "--data", "empty.jsonl") == (1, [sentence], ["bad_rows.jsonl", "reference"])


def test_align_ends_its_sentence_once(say, world):
    turns = small.talk(f"<image>\n{small.question}", "red")
    write_rows(world / "empty.jsonl", dict(video="empty.mp4", conversations=turns))
    code, lines, files = say(*ALIGN, "--data", "empty.jsonl", "--model", world / "model")
    sentence = (
        "Ten rows in succession are bad, the first is empty.jsonl, line 1: empty.mp4 is empty (0 bytes): "
        "copy or download it again. Is the folder of the pictures right?"
    )
    assert code == 1 and lines == [sentence] and "model" not in files


def test_align_starts_from_a_miniature(say, world):
    write_rows(world / "owl.jsonl", dict(image="a.png", conversations=small.talk("<image>\nfind owl", "red")))
    assert say(*ALIGN, "--data", "owl.jsonl", "--model", "mini-longva")[0] == 0
    assert say(*ALIGN, "--data", "owl.jsonl", "--model", "")[:2] == (2, [EMPTY_MODEL])


def without(name):
    """Make a function that removes files of a checkpoint."""

    def spoil(where):
        for file in where.glob(name):
            file.unlink()

    return spoil


def torn(name):
    """Make a function that breaks a file of a checkpoint."""

    def spoil(where):
        (where / name).write_text("{")

    return spoil


FILES = "tokenizer.json, or vocab.json and merges.txt"
BROKEN = [
    (without("tokenizer*"), f"broken holds no tokenizer: copy {FILES}, into it."),
    (torn("tokenizer.json"), f"The tokenizer in broken cannot be read: it needs {FILES}."),
    (
        without("processor_config.json"),
        "broken holds no processor, for it has no processor_config.json: save the processor beside the model.",
    ),
    (torn("processor_config.json"), "processor_config.json in broken is not readable as JSON: copy it again."),
    (
        without("model.safetensors"),
        "broken holds no weights: there is no model.safetensors and no model.safetensors.index.json.",
    ),
]


@pytest.mark.parametrize("spoil, sentence", BROKEN)
def test_a_checkpoint_that_lacks_something(say, world, tmp_path, spoil, sentence):
    broken = Path(shutil.copytree(folder("mini-longva"), tmp_path / "broken"))
    spoil(broken)
    assert say(*ALIGN, "--data", "captions.json", "--model", broken)[:2] == (1, [sentence])
    assert say(*DPO, "--data", "pairs.jsonl", "--model", broken) == (1, [sentence], [])
    if "weights" not in sentence:
        with pytest.raises(CheckpointError) as raised:
            LongVAProcessor.from_pretrained(broken)
        assert str(raised.value) == sentence


def test_weights_that_may_not_be_read(say, world, tmp_path, monkeypatch):
    """Another cause than a torn file, and another advice."""
    allowed = os.access  # root may read everything, so it is played

    def access(file, mode, **more):
        return Path(file).name != "model.safetensors" and allowed(file, mode, **more)

    monkeypatch.setattr(os, "access", access)
    sentence = f"{world / 'model' / 'model.safetensors'} cannot be read (permission denied): ask its owner, or copy it."
    assert say(*ALIGN, "--data", "captions.json", "--model", world / "model") == (1, [sentence], [])
