"""Alignment with several processes and from the terminal: both stages, killed and gone on with, other ranks, ZeRO-3, bad rows."""
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
from longva.model.processing import LongVAProcessor
from longva.train.align import PRESETS, AlignLoss, Rows, align, open_model, recipe_for, see_and_embed, settle, weight_groups
from longva.train.conversations import BadRow, DataError, Reading, Row, open_data, parse_row, read_row, row_length, take, token_ids
from longva.train.engines import Plain
from longva.train.ranks import Ranks
from longva.train.recipe import Recipe, TrainError, learning_rate
from longva.train.run import weights_hash

root = Path(__file__).resolve().parents[1]
SHORT = dict(steps=4, rows=4, micro=2, save_every=2, keep=9, seed=4)  # the bad row comes in the second step, a text beside a picture in the third


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.make_world(tmp_path_factory.mktemp("world"))


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


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    "Two ranks to the end."
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, finish(out, start(out, world, 2, **SHORT))


def test_both_stages_learn(world, tmp_path):
    "Captions to the projector alone; then everything, with all kinds of rows and a bad one, which is named."
    first = align("mini-1", world / "captions.json", tmp_path / "one", world / "model")
    second = align("mini-2", world / "talk.jsonl", tmp_path / "two", first, bad_share=0.03)
    one, two = toy.losses(tmp_path / "one"), toy.losses(tmp_path / "two")
    assert sum(one[-3:]) < 0.97 * sum(one[:3]) and sum(two[-3:]) < 0.5 * sum(two[:3])
    before, after, last = (dict(LongVA.from_pretrained(f).named_parameters()) for f in (world / "model", first, second))
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if ".mm_projector." in n}
    still = {n for n in before if torch.equal(after[n], last[n])}
    assert all("layers.2." in n or "post_layernorm" in n for n in still)  # the tower's last layer is not used
    log, found = metrics(tmp_path / "two"), bad(tmp_path / "two")
    assert {(f["row"], Path(f["file"]).name) for f in found} == {(41, "talk.jsonl")} and "cannot be read as an image" in found[0]["why"]
    assert sum(m["bad_rows"] for m in log) == len(found) in (8, 9) and found[0]["instead"].endswith("line 1")
    assert [f["step"] for f in found] == [m["step"] for m in log if m["bad_rows"]]


def test_killed_run_goes_on_bit_for_bit(whole, world, tmp_path):
    out = tmp_path / "killed"
    ranks, end = start(out, world, 2, **SHORT, slow=0.03), time.time() + 150
    while not (out / "step-000002").exists():
        assert time.time() < end and all(r.exitcode is None for r in ranks), toy.wait(ranks, 5)
        time.sleep(0.01)
    time.sleep(0.1)
    for r in ranks:
        r.kill()
    toy.wait(ranks)
    assert not (out / "model").exists()
    assert finish(out, start(out, world, 2, **SHORT)) == whole[1]
    assert equal(toy.weights(out / "model"), toy.weights(whole[0] / "model")) and equal(toy.weights(out / "step-000004"), toy.weights(whole[0] / "step-000004"))
    assert bad(out) == bad(whole[0]) != []


def test_other_ranks_and_sharing(whole, world, tmp_path):
    "One rank; and two that share every sequence, pictures and all: the losses of two that take a row each."
    runs = [start(tmp_path / "one", world, 1, **SHORT), start(tmp_path / "cp", world, 2, cp=2, **SHORT)]
    for out, ranks in zip(("one", "cp"), runs):
        losses = finish(tmp_path / out, ranks)
        assert max(abs(a - b) for a, b in zip(losses, whole[1], strict=True)) < 1e-4
        assert bad(tmp_path / out) == bad(whole[0])
        a, b = ([[line[k] for k in ("visual_tokens", "bad_rows", "tokens")] for line in metrics(o)] for o in (tmp_path / out, whole[0]))
        assert a == b and sum(line["bad_rows"] for line in metrics(whole[0])) == len(bad(whole[0]))


