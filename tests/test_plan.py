"""The planner against live models and closed formulas, and `longva plan` in a fresh process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from longva.context.plan import MODELS, Plan, PlanError, advice, check, longest, operations, plan, saved_bytes, sizes

ROOT = Path(__file__).resolve().parents[1]


def longva(*words, cwd):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", "from longva.cli import app; app()", "plan", *map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_full_size_models(name):
    "Counted on models that hold no memory."
    from transformers import CONFIG_MAPPING

    given = dict(MODELS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[given.pop("model_type")](**given))
    assert sizes(name).parameters == sum(p.numel() for p in model.parameters())


def test_saved_bytes_by_hand():
    "One Qwen2-7B layer's list, added up by hand for one token in bfloat16."
    one = saved_bytes("qwen2-7b", 1)
    assert one["mlp"] == 28 * 4 * 18944 * 2
    assert one["attention"] == 28 * (2 * 128 * (28 + 4 + 4 + 28) + 4 * 28)
    assert one["norms"] == 28 * 2 * (3584 * (4 + 2 + 2) + 4)
    assert saved_bytes("qwen2-7b", 7, checkpoint=True)["inputs"] == 7 * 200_704


def test_operations_by_hand():
    found = operations("qwen2-7b", 1_000_000)
    layers, head = 28 * (3584 * 128 * 64 + 3 * 3584 * 18944), 152064 * 3584
    assert found["model"] == pytest.approx(3 * (2 * (layers + head) * 1e6 + 4 * 28 * 128 * 28 * 1e12 / 2))
    assert found["hardware"] == pytest.approx(8 * layers * 1e6 + 6 * head * 1e6 + 4.5 * 401_408 * 1e12 / 2)
    assert (
        operations("qwen2-7b", 1000, checkpoint=False)["hardware"]
        < operations("qwen2-7b", 1000, save_attention=True)["hardware"]
        < operations("qwen2-7b", 1000)["hardware"]
    )


SETTINGS = dict(gpu_gib=139.8, host_gib=128, offload="optimizer", tiled_mlp=True)


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(checkpoints="host"),
        dict(checkpoints="host", head_groups=True),
        dict(checkpoints="recurrent"),
        dict(checkpoints="recurrent-host"),
        dict(checkpoints="none"),
        dict(gpus=8),
        dict(gpus=8, kind="ring", offload="all", host_gib=900),
        dict(save_attention=True),
    ],
)
def test_longest_is_the_edge(change):
    p = plan("qwen2-7b", 1000, **SETTINGS | change)
    edge = longest(p)
    assert check(replace(p, length=edge)).fits and not replace(p, length=edge + p.ranks).fits


def test_parts_add_up_and_grow():
    small, large = (
        plan("qwen2-7b", n, gpus=8, gpu_gib=80, host_gib=1000, offload="optimizer") for n in (100_000, 200_000)
    )
    assert small.parts[0]["weights"] == 2 * 7_615_616_512 / 8 and small.parts[1]["optimizer"] == 12 * 7_615_616_512
    assert large.parts[0]["checkpoints"] == 2 * small.parts[0]["checkpoints"] == 2 * 12_500 * 200_704
    assert large.flops["model"] > 2 * small.flops["model"] and large.seconds > 2 * small.seconds


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_the_plain_engine_has_everything_on_each_gpu(gpus):
    """AdamW on float32 weights: 16 bytes a parameter, however many ranks there are."""
    settings = dict(engine="plain", mixed=True, optimizer_bytes=8, gpu_gib=80, gpus=gpus, context=1, kind=None)
    p = plan("qwen2-7b", 4096, host_gib=500, **settings)
    assert sum(p.parts[0][name] for name in ("weights", "gradients", "optimizer")) == 16 * 7_615_616_512
    assert not p.fits and longest(p) == 0
    assert [name for name, _ in p.advice] == ["ZeRO-3 (engine deepspeed)"]
    assert plan("qwen2-0.5b", 4096, **settings).fits


MEASURED = json.loads((ROOT / "benchmarks/results/memory.json").read_text())


@pytest.mark.parametrize("name", MEASURED["cases"])
def test_the_plan_is_within_a_tenth_of_what_was_measured(name):
    """Both engines, both precisions, with and without recomputed layers; benchmarks/memory.py measures it again."""
    from longva.train.ranks import Ranks
    from longva.train.recipe import Recipe
    from longva.train.throughput import plan_step

    engine, precision, layers = name.split(" ", 2)
    world = 2 if engine == "deepspeed" else 1
    recipe = Recipe(
        steps=1, rows=world, engine=engine, precision=precision, checkpointing=layers == "recomputed layers"
    )
    model = Qwen2Config(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=4000,
    )
    parts = plan_step(model, MEASURED["length"], recipe, Ranks(0, world)).parts[0]
    planned = sum(parts.values()) - parts["Python and its libraries"]
    assert abs(planned / MEASURED["cases"][name]["measured"] - 1) < 0.1


def test_ranks_that_each_open_the_whole_model():
    """Eight ranks with Qwen2-7B in bfloat16 take 122 GB of the host before the first step, whatever its step takes."""
    p = plan("qwen2-7b", 8000, gpus=8, gpu_gib=80, host_gib=128, copies=8)
    assert (p.start, p.checkpoint) == (8 * 2 * 7_615_616_512, 12 * 7_615_616_512)
    assert p.fits and replace(p, host_gib=100, copies=0).fits
    small = replace(p, host_gib=100)
    assert small.over == "start" and longest(small) == 0
    assert small.limit.startswith(
        "The start does not fit: the host has 107.4 GB and would need 121.8 GB, for 8 ranks that each hold the whole "
    )


def test_rows_are_computed_together():
    one, four = (plan("qwen2-0.5b", 1000, gpus=2, rows=rows, gpu_gib=80) for rows in (1, 4))
    for part in ("layer", "KV", "checkpoints"):
        assert four.parts[0][part] == 4 * one.parts[0][part] > 0
    assert four.flops["model"] == 4 * one.flops["model"] and four.flops["attention"] == one.flops["attention"]


def test_gradients_come_as_activations_go():
    """With one micro batch the plain engine's gradients and its activations are never there in full together."""
    settings = dict(engine="plain", b=4, optimizer_bytes=8, gpu_gib=80, checkpoints="none", cpu=True)
    apart, beside = (plan("qwen2-0.5b", 8000, accumulates=known, **settings).parts[0] for known in (False, True))
    assert "gradients" not in apart and beside["gradients"] == beside["weights"]
    short = plan("qwen2-0.5b", 1, accumulates=False, **settings).parts[0]
    assert 0.4 < short["gradients"] / short["weights"] < 1


