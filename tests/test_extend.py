"""longva extend with the miniature preset, as a user runs it: from the terminal, with several ranks, killed, and on bad text."""
import json
import os
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


def command(*args, world=1):
    "Processes of one `longva extend`."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    ranks = [env | {"WORLD_SIZE": str(world), "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)] if world > 1 else [env]
    return [subprocess.Popen([sys.executable, "-c", "from longva.cli import app; app()", "extend", *map(str, args)], env=e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for e in ranks]


def finish(processes, seconds=240):
    try:
        return [(p.communicate(timeout=seconds), p.returncode) for p in processes]
    finally:
        for p in processes:
            p.kill()


def test_two_ranks_zero3_killed_and_resumed(tmp_path):
    "Bit-equal weights on the same ranks; on one rank, the same losses to rounding."
    pytest.importorskip("deepspeed")
    settings = ["--preset", "mini", "--steps", 6, "--engine", "deepspeed"]
    for (out, error), code in finish(command(*settings, "--out", tmp_path / "whole", world=2)):
        assert code == 0, error[-3000:]
    processes = command(*settings, "--out", tmp_path / "killed", world=2)
    metrics, end = tmp_path / "killed/long/metrics.jsonl", time.time() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.time() < end and all(p.poll() is None for p in processes)
        time.sleep(0.01)
    for p in processes:
        p.send_signal(signal.SIGKILL)
    finish(processes)
    for (out, error), code in finish(command(*settings, "--out", tmp_path / "killed", world=2)):
        assert code == 0, error[-3000:]
    a, b = (toy.weights(tmp_path / run / "long/model") for run in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert toy.losses(tmp_path / "whole/long") == toy.losses(tmp_path / "killed/long")


@pytest.mark.parametrize("line, sentence", [('{"text": "a b', "line 2: broken JSON"), ('{"words": "a"}', "line 2: no text under 'text'")])
def test_broken_text_is_one_sentence(tmp_path, line, sentence):
    from longva.mini.reader import short_reader
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_text(json.dumps({"text": "find owl ."}) + "\n" + line)
    ((out, error), code), = finish(command("--preset", "mini", "--text", tmp_path / "text", "--model", short_reader(tmp_path / "reader"), "--out", tmp_path / "run"))
    assert code == 1 and sentence in error and "Traceback" not in error and "a.jsonl" in error
    assert not (tmp_path / "run").exists()


def test_context_that_does_not_fit_is_the_planners_sentence(tmp_path):
    from transformers import Qwen2Config

    from longva.context.plan import PlanError
    from longva.train.loop import Ranks, Recipe, check_memory
    seven = type("M", (), {"config": Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)})
    with pytest.raises(PlanError):
        check_memory(seven, 4_000_000, Recipe(steps=1), Ranks())
