"""The training loop with several processes: exact resume, other numbers of ranks, lost ranks, signals."""
import json
import shutil
import signal
import time

import pytest
import torch
import train_toy as toy


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def wait_for(path, processes, seconds=120):
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end and any(p.exitcode is None for p in processes), toy.wait(processes, 5)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "A run of two ranks to its end."
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, toy.run(out, 2, steps=12, save_every=4)


def test_killed_run_goes_on_bit_for_bit(unbroken, tmp_path):
    out = tmp_path / "killed"
    processes = toy.start(out, 2, steps=12, save_every=4, slow=0.05)
    wait_for(out / "step-000004", processes)
    time.sleep(0.17)  # somewhere in a step
    for p in processes:
        p.kill()
    toy.wait(processes)
    assert not (out / "step-000012").exists()
    assert toy.run(out, 2, steps=12, save_every=4) == unbroken[1]
    assert equal(toy.weights(out / "step-000012"), toy.weights(unbroken[0] / "step-000012"))


@pytest.mark.parametrize("world", [1, 4])
def test_goes_on_with_other_ranks(unbroken, tmp_path, world):
    out = tmp_path / "run"
    processes = toy.start(out, 2, steps=12, save_every=4, slow=0.05)
    wait_for(out / "step-000004", processes)
    for p in processes:
        p.kill()
    toy.wait(processes)
    losses = toy.run(out, world, steps=12, save_every=4)
    assert max(abs(a - b) for a, b in zip(losses, unbroken[1], strict=True)) < 1e-4


def test_lost_rank_is_one_sentence(tmp_path):
    out = tmp_path / "run"
    processes = toy.start(out, 2, steps=12, save_every=2, die=5, timeout=20)
    (code, error), (killed, _) = toy.wait(processes)
    assert killed == -signal.SIGKILL and code == 1
    last = error.strip().splitlines()[-1]
    assert "lost another rank in step 6" in last and "step-000004: start all ranks again" in last and "Traceback" not in error
    assert not list(out.glob("*.part")) and (out / "step-000004/state.json").exists()


def test_sigterm_on_one_rank_saves_on_all(unbroken, tmp_path):
    out = tmp_path / "run"
    processes = toy.start(out, 2, steps=12, save_every=100, slow=0.05)
    wait_for(out / "metrics.jsonl", processes)
    processes[1].terminate()
    assert [code for code, _ in toy.wait(processes)] == [143, 143]
    (saved,) = out.glob("step-*")
    assert len(toy.losses(out)) == json.loads((saved / "state.json").read_text())["step"] < 12
    assert toy.run(out, 2, steps=12, save_every=100) == unbroken[1]


def test_nan_stops_before_the_weights_are_touched(unbroken, tmp_path):
    out = tmp_path / "run"
    for code, error in toy.wait(toy.start(out, 2, steps=12, save_every=4, nan=9)):
        assert code == 1 and "Stopped in step 10: the loss is nan" in error and "step-000008" in error
    assert [p.name for p in sorted(out.glob("step-*"))] == ["step-000004", "step-000008"]
    assert toy.run(out, 2, steps=12, save_every=4) == unbroken[1]  # with the data mended, as if nothing had been


@pytest.mark.parametrize("kind", ["all_gather", "ring"])
def test_context_parallel_equals_one_rank(tmp_path, kind):
    "Two documents in every row, an odd length, four ranks as 2 x 2: the losses of one process."
    settings = dict(steps=4, length=45, packed=True)
    alone = toy.run(tmp_path / "one", 1, **settings)
    shared = toy.run(tmp_path / "two", 4, cp=2, kind=kind, **settings)
    assert max(abs(a - b) for a, b in zip(alone, shared, strict=True)) < 1e-4


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    "Two ranks under ZeRO-3 with offload: a run to its end, and one that was killed in its fourth step."
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("runs")
    losses = toy.run(out / "whole", 2, steps=6, save_every=2, keep=3, engine="deepspeed")
    processes = toy.start(out / "killed", 2, steps=6, save_every=2, engine="deepspeed", die=3, timeout=20)
    assert {code for code, _ in toy.wait(processes)} == {1, -signal.SIGKILL}
    assert [p.name for p in (out / "killed").glob("step-*")] == ["step-000002"]
    return out, losses


def test_zero3_equals_plain(zero3, unbroken):
    assert max(abs(a - b) for a, b in zip(zero3[1], unbroken[1])) < 1e-4


@pytest.mark.parametrize("world, engine", [(2, "deepspeed"), (1, "deepspeed"), (1, "plain")])
def test_killed_zero3_goes_on(zero3, tmp_path, world, engine):
    "Bit for bit on the same ranks, to rounding on others, also with the other engine."
    out = shutil.copytree(zero3[0] / "killed", tmp_path / "killed")
    losses = toy.run(out, world, steps=6, save_every=2, engine=engine)
    assert max(abs(a - b) for a, b in zip(losses, zero3[1], strict=True)) < 1e-4
    if (world, engine) == (2, "deepspeed"):
        assert losses == zero3[1]
        for step in ("step-000004", "step-000006"):
            assert equal(toy.weights(out / step), toy.weights(zero3[0] / "whole" / step))


def test_zero3_in_bfloat16_goes_on_bit_for_bit(zero3, tmp_path):
    "As at full size: the layers compute with a rounded copy, which must follow the restored weights from the first step on."
    settings = dict(save_every=2, keep=9, engine="deepspeed", precision="bf16")
    losses = toy.run(tmp_path / "whole", 2, steps=4, **settings)
    shutil.copytree(tmp_path / "whole/step-000002", tmp_path / "stopped/step-000002")
    (tmp_path / "stopped/metrics.jsonl").write_text("".join((tmp_path / "whole/metrics.jsonl").read_text().splitlines(keepends=True)[:3]))  # the third is made again
    assert toy.run(tmp_path / "stopped", 2, steps=4, **settings) == losses
    assert equal(toy.weights(tmp_path / "stopped/step-000004"), toy.weights(tmp_path / "whole/step-000004"))
    assert max(abs(a - b) for a, b in zip(losses, zero3[1])) < 0.05
