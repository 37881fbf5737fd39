"""The training loop with several processes: exact resume, other numbers of ranks, lost ranks, signals."""

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import train_toy as toy
from safetensors.torch import load_file, save_file

from longva.train.batch import TokenLoss, collate
from longva.train.engines import Plain, one_compiler
from longva.train.loop import train
from longva.train.ranks import Ranks
from longva.train.recipe import Recipe, TrainError
from longva.train.run import Identity, check_resume, checkpoints, load_checkpoint

TWELVE = {"steps": 12, "save_every": 4}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def apart(a, b):
    """Give the largest difference of two lists of losses."""
    return max(abs(x - y) for x, y in zip(a, b))


def last_line(error):
    return error.strip().splitlines()[-1]


def names(folder, pattern="step-*"):
    return [path.name for path in sorted(folder.glob(pattern))]


def wait_for(path, processes, seconds=120):
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end and any(p.exitcode is None for p in processes), toy.wait(processes, 5)
        time.sleep(0.02)


def kill(processes):
    for p in processes:
        p.kill()
    toy.wait(processes)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of two ranks to its end."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, toy.run(out, 2, **TWELVE)


def test_killed_run_resumes_bit_for_bit(unbroken, tmp_path):
    out = tmp_path / "killed"
    processes = toy.start(out, 2, **TWELVE, slow=0.05)
    wait_for(out / "step-000004", processes)
    time.sleep(0.17)  # somewhere in a step
    kill(processes)
    assert not (out / "step-000012").exists()
    assert toy.run(out, 2, **TWELVE) == unbroken[1]
    assert equal(toy.weights(out / "step-000012"), toy.weights(unbroken[0] / "step-000012"))


@pytest.mark.parametrize("world", [1, 4])
def test_resumes_with_other_ranks(unbroken, tmp_path, world):
    out = tmp_path / "run"
    processes = toy.start(out, 2, **TWELVE, slow=0.05)
    wait_for(out / "step-000004", processes)
    kill(processes)
    losses = toy.run(out, world, **TWELVE)
    assert len(losses) == 12
    assert apart(losses, unbroken[1]) < 1e-4


def test_lost_rank_is_one_sentence(tmp_path):
    out = tmp_path / "run"
    processes = toy.start(out, 2, steps=12, save_every=2, die=5, timeout=20)
    (code, error), (killed, _) = toy.wait(processes)
    assert killed == -signal.SIGKILL
    assert code == 1
    assert "lost another rank in step 6" in last_line(error)
    assert "step-000004: start all ranks again" in last_line(error)
    assert "Traceback" not in error
    assert not list(out.glob("*.part"))
    assert (out / "step-000004/state.json").exists()


def test_sigterm_on_one_rank_saves_on_all(unbroken, tmp_path):
    out = tmp_path / "run"
    processes = toy.start(out, 2, steps=12, save_every=100, slow=0.05)
    wait_for(out / "metrics.jsonl", processes)
    processes[1].terminate()
    assert [code for code, _ in toy.wait(processes)] == [143, 143]
    (saved,) = out.glob("step-*")
    assert len(toy.losses(out)) == json.loads((saved / "state.json").read_text())["step"] < 12
    assert toy.run(out, 2, steps=12, save_every=100) == unbroken[1]


def test_nan_stops_before_the_weights_change(unbroken, tmp_path):
    out = tmp_path / "run"
    for code, error in toy.wait(toy.start(out, 2, **TWELVE, nan=9)):
        assert code == 1
        assert "Stopped in step 10: the loss is nan" in error
        assert "step-000008" in error
    assert names(out) == ["step-000004", "step-000008"]
    assert toy.run(out, 2, **TWELVE) == unbroken[1]  # with repaired data, as if nothing had happened


@pytest.mark.parametrize("kind", ["all_gather", "ring"])
def test_context_parallel_equals_one_rank(tmp_path, kind):
    """Two documents in every row, an odd length, four ranks as 2 x 2: the losses of one process."""
    settings = {"steps": 4, "length": 45, "packed": True}
    alone = toy.run(tmp_path / "one", 1, **settings)
    shared = toy.run(tmp_path / "two", 4, cp=2, kind=kind, **settings)
    assert len(alone) == len(shared) == 4
    assert apart(alone, shared) < 1e-4


