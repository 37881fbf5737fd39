"""Alignment with several processes and from the terminal: both stages, resumed, other ranks, ZeRO-3, bad rows."""

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import align_toy as small
import pytest
import torch
import train_toy as toy
from align_toy import question, talk
from transformers import CLIPVisionModel, Qwen2ForCausalLM

from longva.model.modeling import LongVA
from longva.model.open import open_parts
from longva.model.processing import LongVAProcessor
from longva.train.align import PRESETS, align, choose_preset
from longva.train.align_loss import AlignLoss
from longva.train.conversations import parse_row, token_ids
from longva.train.engines import Plain
from longva.train.order import BadRows, Samples
from longva.train.parts import part_groups
from longva.train.presets import recipe_for
from longva.train.ranks import Ranks
from longva.train.recipe import Recipe, TrainError, learning_rate
from longva.train.rows import BadRow, DataError, Row, open_data, sample_rows
from longva.train.run import weights_hash
from longva.train.samples import Reading, read_row, row_length

# the bad row comes in the second step, a text beside an image in the third
SHORT = dict(steps=4, rows=4, micro=2, save_every=2, keep=9, seed=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def processor(world):
    return LongVAProcessor.from_pretrained(world / "model")


@pytest.fixture
def model(world):
    return LongVA.from_pretrained(world / "model")


def start(out, world, ranks=1, **settings):
    return toy.start(out, ranks, body=small.one_rank, folder=str(world), **settings)


def finish(out, ranks):
    for code, error in toy.wait(ranks):
        assert code == 0, error[-3000:]
    return toy.losses(out)


def bad(out):
    return [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(losses, others, most=1e-4):
    return max(abs(a - b) for a, b in zip(losses, others, strict=True)) < most


def parameters(folder):
    return dict(LongVA.from_pretrained(folder).named_parameters())


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Two ranks to the end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, finish(out, start(out, world, 2, **SHORT))


def test_both_stages_learn(world, tmp_path):
    """Captions to the projector alone; then everything, with all kinds of rows and a bad one, which is named."""
    first = align("mini-1", world / "captions.json", tmp_path / "one", world / "model")
    second = align("mini-2", world / "talk.jsonl", tmp_path / "two", first, bad_share=0.03)
    one = toy.losses(tmp_path / "one")
    two = toy.losses(tmp_path / "two")
    assert sum(one[-3:]) < 0.97 * sum(one[:3])
    assert sum(two[-3:]) < 0.5 * sum(two[:3])
    before, after, last = [parameters(folder) for folder in (world / "model", first, second)]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mm_projector." in name}
    still = {name for name in before if torch.equal(after[name], last[name])}
    assert all("layers.2." in name or "post_layernorm" in name for name in still)  # the tower's last layer is not used


def test_bad_row_of_a_stage_is_named(world, tmp_path):
    align("mini-2", world / "talk.jsonl", tmp_path / "two", world / "model", bad_share=0.03)
    log = metrics(tmp_path / "two")
    found = bad(tmp_path / "two")
    assert {(line["row"], Path(line["file"]).name) for line in found} == {(41, "talk.jsonl")}
    assert "cannot be read as an image" in found[0]["why"] and found[0]["instead"].endswith("line 1")
    assert sum(m["bad_rows"] for m in log) == len(found) in (8, 9)
    assert [line["step"] for line in found] == [m["step"] for m in log if m["bad_rows"]]


def test_killed_run_resumes_bit_for_bit(whole, world, tmp_path):
    out = tmp_path / "killed"
    ranks = start(out, world, 2, **SHORT, slow=0.03)
    end = time.time() + 150
    while not (out / "step-000002").exists():
        assert time.time() < end and all(rank.exitcode is None for rank in ranks), toy.wait(ranks, 5)
        time.sleep(0.01)
    time.sleep(0.1)
    for rank in ranks:
        rank.kill()
    toy.wait(ranks)
    assert not (out / "model").exists()
    assert finish(out, start(out, world, 2, **SHORT)) == whole[1]
    for folder in ("model", "step-000004"):
        assert equal(toy.weights(out / folder), toy.weights(whole[0] / folder))
    assert bad(out) == bad(whole[0]) != []


def test_other_ranks_and_sharing(whole, world, tmp_path):
    """One rank; and two that share every sequence, images and all: the losses of two that take a row each."""
    one = tmp_path / "one"
    shared = tmp_path / "cp"
    runs = {one: start(one, world, 1, **SHORT), shared: start(shared, world, 2, cp=2, **SHORT)}
    names = ("visual_tokens", "bad_rows", "tokens")
    wanted = [[line[name] for name in names] for line in metrics(whole[0])]
    for out, ranks in runs.items():
        assert close(finish(out, ranks), whole[1])
        assert bad(out) == bad(whole[0])
        assert [[line[name] for name in names] for line in metrics(out)] == wanted
    assert sum(line["bad_rows"] for line in metrics(whole[0])) == len(bad(whole[0]))


def test_zero3_and_its_resume(whole, world, tmp_path):
    """Two ranks under ZeRO-3 with offload, a row at a time, so that one has text while the other has a video."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install 'longva[train]')")
    settings = dict(SHORT, engine="deepspeed", micro=1)
    a = tmp_path / "a"
    b = tmp_path / "b"
    losses = finish(a, start(a, world, 2, **settings))
    assert close(losses, whole[1])
    shutil.copytree(a / "step-000002", b / "step-000002")
    shutil.copy(a / "metrics.jsonl", b)
    shutil.copy(a / "bad_rows.jsonl", b)
    assert finish(b, start(b, world, 2, **settings)) == losses
    assert equal(toy.weights(b / "model"), toy.weights(a / "model")) and bad(a) == bad(b)
    before = toy.weights(world / "model")
    after = toy.weights(a / "model")
    frozen = [name for name in before if "post_layernorm" in name]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)


def test_too_many_bad_rows_stop_all_ranks(whole, world, tmp_path):
    """With the same sentence on all, before the weights are touched; with the data mended, the run resumes."""
    mended = tmp_path / "world"
    run = tmp_path / "run"
    step = bad(whole[0])[0]["step"]
    settings = dict(SHORT, save_every=1, bad_share=0.01)
    shutil.copytree(world, mended)
    for code, error in toy.wait(start(run, mended, 2, **settings)):
        assert code == 1 and "Traceback" not in error
        assert "1 of 41 rows are bad, more than the share of 0.01" in error and "talk.jsonl, line 41: " in error
    assert len(toy.losses(run)) == step - 1
    assert [line["step"] for line in bad(run)] == [step]
    shutil.copy(mended / "0.png", mended / "half.png")
    assert len(finish(run, start(run, mended, 2, **settings))) == 4
    assert bad(run) == []


GOOD = dict(image="0.png", conversations=talk(f"<image>\n{question}", "red"))
NAMELESS = dict(conversations=GOOD["conversations"])


def make_row(world, data):
    return Row(str(world / "x.jsonl"), 7, data)


def test_a_row_that_can_be_used(world, processor):
    """By either name of the key, and never as if there were no image."""
    reading = Reading(processor)
    row = make_row(world, GOOD)
    sample = read_row(row, reading)
    assert str(row).endswith("x.jsonl, line 7") and len(sample["input_ids"]) == row_length(row, reading)
    several = read_row(make_row(world, dict(NAMELESS, images=["0.png"])), reading)
    assert torch.equal(several["pixel_values"], sample["pixel_values"])


@pytest.mark.parametrize(
    "image, why",
    [
        ("lost.png", "no file"),
        ("half.png", "half.png cannot be read as an image"),
        ("text.png", "cannot be read as an image"),
        ("", "0 images are named"),
        (".", "is a folder, not an image"),
    ],
)
def test_images_that_cannot_be_used(world, processor, image, why):
    (world / "text.png").write_text("no image")
    with pytest.raises(BadRow, match=f"(?i){why}"):
        read_row(make_row(world, dict(GOOD, image=image)), Reading(processor))


@pytest.mark.parametrize("video", ["empty.mp4", "0.png.mp4", "text.png"])
def test_videos_that_cannot_be_used(world, processor, video):
    (world / "text.png").write_text("no image")
    (world / "empty.mp4").write_bytes(b"")
    row = make_row(world, dict(video=video, conversations=talk("<video>\nhm", "red")))
    with pytest.raises(BadRow):
        read_row(row, Reading(processor))
    assert row_length(row, Reading(processor)) == 0


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        [],
        "broken JSON",
        {},
        dict(NAMELESS, conversations=talk("hm", "red"), images=["0.png"]),
        dict(GOOD, conversations=[]),
        dict(GOOD, conversations=talk("<image>")),
        dict(GOOD, conversations=talk("<image> <image>", "red")),
        dict(GOOD, conversations=[{"from": "gpt", "value": None}]),
        dict(GOOD, conversations=talk("<image>\n" + question, " \n")),
        dict(GOOD, conversations=[{"from": ["human"], "value": "<image>"}, {"from": "gpt", "value": "red"}]),
        dict(GOOD, conversations=talk("<image>\nhm \ud800", "red")),
    ],
    ids=range(13),
)
def test_rows_that_cannot_be_used(world, processor, data):
    with pytest.raises(BadRow):
        read_row(make_row(world, data), Reading(processor))


PREPROCESSING = [  # what a model's configuration and processor may say of images and videos
    {},
    dict(image_pool_stride=1),
    dict(image_pool_stride=4, image_pool_mode="max", pool_mode="max"),
    dict(encoding="anyres"),
    dict(image_fit="pad"),
    dict(image_fit="resize", image_pool_stride=1, encoding="anyres"),
    dict(max_grids=4),
    dict(grids=[[1, 2], [3, 3]]),
    dict(time_stamps=True),
    dict(frame_delimiters=" say "),
    dict(frames_fit="resize", time_stamps=True, frame_delimiters="\n"),
    dict(pool_stride=1, image_mean=[0.5] * 3),
]
OF_PROCESSOR = ("time_stamps", "frame_delimiters", "frames_fit")
PIXELS = ("pixel_values", "image_layouts", "pixel_values_videos")


def rows_of_all_kinds(world):
    """Take a row of each kind, and one with two images, one of them turned, and a video."""
    turned = small.Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side
    small.Image.open(world / "2.png").save(world / "turned.jpg", exif=turned)
    turns = talk(f"<image> say <video> say <image>\n{question}", "red", "say blue", "blue")
    mixed = dict(image=["0.png", "turned.jpg"], video="grey.mp4", conversations=turns)
    data = open_data(world / "talk.jsonl")
    return [*(data[i] for i in (0, 25, 33, 37)), Row(str(world / "x.json"), 1, mixed)]


@pytest.mark.parametrize("settings", PREPROCESSING, ids=str)
def test_a_sample_is_what_the_processor_makes(world, model, settings):
    """Ids and pixels bit for bit, and the embeddings that the model itself makes; lengths are known beforehand."""
    from longva.vision.video import read_frames

    ours = {name: value for name, value in settings.items() if name in OF_PROCESSOR}
    theirs = {name: value for name, value in settings.items() if name not in OF_PROCESSOR}
    config = type(model.config)(**{**model.config.to_dict(), **theirs})
    model = LongVA(config).eval()
    processor = LongVAProcessor.from_config(config, small.tokenizer(), **ours)
    reading = Reading(processor, fps=1.0)
    write = processor.tokenizer.apply_chat_template
    for row in rows_of_all_kinds(world):
        sample = read_row(row, reading)
        spoken = parse_row(row.data)
        template = processor.chat_template
        asked = write(spoken.messages[:-1], chat_template=template, tokenize=False, add_generation_prompt=True)
        videos = [read_frames(world / name, fps=1.0) for name in spoken.videos]
        made = processor(text=asked, images=[str(world / name) for name in spoken.images], videos=videos)
        prompt = made["input_ids"][0]
        assert torch.equal(sample["input_ids"][: len(prompt)], prompt)
        assert len(sample["input_ids"]) == row_length(row, reading)
        pixels = {name: sample[name] for name in PIXELS if name in sample}
        assert equal(pixels, {name: made[name] for name in PIXELS if name in made})
        loss = AlignLoss(model)
        with torch.no_grad():
            embeds = loss.embed(loss.collate([sample]))
            assert torch.allclose(embeds, model.embed(sample["input_ids"][None], **pixels), atol=1e-6)
        visual = torch.isin(sample["input_ids"], torch.tensor([processor.image_token_id, processor.video_token_id]))
        assert loss.length(sample) == [len(sample["input_ids"])] and loss.visual == float(visual.sum())


def test_words_beside_an_image_are_cut_as_when_chatting(world, model):
    """A tokenizer that joins what is written side by side: the time of a frame belongs to the words before it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = [*map(chr, range(32, 127)), "\n", " <", "?<"]
    joined = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, [(" ", "<"), ("?", "<")]))
    joined.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    special = ["<|im_start|>", "<image>", "<video>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joined, eos_token="<|im_end|>", extra_special_tokens=special)
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in ("image", "video")}
    config = type(model.config)(**{**model.config.to_dict(), **ids})
    reading = Reading(LongVAProcessor.from_config(config, tokenizer, time_stamps=True))
    turns = talk("<image>\nwhich? <video>", "grey")
    row = Row(str(world / "x.json"), 1, dict(image="0.png", video="grey.mp4", conversations=turns))
    sample = read_row(row, reading)
    assert " <" in tokenizer.convert_ids_to_tokens(sample["input_ids"])
    assert len(sample["input_ids"]) == row_length(row, reading)