@pytest.mark.parametrize("kind", ["all_gather", "ring", None])
def test_keys_and_values_of_other_ranks_by_hand(kind):
    """Qwen2-7B in bfloat16, 4 of 8 ranks share 100,000 tokens: with all-gather only those of the others are extra."""
    p = plan("qwen2-7b", 100_000, gpus=8, context=4, kind=kind, gpu_gib=80)
    number, narrow = 2, 4 * 128
    wanted = {
        "all_gather": 75_000 * 2 * narrow * number * 2,  # keys and values, and their gradients
        "ring": 2 * 25_000 * 2 * narrow * (number + 4),  # two blocks, and their gradients in float32
        None: 0,
    }
    assert p.parts[0].get("KV", 0) == wanted[kind]


def test_the_limiting_sentence():
    p = plan("qwen2-7b", 2_000_000, **SETTINGS)
    with pytest.raises(
        PlanError,
        match=r"^2,000,000 tokens do not fit: the GPU has 150\.1 GB and would need .* of which checkpoints 401\.4 GB; "
        r"the longest sequence that fits is 39\d,\d{3}; next: ",
    ):
        check(p)
    host = plan("qwen2-7b", 1000, gpu_gib=139.8, host_gib=64, offload="optimizer")
    with pytest.raises(
        PlanError,
        match="the host has 68.7 GB and would need 99.4 GB, of which optimizer 91.4 GB; not even one token fits",
    ):
        check(host)
    tiny = plan("qwen2-7b", 1000, gpu_gib=8)
    with pytest.raises(PlanError, match="not even one token fits"):
        check(tiny)
    assert "\n" not in p.limit + host.limit + tiny.limit


