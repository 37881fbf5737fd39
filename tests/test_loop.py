"""The training loop with several processes: exact resume, other numbers of ranks, lost ranks, signals."""
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
from transformers import Qwen2Config, Qwen2ForCausalLM

from longva.train.batch import TokenLoss, collate
from longva.train.engines import Plain
from longva.train.loop import train
from longva.train.ranks import Ranks
from longva.train.recipe import Recipe, TrainError
from longva.train.run import Identity, check_resume, checkpoints, load_checkpoint


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


class Here:
    "A training in this process: rows that count upwards."
    length = 32

    def __call__(self, step, row):
        return dict(input_ids=(torch.arange(self.length) + 7 * step + 3 * row) % 64)


def here(out, model=None, batches=None, **settings):
    return train(model or toy.tiny(), batches or Here(), out, **{"steps": 4, "lr": 1e-2, "precision": "fp32", "save_every": 2, **settings})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A run of one rank to its end, with what its caller says of it."
    out = tmp_path_factory.mktemp("runs") / "done"
    return out, here(out, identity=dict(corpus="3fa1", theta=1e4, length=32))


def copied(done, folder, first=2):
    "The run as it was after two steps."
    out = Path(shutil.copytree(done[0], folder))
    shutil.rmtree(out / "step-000004")
    return out


def test_a_run_goes_on_with_the_same_model_and_data(done, tmp_path):
    about = dict(corpus="3fa1", theta=1e4, length=32)
    out = copied(done, tmp_path / "run")
    for other, said in [(dict(about | dict(theta=1e9)), "begun with theta 10000.0 (now 1000000000.0)"), (dict(theta=1e4, length=32), "begun with corpus 3fa1 (now none)"), (None, "begun with corpus 3fa1")]:
        with pytest.raises(TrainError, match=re.escape(said)):
            here(out, identity=other)
    config = {n: v for n, v in toy.tiny().config.to_dict().items() if n != "layer_types"}
    for changes, said in [(dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)), "rope_theta 10000.0 (now 1000000.0)"), (dict(num_hidden_layers=1), "num_hidden_layers 2 (now 1)"),
                          (dict(num_attention_heads=8, head_dim=4, num_key_value_heads=4), "num_attention_heads 4 (now 8)"), (dict(intermediate_size=48), "intermediate_size 64 (now 48)")]:
        with pytest.raises(TrainError, match=re.escape(said)):
            here(out, Qwen2ForCausalLM(Qwen2Config(**{**config, **changes})), identity=about)
    with pytest.raises(TrainError, match=r"begun with lr 0.01 \(now 0.1\)"):
        here(out, identity=about, lr=0.1)
    assert here(out, identity=about) == done[1]
    check_resume(done[0], Identity(about=dict(corpus="3fa1", theta=1e4, length=32)))  # what a caller asks when there is nothing left to train
    with pytest.raises(TrainError, match="begun with length 32"):
        check_resume(done[0], Identity(about=dict(corpus="3fa1", theta=1e4, length=64)))


def test_identity_is_plain_values(tmp_path):
    with pytest.raises(TrainError, match="identity of a run must be plain values"):
        here(tmp_path / "run", identity=dict(corpus=Path("x")))
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_other_models_are_refused(done):
    "Extra and misshapen tensors are named, before a weight is touched."
    last = checkpoints(done[0])[-1]
    model = toy.tiny(seed=3)
    before = {n: p.clone() for n, p in model.named_parameters()}
    recipe, loss = Recipe(steps=1), TokenLoss(model)
    model.lm_head.weight.requires_grad_(False)
    engine = Plain(loss, [dict(params=list(model.parameters()), lr=1.0, top=1.0)], recipe, Ranks())
    with pytest.raises(TrainError, match="it has lm_head.weight, which is not trained here"):
        load_checkpoint(engine, last)
    model.lm_head.weight.requires_grad_(True)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(31))
    with pytest.raises(TrainError, match=r"model.norm.weight is \[32\] in it and \[31\] here"):
        load_checkpoint(engine, last)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n != "model.norm.weight")


