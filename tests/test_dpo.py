"""Preference training: losses against reference numbers, log-probabilities against plain ones, `longva dpo` killed, resumed, and on two ranks."""
import json
import math
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import train_toy as toy
from PIL import Image

from longva.mini import folder, load
from longva.train.clips import Clips
from longva.train.dpo import dpo
from longva.train.dpo_loss import DPOLoss, answer_log_probs, dpo_loss
from longva.train.pair_batch import collate_pairs, encode_pair
from longva.train.pairs import read_pair, read_pairs
from longva.train.recipe import TrainError
from longva.train.reference import read_reference
from longva.train.rows import BadRow, DataError, Row
from longva.train.run import checkpoints
from longva.vision.video import write_video


@pytest.fixture(scope="module")
def parity(shared_data):
    return shared_data / "parity"


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_losses_equal_the_originals(parity, loss):
    known = json.loads((parity / "losses/dpo.json").read_text())
    given = [torch.tensor(known[k]) for k in ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")]
    entries = [e for e in known["entries"] if e["loss_type"] == loss]
    assert len(entries) >= 2
    for e in entries:
        reference = [torch.zeros(6)] * 2 if e["reference_free"] else given[2:]
        ours = dpo_loss(*given[:2], *reference, loss, e["beta"], e["label_smoothing"])
        assert torch.allclose(ours, torch.tensor(e["losses"]), rtol=1e-5, atol=1e-5), e


def test_losses_by_their_formulas():
    "In float64, at random points, written with the sigmoid itself; and the slope at the start, where all is known."
    c, r, rc, rr = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    h = ((c - rc) - (r - rr)).numpy()
    sigma = 1 / (1 + np.exp(-0.3 * h))
    assert np.allclose(dpo_loss(c, r, rc, rr, beta=0.3, label_smoothing=0.2), -0.8 * np.log(sigma) - 0.2 * np.log(1 - sigma), atol=1e-12)
    assert np.allclose(dpo_loss(c, r, rc, rr, "hinge", 0.3), np.clip(1 - 0.3 * h, 0, None), atol=1e-12)
    assert np.allclose(dpo_loss(c, r, rc, rr, "ipo", 0.3), (h - 1 / 0.6) ** 2, atol=1e-12)
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for loss, slope in (("sigmoid", -0.05), ("hinge", -0.1), ("ipo", -10.0)):
        assert torch.autograd.grad(dpo_loss(x, 0, 0, 0, loss, 0.1), x)[0].item() == pytest.approx(slope)


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_answer_log_probs(dtype, close):
    torch.manual_seed(1)
    hidden, weight, labels = torch.randn(5, 17, 16), torch.randn(71, 16), torch.randint(71, (5, 17))
    labels[:, :9] = -100; labels[3] = -100
    def whole(h, w): return (torch.log_softmax(h @ w.T, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)).sum(1)
    a, b = ([x.to(dtype).to(d).requires_grad_() for x in (hidden, weight)] for d in (dtype, torch.float64))
    ours, plain = answer_log_probs(*a, labels, chunk=4)[0], whole(*b)
    assert (ours.double() - plain).abs().max() < close * 10 and ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    by = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    for x, y in zip(torch.autograd.grad((ours * by).sum(), a), torch.autograd.grad((plain * by).sum(), b)):
        assert (x.double() - y).abs().max() <= close * y.abs().max()


def test_logits_of_the_whole_row_never_exist():
    "A vocabulary of 20,000 and 4,000 tokens, of which 64 are answer: at most a chunk of logits is alive."
    hidden, weight, labels = torch.randn(1, 4000, 8, requires_grad=True), torch.randn(20_000, 8, requires_grad=True), torch.full((1, 4000), -100)
    labels[0, -64:] = 3
    largest, lift = [0], torch.utils._python_dispatch.TorchDispatchMode
    class Watch(lift):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest[0] = max(largest[0], *(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)))
            return out
    with Watch(): answer_log_probs(hidden, weight, labels, chunk=16)[0].sum().backward()
    assert largest[0] <= 20_000 * 16