def test_one_token_is_a_singular():
    p = plan("qwen2-7b", 1, gpu_gib=8)
    assert p.limit.startswith("1 token does not fit: ") and p.table.startswith(
        "1 token on 1 GPU of 8 GiB, host of 0 GiB; 1 token on each GPU\n"
    )
    assert plan("qwen2-0.5b", 1, gpu_gib=80).limit.startswith("1 token fits; up to ")


def test_advice_is_true():
    p = plan("qwen2-7b", 224_000, gpu_gib=80, host_gib=1000, checkpoints="none", offload="optimizer")
    before = longest(p)
    assert advice(p) and all(to > before for _, to in advice(p))
    assert dict(advice(p))["recompute layers (checkpoints gpu)"] == longest(replace(p, checkpoints="gpu"))


def test_configurations_of_every_kind(tmp_path):
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    config.save_pretrained(tmp_path)
    nested = {"model_type": "longva", "text_config": json.loads((tmp_path / "config.json").read_text())}
    assert (
        sizes(config)
        == sizes(tmp_path)
        == sizes(str(tmp_path))
        == sizes(nested)
        == sizes(json.loads((tmp_path / "config.json").read_text()))
    )
    assert check(plan(config, 4096, gpu_gib=16)).fits


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(length=0), "length is 0"),
        (dict(gpus=0), "gpus is 0"),
        (dict(gpus=4, context=3), "4 GPUs cannot be divided into groups of 3"),
        (dict(gpu_gib=-1), "gpu_gib is -1"),
        (dict(offload="disk"), "no offload 'disk'"),
        (dict(checkpoints="all"), "no checkpoints 'all'"),
        (dict(efficiency=1.5), "share of the peak"),
        (dict(b=1), "1 bytes"),
    ],
)
def test_impossible_settings(given, words):
    with pytest.raises(PlanError, match=words):
        plan("qwen2-7b", **dict(length=1000) | given)


def test_command_that_fits(tmp_path):
    done = longva(
        "--model",
        "qwen2-7b",
        "--length",
        224000,
        "--gpus",
        8,
        "--gpu-gib",
        80,
        "--host-gib",
        1000,
        "--offload",
        "all",
        "--tflops",
        312,
        "--efficiency",
        0.45,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "224,000 tokens fit" in done.stdout
        and "a step: 35 s" in done.stdout
        and not done.stderr
        and not list(tmp_path.iterdir())
    )


def test_command_that_does_not_fit(tmp_path):
    done = longva("--model", "qwen2-7b", "--length", 224000, "--gpu-gib", 80, "--host-gib", 128, cwd=tmp_path)
    assert (
        done.returncode == 1
        and done.stderr.startswith("224,000 tokens do not fit: the GPU has 85.9 GB")
        and done.stderr.count("\n") == 1
    )
    assert "optimizer" in done.stdout and "one more switch" in done.stdout


def test_command_reads_a_folder_and_refuses(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["qwen2-0.5b"]))
    assert longva("--model", tmp_path, "--length", 32768, "--gpu-gib", 80, cwd=tmp_path).returncode == 0
    for words, sentence in [
        (("--model", "qwen9", "--length", 10), "There is no model qwen9"),
        (("--model", "qwen2-7b", "--length", 0), "'--length'"),
        (("--model", "qwen2-7b", "--length", 10, "--checkpoints", "disk"), "'disk' is not one of 'none'"),
    ]:
        done = longva(*words, cwd=tmp_path)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr


def test_the_plan_needs_no_torch():
    code = (
        "import sys; from longva.context.plan import plan; print(plan('qwen2-7b', 1000)); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "1,000 tokens" in done.stdout, done.stderr


def test_plan_is_its_settings():
    assert Plan(sizes("qwen2-7b"), 1000) == plan("qwen2-7b", 1000)
