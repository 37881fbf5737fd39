"""Preference training: losses and log-probabilities against known numbers, `longva dpo` resumed and on two ranks."""

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
from original import PARITY
from PIL import Image

from longva.mini import folder, load
from longva.model.modeling import LongVA
from longva.model.open import OpenError
from longva.model.processing import LongVAProcessor
from longva.train.clips import Clips
from longva.train.dpo import dpo
from longva.train.dpo_loss import DPOLoss, answer_log_probs, dpo_loss
from longva.train.pair_batch import collate_pairs, encode_pair
from longva.train.pairs import read_pair, read_pairs
from longva.train.recipe import TrainError
from longva.train.reference import read_reference
from longva.train.rows import BadRow, DataError, Row
from longva.train.run import checkpoints
from longva.vision.video import read_frames, write_video

ALL_PARTS = ("tower", "projector", "language")


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "kto_pair"])
def test_losses_equal_the_originals(loss):
    known = json.loads((PARITY / "losses/dpo.json").read_text())
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    given = [torch.tensor(known[f"{name}_logps"]) for name in names]
    entries = [entry for entry in known["entries"] if entry["loss_type"] == loss]
    assert len(entries) >= 2
    for entry in entries:
        reference = [torch.zeros(6)] * 2 if entry["reference_free"] else given[2:]
        ours = dpo_loss(*given[:2], *reference, loss, entry["beta"], entry["label_smoothing"])
        assert torch.allclose(ours, torch.tensor(entry["losses"]), rtol=1e-5, atol=1e-5), entry
        assert float(ours.mean()) == pytest.approx(entry["mean_loss"], abs=1e-5)


def test_the_means_of_kto_pair_are_those_of_each_pair():
    """As in the original, with its one pair on a GPU; so the loss is the same however pairs are dealt."""
    known = json.loads((PARITY / "losses/dpo.json").read_text())
    policy = torch.tensor(known["policy_chosen_logps"] + known["policy_rejected_logps"])
    reference = torch.tensor(known["reference_chosen_logps"] + known["reference_rejected_logps"])
    loss = DPOLoss(toy.tiny(), "kto_pair", beta=0.1)
    moved = (policy - reference).double().numpy()
    chosen, rejected = moved[:6], moved[6:]
    assert (chosen < 0).any() and (rejected > 0).any()
    up = 1 / (1 + np.exp(0.1 * (chosen - np.maximum(rejected, 0))))
    down = 1 / (1 + np.exp(0.1 * (np.maximum(chosen, 0) - rejected)))
    assert np.allclose(loss._losses(policy, reference), (up + down) / 2, atol=1e-6)


def test_rewards_are_the_originals():
    known = json.loads((PARITY / "losses/dpo.json").read_text())
    policy = torch.tensor(known["policy_chosen_logps"] + known["policy_rejected_logps"])
    reference = torch.tensor(known["reference_chosen_logps"] + known["reference_rejected_logps"])
    for entry in known["entries"]:
        if entry["reference_free"]:
            continue
        loss = DPOLoss(toy.tiny(), entry["loss_type"], entry["beta"], entry["label_smoothing"])
        loss._add_figures(policy - reference, torch.zeros(6), normalizer=6)
        figures = loss.figures()
        assert figures["reward_accuracy"] == pytest.approx(entry["reward_accuracy"])
        assert figures["reward_margin"] == pytest.approx(entry["reward_margin"], abs=1e-5)
        for side in ("chosen", "rejected"):
            assert figures[f"reward_{side}"] == pytest.approx(np.mean(entry[f"{side}_rewards"]), abs=1e-5)