def test_two_pairs_of_the_original(parity):
    "Log-probabilities, SFT loss and DPO losses on a checkpoint in the original's format."
    from longva.model.modeling import LongVA
    from longva.model.processing import LongVAImageProcessor
    known = json.loads((parity / "losses/dpo.json").read_text())["from_checkpoint"]
    model = LongVA.from_pretrained(parity / known["checkpoint"], dtype=torch.float32).eval()
    token, vision = model.config.image_token_id, model.config.vision_config
    images = LongVAImageProcessor(vision.image_size, vision.patch_size, model.config.pool_stride)(Image.open(parity / known["image"]))
    (columns, rows), = images["image_layouts"].tolist()
    visual = columns * rows * model.config.tokens_per_grid
    samples = []
    for prompt, chosen, rejected in zip(known["prompts"], known["chosen"], known["rejected"]):
        ids = [i for x in prompt for i in ([token] * visual if x == -200 else [x])]
        samples.append(dict(prompt=torch.tensor(ids), chosen=torch.tensor(chosen), rejected=torch.tensor(rejected), image_pixels=images["pixel_values"], image_layouts=images["image_layouts"]))
    for kind, there in known["losses_beta_0.1"].items():
        loss, counts = DPOLoss(model, kind), torch.tensor([len(s[k]) for k in ("chosen", "rejected") for s in samples])
        reference = torch.tensor(there["reference_logps_used"]).double() * (counts if kind == "ipo" else 1)
        with torch.no_grad():
            sums, n = loss.log_probs(collate_pairs(samples))
            mean = loss(dict(collate_pairs(samples), reference=reference), 2.0)
        told = loss.figures()
        assert torch.equal(n, counts) and torch.allclose(sums, torch.tensor(known["sum_logps"]), atol=2e-4)
        assert float(mean) == pytest.approx(there["mean"], rel=1e-4)
        assert told["reward_chosen"] == pytest.approx(np.mean(there["chosen_rewards"]), abs=1e-4) and told["reward_rejected"] == pytest.approx(np.mean(there["rejected_rewards"]), abs=1e-4)
    assert -sums[:2].sum() / n[:2].sum() == pytest.approx(known["sft_loss_on_chosen"], rel=1e-4)


