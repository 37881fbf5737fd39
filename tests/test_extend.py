"""longva extend with the miniature preset, as a user runs it: from the terminal, with several ranks, killed, and on
bad text."""

import json
import random
import shutil
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import train_toy as toy


def command(out, settings):
    "One rank of `longva extend`, with a checkpoint every second step; what it prints goes where its errors go."
    import os
    from dataclasses import replace

    from longva.cli import app
    from longva.train.extend import PRESETS

    PRESETS["mini"] = replace(PRESETS["mini"], recipe=replace(PRESETS["mini"].recipe, save_every=2))
    os.dup2(2, 1)
    app(["extend", "--out", out, *map(str, settings["args"])])


def start(out, *args, world=1):
    return toy.start(out, world, body=command, args=args)


def test_two_ranks_zero3_killed_and_resumed(tmp_path):
    """As from the terminal; killed, it ends with bit-equal weights on the same ranks, and on one rank with the same
    losses to rounding."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install 'longva[train]')")
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))

    def run(out, world):
        return start(out, "--preset", "mini", "--steps", 4, "--rows", 4, "--engine", "deepspeed", world=world)

    done = toy.wait(run(whole, 2))
    assert [code for code, _ in done] == [0, 0], done[0][1][-3000:]
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("long"))  # the stage before is the same
    processes, metrics, end = run(killed, 2), killed / "long/metrics.jsonl", time.time() + 900
    while not (killed / "long/step-000002").exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.time() < end and all(p.exitcode is None for p in processes), toy.wait(processes, 5)
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    for p in processes:
        p.kill()
    toy.wait(processes)
    assert not (killed / "long/model").exists() and (killed / "long/step-000002").exists()
    shutil.copytree(killed, alone)
    for code, error in toy.wait(run(killed, 2) + run(alone, 1)):
        assert code == 0, error[-3000:]
    a, b = (toy.weights(out / "long/model") for out in (whole, killed))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert toy.losses(whole / "long") == toy.losses(killed / "long")
    assert max(abs(x - y) for x, y in zip(toy.losses(whole / "long"), toy.losses(alone / "long"), strict=True)) < 1e-4


def waiting(out, settings):
    "The first rank works for longer than the ranks wait for each other."
    import os

    import torch.distributed as dist

    from longva.train.ranks import Ranks

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=4))

    def slow():
        time.sleep(9)
        if settings["error"]:
            raise OSError("no space left")

    try:
        Ranks(rank, 2).first(slow, heartbeat=1)
        said = "done"
    except Exception as e:
        said = f"{type(e).__name__}: {e}"
    Path(f"{out}-{rank}").write_text(said)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "error, said",
    [
        (False, ["done", "done"]),
        (True, ["OSError: no space left", "TrainError: The first rank stopped: no space left."]),
    ],
)
def test_ranks_wait_longer_than_their_deadline_for_the_text(tmp_path, error, said):
    toy.wait(toy.start(tmp_path / "said", 2, body=waiting, error=error))
    assert [(tmp_path / f"said-{r}").read_text() for r in range(2)] == said


def test_broken_text_is_one_sentence(tmp_path):
    "As in the terminal; and another kind of broken line from Python."
    from longva.mini.reader import short_reader
    from longva.train.data import CorpusError
    from longva.train.extend import extend

    (tmp_path / "text").mkdir()
    torn, reader = tmp_path / "text/a.jsonl", short_reader(tmp_path / "reader")
    torn.write_text(json.dumps({"text": "find owl ."}) + '\n{"text": "a b')
    ((code, error),) = toy.wait(
        start(tmp_path / "run", "--preset", "mini", "--text", tmp_path / "text", "--model", reader)
    )
    assert code == 1 and "a.jsonl, line 2: broken JSON" in error and "Traceback" not in error
    torn.write_text(json.dumps({"text": "find owl ."}) + '\n{"words": "a"}')
    with pytest.raises(CorpusError, match="line 2: no text under 'text'"):
        extend("mini", tmp_path / "text", tmp_path / "run", model=reader)
    assert not (tmp_path / "run").exists()


def test_another_start_is_refused(tmp_path):
    """A run that is half done, and one that is whole, whose checkpoints are gone: other weights of the same shapes,
    other weights of tokens, another seed."""
    from longva.mini.reader import short_reader
    from longva.train.extend import extend

    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("find owl . red rings . " * 60)
    reader, out = short_reader(tmp_path / "reader"), tmp_path / "run"

    def go(model=reader, **more):
        return extend(
            "mini",
            tmp_path / "text",
            out,
            model=model,
            length=16,
            **{"corpus": dict(separator=2), "steps": 2, "rows": 2, **more},
        )

    made = go(save_every=1)
    other = shutil.copytree(reader, tmp_path / "other")
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    name = next(n for n in weights if "layers.0" in n)
    weights[name].flatten()[7] += 1e-3  # one number
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(out / "step-000002")
    shutil.rmtree(made)
    for _ in ("half", "whole"):
        for wrong, said in (
            (dict(model=other), "starting weights"),
            (dict(weigh=lambda ids: torch.ones(len(ids))), "weighed False .now True"),
            (dict(lr=1e-5), "lr 0.0015 .now 1e-05"),
            (dict(steps=3), "steps 2 .now 3"),
        ):
            with pytest.raises(toy.TrainError, match=f"was begun with {said}"):
                go(**wrong)
        assert go() == made
        for checkpoint in out.glob("step-*"):
            shutil.rmtree(checkpoint)


def test_memory_is_asked_before_text_and_weights(tmp_path, monkeypatch):
    """On all three trainings: the refusal comes before anything is read or written."""
    from longva.context.plan import PlanError
    from longva.model.open import find_model
    from longva.train import align, dpo, extend, throughput

    def too_late(*given, **more):
        raise AssertionError("memory was not asked first")

    for module, names in (
        (extend, ["open_tokenizer", "open_corpus", "open_model"]),
        (align, ["open_data", "open_start"]),
        (dpo, ["read_pairs", "open_both"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, too_late)
    monkeypatch.setattr(throughput, "_host_gib", lambda: 0.25)
    toy.tiny().save_pretrained(tmp_path / "reader")
    out = tmp_path / "run"
    for call in (
        lambda: extend.extend("mini", tmp_path, out, model=tmp_path / "reader"),
        lambda: align.align("mini-2", tmp_path / "rows.json", out, model="mini-longva"),
        lambda: dpo.dpo("mini", tmp_path / "pairs.json", out, model=str(find_model("mini-longva"))),
    ):
        with pytest.raises(PlanError, match="the process has 0.3 GB and would need"):
            call()
    assert not out.exists()


def test_a_plan_without_a_run(tmp_path):
    from longva.train.extend import describe_extension

    toy.tiny().save_pretrained(tmp_path / "reader")
    before = sorted(tmp_path.rglob("*"))
    text, planned = describe_extension("mini", model=tmp_path / "reader", length=1000, steps=7)
    assert planned.fits and planned.length == 1000 and planned.engine == "plain"
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert {"length 1000", "theta 1000000000.0", "steps 7", "engine plain"} <= set(lines)
    assert sorted(tmp_path.rglob("*")) == before


def test_context_that_does_not_fit_is_the_planners_sentence(tmp_path):
    from transformers import Qwen2Config

    from longva.context.plan import PlanError
    from longva.train.ranks import Ranks
    from longva.train.recipe import Recipe
    from longva.train.throughput import check_memory

    seven = type(
        "M",
        (),
        {
            "config": Qwen2Config(
                vocab_size=152064,
                hidden_size=3584,
                intermediate_size=18944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
            )
        },
    )
    with pytest.raises(PlanError):
        check_memory(seven, 4_000_000, Recipe(steps=1), Ranks())


def test_a_short_window_and_a_lost_rope_are_refused_before_the_text_is_read(tmp_path):
    from transformers import LlamaConfig, MistralConfig

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    MistralConfig(**sizes, num_key_value_heads=2, sliding_window=32).save_pretrained(tmp_path / "window")
    rope = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope["original_max_position_embeddings"] = 64
    LlamaConfig(**sizes, rope_parameters=rope).save_pretrained(tmp_path / "rope")
    (tmp_path / "text").mkdir()
    command = ("--preset", "mini", "--text", tmp_path / "text", "--model")
    for name, words, option in [
        ("window", "all 2 layers see 32 tokens", "--keep-window"),
        ("rope", "of type llama3", "--replace-rope"),
    ]:
        ((code, error),) = toy.wait(start(tmp_path / "run", *command, tmp_path / name))
        assert code == 1 and words in error and option in error and "Traceback" not in error, error
        ((code, error),) = toy.wait(start(tmp_path / "run", *command, tmp_path / name, option))
        assert words not in error, "now the tokenizer is missed"
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch):
    """On all three trainings; a plan that doesn't fit is one sentence and exit 1."""
    from typer.testing import CliRunner

    from longva.cli import app
    from longva.train import throughput

    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps([{"id": 1, "conversations": [
        {"from": "human", "value": "find owl"}, {"from": "gpt", "value": "red"}]}]))
    (tmp_path / "pairs.json").write_text(json.dumps([{"prompt": "find owl", "chosen": "red", "rejected": "blue"}]))
    before = sorted(tmp_path.rglob("*"))
    commands = [
        ["extend", "--preset", "mini"],
        ["align", "--preset", "mini-2", "--data", "rows.json", "--model", "mini-longva"],
        ["dpo", "--preset", "mini", "--data", "pairs.json"],
    ]
    for words in commands:
        done = CliRunner().invoke(app, [*words, "--steps", "7", "--dry-run"])
        assert done.exit_code == 0, done.output
        lines = [" ".join(line.split()) for line in done.output.splitlines()]
        assert {"steps 7", "engine plain", "precision fp32"} <= set(lines)
        assert any(line.startswith("weights ") for line in lines) and any("would, then memory" in x for x in lines)
    monkeypatch.setattr(throughput, "_host_gib", lambda: 0.25)
    done = CliRunner().invoke(app, [*commands[0], "--dry-run"])
    assert done.exit_code == 1 and "do not fit: the process has 0.3 GB" in done.output
    assert sorted(tmp_path.rglob("*")) == before