def test_losses_by_their_formulas():
    """In float64, at random points, written with the sigmoid itself."""
    points = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    chosen, rejected, reference_chosen, reference_rejected = points
    h = ((chosen - reference_chosen) - (rejected - reference_rejected)).numpy()
    sigma = 1 / (1 + np.exp(-0.3 * h))
    smoothed = -0.8 * np.log(sigma) - 0.2 * np.log(1 - sigma)
    assert np.allclose(dpo_loss(*points, beta=0.3, label_smoothing=0.2), smoothed, atol=1e-12)
    assert np.allclose(dpo_loss(*points, "hinge", 0.3), np.clip(1 - 0.3 * h, 0, None), atol=1e-12)
    assert np.allclose(dpo_loss(*points, "ipo", 0.3), (h - 1 / 0.6) ** 2, atol=1e-12)
    up = (chosen - reference_chosen).numpy()
    down = (rejected - reference_rejected).numpy()
    won = 1 / (1 + np.exp(-0.3 * (up - max(down.mean(), 0))))
    avoided = 1 / (1 + np.exp(-0.3 * (max(up.mean(), 0) - down)))
    assert np.allclose(dpo_loss(*points, "kto_pair", 0.3), 1 - np.concatenate([won, avoided]), atol=1e-12)


@pytest.mark.parametrize("loss, slope", [("sigmoid", -0.05), ("hinge", -0.1), ("ipo", -10.0)])
def test_slopes_at_the_start(loss, slope):
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(dpo_loss(x, 0, 0, 0, loss, 0.1), x)[0].item() == pytest.approx(slope)


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_answer_log_probs(dtype, close):
    torch.manual_seed(1)
    hidden = torch.randn(5, 17, 16)
    weight = torch.randn(71, 16)
    labels = torch.randint(71, (5, 17))
    labels[:, :9] = -100
    labels[3] = -100

    def plain_sums(hidden, weight):
        """Take the whole table of logits."""
        table = torch.log_softmax(hidden @ weight.T, -1)
        return (table.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)).sum(1)

    inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    exact = [x.to(dtype).double().requires_grad_() for x in (hidden, weight)]
    ours = answer_log_probs(*inputs, labels, chunk=4)[0]
    plain = plain_sums(*exact)
    assert (ours.double() - plain).abs().max() < close * 10
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    factors = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    ours = torch.autograd.grad((ours * factors).sum(), inputs)
    plain = torch.autograd.grad((plain * factors).sum(), exact)
    for x, y in zip(ours, plain):
        assert (x.double() - y).abs().max() <= close * y.abs().max()


def test_logits_of_the_whole_row_never_exist():
    """A vocabulary of 20,000 and 4,000 tokens, of which 64 are answer: at most a chunk of logits is alive."""
    hidden = torch.randn(1, 4000, 8, requires_grad=True)
    weight = torch.randn(20_000, 8, requires_grad=True)
    labels = torch.full((1, 4000), -100)
    labels[0, -64:] = 3
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else [out]
            sizes.extend(tensor.numel() for tensor in made if isinstance(tensor, torch.Tensor))
            return out

    with Watch():
        answer_log_probs(hidden, weight, labels, chunk=16)[0].sum().backward()
    assert max(sizes) <= 20_000 * 16


@pytest.fixture(scope="module")
def two_pairs():
    """A checkpoint in the original's format, two pairs about an image, and what the original computes of them."""
    from longva.model.processing import LongVAImageProcessor

    known = json.loads((PARITY / "losses/dpo.json").read_text())["from_checkpoint"]
    model = LongVA.from_pretrained(PARITY / known["checkpoint"], dtype=torch.float32).eval()
    vision = model.config.vision_config
    preprocess = LongVAImageProcessor(vision.image_size, vision.patch_size, model.config.pool_stride)
    images = preprocess(Image.open(PARITY / known["image"]))
    ((columns, rows),) = images["image_layouts"].tolist()
    visual = [model.config.image_token_id] * (columns * rows * model.config.tokens_per_grid)
    shown = dict(image_pixels=images["pixel_values"], image_layouts=images["image_layouts"])
    samples = []
    for prompt, chosen, rejected in zip(known["prompts"], known["chosen"], known["rejected"]):
        at = prompt.index(-200)
        ids = prompt[:at] + visual + prompt[at + 1 :]
        answers = dict(chosen=torch.tensor(chosen), rejected=torch.tensor(rejected))
        samples.append(dict(prompt=torch.tensor(ids), **answers, **shown))
    return model, samples, known