SIX = {"steps": 6, "save_every": 2, "engine": "deepspeed"}


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    """Two ranks under ZeRO-3 with offload: a run to its end, and one that was killed in its fourth step."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install 'longva[train]')")
    out = tmp_path_factory.mktemp("runs")
    losses = toy.run(out / "whole", 2, **SIX, keep=3)
    processes = toy.start(out / "killed", 2, **SIX, die=3, timeout=20)
    assert {code for code, _ in toy.wait(processes)} == {1, -signal.SIGKILL}
    assert names(out / "killed") == ["step-000002"]
    return out, losses


def test_zero3_equals_plain(zero3, unbroken):
    assert apart(zero3[1], unbroken[1]) < 1e-4


@pytest.mark.parametrize("world, engine", [(2, "deepspeed"), (1, "deepspeed"), (1, "plain")])
def test_killed_zero3_resumes(zero3, tmp_path, world, engine):
    """Bit for bit on the same ranks, to rounding on others, also with the other engine."""
    folder, expected = zero3
    out = shutil.copytree(folder / "killed", tmp_path / "killed")
    losses = toy.run(out, world, **SIX | {"engine": engine})
    assert len(losses) == len(expected)
    assert apart(losses, expected) < 1e-4
    if (world, engine) == (2, "deepspeed"):
        assert losses == expected
        for step in ("step-000004", "step-000006"):
            assert equal(toy.weights(out / step), toy.weights(folder / "whole" / step))


def test_all_ranks_write_a_zero3_checkpoint(zero3):
    """Each about as much; every tensor whole and in one file, with the checksum of what is there."""
    folder = zero3[0] / "whole/step-000002"
    files = sorted(folder.glob("part-*.safetensors"))
    assert [file.name for file in files] == ["part-00000.safetensors", "part-00001.safetensors"]
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 1.5 * min(sizes)
    names = [set(load_file(file)) for file in files]
    shapes = {name: p.shape for name, p in toy.tiny().named_parameters()}
    assert not names[0] & names[1]
    assert names[0] | names[1] == {f"{key}.{name}" for name in shapes for key in ("weight", "first", "second")}
    assert all(tensor.shape == shapes[name.partition(".")[2]] for name, tensor in toy.weights(folder).items())
    sums = json.loads((folder / "state.json").read_text())["sums"]
    assert sums == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def resumed(whole, out, world, settings):
    """Resume a copy of a run from its second step; give the losses."""
    shutil.copytree(whole / "step-000002", out / "step-000002", dirs_exist_ok=True)
    shutil.copy(whole / "metrics.jsonl", out)
    return toy.run(out, world, **settings)


def test_zero3_on_ranks_that_divide_no_weight(tmp_path):
    """Three ranks, and weights of 32 and 2048 numbers: bit for bit on three, to rounding on two and on one."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install 'longva[train]')")
    settings = {"steps": 4, "save_every": 2, "keep": 3, "rows": 6, "engine": "deepspeed"}
    whole = tmp_path / "whole"
    losses = toy.run(whole, 3, **settings)
    assert len(list((whole / "step-000002").glob("part-*"))) == 3
    assert resumed(whole, tmp_path / "three", 3, settings) == losses
    assert equal(toy.weights(tmp_path / "three/step-000004"), toy.weights(whole / "step-000004"))
    assert apart(resumed(whole, tmp_path / "two", 2, settings), losses) < 1e-4
    assert apart(resumed(whole, tmp_path / "one", 1, settings | {"engine": "plain"}), losses) < 1e-4


def test_zero3_reads_a_checkpoint_that_one_rank_wrote(zero3, tmp_path):
    """As all were written before every rank wrote its own files."""
    one = tmp_path / "one/step-000002"
    shutil.copytree(zero3[0] / "whole/step-000002", one)
    tensors = toy.weights(one)
    for file in one.glob("part-*"):
        file.unlink()
    save_file(tensors, one / "part-00000.safetensors")
    state = json.loads((one / "state.json").read_text())
    sums = {"part-00000.safetensors": hashlib.sha256((one / "part-00000.safetensors").read_bytes()).hexdigest()}
    (one / "state.json").write_text(json.dumps(state | {"files": 1, "sums": sums}))
    shutil.copy(zero3[0] / "whole/metrics.jsonl", one.parent)
    assert toy.run(one.parent, 2, **SIX) == zero3[1]
    assert equal(toy.weights(one.parent / "step-000006"), toy.weights(zero3[0] / "whole/step-000006"))


