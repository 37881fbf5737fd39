"""Needles while a model trains: nothing changes, no rank is blocked, and the lines are those of an unbroken run."""

import json
import os
import random
import signal
from pathlib import Path

import needle_toy as toy
import numpy as np
import pytest
import torch
import train_toy

from longva.needle.watch import NeedleWatch, watched
from longva.train.loop import train

GRID = dict(frames=[2, 6], depths=[0, 0.5])


def text(step, row):
    return dict(input_ids=(torch.arange(20) * (1 + row % 3) + 7 * step) % len(toy.WORDS))


def training(out, settings):
    """A few steps with the toy, looked at or not."""
    model, processor = toy.toy()
    every = settings.pop("every", None)
    stop = settings.pop("stop", None)

    def batches(step, row):
        if step == stop and row == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return text(step, row)

    look = NeedleWatch(processor, toy.film(6), toy.needles(), **GRID, out=out, every=every) if every else None
    return train(
        model,
        batches,
        Path(out),
        on_step=look,
        **{"steps": 5, "rows": 4, "lr": 1e-2, "precision": "fp32", "spike": 1e9, **settings},
    )


def lines(out):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (out / "needles.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("way", [dict(cp=2), dict(engine="deepspeed")], ids=str)
def test_two_ranks_look_and_nothing_else_changes(tmp_path, way):
    if "engine" in way:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install 'longva[train]')")
    found = train_toy.run(tmp_path / "watched", 2, body=training, steps=3, every=2, **way)
    assert found == train_toy.run(tmp_path / "alone", 2, body=training, steps=3, **way)
    ours, theirs = (train_toy.weights(tmp_path / name / "step-000003") for name in ("watched", "alone"))
    assert ours.keys() == theirs.keys() and all(torch.equal(w, theirs[n]) for n, w in ours.items())
    assert [
        (step, {n: of for n, (_, of) in look.items()})
        for step, look in watched(tmp_path / "watched/needles.jsonl").items()
    ] == [(k, {2: 6, 6: 6}) for k in (2, 3)]
    assert not (tmp_path / "alone/needles.jsonl").exists()


def test_what_goes_on_holds_the_lines_of_an_unbroken_run(tmp_path):
    training(tmp_path / "whole", dict(every=2, save_every=3))
    with pytest.raises(SystemExit):
        training(tmp_path / "stopped", dict(every=2, save_every=3, stop=3))
    (tmp_path / "stopped/step-000004").rename(
        tmp_path / "gone"
    )  # as if killed before that checkpoint: step 4 is done again
    assert [row["step"] for row in lines(tmp_path / "stopped")][-1] == 4
    training(tmp_path / "stopped", dict(every=2, save_every=3))
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_a_look_leaves_everything_as_it_was(tmp_path):
    model, processor = toy.toy()
    model.train()
    frozen = model.model.vision_tower
    frozen.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    attention = model.config.get_text_config()._attn_implementation
    dice = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    look = NeedleWatch(processor, toy.film(6), toy.needles(), **GRID, out=tmp_path)
    look(model, 99, False)
    assert not (tmp_path / "needles.jsonl").exists()
    look(model, 100, False)
    assert len(lines(tmp_path)) == 12
    assert (
        {n: m.training for n, m in model.named_modules()} == modes and any(modes.values()) and not all(modes.values())
    )
    assert model.config.get_text_config()._attn_implementation == attention
    assert dice == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_its_verdicts_are_those_of_a_sweep(tmp_path):
    from longva.needle.vniah import run

    model, processor = toy.toy()
    NeedleWatch(processor, toy.film(6), toy.needles(), **GRID, out=tmp_path, every=1)(model, 1, True)
    swept = run((model, processor), toy.film(6), toy.needles(), **GRID, out=tmp_path / "sweep", progress=False)
    ours = {(r["needle"], r["frames"], r["depth"]): r for r in lines(tmp_path)}
    assert len(ours) == len(swept) == 12
    for t in swept:
        row = ours[t.needle, t.frames, t.depth]
        assert (row["insert"], row["answer_ids"], row["argmax_ids"], row["correct"]) == (
            t.insert,
            t.answer_ids,
            t.argmax_ids,
            t.correct,
        )
        assert abs(row["margin"] - t.margin) < 1e-4


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(every=0), "a whole number from 1, and not every 0"),
        (dict(frames=[7]), "holds 6 frames, and 7"),
        (dict(needles=[]), "at least one"),
        (dict(out=__file__), "is a file"),
    ],
    ids=str,
)
def test_what_cannot_be_looked_at(tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        NeedleWatch(**(dict(processor=None, haystack=toy.film(6), needles=toy.needles(), out=tmp_path, **GRID) | wrong))