def test_two_pairs_of_the_original(two_pairs):
    """Log-probabilities, SFT loss and DPO losses on a checkpoint in the original's format."""
    model, samples, known = two_pairs
    counts = torch.tensor([len(sample[name]) for name in ("chosen", "rejected") for sample in samples])
    batch = collate_pairs(samples)
    for kind, theirs in known["losses_beta_0.1"].items():
        loss = DPOLoss(model, kind)
        reference = torch.tensor(theirs["reference_logps_used"]).double() * (counts if kind == "ipo" else 1)
        with torch.no_grad():
            sums, n = loss.log_probs(batch)
            mean = loss(dict(batch, reference=reference), 2.0)
        figures = loss.figures()
        assert torch.equal(n, counts) and torch.allclose(sums, torch.tensor(known["sum_logps"]), atol=2e-4)
        assert float(mean) == pytest.approx(theirs["mean"], rel=1e-4)
        for name in ("chosen", "rejected"):
            assert figures[f"reward_{name}"] == pytest.approx(np.mean(theirs[f"{name}_rewards"]), abs=1e-4)
        assert figures["sft_loss"] == pytest.approx(-np.mean(known["mean_logps"][:2]), rel=1e-4)
    assert -sums[:2].sum() / n[:2].sum() == pytest.approx(known["sft_loss_on_chosen"], rel=1e-4)


def one_message(role, *parts):
    return [dict(role=role, content=list(parts))]


def text_part(text):
    return dict(type="text", text=text)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three videos, an image and a text, in both layouts of rows; a broken video; a row without an answer."""
    where = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    rows = []
    for i, (thing, colour, background) in enumerate(
        [("owl", "red", "rings"), ("bear", "blue", "dots"), ("fish", "green", "plain")]
    ):
        write_video(rng.integers(0, 255, (3 + i, 28, 28, 3), dtype=np.uint8), where / f"{i}.mp4", fps=1.0)
        answers = dict(chosen=background, rejected=f"{colour} . {colour}", answer=background)
        rows.append(dict(id=i, video=f"{i}.mp4", prompt=f"<video>\nfind {thing}", **answers))
    Image.fromarray(rng.integers(0, 255, (28, 56, 3), dtype=np.uint8)).save(where / "a.png")
    prompt = one_message("user", dict(type="image"), text_part("find tiger"))
    chosen = one_message("assistant", text_part("rows"))
    rejected = one_message("assistant", text_part("cyan"))
    rows.append(dict(images=["a.png"], prompt=prompt, chosen=chosen, rejected=rejected))
    rows.append(dict(prompt="find goose", chosen="square", rejected="purple"))
    (where / "broken.mp4").write_bytes(b"no video")
    rows.insert(2, dict(video="broken.mp4", prompt="find owl", chosen="plain", rejected="red"))
    rows.insert(4, dict(image="a.png", prompt="find owl", chosen="plain"))
    (where / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return where / "pairs.jsonl"


def command(out, settings):
    """Run one rank of `longva dpo`, `slow` seconds a micro batch."""
    from longva.cli import app
    from longva.train import dpo as module

    mini = module.PRESETS["mini"]
    module.PRESETS["mini"] = replace(mini, recipe=replace(mini.recipe, save_every=2))
    if settings["slow"]:
        first = DPOLoss.forward

        def slowly(self, batch, normalizer):
            time.sleep(settings["slow"])
            return first(self, batch, normalizer)

        DPOLoss.forward = slowly
    app(["dpo", *map(str, settings["args"])])


def start(out, data, *args, world=1, slow=0, **more):
    options = ["--preset", "mini", "--data", data, "--out", out, "--steps", 8, "--rows", 4, "--bad-share", 0.3]
    return toy.start(out, world, body=command, args=[*options, "--lr", 1e-3, *args], slow=slow, **more)


def run(out, data, *args, world=1):
    """Run to the end, and give what the first rank prints."""
    ended = toy.wait(start(out, data, *args, world=world))
    assert all(code == 0 for code, _ in ended), ended[0][1][-3000:]
    return ended[0][1]


def trainer(data, out, **changes):
    """Run in this process."""
    changes = dict(model=str(folder("mini-longva")), bad_share=0.3, steps=2, lr=1e-3) | changes
    return dpo("mini", data, out, **changes)


def log(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """A run to its end, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, run(out, data)