def test_a_flipped_bit_in_the_file_of_another_rank(zero3, tmp_path):
    """All ranks refuse, and name the checkpoint before."""
    out = Path(shutil.copytree(zero3[0] / "whole", tmp_path / "run"))
    flipped_bit(out / "step-000006", "part-00001.safetensors")
    for code, error in toy.wait(toy.start(out, 2, **SIX | {"steps": 8})):
        assert code == 1 and "Traceback" not in error
        assert "part-00001.safetensors has other bytes than were written" in last_line(error)
        assert "remove it, and the run resumes from step-000004" in last_line(error)


def test_a_rank_killed_while_it_writes(zero3, tmp_path):
    """What it leaves doesn't count, and the run resumes bit for bit from the checkpoint before."""
    out = tmp_path / "run"
    processes = toy.start(out, 2, body=toy.count_until_killed, half="step-000004", **SIX, timeout=20)
    (code, error), (killed, _) = toy.wait(processes)
    assert (code, killed) == (1, -signal.SIGKILL)
    assert "step-000002: start all ranks again" in last_line(error)
    assert (out / "step-000004.part").exists() and checkpoints(out) == [out / "step-000002"]
    assert toy.run(out, 2, **SIX) == zero3[1]
    assert equal(toy.weights(out / "step-000006"), toy.weights(zero3[0] / "whole/step-000006"))
    assert not list(out.glob("*.part"))


def test_a_full_disk_of_another_rank(zero3, tmp_path):
    """The files of the second rank don't fit: the same sentence on both, and no half of a checkpoint is left."""
    out = tmp_path / "run"
    for code, error in toy.wait(toy.start(out, 2, **SIX, largest=20_000, full=1)):
        assert code == 1 and "Traceback" not in error
        assert "The checkpoint of step 2 cannot be saved in" in last_line(error)
        assert "File too large" in last_line(error)
    assert not list(out.glob("step-*"))


def test_zero3_in_bfloat16_resumes_bit_for_bit(zero3, tmp_path):
    """As at full size: the layers compute with a rounded copy, which must follow the restored weights at once."""
    settings = {"steps": 4, "save_every": 2, "keep": 9, "engine": "deepspeed", "precision": "bf16"}
    whole = tmp_path / "whole"
    stopped = tmp_path / "stopped"
    losses = toy.run(whole, 2, **settings)
    shutil.copytree(whole / "step-000002", stopped / "step-000002")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:3]))  # the third is made again
    assert toy.run(stopped, 2, **settings) == losses
    assert equal(toy.weights(stopped / "step-000004"), toy.weights(whole / "step-000004"))
    assert apart(losses, zero3[1]) < 0.05


class Here:
    """Rows that count upwards, for a training in this process."""

    length = 32

    def __call__(self, step, row):
        return {"input_ids": (torch.arange(self.length) + 7 * step + 3 * row) % 64}


def here(out, model=None, batches=None, **changes):
    settings = {"steps": 4, "lr": 1e-2, "precision": "fp32", "save_every": 2} | changes
    return train(model or toy.tiny(), batches or Here(), out, **settings)