def test_zero3_and_its_resume(whole, world, tmp_path):
    "Two ranks under ZeRO-3 with offload, one row at a time, so that a rank has text while the other has a film; killed after two steps."
    pytest.importorskip("deepspeed")
    settings = dict(SHORT, engine="deepspeed", micro=1)
    losses = finish(tmp_path / "a", start(tmp_path / "a", world, 2, **settings))
    assert max(abs(a - b) for a, b in zip(losses, whole[1], strict=True)) < 1e-4
    shutil.copytree(tmp_path / "a/step-000002", tmp_path / "b/step-000002")
    shutil.copy(tmp_path / "a/metrics.jsonl", tmp_path / "b"); shutil.copy(tmp_path / "a/bad_rows.jsonl", tmp_path / "b")
    assert finish(tmp_path / "b", start(tmp_path / "b", world, 2, **settings)) == losses
    assert equal(toy.weights(tmp_path / "b/model"), toy.weights(tmp_path / "a/model")) and bad(tmp_path / "a") == bad(tmp_path / "b")
    frozen = [n for n in toy.weights(world / "model") if "post_layernorm" in n]
    assert frozen and all(torch.equal(toy.weights(world / "model")[n], toy.weights(tmp_path / "a/model")[n]) for n in frozen)


def test_too_many_bad_rows_stop_all_ranks(whole, world, tmp_path):
    "On all ranks with the same sentence, before the weights are touched; and with the data mended, the run goes on."
    mended, step = tmp_path / "world", bad(whole[0])[0]["step"]
    shutil.copytree(world, mended)
    for code, error in toy.wait(start(tmp_path / "run", mended, 2, **dict(SHORT, save_every=1), bad_share=0.01)):
        assert code == 1 and "1 of 41 rows are bad, more than the share of 0.01" in error and "talk.jsonl, line 41: " in error and "Traceback" not in error
    assert len(toy.losses(tmp_path / "run")) == step - 1 and [f["step"] for f in bad(tmp_path / "run")] == [step]
    shutil.copy(mended / "0.png", mended / "half.png")
    assert len(finish(tmp_path / "run", start(tmp_path / "run", mended, 2, **dict(SHORT, save_every=1), bad_share=0.01))) == 4
    assert bad(tmp_path / "run") == []


def test_rows_that_cannot_be_used(world):
    "Every kind of bad row is one sentence, and a good one beside it is read."
    reading, good = Reading(LongVAProcessor.from_pretrained(world / "model")), dict(image="0.png", conversations=talk(f"<image>\n{question}", "red"))
    row = lambda data: Row(str(world / "x.jsonl"), 7, data)
    assert str(row(good)).endswith("x.jsonl, line 7") and len(read_row(row(good), reading)["input_ids"]) == row_length(row(good), reading)
    (world / "text.png").write_text("no picture")
    (world / "empty.mp4").write_bytes(b"")
    for change, why in {
        "lost.png": "no file", "half.png": "half.png cannot be read as an image", "text.png": "cannot be read as an image", "": "0 images are named", ".": "is a folder, not an image",
    }.items():
        with pytest.raises(BadRow, match=f"(?i){why}"):
            read_row(row(dict(good, image=change)), reading)
    for film in ("empty.mp4", "0.png.mp4", "text.png"):
        with pytest.raises(BadRow):
            read_row(row(dict(video=film, conversations=talk("<video>\nhm", "red"))), reading)
        assert row_length(row(dict(video=film, conversations=talk("<video>\nhm", "red"))), reading) == 0
    named = {k: v for k, v in good.items() if k != "image"}
    assert torch.equal(read_row(row(dict(named, images=["0.png"])), reading)["pixel_values"], read_row(row(good), reading)["pixel_values"])  # by either name, and never as if there were none
    for data in (None, 3, [], dict(named, conversations=talk("hm", "red"), images=["0.png"]), "broken JSON", {}, dict(good, conversations=[]), dict(good, conversations=talk("<image>")), dict(good, conversations=talk("<image> <image>", "red")), dict(good, conversations=[{"from": "gpt", "value": None}]),
                 dict(good, conversations=talk("<image>\n" + question, " \n")), dict(good, conversations=[{"from": ["human"], "value": "<image>"}, {"from": "gpt", "value": "red"}]),
                 dict(good, conversations=talk("<image>\nhm \ud800", "red"))):
        with pytest.raises(BadRow):
            read_row(row(data), reading)


FRONT = [  # what a model's configuration and processor may say of pictures
    {}, dict(image_pool_stride=1), dict(image_pool_stride=4, image_pool_mode="max", pool_mode="max"), dict(encoding="anyres"), dict(image_fit="pad"), dict(image_fit="resize", image_pool_stride=1, encoding="anyres"),
    dict(max_grids=4), dict(grids=[[1, 2], [3, 3]]), dict(time_stamps=True), dict(frame_delimiters=" say "), dict(frames_fit="resize", time_stamps=True, frame_delimiters="\n"), dict(pool_stride=1, image_mean=[0.5] * 3),
]