def test_margins_grow(unbroken):
    steps = log(unbroken[0])
    first = steps[0]
    last = steps[-1]
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(first["reward_margin"]) < 1e-4
    assert last["loss"] < 0.6 * first["loss"] and last["reward_margin"] > 0.5 and last["reward_accuracy"] == 1
    assert last["reward_margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], abs=1e-9)


def test_command_names_bad_rows(unbroken):
    out, printed = unbroken
    bad = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert [(Path(line["file"]).name, line["row"]) for line in bad] == [("pairs.jsonl", 5), ("pairs.jsonl", 3)]
    assert "no rejected" in bad[0]["why"] and "broken.mp4" in bad[1]["why"]
    assert "2 of 7 rows are left out" in printed and "pairs.jsonl, line 5: no rejected" in printed
    assert "Traceback" not in printed


def test_trained_model_prefers_the_chosen_answers(unbroken, data):
    out = unbroken[0]
    model, processor = load(str(out / "model"))
    before = dict(load("mini-longva")[0].named_parameters())
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("mm_projector" in name for name in moved) and any("layers.0" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)
    pairs, _ = read_pairs(data)
    clips = Clips(model, processor, frames=4)
    kept = read_reference(out / "reference")
    leads = []
    for i, pair in enumerate(pairs):
        if "bad" in kept[i]:
            continue
        with torch.no_grad():
            sums, _ = DPOLoss(model).log_probs(collate_pairs([encode_pair(pair, clips)]))
        leads.append(float(sums[0] - sums[1]) - (kept[i]["chosen"] - kept[i]["rejected"]))
    assert len(leads) == 5 and min(leads) > 0


def test_killed_run_resumes_bit_for_bit(unbroken, data, tmp_path):
    whole = unbroken[0]
    out = tmp_path / "killed"
    processes = start(out, data, slow=0.05)
    end = time.time() + 120
    while not (out / "step-000004").exists():
        assert time.time() < end and all(p.exitcode is None for p in processes), toy.wait(processes, 5)
        time.sleep(0.02)
    time.sleep(0.13)  # somewhere in a step
    for p in processes:
        p.kill()
    assert toy.wait(processes)[0][0] == -signal.SIGKILL and not (out / "step-000008").exists()
    features = {file: file.stat().st_mtime_ns for file in (out / "reference").rglob("*.safetensors")}
    lists = list((out / "reference").rglob("*.jsonl"))
    assert len(features) == 4 and len(lists) == 1  # four clips, one list
    run(out, data)
    a = toy.weights(whole / "model")
    b = toy.weights(out / "model")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert toy.losses(whole) == toy.losses(out)
    assert all(file.stat().st_mtime_ns == when for file, when in features.items())


def assert_same_steps(out, other, names, most=1e-4):
    """Compare the metrics of two runs."""
    for a, b in zip(log(out), log(other), strict=True):
        assert all(abs(a[name] - b[name]) < most for name in names) and a["tokens"] == b["tokens"], (a, b)
        if a["step"] > 1:  # at the start all margins are rounding
            assert a["reward_accuracy"] == b["reward_accuracy"]


def test_two_ranks_equal_one(unbroken, data, tmp_path):
    run(tmp_path / "two", data, world=2)
    assert_same_steps(unbroken[0], tmp_path / "two", ("loss", "reward_margin", "reward_chosen", "sft_loss"))
    lines = [len(file.read_text().splitlines()) for file in (tmp_path / "two/reference").glob("rank-*.jsonl")]
    assert lines == [3, 3]  # six pairs, shared out
    assert read_reference(tmp_path / "two/reference") == read_reference(unbroken[0] / "reference")


def test_two_ranks_share_a_sequence(unbroken, data, tmp_path):
    shutil.copytree(unbroken[0] / "reference", tmp_path / "cp/reference")
    run(tmp_path / "cp", data, "--cp", 2, world=2)
    assert_same_steps(unbroken[0], tmp_path / "cp", ("loss", "reward_margin", "sft_loss"))


def test_zero3_with_a_text_on_one_rank(unbroken, data, tmp_path):
    """Ranks gather weights together, though one of them has a row without a clip."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install 'longva[train]')")
    shutil.copytree(unbroken[0] / "reference", tmp_path / "zero/reference")
    run(tmp_path / "zero", data, "--engine", "deepspeed", world=2)
    for a, b in zip(log(unbroken[0]), log(tmp_path / "zero"), strict=True):
        assert all(abs(a[name] - b[name]) < 1e-3 for name in ("loss", "reward_margin", "sft_loss")), (a, b)
    a = toy.weights(unbroken[0] / "model")
    b = toy.weights(tmp_path / "zero/model")
    assert a.keys() == b.keys()
    # Adam follows even the sign of rounding, where there is no gradient
    assert torch.cat([(a[name] - b[name]).abs().flatten() for name in a]).mean() < 1e-5


def test_frozen_tower_runs_once_for_each_clip(unbroken, data, tmp_path, monkeypatch):
    """Six epochs; each of the four clips goes through the tower once, and with the folder of another run never."""
    from longva.model.modeling import LongVATower

    calls = []
    run_tower = LongVATower.features

    def count(self, pixels, layer):
        calls.append(len(pixels))
        return run_tower(self, pixels, layer)

    monkeypatch.setattr(LongVATower, "features", count)
    trainer(data, tmp_path / "once", steps=6, rows=5)
    assert sorted(calls) == [2, 4, 4, 4]  # an image of two grids, three videos of four frames
    calls.clear()
    trainer(data, tmp_path / "never", steps=2, rows=5, loss="ipo", beta=0.5, reference=tmp_path / "once/reference")
    assert calls == []
    trainer(data, tmp_path / "always", steps=1, rows=5, parts=ALL_PARTS)
    # four clips for the reference; in training once a pair, the text with a black frame: not once an answer
    assert len(calls) == 4 + 5


def test_trained_tower_gets_gradients(data, tmp_path):
    trainer(data, tmp_path / "run", steps=2, rows=5, parts=("tower",), label_smoothing=0.1, sft=0.5)
    before = dict(load("mini-longva")[0].named_parameters())
    after = load(str(tmp_path / "run/model"))[0].named_parameters()
    moved = {name for name, weight in after if not torch.equal(weight, before[name])}
    assert moved and all("vision_tower" in name for name in moved)


PREPROCESSING = [
    {},
    dict(time_stamps=True),
    dict(frame_delimiters=" and ", time_stamps=True),
    dict(frames_fit="pad"),
    dict(image_fit="crop", image_pool_stride=1),
]


@pytest.mark.parametrize("settings", PREPROCESSING, ids=str)
def test_prompt_and_pixels_are_the_processors(data, tmp_path, settings):
    """Also with words before the clip, with features from the disk, and in the model's own embeddings."""
    model, plain = load("mini-longva")
    theirs = {name: value for name, value in settings.items() if name.startswith("image")}
    ours = {name: value for name, value in settings.items() if name not in theirs}
    config = type(model.config)(**{**model.config.to_dict(), **theirs})
    torch.manual_seed(0)
    model = LongVA(config).eval()
    processor = LongVAProcessor.from_config(config, plain.tokenizer, plain.chat_template, **ours)
    prompt = [dict(role="user", content="find owl <image> red <video> blue")]
    row = dict(images=["a.png"], videos=["0.mp4"], prompt=prompt, chosen="rings", rejected="dots")
    pair = read_pair(Row(str(data), 1, row))
    image = pair.files("image")[0]
    video = pair.files("video")[0]
    text = processor.apply_chat_template(pair.prompt, tokenize=False, add_generation_prompt=True)
    made = processor(text=text, images=[str(image)], videos=[read_frames(video, n=3)])
    pixels = {name: made[name] for name in ("pixel_values", "image_layouts", "pixel_values_videos")}
    whole = model.embed(made["input_ids"], **pixels)
    for place in (None, tmp_path, tmp_path):
        sample = encode_pair(pair, Clips(model, processor, 3, folder=place))
        assert torch.equal(sample["prompt"], made["input_ids"][0])
        assert torch.equal(sample["image_layouts"], made["image_layouts"])
        if place is None:
            assert torch.equal(sample["image_pixels"], made["pixel_values"])
            assert torch.equal(sample["video_pixels"], made["pixel_values_videos"])
        with torch.no_grad():
            embeds = DPOLoss(model).embed(collate_pairs([sample]))[:, : len(sample["prompt"])]
        assert torch.allclose(embeds[0], whole[0], atol=1e-6) and torch.allclose(embeds[1], whole[0], atol=1e-6)


def test_the_cache_tells_preprocessing_apart(data, tmp_path):
    model, processor = load("mini-longva")
    for delimiters in ("", " or "):
        other = LongVAProcessor.from_config(
            model.config, processor.tokenizer, processor.chat_template, frame_delimiters=delimiters
        )
        for _ in range(2):
            Clips(model, other, 3, folder=tmp_path)("video", data.parent / "0.mp4")
    assert len(list(tmp_path.iterdir())) == 2


def test_file_that_goes_away_in_training_is_a_sentence(data, tmp_path, monkeypatch):
    """Between the reference and the training; the tower is trained, so pixels are read again."""
    where = shutil.copytree(data.parent, tmp_path / "data")
    first = DPOLoss.forward

    def lose(self, batch, normalizer):
        (where / "0.mp4").unlink(missing_ok=True)
        return first(self, batch, normalizer)

    monkeypatch.setattr(DPOLoss, "forward", lose)
    with pytest.raises(TrainError, match="could be read before training, and cannot be read any more"):
        trainer(where / data.name, tmp_path / "run", steps=4, rows=5, parts=ALL_PARTS)


def with_reference_of(unbroken, out):
    """Make a run's folder with the reference of another run."""
    shutil.copytree(unbroken[0] / "reference", out / "reference")
    return out


def test_reference_of_another_model_is_refused(unbroken, data, tmp_path):
    """Were it another in one number."""
    model, processor = load("mini-longva")
    weight = next(weight for name, weight in model.named_parameters() if "layers.0" in name)
    with torch.no_grad():
        weight.view(-1)[5] += 1e-3
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(TrainError, match="belong to another model"):
        trainer(data, with_reference_of(unbroken, tmp_path / "run"), model=str(tmp_path / "model"))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_reference_of_other_settings_or_pairs_is_refused(unbroken, data, tmp_path):
    """Other settings; other words; and another video of the same name and size."""
    with pytest.raises(TrainError, match="belong to other settings"):
        trainer(data, with_reference_of(unbroken, tmp_path / "a"), frames=2)
    rows = data.read_text().splitlines()
    other = data.parent / "other.jsonl"
    other.write_text("\n".join([rows[0].replace("rings", "dots"), *rows[1:]]))
    with pytest.raises(TrainError, match="belong to other pairs"):
        trainer(other, with_reference_of(unbroken, tmp_path / "b"))
    where = shutil.copytree(data.parent, tmp_path / "data")
    video = (where / "0.mp4").read_bytes()
    (where / "0.mp4").write_bytes(video[:-1] + bytes([video[-1] ^ 1]))
    with pytest.raises(TrainError, match="belong to other pairs"):
        trainer(where / data.name, with_reference_of(unbroken, tmp_path / "c"))
    assert not any((tmp_path / name / "metrics.jsonl").exists() for name in "abc")


def test_finished_run_is_done_for_its_own_settings_alone(unbroken, data, tmp_path):
    """As long as its checkpoints are there, and afterwards."""
    out = shutil.copytree(unbroken[0], tmp_path / "run")
    for _ in ("with checkpoints", "without"):
        for wrong, words in (
            (dict(beta=0.5), "beta 0.1 .now 0.5"),
            (dict(loss="hinge"), "loss sigmoid .now hinge"),
            (dict(lr=1e-4), "lr 0.001 .now 0.0001"),
            (dict(rows=2), "rows 4 .now 2"),
            (dict(steps=9), "steps 8 .now 9"),
            (dict(sft=0.5), "sft 0.0 .now 0.5"),
            (dict(seed=3), "seed 0 .now 3"),
            (dict(parts=("language",)), "parts .*now"),
            (dict(frames=2, reference=tmp_path / "two"), "frames 4 .now 2"),
            (dict(length=900, reference=tmp_path / "short"), "length 1024 .now 900"),
        ):
            with pytest.raises(TrainError, match=f"was begun with {words}"):
                trainer(data, out, **(dict(steps=8, rows=4) | wrong))
        assert trainer(data, out, steps=8, rows=4) == out / "model"
        for checkpoint in out.glob("step-*"):
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(steps=3, epochs=2), "steps and epochs"),
        (dict(steps=0), "Nothing would be trained"),
        (dict(steps=None, epochs=-1), "steps is None|Nothing would"),
        (dict(fps=1.0, frames=3), "fps and frames"),
        (dict(warmup=3, warm_up=0.1), "warmup and warm_up"),
    ],
)
def test_settings_that_would_be_ignored(data, tmp_path, wrong, words):
    with pytest.raises(TrainError, match=words):
        trainer(data, tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "largest, words",
    [
        (4_000, "features of .* cannot be saved"),
        (60_000, "checkpoint of step .* cannot be saved"),
    ],
)
def test_full_disk_is_one_sentence_and_no_bad_row(data, tmp_path, largest, words):
    """What cannot be written is not a row that cannot be read."""
    out = tmp_path / "run"
    ((code, error),) = toy.wait(start(out, data, largest=largest))
    assert code == 1 and re.search(words, error) and "Traceback" not in error, error[-2000:]
    bad = [line for line in read_reference(out / "reference").values() if "bad" in line]
    assert all("broken.mp4" in line["bad"] for line in bad) and not list(out.glob("step-*"))