ABOUT = {"corpus": "3fa1", "theta": 1e4, "length": 32}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of one rank to its end, with an identity."""
    out = tmp_path_factory.mktemp("runs") / "done"
    return out, here(out, identity=ABOUT)


def copied(done, folder):
    """Copy the run as it was after two steps."""
    out = Path(shutil.copytree(done[0], folder))
    shutil.rmtree(out / "step-000004")
    return out


@pytest.mark.parametrize(
    "other, message",
    [
        (ABOUT | {"theta": 1e9}, "begun with theta 10000.0 (now 1000000000.0)"),
        ({"theta": 1e4, "length": 32}, "begun with corpus 3fa1 (now none)"),
        (None, "begun with corpus 3fa1"),
    ],
)
def test_another_identity_is_refused(done, tmp_path, other, message):
    with pytest.raises(TrainError, match=re.escape(message)):
        here(copied(done, tmp_path / "run"), identity=other)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta 10000.0 (now 1000000.0)"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 2 (now 1)"),
        ({"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4}, "num_attention_heads 4 (now 8)"),
        ({"intermediate_size": 48}, "intermediate_size 64 (now 48)"),
    ],
)
def test_another_model_is_refused(done, tmp_path, changes, message):
    with pytest.raises(TrainError, match=re.escape(message)):
        here(copied(done, tmp_path / "run"), toy.tiny(**changes), identity=ABOUT)


def test_a_run_resumes_with_the_same_model_and_data(done, tmp_path):
    out = copied(done, tmp_path / "run")
    with pytest.raises(TrainError, match=r"begun with lr 0.01 \(now 0.1\)"):
        here(out, identity=ABOUT, lr=0.1)
    assert here(out, identity=ABOUT) == done[1]
    check_resume(done[0], Identity(about=ABOUT))  # what a caller asks when there is nothing left to train
    with pytest.raises(TrainError, match="begun with length 32"):
        check_resume(done[0], Identity(about=ABOUT | {"length": 64}))


def test_identity_is_plain_values(tmp_path):
    with pytest.raises(TrainError, match="identity of a run must be plain values"):
        here(tmp_path / "run", identity={"corpus": Path("x")})
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_other_models_are_refused(done):
    """Extra and misshapen tensors are named, before a weight changes."""
    last = checkpoints(done[0])[-1]
    model = toy.tiny(seed=3)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.lm_head.weight.requires_grad_(False)
    groups = [{"params": list(model.parameters()), "lr": 1.0, "top": 1.0}]
    engine = Plain(TokenLoss(model), groups, Recipe(steps=1), Ranks())
    with pytest.raises(TrainError, match="it has lm_head.weight, which is not trained here"):
        load_checkpoint(engine, last)
    model.lm_head.weight.requires_grad_(True)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(31))
    with pytest.raises(TrainError, match=r"model.norm.weight is \[32\] in it and \[31\] here"):
        load_checkpoint(engine, last)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n != "model.norm.weight")


def test_one_run_in_a_folder(unbroken, tmp_path):
    """The second is refused on all of its ranks, and the first doesn't notice."""
    out = tmp_path / "run"
    first = toy.start(out, 2, **TWELVE, slow=0.05)
    wait_for(out / "metrics.jsonl", first)
    for world in (1, 2):
        for code, error in toy.wait(toy.start(out, world, **TWELVE)):
            assert code == 1
            assert last_line(error).startswith("Another run is training in")
            assert "Traceback" not in error
    assert [code for code, _ in toy.wait(first)] == [0, 0]
    assert toy.losses(out) == unbroken[1]
    assert not list(out.glob("*.part"))


WRONG = [
    ("steps", -1),
    ("steps", 2.5),
    ("steps", "4"),
    ("steps", True),
    ("rows", 0),
    ("rows", -4),
    ("lr", 0),
    ("lr", -1.0),
    ("lr", float("nan")),
    ("schedule", "step"),
    ("floor", 2),
    ("warmup", -5),
    ("weight_decay", -0.1),
    ("betas", (0.9,)),
    ("betas", (0.9, 1.0)),
    ("betas", 0.9),
    ("clip", 0),
    ("clip", -1),
    ("precision", "fp16"),
    ("seed", -1),
    ("micro", 0),
    ("cp", 0),
    ("kind", "rings"),
    ("engine", "deepsped"),
    ("checkpointing", "no"),
    ("save_every", 0),
    ("keep", -1),
    ("keep", 0),
    ("spike", 1),
    ("timeout", 0),
    ("trackers", "tensorboard"),
    ("trackers", (1,)),
]


@pytest.mark.parametrize("name, value", WRONG, ids=str)
def test_wrong_settings(name, value):
    with pytest.raises(TrainError) as error:
        Recipe(**{"steps": 4, name: value})
    assert str(error.value).startswith(f"{name} is {value!r}: it must be ")
    assert "\n" not in str(error.value)