def test_another_start_is_refused(world, processor, tmp_path):
    """In a run that has a checkpoint, and in one that is done, even when its checkpoints are gone."""
    from safetensors.torch import load_file, save_file

    def run(model=world / "model", data="captions.json", **changes):
        changes = dict(steps=2, rows=4, save_every=1, workers=0) | changes
        return align("mini-2", world / data, tmp_path / "run", model, **changes)

    made = run()
    other = shutil.copytree(world / "model", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    idle = next(weight for name, weight in weights.items() if "post_layernorm" in name)
    idle.flatten()[3] += 1e-3  # one number, of a weight that is not even trained
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    stamped = shutil.copytree(world / "model", tmp_path / "stamped")
    stamping = LongVAProcessor.from_pretrained(world / "model")
    stamping.time_stamps = True
    stamping.save_pretrained(stamped)
    shutil.rmtree(tmp_path / "run/step-000002")
    shutil.rmtree(made)
    for _ in ("half", "whole"):
        for wrong, words in (
            (dict(model=other), "starting weights"),
            (dict(model=stamped), "time_stamps False .now True"),
            (dict(data="talk.jsonl", bad_share=0.5), "data_rows 24 .now 41"),
            (dict(steps=3), "steps 2 .now 3"),
            (dict(fps=2.0), "fps 1.0 .now 2.0"),
            (dict(seed=1), "seed 0 .now 1"),
            (dict(pictures="square"), "pictures model .now square"),
        ):
            with pytest.raises(TrainError, match=f"was begun with .*{words}"):
                run(**wrong)
        assert run() == made
        for checkpoint in (tmp_path / "run").glob("step-*"):
            shutil.rmtree(checkpoint)
    (made / "training.json").unlink()
    with pytest.raises(TrainError, match="does not say how it was trained"):
        run()


def test_seed_decides_a_fresh_projector(world, model, tmp_path):
    """Made of two models twice: the same start, so a run can be resumed. Naming both a model and its parts is
    refused."""
    Qwen2ForCausalLM(model.config.text_config).save_pretrained(tmp_path / "words")
    small.tokenizer().save_pretrained(tmp_path / "words")
    CLIPVisionModel(model.config.vision_config).save_pretrained(tmp_path / "tower")
    parts = dict(language_model=str(tmp_path / "words"), vision_tower=str(tmp_path / "tower"))
    a, b, c = [open_parts(**parts, seed=seed)[0] for seed in (0, 0, 1)]
    assert weights_hash(a) == weights_hash(b) != weights_hash(c)
    made = align("mini-1", world / "captions.json", tmp_path / "run", **parts, steps=2)
    assert align("mini-1", world / "captions.json", tmp_path / "run", **parts, steps=2) == made
    state = LongVA.from_pretrained(made).state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in toy.weights(tmp_path / "words").items())
    assert len(toy.losses(tmp_path / "run")) == 2
    assert LongVAProcessor.from_pretrained(made).image_processor.grid == 28
    with pytest.raises(TrainError, match="name one or the other"):
        align("mini-1", world / "captions.json", tmp_path / "both", world / "model", **parts)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(steps=0), "steps is 0"),
        (dict(pictures="unires"), "pictures 'unires'"),
        (dict(fps=0), "fps 0"),
        (dict(rates={"vision": 1e-3}), "parts to train are vision"),
        (dict(stepz=3), "no setting stepz"),
        (dict(lr=1e-9), "learning rate of its own"),  # one rate for all parts would be without effect
    ],
)
def test_settings_that_would_be_ignored(world, tmp_path, wrong, words):
    with pytest.raises(TrainError, match=words):
        align("mini-2", world / "captions.json", tmp_path / "run", world / "model", **wrong)
    assert not (tmp_path / "run").exists()