def test_torn_reference_is_asked_again(unbroken, data, tmp_path):
    file = with_reference_of(unbroken, tmp_path / "run") / "reference/rank-0.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    trainer(data, tmp_path / "run")
    assert file.read_bytes() == (unbroken[0] / "reference/rank-0.jsonl").read_bytes()


def test_too_many_bad_rows_stop_the_run(data, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(DataError, match="1 of 7 rows are bad, more than the share of 0.1 .*line 5: no rejected"):
        trainer(data, out, bad_share=0.1)
    assert not out.exists()
    with pytest.raises(DataError, match="2 of 7 rows are bad.*line 3: .*broken.mp4"):
        trainer(data, out, bad_share=0.2)
    assert not checkpoints(out)


def test_start_or_data_that_is_not_there(data, tmp_path):
    with pytest.raises(OpenError, match="No model can be loaded from .*nothing: it is no folder here"):
        trainer(data, tmp_path / "run", model=str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="cannot be read"):
        trainer(tmp_path / "nothing.jsonl", tmp_path / "run")


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(chosen="plain"), "the same"),
        (dict(rejected=None), "no rejected"),
        (dict(rejected=[dict(role="user", content="x")]), "rejected must be"),
        (dict(video=["0.mp4", "1.mp4"]), "files that the row names: 2"),
        (dict(video="9.mp4"), "there is no video"),
        (dict(video=5), "video must be a name"),
        (dict(prompt=[]), "no prompt"),
        (dict(prompt=[dict(role="user")]), "content of a message"),
        (dict(prompt=["x"]), "prompt must be"),
    ],
)
def test_bad_rows(data, change, why):
    row = dict(video="0.mp4", prompt="<video>\nfind owl", chosen="red", rejected="plain")
    assert read_pair(Row(str(data), 1, row)).files("video") == [data.parent / "0.mp4"]
    with pytest.raises(BadRow, match=why):
        read_pair(Row(str(data), 1, row | change))


def test_rows_of_a_list(data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pairs, bad = read_pairs(tmp_path / "rows.json", data.parent)
    wanted, _ = read_pairs(data)
    for name in ("prompt", "chosen", "rejected"):
        assert [getattr(pair, name) for pair in pairs] == [getattr(pair, name) for pair in wanted]
    assert [line["row"] for line in bad] == [5]


@pytest.mark.parametrize(
    "text, why",
    [
        ('{"a": 1}', "must hold a list"),
        ("[{", "broken JSON"),
        ("[]", "no rows"),
        ("[3]", "row 1: a row must be an object"),
    ],
)
def test_broken_files(tmp_path, text, why):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=why):
        read_pairs(tmp_path / "rows.json")