WORDS = [("owl", "red", "rings"), ("bear", "blue", "dots"), ("fish", "green", "plain"), ("tiger", "cyan", "rows"), ("goose", "purple", "square")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Three films, an image and a text, in both layouts of rows; a film that is none; a row without an answer."
    where, rng, rows = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0), []
    for i, (thing, colour, ground) in enumerate(WORDS[:3]):
        write_video(rng.integers(0, 255, (3 + i, 28, 28, 3), dtype=np.uint8), where / f"{i}.mp4", fps=1.0)
        rows.append(dict(id=i, video=f"{i}.mp4", prompt=f"<video>\nfind {thing}", chosen=ground, rejected=f"{colour} . {colour}", answer=ground))
    Image.fromarray(rng.integers(0, 255, (28, 56, 3), dtype=np.uint8)).save(where / "a.png")
    say = lambda who, *parts: [dict(role=who, content=list(parts))]
    rows.append(dict(images=["a.png"], prompt=say("user", dict(type="image"), dict(type="text", text="find tiger")),
                     chosen=say("assistant", dict(type="text", text="rows")), rejected=say("assistant", dict(type="text", text="cyan"))))
    rows.append(dict(prompt="find goose", chosen="square", rejected="purple"))
    (where / "broken.mp4").write_bytes(b"no film")
    rows.insert(2, dict(video="broken.mp4", prompt="find owl", chosen="plain", rejected="red"))
    rows.insert(4, dict(image="a.png", prompt="find owl", chosen="plain"))
    (where / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return where / "pairs.jsonl"


def command(out, settings):
    "One rank of `longva dpo`."
    from longva.cli import app
    from longva.train import dpo as module
    PRESETS = module.PRESETS
    PRESETS["mini"] = replace(PRESETS["mini"], recipe=replace(PRESETS["mini"].recipe, save_every=2))
    first = DPOLoss.forward
    def slowly(self, batch, normalizer): time.sleep(settings["slow"]); return first(self, batch, normalizer)
    if settings["slow"]: DPOLoss.forward = slowly
    app(["dpo", *map(str, settings["args"])])


def start(out, data, *args, world=1, slow=0, **more):
    options = ["--preset", "mini", "--data", data, "--out", out, "--steps", 8, "--rows", 4, "--bad-share", 0.3, "--lr", 1e-3, *args]
    return toy.start(out, world, body=command, args=options, slow=slow, **more)


def run(out, data, *args, world=1):
    said = toy.wait(start(out, data, *args, world=world))
    assert all(code == 0 for code, _ in said), said[0][1][-3000:]
    return said[0][1]


def log(out): return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    "A run to its end, and what it said."
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, run(out, data)


def test_command_names_bad_rows_and_margins_grow(unbroken, data):
    out, said = unbroken
    steps = log(out)
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(steps[0]["reward_margin"]) < 1e-4
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"] and steps[-1]["reward_margin"] > 0.5 and steps[-1]["reward_accuracy"] == 1
    assert steps[-1]["reward_margin"] == pytest.approx(steps[-1]["reward_chosen"] - steps[-1]["reward_rejected"], abs=1e-9)
    bad = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert [(Path(b["file"]).name, b["row"]) for b in bad] == [("pairs.jsonl", 5), ("pairs.jsonl", 3)] and "no rejected" in bad[0]["why"] and "broken.mp4" in bad[1]["why"]
    assert "2 of 7 rows are left out" in said and "pairs.jsonl, line 5: no rejected" in said and "Traceback" not in said
    model, processor = load(str(out / "model"))
    before = dict(load("mini-longva")[0].named_parameters())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any("mm_projector" in n for n in moved) and any("layers.0" in n for n in moved) and not any("vision_tower" in n for n in moved)
    pairs, _ = read_pairs(data)
    clips = Clips(model, processor, frames=4)
    kept, sure = read_reference(out / "reference"), []
    for i, pair in enumerate(pairs):
        if "bad" in kept[i]: continue
        with torch.no_grad(): sums, _ = DPOLoss(model).log_probs(collate_pairs([encode_pair(pair, clips)]))
        sure.append(float(sums[0] - sums[1]) > kept[i]["chosen"] - kept[i]["rejected"])
    assert sure == [True] * 5


def test_killed_run_goes_on_bit_for_bit(unbroken, data, tmp_path):
    whole, out = unbroken[0], tmp_path / "killed"
    processes, end = start(out, data, slow=0.05), time.time() + 120
    while not (out / "step-000004").exists():
        assert time.time() < end and all(p.exitcode is None for p in processes), toy.wait(processes, 5)
        time.sleep(0.02)
    time.sleep(0.13)  # somewhere in a step
    for p in processes:
        p.kill()
    assert toy.wait(processes)[0][0] == -signal.SIGKILL and not (out / "step-000008").exists()
    asked = {f: f.stat().st_mtime_ns for f in (out / "reference").rglob("*") if f.suffix in (".jsonl", ".safetensors")}
    run(out, data)
    a, b = toy.weights(whole / "model"), toy.weights(out / "model")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and toy.losses(whole) == toy.losses(out)
    assert all(f.stat().st_mtime_ns == t for f, t in asked.items() if f.suffix == ".safetensors") and len(asked) == 5  # four clips, one list


def test_two_ranks_equal_one(unbroken, data, tmp_path):
    run(tmp_path / "two", data, world=2)
    for a, b in zip(log(unbroken[0]), log(tmp_path / "two"), strict=True):
        assert all(abs(a[k] - b[k]) < 1e-4 for k in ("loss", "reward_margin", "reward_chosen", "sft_loss")) and a["tokens"] == b["tokens"], (a, b)
        assert a["step"] == 1 or a["reward_accuracy"] == b["reward_accuracy"]  # at the start all margins are rounding
    lines = [f.read_text().splitlines() for f in sorted((tmp_path / "two/reference").glob("rank-*.jsonl"))]
    assert [len(x) for x in lines] == [3, 3]  # six pairs, shared out
    assert read_reference(tmp_path / "two/reference") == read_reference(unbroken[0] / "reference")


def test_two_ranks_share_a_sequence(unbroken, data, tmp_path):
    shutil.copytree(unbroken[0] / "reference", tmp_path / "cp/reference")
    run(tmp_path / "cp", data, "--cp", 2, world=2)
    for a, b in zip(log(unbroken[0]), log(tmp_path / "cp"), strict=True):
        assert all(abs(a[k] - b[k]) < 1e-4 for k in ("loss", "reward_margin", "sft_loss")) and a["tokens"] == b["tokens"], (a, b)
        assert a["step"] == 1 or a["reward_accuracy"] == b["reward_accuracy"]  # at the start all margins are rounding


def test_zero3_with_a_text_on_one_rank(unbroken, data, tmp_path):
    "Ranks gather weights together, though one of them has a row without a picture."
    pytest.importorskip("deepspeed")
    shutil.copytree(unbroken[0] / "reference", tmp_path / "zero/reference")
    run(tmp_path / "zero", data, "--engine", "deepspeed", world=2)
    for a, b in zip(log(unbroken[0]), log(tmp_path / "zero"), strict=True):
        assert all(abs(a[k] - b[k]) < 1e-3 for k in ("loss", "reward_margin", "sft_loss")), (a, b)
    a, b = toy.weights(unbroken[0] / "model"), toy.weights(tmp_path / "zero/model")
    apart = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])  # Adam follows even the sign of rounding, where there is no gradient
    assert a.keys() == b.keys() and apart.mean() < 1e-5


