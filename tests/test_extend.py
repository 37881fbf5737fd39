"""longva extend with the miniature preset, as a user runs it: from the terminal, with several ranks, killed, and on bad text."""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train_toy as toy

root = Path(__file__).resolve().parents[1]


often = """
from dataclasses import replace
from longva.train.extend import PRESETS
mini = PRESETS["mini"]
PRESETS["mini"] = replace(mini, recipe=replace(mini.recipe, save_every=2))
"""


def command(*args, world=1, first=""):
    "Processes of one `longva extend`; `first` is run before it."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    ranks = [env | {"WORLD_SIZE": str(world), "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)] if world > 1 else [env]
    code = first + "from longva.cli import app; app()"
    return [subprocess.Popen([sys.executable, "-c", code, "extend", *map(str, args)], env=e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for e in ranks]


def finish(processes, seconds=900):
    try:
        return [(p.communicate(timeout=seconds), p.returncode) for p in processes]
    finally:
        for p in processes:
            p.kill()


def test_two_ranks_zero3_killed_and_resumed(tmp_path):
    "Bit-equal weights on the same ranks; on one rank, the same losses to rounding. A checkpoint every second step."
    pytest.importorskip("deepspeed")
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))
    run = lambda out, world: command("--preset", "mini", "--steps", 6, "--engine", "deepspeed", "--out", out, world=world, first=often)
    done = finish(run(whole, 2))
    assert [code for _, code in done] == [0, 0], done[0][0][1][-3000:]
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("long"))  # the stage before is the same
    processes, metrics, end = run(killed, 2), killed / "long/metrics.jsonl", time.time() + 900
    while not (killed / "long/step-000002").exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.time() < end and all(p.poll() is None for p in processes)
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    for p in processes:
        p.send_signal(signal.SIGKILL)
    finish(processes)
    assert not (killed / "long/model").exists() and (killed / "long/step-000002").exists()
    shutil.copytree(killed, alone)
    done = finish(run(killed, 2) + run(alone, 1))
    assert [code for _, code in done] == [0, 0, 0], done[0][0][1][-3000:]
    a, b = (toy.weights(out / "long/model") for out in (whole, killed))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert toy.losses(whole / "long") == toy.losses(killed / "long")
    assert max(abs(x - y) for x, y in zip(toy.losses(whole / "long"), toy.losses(alone / "long"), strict=True)) < 1e-4


def test_broken_text_is_one_sentence(tmp_path):
    "In the terminal; and another kind of broken line from Python, which is quicker."
    from longva.mini.reader import short_reader
    from longva.train.data import CorpusError
    from longva.train.extend import extend
    (tmp_path / "text").mkdir()
    torn, reader = tmp_path / "text/a.jsonl", short_reader(tmp_path / "reader")
    torn.write_text(json.dumps({"text": "find owl ."}) + '\n{"text": "a b')
    ((_, error), code), = finish(command("--preset", "mini", "--text", tmp_path / "text", "--model", reader, "--out", tmp_path / "run"))
    assert code == 1 and "a.jsonl, line 2: broken JSON" in error and "Traceback" not in error
    torn.write_text(json.dumps({"text": "find owl ."}) + '\n{"words": "a"}')
    with pytest.raises(CorpusError, match="line 2: no text under 'text'"):
        extend("mini", tmp_path / "text", tmp_path / "run", model=reader)
    assert not (tmp_path / "run").exists()


def test_context_that_does_not_fit_is_the_planners_sentence(tmp_path):
    from transformers import Qwen2Config

    from longva.context.plan import PlanError
    from longva.train.loop import Ranks, Recipe, check_memory
    seven = type("M", (), {"config": Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)})
    with pytest.raises(PlanError):
        check_memory(seven, 4_000_000, Recipe(steps=1), Ranks())
