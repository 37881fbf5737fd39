"""The shipped miniatures: decoded against drawn frames, saved against live, and what the recipe promises."""

import json
import subprocess
import sys

import numpy as np
import pytest

from longva import mini
from longva.mini import world
from longva.needle.needles import load_needles
from longva.needle.vniah import run
from longva.vision.video import Frames

SEED, LENGTHS, DEPTHS = 77, [16, 64, 128], [0, 0.5, 1]


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exam")
    film = world.write_mini_video(folder / "film.mp4", max(LENGTHS), SEED)
    return film, load_needles(world.write_needles(folder / "needles", 12, SEED))


def ask(model, processor, haystack, needles, out):
    return {
        (t.needle, t.frames, t.depth): t.argmax_ids
        for t in run((model, processor), haystack, needles, LENGTHS, DEPTHS, out, seed=SEED, progress=False)
    }


def test_decoded_film_gives_the_decisions_of_drawn_frames(exam, tmp_path):
    film, needles = exam
    drawn = world.video_frames(max(LENGTHS), SEED)
    frames = Frames(drawn, np.arange(len(drawn), dtype=float), 1.0)
    model, processor = mini.load("mini-longva")
    decoded, direct = (ask(model, processor, hay, needles, tmp_path / str(k)) for k, hay in enumerate((film, frames)))
    same = np.mean([decoded[key] == direct[key] for key in direct])
    assert len(direct) == 108 and same >= 0.99


AGAIN = """
import json, sys
from longva import mini
from longva.needle.vniah import run
film, needles, model, out = sys.argv[1:]
trials = run(mini.load(model), film, needles, [16, 64], [0, 0.5], out, progress=False)
print(json.dumps([[t.needle, t.frames, t.depth, t.argmax_ids] for t in trials]))
"""


@pytest.mark.parametrize("name", mini.NAMES)
def test_saved_model_decides_alike_in_a_fresh_process(exam, tmp_path, name):
    film, _ = exam
    model, processor = mini.load(name)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    needles = film.parent / "needles"
    here = [
        [t.needle, t.frames, t.depth, t.argmax_ids]
        for t in run((model, processor), film, needles, [16, 64], [0, 0.5], tmp_path / "here", progress=False)
    ]
    said = subprocess.run(
        [sys.executable, "-c", AGAIN, str(film), str(needles), str(tmp_path / "saved"), str(tmp_path / "there")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(said.stdout.splitlines()[-1]) == here


def test_the_twins_differ_at_length(exam, tmp_path):
    "A small form of Figure 4: long text carries over, short text does not."
    film, needles = exam
    right = {}
    for name in ("mini-longva", "mini-short"):
        trials = run(mini.load(name), film, needles, [16, 128], [0, 0.5, 1], tmp_path / name, progress=False)
        right[name] = {n: np.mean([t.correct for t in trials if t.frames == n]) for n in (16, 128)}
    assert right["mini-longva"][16] > 0.9 < right["mini-longva"][128]
    assert right["mini-short"][16] > 0.9 and right["mini-short"][128] < 0.5