@pytest.mark.parametrize("front", FRONT, ids=str)
def test_what_is_fed_is_what_the_processor_makes(world, front):
    "Ids and pixels of whole conversations, bit for bit, and the embeddings that the model itself makes of them; lengths are known beforehand."
    from longva.vision.video import read_frames
    config = LongVA.from_pretrained(world / "model").config
    ours = {k: v for k, v in front.items() if k in ("time_stamps", "frame_delimiters", "frames_fit")}
    config = type(config)(**{**config.to_dict(), **{k: v for k, v in front.items() if k not in ours}})
    model, processor = LongVA(config).eval(), LongVAProcessor.from_config(config, small.tokenizer(), **ours)
    reading, data = Reading(processor, fps=1.0), open_data(world / "talk.jsonl")
    mixed = dict(image=["0.png", "turned.jpg"], video="grey.mp4", conversations=talk(f"<image> say <video> say <image>\n{question}", "red", "say blue", "blue"))
    turned = small.Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side
    small.Image.open(world / "2.png").save(world / "turned.jpg", exif=turned)
    for row in (data[0], data[25], data[33], data[37], Row(str(world / "x.json"), 1, mixed)):
        sample, talked = read_row(row, reading), parse_row(row.data)
        asked = processor.tokenizer.apply_chat_template(talked.messages[:-1], chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True)
        films = [read_frames(world / name, fps=1.0) for name in talked.videos]
        made = processor(text=asked, images=[str(world / name) for name in talked.images], videos=films)
        assert torch.equal(sample["input_ids"][: made["input_ids"].shape[1]], made["input_ids"][0]) and len(sample["input_ids"]) == row_length(row, reading)
        pixels = {k: made[k] for k in ("pixel_values", "image_layouts", "pixel_values_videos") if k in made}
        assert equal({k: v for k, v in sample.items() if k in made and k not in ("input_ids", "video_frames")}, pixels)
        loss, whole = AlignLoss(model), {k: v for k, v in sample.items() if k.startswith(("pixel", "image_"))}
        with torch.no_grad():
            assert torch.allclose(see_and_embed(loss, loss.collate([sample])), model.embed(sample["input_ids"][None], **whole), atol=1e-6)
        assert [loss.length(sample), loss.visual] == [[len(sample["input_ids"])], float(sum((sample["input_ids"] == t).sum() for t in (processor.image_token_id, processor.video_token_id)))]