def trainer(data, out, **changes): return dpo("mini", data, out, **{**dict(model=str(folder("mini-longva")), bad_share=0.3, steps=2, lr=1e-3), **changes})


def test_frozen_tower_runs_once_for_each_clip(unbroken, data, tmp_path, monkeypatch):
    "Six epochs; each of the four clips goes through the tower once, and with the folder of another run never."
    from longva.model.modeling import LongVATower
    calls, run_tower = [], LongVATower.features
    monkeypatch.setattr(LongVATower, "features", lambda self, pixels, layer: calls.append(len(pixels)) or run_tower(self, pixels, layer))
    trainer(data, tmp_path / "once", steps=6, rows=5)
    assert sorted(calls) == [2, 4, 4, 4]  # an image of two grids, three films of four frames
    calls.clear()
    trainer(data, tmp_path / "never", steps=2, rows=5, loss="ipo", beta=0.5, reference=tmp_path / "once/reference")
    assert calls == []
    trainer(data, tmp_path / "always", steps=1, rows=5, parts=("tower", "projector", "language"))
    assert len(calls) == 4 + 5  # four clips for the reference; in training once a pair, the text with a black frame: not once an answer


def test_trained_tower_gets_gradients(data, tmp_path):
    trainer(data, tmp_path / "run", steps=2, rows=5, parts=("tower",), label_smoothing=0.1, sft=0.5)
    before, after = load("mini-longva")[0], load(str(tmp_path / "run/model"))[0]
    moved = {n for (n, p), q in zip(before.named_parameters(), after.parameters()) if not torch.equal(p, q)}
    assert moved and all("vision_tower" in n for n in moved)


@pytest.mark.parametrize("front", [{}, dict(time_stamps=True), dict(frame_delimiters=" and ", time_stamps=True), dict(frames_fit="pad"), dict(image_fit="crop", image_pool_stride=1)], ids=str)
def test_prompt_and_pixels_are_the_processors(data, tmp_path, front):
    "Also with words before the picture, with features from the disk, and in the embeddings that the model itself makes; and the tower's cache tells front ends apart."
    from longva.model.modeling import LongVA
    from longva.model.processing import LongVAProcessor
    from longva.vision.video import read_frames
    model, plain = load("mini-longva")
    ours = {k: v for k, v in front.items() if not k.startswith("image")}
    config = type(model.config)(**{**model.config.to_dict(), **{k: v for k, v in front.items() if k not in ours}})
    torch.manual_seed(0)
    model, processor = LongVA(config).eval(), LongVAProcessor.from_config(config, plain.tokenizer, plain.chat_template, **ours)
    row = dict(images=["a.png"], videos=["0.mp4"], prompt=[dict(role="user", content="find owl <image> red <video> blue")], chosen="rings", rejected="dots")
    pair = read_pair(Row(str(data), 1, row))
    film = read_frames(pair.files("video")[0], n=3)
    text = processor.apply_chat_template(pair.prompt, tokenize=False, add_generation_prompt=True)
    made = processor(text=text, images=[str(pair.files("image")[0])], videos=[film])
    whole = model.embed(made["input_ids"], made["pixel_values"], made["image_layouts"], made["pixel_values_videos"])
    for place in (None, tmp_path, tmp_path):
        sample = encode_pair(pair, Clips(model, processor, 3, folder=place))
        assert torch.equal(sample["prompt"], made["input_ids"][0]) and torch.equal(sample["image_layouts"], made["image_layouts"])
        if place is None: assert torch.equal(sample["image_pixels"], made["pixel_values"]) and torch.equal(sample["video_pixels"], made["pixel_values_videos"])
        with torch.no_grad(): embeds = DPOLoss(model).embed(collate_pairs([sample]))
        n = len(sample["prompt"])
        assert torch.allclose(embeds[0, :n], whole[0], atol=1e-6) and torch.allclose(embeds[1, :n], whole[0], atol=1e-6)
    Clips(model, LongVAProcessor.from_config(config, plain.tokenizer, plain.chat_template, **{**ours, "frame_delimiters": " or "}), 3, folder=tmp_path)("video", pair.files("video")[0])
    assert len(list(tmp_path.iterdir())) == 3