def test_one_run_in_a_folder(unbroken, tmp_path):
    "The second is refused on all of its ranks, and the first doesn't notice."
    out = tmp_path / "run"
    first = toy.start(out, 2, steps=12, save_every=4, slow=0.05)
    wait_for(out / "metrics.jsonl", first)
    for world in (1, 2):
        for code, error in toy.wait(toy.start(out, world, steps=12, save_every=4)):
            assert code == 1 and error.strip().splitlines()[-1].startswith("Another run is training in") and "Traceback" not in error
    assert [code for code, _ in toy.wait(first)] == [0, 0]
    assert toy.losses(out) == unbroken[1] and not list(out.glob("*.part"))


WRONG = [dict(steps=-1), dict(steps=2.5), dict(steps="4"), dict(rows=0), dict(rows=-4), dict(lr=0), dict(lr=-1.0), dict(lr=float("nan")), dict(schedule="step"), dict(floor=2), dict(warmup=-5), dict(weight_decay=-0.1),
         dict(betas=(0.9,)), dict(betas=(0.9, 1.0)), dict(betas=0.9), dict(clip=0), dict(clip=-1), dict(precision="fp16"), dict(seed=-1), dict(micro=0), dict(cp=0), dict(kind="rings"), dict(engine="deepsped"),
         dict(checkpointing="no"), dict(save_every=0), dict(keep=-1), dict(keep=0), dict(spike=1), dict(timeout=0), dict(trackers="tensorboard"), dict(trackers=(1,)), dict(steps=True)]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_recipes_that_cannot_be_meant(wrong):
    (name,) = wrong
    with pytest.raises(TrainError) as said:
        Recipe(**{"steps": 4, **wrong})
    assert str(said.value).startswith(f"{name} is {wrong[name]!r}: it must be ") and "\n" not in str(said.value)


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


@pytest.mark.parametrize("largest, save_every, said", [(40_000, 4, "The checkpoint of step 4 cannot be saved in"), (2_000, 100, "metrics.jsonl cannot be written")])
def test_full_disk_is_one_sentence_on_all_ranks(tmp_path, largest, save_every, said):
    "Files of rank 0 may have so many bytes: the checkpoint or the log doesn't fit, and no half of a checkpoint is left."
    out = tmp_path / "run"
    for code, error in toy.wait(toy.start(out, 2, steps=12, save_every=save_every, largest=largest)):
        assert code == 1 and "Traceback" not in error, error
        last = error.strip().splitlines()[-1]
        assert said in last and "File too large" in last and "lost another rank" not in last
    assert not list(out.glob("step-*"))


def test_a_bad_row_on_one_rank_is_told_by_all(tmp_path):
    for code, error in toy.wait(toy.start(tmp_path / "run", 2, steps=12, save_every=4, broken=2)):
        assert code == 1 and "lost another rank" not in error and "shard-1 cannot be read" in error.strip().splitlines()[-1]


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', "\n\n", "[1]\n"])
def test_torn_lines_of_metrics_are_left_out(done, tmp_path, tail):
    out = copied(done, tmp_path / "run")
    with open(out / "metrics.jsonl", "a") as file:
        file.write(tail)
    assert here(out, identity=dict(corpus="3fa1", theta=1e4, length=32)) == done[1]
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_lost_metrics_are_nan_and_told(done, tmp_path, caplog):
    out = copied(done, tmp_path / "run")
    (out / "metrics.jsonl").unlink()
    losses = here(out, identity=dict(corpus="3fa1", theta=1e4, length=32))
    assert len(losses) == 4 and all(math.isnan(x) for x in losses[:2]) and losses[2:] == done[1][2:]
    assert "2 of 2 steps" in caplog.text