def test_words_beside_a_picture_are_cut_as_when_chatting(world):
    "A tokenizer that joins what is written side by side: the time of a frame belongs to the words before it."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    joined = Tokenizer(models.BPE({c: i for i, c in enumerate([*map(chr, range(32, 127)), "\n", " <", "?<"])}, [(" ", "<"), ("?", "<")]))
    joined.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joined, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>", "<image>", "<video>"])
    old = LongVA.from_pretrained(world / "model").config
    config = type(old)(**{**old.to_dict(), "image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "video_token_id": tokenizer.convert_tokens_to_ids("<video>")})
    processor = LongVAProcessor.from_config(config, tokenizer, time_stamps=True)
    row = Row(str(world / "x.json"), 1, dict(image="0.png", video="grey.mp4", conversations=talk("<image>\nwhich? <video>", "grey")))
    sample, reading = read_row(row, Reading(processor)), Reading(processor)
    assert " <" in tokenizer.convert_ids_to_tokens(sample["input_ids"]) and len(sample["input_ids"]) == row_length(row, reading)


def test_another_start_is_refused(world, tmp_path):
    "In a run that has a checkpoint, and in one that is done, even when its checkpoints are gone: another model, another front end, other rows, other settings."
    from safetensors.torch import load_file, save_file
    out = tmp_path / "run"
    go = lambda model=world / "model", data="captions.json", **more: align("mini-2", world / data, out, model, **{"steps": 2, "rows": 4, "save_every": 1, "workers": 0, **more})
    made = go()
    other, stamped = (shutil.copytree(world / "model", tmp_path / name) for name in ("other", "stamped"))
    weights = load_file(other / "model.safetensors")
    next(w for n, w in weights.items() if "post_layernorm" in n).flatten()[3] += 1e-3  # one number, of a weight that is not even trained
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    processor = LongVAProcessor.from_pretrained(world / "model")
    processor.time_stamps = True
    processor.save_pretrained(stamped)
    shutil.rmtree(out / "step-000002"); shutil.rmtree(made)
    for _ in ("half", "whole"):
        for wrong, said in ((dict(model=other), "starting weights"), (dict(model=stamped), "time_stamps False .now True"), (dict(data="talk.jsonl", bad_share=0.5), "data_rows 24 .now 41"),
                            (dict(steps=3), "steps 2 .now 3"), (dict(reading=dict(fps=2.0)), "fps 1.0 .now 2.0"), (dict(seed=1), "seed 0 .now 1"), (dict(reading=dict(pictures="square")), "pictures model .now square")):
            with pytest.raises(TrainError, match=f"was begun with {said}"):
                go(**wrong)
        assert go() == made
        for checkpoint in out.glob("step-*"):
            shutil.rmtree(checkpoint)
    (made / "training.json").unlink()
    with pytest.raises(TrainError, match="does not say how it was trained"):
        go()


def test_seed_decides_a_fresh_projector(world, tmp_path):
    "Made together from two models twice: the same start; so a run can be gone on with. With both ways of saying where to start, it is refused."
    text = LongVA.from_pretrained(world / "model").config
    Qwen2ForCausalLM(text.text_config).save_pretrained(tmp_path / "words")
    small.tokenizer().save_pretrained(tmp_path / "words")
    CLIPVisionModel(text.vision_config).save_pretrained(tmp_path / "tower")
    parts = dict(language_model=str(tmp_path / "words"), vision_tower=str(tmp_path / "tower"))
    a, b, c = (open_model(PRESETS["mini-1"], None, None, *parts.values(), torch.float32, seed)[0] for seed in (0, 0, 1))
    assert weights_hash(a) == weights_hash(b) != weights_hash(c)
    made = align("mini-1", world / "captions.json", tmp_path / "run", **parts, steps=2)
    assert align("mini-1", world / "captions.json", tmp_path / "run", **parts, steps=2) == made
    model, words = LongVA.from_pretrained(made), toy.weights(tmp_path / "words")
    assert all(torch.equal(words[n], model.state_dict()[n]) for n in words) and len(toy.losses(tmp_path / "run")) == 2
    assert LongVAProcessor.from_pretrained(made).image_processor.grid == 28
    with pytest.raises(TrainError, match="name one or the other"):
        align("mini-1", world / "captions.json", tmp_path / "both", world / "model", **parts)


def test_settings_that_would_be_ignored(world, tmp_path):
    go = lambda preset="mini-2", **more: align(preset, world / "captions.json", tmp_path / "run", world / "model", **more)
    for wrong, said in ((dict(steps=0), "steps is 0"), (dict(reading=dict(pictures="unires")), "pictures 'unires'"), (dict(reading=dict(fps=0)), "fps 0"),
                        (dict(preset=replace(PRESETS["mini-2"], rates={"vision": 1e-3})), "parts to train are vision"), (dict(stepz=3), "no such setting")):
        with pytest.raises(TrainError, match=said):
            go(**wrong)
    assert not (tmp_path / "run").exists()
    assert recipe_for(PRESETS["mini-2"], 100, warmup=0).warmup == 0 and recipe_for(PRESETS["mini-2"], 100, warmup=5).warmup == 5 and recipe_for(PRESETS["mini-2"], 100).warmup == 3
    assert recipe_for(replace(PRESETS["mini-2"], rates={"tower": 1e-6, "language": 1e-4}), 100).lr == 1e-4  # what the log shows is a rate that something has


def test_each_part_follows_the_schedule_at_its_own_rate(world):
    loss = AlignLoss(LongVA.from_pretrained(world / "model"))
    recipe, rates = recipe_for(PRESETS["paper-2"], 3200, steps=100), PRESETS["paper-2"].rates
    groups = [dict(g, top=g["lr"]) for g in weight_groups(loss, rates)]
    engine = Plain(loss, groups, replace(recipe, precision="fp32"), Ranks())
    for step, share in ((0, 1 / 3), (2, 1.0), (3, 1.0), (51, 0.5 * (1 + math.cos(math.pi * 48 / 97))), (99, 0.5 * (1 + math.cos(math.pi * 96 / 97)))):
        engine.clip_and_step(learning_rate(recipe, step) / recipe.lr)
        assert {round(g["lr"] / g["top"], 9) for g in engine.optimizer.param_groups} == {round(share, 9)}
    assert sorted({g["top"] for g in engine.optimizer.param_groups}) == [2e-6, 1e-5]


def test_full_disk_when_the_model_is_saved(world, tmp_path):
    "One sentence on both ranks, nothing half-written; with room again, the same call saves what was trained."
    settings = dict(SHORT, steps=1, rows=2, micro=1)
    room = (world / "model/model.safetensors").stat().st_size
    for code, error in toy.wait(start(tmp_path / "run", world, 2, stage="mini-1", **settings, data="captions.json", largest=room // 2)):
        assert code == 1 and "The model cannot be saved in" in error and "the same call saves it" in error and "Traceback" not in error, error[-2000:]
    assert not (tmp_path / "run/model").exists() and not list((tmp_path / "run").glob("*.part")) and (tmp_path / "run/step-000001").exists()
    finish(tmp_path / "run", start(tmp_path / "run", world, 1, stage="mini-1", **settings, data="captions.json"))
    assert (tmp_path / "run/model/training.json").exists()


def test_full_disk_for_the_list_of_bad_rows(world, tmp_path):
    rows = Rows(open_data(world / "talk.jsonl"), Reading(LongVAProcessor.from_pretrained(world / "model")), Recipe(steps=1, rows=1), tmp_path, workers=0)
    rows.found, rows.file = [dict(step=1, place=0, file="a.json", row=1, why="no file", instead="")], tmp_path / "not/here/bad_rows.jsonl"
    with pytest.raises(TrainError, match="bad_rows.jsonl cannot be written .No such file"):
        settle(rows)


def test_processor_of_another_model_is_refused(world):
    model = LongVA.from_pretrained(world / "model")
    processor = LongVAProcessor.from_config(model.config, small.tokenizer(), pool_stride=1)
    with pytest.raises(TrainError, match="a pool of frames 1, and the model 2"):
        align("mini-2", world / "captions.json", world / "never", model, processor)
    assert not (world / "never").exists()


def test_one_rate_for_all_parts_is_refused(world, tmp_path):
    "It would be without effect."
    with pytest.raises(TrainError, match="learning rate of its own"):
        align("mini-2", world / "captions.json", tmp_path / "run", world / "model", lr=1e-9)
    assert not (tmp_path / "run").exists()


def test_files_and_mixtures(tmp_path):
    rows = [dict(id=i, conversations=talk("say red", "red")) for i in range(10)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "mix.yaml").write_text("datasets:\n" + "".join(f"- json_path: {f}\n  sampling_strategy: {s}\n" for f, s in
                                       [("a.json", "first:3"), ("b.jsonl", "end:21%"), (str(tmp_path / "a.json"), "random:5"), ("'{a.json,b.jsonl}'", "all")]))
    ids = [r.data["id"] for r in open_data(tmp_path / "mix.yaml")]
    assert ids[:6] == [0, 1, 2, 7, 8, 9] and len(set(ids[6:11])) == 5 and ids[11:] == [*range(10)] * 2
    assert ids == [r.data["id"] for r in open_data(tmp_path / "mix.yaml")] and [r.number for r in take(open_data(tmp_path / "b.jsonl"), "end:2")] == [9, 10]
    for name, content, why in [("c.json", "[1,", "broken JSON"), ("c.json", "{}", "list of rows"), ("c.json", "[]", "no rows"), ("c.yaml", "- a", "`datasets`"),
                               ("c.yaml", "datasets: [{a: 1}]", "json_path"), ("c.yaml", f"datasets: [{{json_path: {tmp_path}/a.json, sampling_strategy: 'last:3'}}]", "sampling strategy"), ("c.yaml", "datasets: 3", "list `datasets`"),
                               ("c.yaml", f"datasets: [{{json_path: {tmp_path}/a.json, sampling_strategie: 'first:2'}}]", "known are json_path"), ("c.csv", "", "must be")]:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=why):
            open_data(tmp_path / name)


def test_which_tokens_are_learnt(world):
    "Against the rule in words: markers of every turn, answers with their end; or answers alone."
    processor = LongVAProcessor.from_pretrained(world / "model")
    messages = [dict(role=r, content=c) for r, c in (("user", "<image>\nwhich colour?"), ("assistant", "red"), ("user", "say blue"), ("assistant", "blue"))]
    turns = [("system", "You are a helpful assistant."), *((m["role"], m["content"]) for m in messages)]
    for answers_only in (False, True):
        expected = []
        for role, text in turns:
            answer, mark = role == "assistant", not answers_only
            body = processor.tokenizer(text)["input_ids"]
            expected += [("<|im_start|>", mark), (role, False), ("\n", False), *((t, answer) for t in processor.tokenizer.convert_ids_to_tokens(body)), ("<|im_end|>", mark or answer), ("\n", mark or answer)]
        ids, learnt = token_ids(messages, processor, answers_only=answers_only)
        assert [*zip(processor.tokenizer.convert_ids_to_tokens(ids), learnt.tolist())] == expected
    reading = Reading(processor)
    sample = read_row(Row(str(world / "x.json"), 1, dict(image="0.png", conversations=talk(f"<image>\n{question}", "red", "say blue", "blue"))), reading)
    ids, learnt = token_ids(messages, processor)
    keep = sample["input_ids"] != processor.image_token_id
    assert sample["input_ids"][keep].tolist() == ids[ids != processor.image_token_id].tolist() and (sample["labels"] == -100).sum() == len(sample["labels"]) - learnt[1:].sum()


def test_every_row_once_an_epoch_and_like_lengths_together(world, tmp_path):
    data, reading = open_data(world / "talk.jsonl"), Reading(LongVAProcessor.from_pretrained(world / "model"))
    recipe = Recipe(steps=41, rows=8)
    rows = Rows(data, reading, recipe, tmp_path, together=41, workers=0)
    taken = [[rows.index(s, r) for r in range(8)] for s in range(41)]
    assert sorted(sum(taken, [])) == sorted([*range(41)] * 8)  # eight epochs
    lengths = [[row_length(data[i], reading) for i in step] for step in taken]
    short = sum(max(s) * 8 - sum(s) for s in lengths) / sum(max(s) * 8 for s in lengths)
    assert short < 0.05 and max(map(max, lengths)) > 2 * min(map(min, lengths[:-1]))
    other = Rows(data, reading, replace(recipe, seed=1), tmp_path, together=41, workers=0)
    assert [[other.index(s, r) for r in range(8)] for s in range(41)] != taken


def test_loss_is_the_models_own(world):
    "Against LongVA.forward, which embeds images and films in its own way; gradients of every trained weight, too."
    data, reading = open_data(world / "talk.jsonl"), Reading(LongVAProcessor.from_pretrained(world / "model"))
    model = LongVA.from_pretrained(world / "model")
    loss = AlignLoss(model)
    samples = [read_row(data[i], reading) for i in (0, 25, 33, 38)]
    batch = loss.collate(samples)
    loss(batch, loss.count(batch)).backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], **{k: batch[k] for k in ("pixel_values", "image_layouts", "pixel_values_videos")}).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys() and max(float((mine[n] - theirs[n]).abs().max()) for n in mine) < 1e-5


def test_command(world, tmp_path):
    "As from the terminal: a run, and mistakes as sentences."
    for data, made in (("lost.json", False), ("talk.jsonl", True)):
        args = ["--preset", "mini-2", "--data", world / data, "--model", world / "model", "--out", tmp_path / data, "--steps", 2, "--rows", 4, "--bad-share", 0.1]
        ((code, said),) = toy.wait(toy.start(tmp_path / data, body=small.command, args=args))
        assert (code == 0 and "Done." in said if made else code == 1 and "lost.json cannot be read" in said) and "Traceback" not in said, said[-3000:]
        assert (tmp_path / data / "model/config.json").exists() == (tmp_path / data).exists() == made
    assert len(toy.losses(tmp_path / "talk.jsonl")) == 2


def test_presets_are_the_papers():
    one, two = PRESETS["paper-1"], PRESETS["paper-2"]
    assert one.rates == {"projector": 1e-3} and two.rates == {"language": 1e-5, "projector": 1e-5, "tower": 2e-6}
    assert (one.length, two.length, one.warmup, two.warmup, one.epochs, two.epochs) == (8192, 32768, 0.03, 0.03, 1, 1)
    for preset in (one, two):
        r = preset.recipe
        assert (r.schedule, r.floor, r.weight_decay, r.precision, r.engine) == ("cosine", 0, 0, "bf16", "deepspeed")
    with pytest.raises(TrainError, match="no preset"):
        align("paper-3", "x.json", "nowhere")