def test_no_steps_and_unknown_trackers_before_anything_is_made(tmp_path):
    with pytest.raises(TrainError, match="steps is 0"):
        here(tmp_path / "run", steps=0)
    with pytest.raises(TrainError, match="no tracker 'paper'"):
        here(tmp_path / "run", trackers=("paper",))
    missing = [n for n in ("wandb", "aim", "clearml", "comet_ml") if importlib.util.find_spec(n) is None]
    for name in missing[:1]:
        with pytest.raises(TrainError, match=f"{name} is not installed"):
            here(tmp_path / "run", trackers=(name,))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "largest, save_every, message",
    [
        (40_000, 4, "The checkpoint of step 4 cannot be saved in"),
        (2_000, 100, "metrics.jsonl cannot be written"),
    ],
)
def test_full_disk_is_one_sentence_on_all_ranks(tmp_path, largest, save_every, message):
    """Files of rank 0 may have so many bytes: checkpoint or log don't fit, and no half of a checkpoint is left."""
    out = tmp_path / "run"
    for code, error in toy.wait(toy.start(out, 2, steps=12, save_every=save_every, largest=largest)):
        assert code == 1
        assert "Traceback" not in error
        assert message in last_line(error)
        assert "File too large" in last_line(error)
        assert "lost another rank" not in last_line(error)
    assert not list(out.glob("step-*"))


def test_a_bad_row_on_one_rank_is_reported_by_all(tmp_path):
    for code, error in toy.wait(toy.start(tmp_path / "run", 2, **TWELVE, broken=2)):
        assert code == 1
        assert "lost another rank" not in error
        assert "shard-1 cannot be read" in last_line(error)


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', "\n\n", "[1]\n"])
def test_torn_lines_of_metrics_are_left_out(done, tmp_path, tail):
    out = copied(done, tmp_path / "run")
    with open(out / "metrics.jsonl", "a") as file:
        file.write(tail)
    assert here(out, identity=ABOUT) == done[1]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_lost_metrics_are_nan_with_a_warning(done, tmp_path, caplog):
    out = copied(done, tmp_path / "run")
    (out / "metrics.jsonl").unlink()
    losses = here(out, identity=ABOUT)
    assert len(losses) == 4
    assert all(math.isnan(x) for x in losses[:2])
    assert losses[2:] == done[1][2:]
    assert "2 of 2 steps" in caplog.text


def empty_state(folder):
    (folder / "state.json").write_text("")


def state_without_step(folder):
    (folder / "state.json").write_text("{}")


def missing_tensors(folder):
    (folder / "part-00000.safetensors").unlink()


def torn_tensors(folder):
    file = folder / "part-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def flipped_bit(folder, name="part-00000.safetensors"):
    file = folder / name
    written = bytearray(file.read_bytes())
    written[-5] ^= 1  # the last bit of a number
    file.write_bytes(written)