def test_damaged_checkpoints_are_named(done, tmp_path):
    about = dict(corpus="3fa1", theta=1e4, length=32)
    for number, harm in enumerate([lambda f: (f / "state.json").write_text(""), lambda f: (f / "state.json").write_text("{}"), lambda f: (f / "part-00000.safetensors").unlink(),
                                   lambda f: (f / "part-00000.safetensors").write_bytes((f / "part-00000.safetensors").read_bytes()[:-9])]):
        out = copied(done, tmp_path / str(number))
        harm(out / "step-000002")
        with pytest.raises(TrainError, match="step-000002 is damaged .*: remove it"):
            here(out, identity=about)
    out = copied(done, tmp_path / "foreign")
    (out / "step-final").mkdir()
    (out / "step-final/state.json").write_text("{}")
    assert here(out, identity=about) == done[1]


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    for step in (999_800, 1_000_000, 999_900):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}/state.json").write_text("{}")
    assert [c.name for c in checkpoints(tmp_path)] == ["step-999800", "step-999900", "step-1000000"]


def test_samples_that_teach_nothing(tmp_path):
    ids = torch.arange(8)
    for number, sample in enumerate([dict(input_ids=ids[:1]), dict(input_ids=ids, labels=torch.full((8,), -100)), dict(input_ids=ids, weights=torch.zeros(8))]):
        with pytest.raises(TrainError, match="step 1: no token of its 4 rows"):
            here(tmp_path / str(number), batches=lambda step, row, sample=sample: sample)
    for sample, said in [(dict(input_ids=ids, labels=ids[1:]), "7 labels for 8 tokens"), (dict(input_ids=ids, weights=torch.ones(9)), "9 weights for 8 tokens"), (dict(input_ids=ids[:0]), "no tokens"), (dict(labels=ids), "input_ids")]:
        with pytest.raises(TrainError, match=said):
            collate([sample])
    with pytest.raises(TrainError, match="kinds"):
        collate([dict(input_ids=ids), dict(input_ids=ids, kinds=ids)])


def test_advice_can_be_followed(tmp_path):
    "With a checkpoint, another recipe is refused in the same folder; without one, it isn't."
    for out, save_every in ((tmp_path / "saved", 1), (tmp_path / "unsaved", 9)):
        with pytest.raises(TrainError, match="In another folder, a lower" if save_every == 1 else "no checkpoint yet, and a lower"):
            here(out, batches=lambda step, row: dict(input_ids=torch.arange(8), weights=torch.full((8,), math.nan if step else 1.0)), save_every=save_every)
    here(tmp_path / "unsaved", lr=1e-3)


def test_sigterm_has_its_sentence(tmp_path, caplog):
    class Stopping(Here):
        def __call__(self, step, row):
            if (step, row) == (1, 0):
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(step, row)

    with pytest.raises(SystemExit) as said:
        here(tmp_path / "run", batches=Stopping())
    assert said.value.code == 143 and "Stopped after step 2 of 4" in caplog.text and "resumes from there" in caplog.text


def test_stale_compiler_lock(tmp_path, monkeypatch, caplog):
    "torch waits for this file forever, whoever left it. In our own folder nobody else compiles."
    from longva.train.engines import one_compiler

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
        assert not (ours / "x/lock").exists() and not caplog.text
    theirs = tmp_path / "theirs"
    (theirs / "x").mkdir(parents=True)
    (theirs / "x/lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(theirs))
    with one_compiler("x"):
        assert (theirs / "x/lock").exists() and str(theirs / "x/lock") in caplog.text
    os.utime(theirs / "x/lock", (0, 0))
    with one_compiler("x"):
        assert not (theirs / "x/lock").exists()


def test_saving_after_a_plain_training_is_silent(tmp_path):
    "DeepSpeed, where it is installed, is imported when transformers saves; it would tell which device it found."
    ((code, error),) = toy.wait(toy.start(tmp_path / "run", body=toy.train_and_save))
    assert code == 0 and (tmp_path / "run/model/config.json").exists() and "accelerator" not in error, error