def test_warmup_and_rate_of_a_preset():
    warmup = [recipe_for(choose_preset("mini-2", given), 100).warmup for given in ({"warmup": 0}, {"warmup": 5}, {})]
    assert warmup == [0, 5, 3]
    preset = choose_preset("mini-2", {"rates": {"tower": 1e-6, "language": 1e-4}})
    assert preset.recipe.lr == 1e-4  # what the log shows is a rate that something has


def test_each_part_follows_the_schedule_at_its_own_rate(model):
    loss = AlignLoss(model)
    preset = choose_preset("paper-2", {"steps": 100})
    recipe = recipe_for(preset, 3200)
    groups = [dict(group, top=group["lr"]) for group in part_groups(loss, preset.rates)]
    engine = Plain(loss, groups, replace(recipe, precision="fp32"), Ranks())
    for step, share in (
        (0, 1 / 3),
        (2, 1.0),
        (3, 1.0),
        (51, 0.5 * (1 + math.cos(math.pi * 48 / 97))),
        (99, 0.5 * (1 + math.cos(math.pi * 96 / 97))),
    ):
        engine.clip_and_step(learning_rate(recipe, step) / recipe.lr)
        assert {round(group["lr"] / group["top"], 9) for group in engine.optimizer.param_groups} == {round(share, 9)}
    assert sorted({group["top"] for group in engine.optimizer.param_groups}) == [2e-6, 1e-5]