def zeroed_tensors(folder):
    file = folder / "part-00000.safetensors"
    written = file.read_bytes()
    file.write_bytes(written[: len(written) // 2] + bytes(len(written) - len(written) // 2))


HARMS = [empty_state, state_without_step, missing_tensors, torn_tensors, flipped_bit, zeroed_tensors]


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_checkpoints_are_named(done, tmp_path, harm):
    """The only checkpoint; the last of two; and both."""
    out = copied(done, tmp_path / "run")
    harm(out / "step-000002")
    with pytest.raises(TrainError, match="step-000002 is damaged .*: remove it, .* resumes from the beginning"):
        here(out, identity=ABOUT)
    out = Path(shutil.copytree(done[0], tmp_path / "two"))
    harm(out / "step-000004")
    with pytest.raises(TrainError, match="step-000004 is damaged .*: remove it, .* resumes from step-000002"):
        here(out, identity=ABOUT, steps=6)
    harm(out / "step-000002")
    with pytest.raises(TrainError, match="remove it and step-000002, .* resumes from the beginning"):
        here(out, identity=ABOUT, steps=6)


def test_checkpoints_without_checksums_are_read(done, tmp_path):
    """As they were written before there were checksums."""
    out = copied(done, tmp_path / "run")
    file = out / "step-000002/state.json"
    state = json.loads(file.read_text())
    assert state.pop("sums").keys() == {"part-00000.safetensors"}
    file.write_text(json.dumps(state))
    assert here(out, identity=ABOUT) == done[1]


def test_folders_of_others_are_left_alone(done, tmp_path):
    out = copied(done, tmp_path / "foreign")
    (out / "step-final").mkdir()
    (out / "step-final/state.json").write_text("{}")
    assert here(out, identity=ABOUT) == done[1]


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    for step in (999_800, 1_000_000, 999_900):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}/state.json").write_text("{}")
    assert [c.name for c in checkpoints(tmp_path)] == ["step-999800", "step-999900", "step-1000000"]


IDS = torch.arange(8)


@pytest.mark.parametrize(
    "sample",
    [
        {"input_ids": IDS[:1]},
        {"input_ids": IDS, "labels": torch.full((8,), -100)},
        {"input_ids": IDS, "weights": torch.zeros(8)},
    ],
    ids=["one token", "no labels", "no weights"],
)
def test_samples_that_teach_nothing(tmp_path, sample):
    with pytest.raises(TrainError, match="step 1: no token of its 4 rows"):
        here(tmp_path / "run", batches=lambda step, row: sample)


@pytest.mark.parametrize(
    "samples, message",
    [
        ([{"input_ids": IDS, "labels": IDS[1:]}], "7 labels for 8 tokens"),
        ([{"input_ids": IDS, "weights": torch.ones(9)}], "9 weights for 8 tokens"),
        ([{"input_ids": IDS[:0]}], "no tokens"),
        ([{"labels": IDS}], "input_ids"),
        ([{"input_ids": IDS}, {"input_ids": IDS, "kinds": IDS}], "kinds"),
    ],
    ids=str,
)
def test_samples_that_make_no_batch(samples, message):
    with pytest.raises(TrainError, match=message):
        collate(samples)


@pytest.mark.parametrize(
    "save_every, message",
    [
        (1, "In another folder, a lower"),
        (9, "no checkpoint yet, and a lower"),
    ],
)
def test_advice_can_be_followed(tmp_path, save_every, message):
    """With a checkpoint, another recipe is refused in the same folder; without one, it isn't."""
    out = tmp_path / "run"

    def broken(step, row):
        return {"input_ids": IDS, "weights": torch.full((8,), math.nan if step else 1.0)}

    with pytest.raises(TrainError, match=message):
        here(out, batches=broken, save_every=save_every)
    if save_every == 9:
        here(out, lr=1e-3)


def test_sigterm_has_its_sentence(tmp_path, caplog):
    class Stopping(Here):
        def __call__(self, step, row):
            if (step, row) == (1, 0):
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(step, row)

    with pytest.raises(SystemExit) as end:
        here(tmp_path / "run", batches=Stopping())
    assert end.value.code == 143
    assert "Stopped after step 2 of 4" in caplog.text
    assert "resumes from there" in caplog.text


def test_stale_compiler_lock_in_our_folder(tmp_path, monkeypatch, caplog):
    """torch waits for this file forever, whichever process left it. In our own folder no other program compiles."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with one_compiler("x"):
        ours = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert "compiles" in caplog.text
    (ours / "x").mkdir()
    (ours / "x/lock").touch()
    (ours / "x/x.so").touch()
    caplog.clear()
    with one_compiler("x"):
        assert not (ours / "x/lock").exists()
        assert not caplog.text


def test_stale_compiler_lock_in_a_shared_folder(tmp_path, monkeypatch, caplog):
    lock = tmp_path / "x/lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with one_compiler("x"):
        assert lock.exists()
        assert str(lock) in caplog.text
    os.utime(lock, (0, 0))
    with one_compiler("x"):
        assert not lock.exists()


def test_saving_after_a_plain_training_is_silent(tmp_path):
    """DeepSpeed, where it is installed, is imported when transformers saves; it would print which device it found."""
    ((code, error),) = toy.wait(toy.start(tmp_path / "run", body=toy.train_and_save))
    assert code == 0
    assert (tmp_path / "run/model/config.json").exists()
    assert "accelerator" not in error, error