def test_file_that_goes_away_in_training_is_a_sentence(unbroken, data, tmp_path, monkeypatch):
    "Between the reference and the training; the tower is trained, so pixels are read again."
    where, first = shutil.copytree(data.parent, tmp_path / "data"), DPOLoss.forward
    def lose(self, batch, normalizer): (where / "0.mp4").unlink(missing_ok=True); return first(self, batch, normalizer)
    monkeypatch.setattr(DPOLoss, "forward", lose)
    with pytest.raises(TrainError, match="could be read before training, and no more"): trainer(where / data.name, tmp_path / "run", steps=4, rows=5, parts=("tower", "projector", "language"))


def test_reference_of_something_else_is_refused(unbroken, data, tmp_path):
    "Another model, were it in one number; other settings; other words; and another film of the same name and size."
    folder_of = lambda name: shutil.copytree(unbroken[0] / "reference", tmp_path / name / "reference") and tmp_path / name
    model, processor = load("mini-longva")
    with torch.no_grad(): next(p for n, p in model.named_parameters() if "layers.0" in n).view(-1)[5] += 1e-3
    model.save_pretrained(tmp_path / "model"); processor.save_pretrained(tmp_path / "model")
    with pytest.raises(TrainError, match="belong to another model"): trainer(data, folder_of("a"), model=str(tmp_path / "model"))
    with pytest.raises(TrainError, match="belong to other settings"): trainer(data, folder_of("b"), frames=2)
    rows = data.read_text().splitlines()
    other = data.parent / "other.jsonl"
    other.write_text("\n".join([rows[0].replace("rings", "dots"), *rows[1:]]))
    with pytest.raises(TrainError, match="belong to other pairs"): trainer(other, folder_of("c"))
    where = shutil.copytree(data.parent, tmp_path / "data")
    film, size = (where / "0.mp4").read_bytes(), (where / "0.mp4").stat().st_size
    (where / "0.mp4").write_bytes(film[:-1] + bytes([film[-1] ^ 1]))
    assert (where / "0.mp4").stat().st_size == size
    with pytest.raises(TrainError, match="belong to other pairs"): trainer(where / data.name, folder_of("d"))
    assert not any((tmp_path / x / "metrics.jsonl").exists() for x in "abcd")


def test_finished_run_is_done_for_its_own_settings_alone(unbroken, data, tmp_path):
    "As long as its checkpoints are there, and afterwards."
    out = shutil.copytree(unbroken[0], tmp_path / "run")
    again = lambda **changes: trainer(data, out, **{**dict(steps=8, rows=4), **changes})
    for _ in ("with checkpoints", "without"):
        for wrong, said in ((dict(beta=0.5), "beta 0.1 .now 0.5"), (dict(loss="hinge"), "loss sigmoid .now hinge"), (dict(lr=1e-4), "lr 0.001 .now 0.0001"), (dict(rows=2), "rows 4 .now 2"), (dict(steps=9), "steps 8 .now 9"),
                            (dict(sft=0.5), "sft 0.0 .now 0.5"), (dict(seed=3), "seed 0 .now 3"), (dict(parts=("language",)), "parts .*now"), (dict(frames=2, reference=tmp_path / "two"), "frames 4 .now 2"), (dict(length=900, reference=tmp_path / "short"), "length 1024 .now 900")):
            with pytest.raises(TrainError, match=f"was begun with {said}"): again(**wrong)
        assert again() == out / "model"
        for checkpoint in out.glob("step-*"): shutil.rmtree(checkpoint)