def test_full_disk_when_the_model_is_saved(world, tmp_path):
    """One sentence on both ranks, nothing half-written; with room again, the same call saves what was trained."""
    run = tmp_path / "run"
    settings = dict(SHORT, steps=1, rows=2, micro=1, stage="mini-1", data="captions.json")
    room = (world / "model/model.safetensors").stat().st_size
    for code, error in toy.wait(start(run, world, 2, **settings, largest=room // 2)):
        assert code == 1 and "Traceback" not in error, error[-2000:]
        assert "The model cannot be saved in" in error and "the same call saves it" in error
    assert not (run / "model").exists() and not list(run.glob("*.part")) and (run / "step-000001").exists()
    finish(run, start(run, world, 1, **settings))
    assert (run / "model/training.json").exists()


def test_full_disk_for_the_list_of_bad_rows(tmp_path):
    (tmp_path / "file").touch()
    bad_rows = BadRows(tmp_path / "file/run", rows=41)
    bad_rows.found = [dict(step=1, place=0, file="a.json", row=1, why="no file", instead="")]
    with pytest.raises(TrainError, match="bad_rows.jsonl cannot be written .(Not a directory|File exists)"):
        bad_rows.report(seen=1)


def test_processor_of_another_model_is_refused(world, model):
    processor = LongVAProcessor.from_config(model.config, small.tokenizer(), pool_stride=1)
    with pytest.raises(TrainError, match="a pool of frames 1, and the model 2"):
        align("mini-2", world / "captions.json", world / "never", model, processor)
    assert not (world / "never").exists()


def test_files_and_mixtures(tmp_path):
    rows = [dict(id=i, conversations=talk("say red", "red")) for i in range(10)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    parts = [("a.json", "first:3"), ("b.jsonl", "end:21%"), (str(tmp_path / "a.json"), "random:5")]
    parts.append(("'{a.json,b.jsonl}'", "all"))
    lines = [f"- json_path: {file}\n  sampling_strategy: {strategy}\n" for file, strategy in parts]
    (tmp_path / "mix.yaml").write_text("datasets:\n" + "".join(lines))
    ids = [row.data["id"] for row in open_data(tmp_path / "mix.yaml")]
    assert ids[:6] == [0, 1, 2, 7, 8, 9] and len(set(ids[6:11])) == 5 and ids[11:] == [*range(10)] * 2
    assert ids == [row.data["id"] for row in open_data(tmp_path / "mix.yaml")]
    assert [row.number for row in sample_rows(open_data(tmp_path / "b.jsonl"), "end:2")] == [9, 10]


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("c.json", "[1,", "broken JSON"),
        ("c.json", "{}", "list of rows"),
        ("c.json", "[]", "no rows"),
        ("c.yaml", "- a", "`datasets`"),
        ("c.yaml", "datasets: [{a: 1}]", "json_path"),
        ("c.yaml", "datasets: [{json_path: FOLDER/a.json, sampling_strategy: 'last:3'}]", "sampling strategy"),
        ("c.yaml", "datasets: 3", "list `datasets`"),
        ("c.yaml", "datasets: [{json_path: FOLDER/a.json, sampling_strategie: 'first:2'}]", "known are json_path"),
        ("c.csv", "", "must be"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, why):
    (tmp_path / "a.json").write_text(json.dumps([dict(id=0)]))
    (tmp_path / name).write_text(content.replace("FOLDER", str(tmp_path)))
    with pytest.raises(DataError, match=why):
        open_data(tmp_path / name)


@pytest.mark.parametrize("answers_only", [False, True])
def test_which_tokens_are_learned(processor, answers_only):
    """Against the rule in words: markers of every turn, answers with their end; or answers alone."""
    texts = ("<image>\nwhich colour?", "red", "say blue", "blue")
    messages = [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]
    tokenizer = processor.tokenizer
    marker = not answers_only
    expected = []
    for message in [dict(role="system", content="You are a helpful assistant."), *messages]:
        answer = message["role"] == "assistant"
        words = tokenizer.convert_ids_to_tokens(tokenizer(message["content"])["input_ids"])
        expected += [("<|im_start|>", marker), (message["role"], False), ("\n", False)]
        expected += [(word, answer) for word in words]
        expected += [("<|im_end|>", marker or answer), ("\n", marker or answer)]
    ids, learned = token_ids(messages, processor, answers_only=answers_only)
    assert [*zip(tokenizer.convert_ids_to_tokens(ids), learned.tolist())] == expected


def test_labels_of_a_sample_are_the_learned_tokens(world, processor):
    turns = talk(f"<image>\n{question}", "red", "say blue", "blue")
    row = Row(str(world / "x.json"), 1, dict(image="0.png", conversations=turns))
    sample = read_row(row, Reading(processor))
    ids, learned = token_ids(parse_row(row.data).messages, processor)
    image = processor.image_token_id
    assert sample["input_ids"][sample["input_ids"] != image].tolist() == ids[ids != image].tolist()
    assert (sample["labels"] == -100).sum() == len(sample["labels"]) - learned[1:].sum()


def test_every_row_once_an_epoch_and_like_lengths_together(world, processor, tmp_path):
    data = open_data(world / "talk.jsonl")
    reading = Reading(processor)

    def order(seed):
        """Give the rows of 41 steps."""
        recipe = Recipe(steps=41, rows=8, seed=seed)
        samples = Samples(data, reading, recipe, BadRows(tmp_path, 41), block_steps=41, workers=0)
        return [[samples.index(step, place) for place in range(8)] for step in range(41)]

    taken = order(seed=0)
    assert sorted(sum(taken, [])) == sorted([*range(41)] * 8)  # eight epochs
    lengths = [[row_length(data[i], reading) for i in step] for step in taken]
    padding = sum(max(step) * 8 - sum(step) for step in lengths) / sum(max(step) * 8 for step in lengths)
    assert padding < 0.05 and max(map(max, lengths)) > 2 * min(map(min, lengths[:-1]))
    assert order(seed=1) != taken


def test_loss_is_the_models_own(world, model, processor):
    """Against LongVA.forward, which embeds images and videos in its own way; gradients of every trained weight, too."""
    data = open_data(world / "talk.jsonl")
    loss = AlignLoss(model)
    batch = loss.collate([read_row(data[i], Reading(processor)) for i in (0, 25, 33, 38)])
    loss(batch, loss.count(batch)).backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], **{name: batch[name] for name in PIXELS}).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    theirs = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5


@pytest.mark.parametrize("data, made", [("lost.json", False), ("talk.jsonl", True)])
def test_command(world, tmp_path, data, made):
    """As from the terminal: a run, and a mistake as a sentence."""
    out = tmp_path / data
    args = ["--preset", "mini-2", "--data", world / data, "--model", world / "model", "--out", out]
    args += ["--steps", 2, "--rows", 4, "--bad-share", 0.1]
    ((code, output),) = toy.wait(toy.start(out, body=small.command, args=args))
    assert "Traceback" not in output
    if made:
        assert code == 0 and "Done." in output, output[-3000:]
        assert (out / "model/config.json").exists() and len(toy.losses(out)) == 2
    else:
        assert code == 1 and "There is no file" in output and "lost.json" in output and not out.exists(), output[-3000:]


def test_presets_are_the_papers():
    one = PRESETS["paper-1"]
    two = PRESETS["paper-2"]
    assert one.rates == {"projector": 1e-3} and two.rates == {"language": 1e-5, "projector": 1e-5, "tower": 2e-6}
    assert (one.length, one.warm_up, one.epochs) == (8192, 0.03, 1)
    assert (two.length, two.warm_up, two.epochs) == (32768, 0.03, 1)
    for preset in (one, two):
        r = preset.recipe
        assert (r.schedule, r.floor, r.weight_decay, r.precision, r.engine) == ("cosine", 0, 0, "bf16", "deepspeed")
    with pytest.raises(TrainError, match="no preset"):
        align("paper-3", "x.json", "nowhere")