def test_settings_that_would_be_ignored(data, tmp_path):
    for wrong, said in ((dict(steps=3, epochs=2), "steps and epochs"), (dict(steps=0), "Nothing would be trained"), (dict(steps=None, epochs=-1), "steps is None|Nothing would"), (dict(fps=1.0, frames=3), "fps and frames"), (dict(warmup=3, warm_up=0.1), "warmup and warm_up")):
        with pytest.raises(TrainError, match=said): trainer(data, tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("largest, said", [(4_000, "features of .* cannot be saved"), (60_000, "checkpoint of step .* cannot be saved")])
def test_full_disk_is_one_sentence_and_no_bad_row(data, tmp_path, largest, said):
    "What cannot be written is not a row that cannot be read."
    (code, error), *_ = toy.wait(start(tmp_path / "run", data, largest=largest))
    assert code == 1 and re.search(said, error) and "Traceback" not in error, error[-2000:]
    bad = [row for row in read_reference(tmp_path / "run/reference").values() if "bad" in row]
    assert all("broken.mp4" in row["bad"] for row in bad) and not list((tmp_path / "run").glob("step-*"))


def test_torn_reference_is_asked_again(unbroken, data, tmp_path):
    shutil.copytree(unbroken[0] / "reference", tmp_path / "run/reference")
    file = tmp_path / "run/reference/rank-0.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    trainer(data, tmp_path / "run")
    assert file.read_bytes() == (unbroken[0] / "reference/rank-0.jsonl").read_bytes()


def test_too_many_bad_rows_stop_the_run(data, tmp_path):
    with pytest.raises(DataError, match="1 of 7 rows are bad, more than the share of 0.1 .*line 5: no rejected"): trainer(data, tmp_path / "run", bad_share=0.1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="2 of 7 rows are bad.*line 3: .*broken.mp4"): trainer(data, tmp_path / "run", bad_share=0.2)
    assert not checkpoints(tmp_path / "run")
    with pytest.raises(TrainError, match="There is no folder nothing"): trainer(data, tmp_path / "run", model=str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="cannot be read"): trainer(tmp_path / "nothing.jsonl", tmp_path / "run")


@pytest.mark.parametrize("change, said", [
    (dict(chosen="plain"), "the same"), (dict(rejected=None), "no rejected"), (dict(rejected=[dict(role="user", content="x")]), "rejected must be"),
    (dict(chosen="<video>"), "stands for a picture"), (dict(video=["0.mp4", "1.mp4"]), "files that the row names: 2"), (dict(video="9.mp4"), "there is no video"),
    (dict(video=5), "video must be a name"), (dict(prompt=[]), "no prompt"), (dict(prompt=[dict(role="user")]), "content of a message"), (dict(prompt=["x"]), "prompt must be")])
def test_bad_rows(data, change, said):
    row = dict(video="0.mp4", prompt="<video>\nfind owl", chosen="red", rejected="plain")
    assert read_pair(Row(str(data), 1, row)).files("video") == [data.parent / "0.mp4"]
    with pytest.raises(BadRow, match=said): read_pair(Row(str(data), 1, row | change))


def test_rows_of_a_list_and_of_broken_files(data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pairs, bad = read_pairs(tmp_path / "rows.json", data.parent)
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [(p.prompt, p.chosen, p.rejected) for p in read_pairs(data)[0]] and [b["row"] for b in bad] == [5]
    for text, said in (('{"a": 1}', "must hold a list"), ("[{", "broken JSON"), ("[]", "no rows"), ("[3]", "row 1: a row must be an object")):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(DataError, match=said): read_pairs(tmp_path / "rows.json")
