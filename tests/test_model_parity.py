"""The same numbers as the original code, from its own checkpoints.

Tiny random checkpoints in the original format, pictures, and what the original computes from them: see `original.py`
for where they lie. Everything goes through the doors a user takes: `LongVA.from_pretrained` on an original folder, and
the processor that belongs to it. The checkpoints have no tokenizer, so each gets one whose words are t0 to t511.
"""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from original import PARITY, same_columns
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longva.context.parallel import zigzag_order
from longva.model.checkpoint import save_original
from longva.model.modeling import LongVA
from longva.model.processing import LongVAProcessor
from longva.model.weights import weight_files
from longva.vision.unires import normalize, tile_image

VISUAL, LOGITS, PIXELS = 5e-5, 1e-4, 1e-5
IMAGE_CASES = json.loads((PARITY / "cases.json").read_text())["cases"]
VIDEO_CASES = json.loads((PARITY / "video_cases.json").read_text())["cases"]
PROBES = json.loads((PARITY / "cases.json").read_text())["probe_points_by_tile"]
FOLDERS = sorted(folder.name for folder in PARITY.glob("checkpoint*"))


def named(cases, *kinds):
    return [pytest.param(c, id=c["id"]) for c in cases if c["kind"] in kinds]


def original_folder(where, checkpoint, overrides):
    """A copy of an original folder, with other settings, the tower's folder inside, and a tokenizer."""
    raw = json.loads((PARITY / checkpoint / "config.json").read_text()) | overrides
    folder = Path(where) / "model"
    shutil.copytree(PARITY / checkpoint, folder)
    shutil.copytree(PARITY / raw["mm_vision_tower"], folder / raw["mm_vision_tower"])
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(512)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t510").save_pretrained(folder)
    return folder


@cache
def _opened(checkpoint, overrides):
    with tempfile.TemporaryDirectory() as where:
        folder = original_folder(where, checkpoint, json.loads(overrides))
        return LongVA.from_pretrained(folder, dtype=torch.float32), LongVAProcessor.from_pretrained(folder)


def opened(case):
    return _opened(case["checkpoint"], json.dumps(case.get("config_overrides", {}), sort_keys=True))


@cache
def stored(name):
    return load_file(PARITY / f"{name}.safetensors")


def frames_of(names):
    return np.stack([np.asarray(Image.open(PARITY / name).convert("RGB")) for name in names])


def text_of(ids, pictures):
    """Ids as words, and a placeholder for each -200."""
    left = iter(pictures)
    return " ".join(f"t{i}" if i != -200 else "<video>" if "video_frames" in next(left) else "<image>" for i in ids)


def inputs_of(case):
    """Model and inputs of a case."""
    model, processor = opened(case)
    pictures = [
        p
        for p in case.get("images", [{"video_frames": case["frames"]}] if "frames" in case else [])
        if "zeros" not in p
    ]
    rows = case["input_ids"] if case["kind"] == "batch" else [case["input_ids"]]
    if case["kind"] == "batch":
        rows = [[i for i, keep in zip(ids, mask) if keep] for ids, mask in zip(rows, case["attention_mask"])]
    left = iter(pictures)
    texts = [text_of(row, [next(left) for i in row if i == -200]) for row in rows]
    images = [Image.open(PARITY / p["file"]) for p in pictures if "file" in p]
    videos = [frames_of(p["video_frames"]) for p in pictures if "video_frames" in p]
    return (
        model,
        processor,
        processor(
            text=texts, images=images or None, videos=videos or None, padding_side=processor.tokenizer.padding_side
        ),
    )


def check_logits(case, logits, tensors):
    theirs = tensors[case["tensors"]["logits"]]
    assert (same_columns(logits, theirs) - theirs).abs().max() <= LOGITS
    if "argmax_at_logit_positions" in case:
        assert logits.argmax(-1).tolist() == case["argmax_at_logit_positions"]


def check_greedy(case, model, inputs):
    for key, eos in (("eight_ids_ignoring_eos", None), ("ids_with_eos_511", 511)):
        if "greedy" in case:
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=509)
            assert out[0, inputs["input_ids"].shape[1] :].tolist() == case["greedy"][key]


def check_case(case, tensors):
    model, _, inputs = inputs_of(case)
    pixels = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        rows = model.embed(inputs["input_ids"], **pixels)[:, : case["merged_length"]]
        spans = [rows[0, a:b] for a, b in case.get("visual_spans", [])]
        if "visual_tokens" in case["tensors"]:
            assert (torch.cat(spans) - tensors[case["tensors"]["visual_tokens"]]).abs().max() <= VISUAL
        if "merged_embeds" in case["tensors"]:
            assert (rows[0] - tensors[case["tensors"]["merged_embeds"]]).abs().max() <= VISUAL
        assert rows.shape[1] == case["merged_length"]
        positions = torch.tensor([case["position_ids"]]) if "position_ids" in case else None
        keep = torch.tensor(case["logit_positions"])
        check_logits(case, model(inputs_embeds=rows, position_ids=positions, logits_to_keep=keep).logits[0], tensors)
        if (
            case["merged_length"] == inputs["input_ids"].shape[1] and positions is None
        ):  # not cut to the tokenizer's length, as the original does
            check_logits(case, model(**inputs, logits_to_keep=keep).logits[0], tensors)
            check_greedy(case, model, inputs)


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_and_shapes_are_the_original_ones(folder):
    model = LongVA.from_pretrained(PARITY / folder)
    state = {k: v for file in weight_files(PARITY / folder) for k, v in load_file(file).items()}
    ours = model.state_dict()
    assert (
        model.dtype == torch.bfloat16
        and ours.keys() == state.keys()
        and all(torch.equal(ours[k], v) for k, v in state.items())
    )
    assert model.generation_config.eos_token_id == 511


def test_the_checkpoints_tower_wins(tmp_path):
    """Other weights lie in the tower's own folder."""
    folder = original_folder(tmp_path, "checkpoint", {})
    name = "vision_model.embeddings.class_embedding"
    tower = folder / json.loads((folder / "config.json").read_text())["mm_vision_tower"]
    save_file({name: torch.full((32,), 7.0)}, tower / "model.safetensors")
    ours = LongVA.from_pretrained(folder).state_dict()[f"model.vision_tower.vision_tower.{name}"]
    theirs = load_file(PARITY / "checkpoint" / "model.safetensors")
    assert torch.equal(ours, theirs[f"model.vision_tower.vision_tower.{name}"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_there_and_back(folder, tmp_path):
    """Original, ours on disk, original: the same bits, and settings that open to the same model."""
    LongVA.from_pretrained(PARITY / folder).save_pretrained(tmp_path / "ours")
    save_original(
        LongVA.from_pretrained(tmp_path / "ours"),
        tmp_path / "back",
        max_shard_size="200KB" if folder == "checkpoint_336" else "5GB",
    )
    first, last = (
        {k: v for file in weight_files(f) for k, v in load_file(file).items()}
        for f in (PARITY / folder, tmp_path / "back")
    )
    assert first.keys() == last.keys() and all(
        v.dtype == last[k].dtype and torch.equal(v.view(torch.int16), last[k].view(torch.int16))
        for k, v in first.items()
    )
    before, after = (json.loads((f / "config.json").read_text()) for f in (PARITY / folder, tmp_path / "back"))
    assert {k: v for k, v in after.items() if k in before} == before
    again, once = (LongVA.from_pretrained(f).config.to_dict() for f in (tmp_path / "back", PARITY / folder))
    assert {k: v for k, v in again.items() if k != "_name_or_path"} == {
        k: v for k, v in once.items() if k != "_name_or_path"
    }


@pytest.mark.parametrize("case", named(IMAGE_CASES, "image", "image+video", "text"))
def test_images_and_text(case):
    check_case(case, stored("image_cases"))


@pytest.mark.parametrize("case", named(VIDEO_CASES, "video"))
def test_videos(case):
    check_case(case, stored("video_cases"))


@pytest.mark.parametrize("case", named(VIDEO_CASES, "vniah_frontend"))
def test_needle_front_end(case):
    (model, processor), tensors = opened(case), stored("video_cases")
    pixels = processor.image_processor.preprocess_frames(frames_of(case["frames"]), "pad")
    if "pixel_values" in case["tensors"]:
        assert (pixels - tensors[case["tensors"]["pixel_values"]]).abs().max() <= PIXELS
    with torch.no_grad():
        tokens = model.encode_frames(pixels, chunk=2)
    assert tokens.shape[1] == case["tokens_per_frame"]
    assert (tokens - tensors[case["tensors"]["frame_tokens"]]).abs().max() <= VISUAL


def check_statistics(pixels, theirs):
    side = str(pixels.shape[-1])
    assert len(pixels) == len(theirs)
    for tile, t in zip(pixels.double(), theirs):
        assert (tile.mean((1, 2)) - torch.tensor(t["mean"])).abs().max() <= 1e-5
        assert (tile.std((1, 2), correction=0) - torch.tensor(t["std"])).abs().max() <= 1e-5
        assert abs(tile.min() - t["min"]) <= 1e-5 and abs(tile.max() - t["max"]) <= 1e-5
        assert max(abs(tile[c, y, x] - v) for (c, y, x), v in zip(PROBES[side], t["samples"])) <= 1e-5


@pytest.mark.parametrize("case", named([c for c in VIDEO_CASES if "frame_stats" in c], "video", "vniah_frontend"))
def test_frame_pixels(case):
    _, processor = opened(case)
    how = "crop" if case["kind"] == "video" else "pad"
    pixels = processor.image_processor.preprocess_frames(frames_of(case["frames"]), how)
    if "pixel_values" in case["tensors"]:
        assert (pixels - stored("video_cases")[case["tensors"]["pixel_values"]]).abs().max() <= PIXELS
    check_statistics(pixels, case["frame_stats"])


@pytest.mark.parametrize("case", named(IMAGE_CASES, "image", "image+video", "batch"))
def test_image_pixels(case):
    """Where pixels are stored they agree; elsewhere the statistics of every grid do."""
    _, processor = opened(case)
    for picture in case["images"]:
        if "file" not in picture:
            continue
        cut = processor.image_processor(Image.open(PARITY / picture["file"]))
        single = case["id"].startswith("pad_single_tile")
        first = 0 if single else 1  # stored with the thumbnail, which we do not make
        assert cut["image_layouts"].tolist() == [[1, 1] if single else picture["grid"]]
        if "pixel_values" in picture:
            theirs = stored("image_cases")[picture["pixel_values"]]
            assert (cut["pixel_values"] - (theirs[None] if theirs.ndim == 3 else theirs[first:])).abs().max() <= PIXELS
        if "tile_stats" in picture:
            check_statistics(cut["pixel_values"], picture["tile_stats"][first:])


def test_tower_and_projector():
    case, tensors = IMAGE_CASES[0], stored("image_cases")
    model, _ = opened(case)
    picture = Image.open(PARITY / case["images"][0]["file"])
    pixels = normalize(tile_image(picture, 28, thumbnail=True).pixels)  # compared with theirs in test_unires
    with torch.no_grad():
        tower = model.model.vision_tower["vision_tower"]["vision_model"].features(pixels, -2)
        assert (tower - tensors[case["tensors"]["tower_features"]]).abs().max() <= VISUAL
        assert (
            model.model.patch_features(pixels) - tensors[case["tensors"]["projector_features"]]
        ).abs().max() <= VISUAL


@pytest.mark.parametrize("case", named(IMAGE_CASES, "batch"))
def test_padded_batches(case):
    model, processor, inputs = inputs_of(case)
    assert processor.tokenizer.padding_side == case["config_overrides"]["tokenizer_padding_side"]
    assert inputs["attention_mask"].tolist() == torch.tensor(case["merged_attention_mask"]).int().tolist()
    with torch.no_grad():
        pixels = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        rows = model.embed(inputs["input_ids"], **pixels)
        out = model(**inputs, labels=torch.tensor(case["merged_labels"]))
    if "merged_embeds" in case["tensors"]:  # of padding nothing is defined
        real = inputs["attention_mask"].bool()
        theirs = stored("image_cases")[case["tensors"]["merged_embeds"]]
        assert rows.shape == theirs.shape and (rows - theirs)[real].abs().max() <= VISUAL
    assert abs(out.loss.item() - case["loss"]) <= 1e-4 * case["loss"]
    for i, row in enumerate(case["rows"]):
        if "visual_tokens" in row["tensors"]:
            own = rows[i, row["row_offset"] :]
            tokens = torch.cat([own[a:b] for a, b in row["visual_spans"]])
            assert (tokens - stored("image_cases")[row["tensors"]["visual_tokens"]]).abs().max() <= VISUAL
        check_logits(
            row, out.logits[i, row["row_offset"] + torch.tensor(row["logit_positions"])], stored("image_cases")
        )


def test_truncation():
    """The original cuts a merged sequence on the right at tokenizer_model_max_length, which is off here unless asked.

    A cut inside a picture, which the original makes in silence, is refused.
    """
    (case,) = [case for case in IMAGE_CASES if case["id"] == "truncate_to_20"]
    model, processor, inputs = inputs_of(case)
    assert inputs["input_ids"].shape[1] == case["length_before_truncation"] > case["merged_length"]
    words = text_of(case["input_ids"], case["images"])
    picture = Image.open(PARITY / case["images"][0]["file"])
    short = processor(text=words, images=picture, truncation=True, max_length=40)
    assert torch.equal(short["input_ids"], inputs["input_ids"][:, :40])
    with torch.no_grad():
        logits = model(**short).logits[0]
        check_logits(case, logits[case["logit_positions"]], stored("image_cases"))
        cut = processor(text=words, images=picture, truncation=True, max_length=case["merged_length"])
        with pytest.raises(ValueError, match="11 image placeholders, but the images give 24 visual tokens"):
            model(**cut)


def test_every_needle_is_found_or_missed_as_in_the_original():
    data, tensors = json.loads((PARITY / "vniah" / "vniah_cases.json").read_text()), load_file(
        PARITY / "vniah" / "vniah.safetensors"
    )
    model = LongVA.from_pretrained(PARITY / data["checkpoint"], dtype=torch.float32)
    word, hay, passed, row = (lambda ids: model.get_input_embeddings()(torch.tensor(ids))), tensors["haystack"], 0, 0
    assert np.mean([c["score"] for c in data["cells"]]) == pytest.approx(data["average_accuracy"])
    with torch.no_grad():
        for cell in data["cells"]:
            n, i = cell["num_frames"], int(cell["depth"] * cell["num_frames"])
            assert i == cell["insert_index"]
            for j, (question, answer) in enumerate(zip(data["question_ids"], data["answer_ids"])):
                rows = torch.cat(
                    [
                        word(data["pre_ids"]),
                        *hay[:i],
                        tensors["needles"][j],
                        *hay[i:n],
                        word(question),
                        word(data["post_ids"]),
                        word(answer),
                    ]
                )
                assert len(rows) - len(answer) == cell["prompt_length"][j]
                span = torch.arange(len(rows) - len(answer) - 1, len(rows) - 1)
                logits = model(
                    inputs_embeds=rows[None], position_ids=torch.arange(len(rows))[None], logits_to_keep=span
                ).logits[0]
                theirs = tensors["answer_span_logits"][row : row + len(answer)]
                assert (same_columns(logits, theirs) - theirs).abs().max() <= LOGITS
                assert logits.argmax(-1).tolist() == cell["argmax_answer_span"][j]
                assert (logits.argmax(-1).tolist() == answer) == bool(cell["pass"][j])
                passed, row = passed + (logits.argmax(-1).tolist() == answer), row + len(answer)
    assert passed == 36 and row == len(tensors["answer_span_logits"])


def test_positions_of_ranks():
    for case in json.loads((PARITY / "vniah" / "vniah_cases.json").read_text())["zigzag_layout"]:
        assert zigzag_order(case["padded_length"], case["world_size"]).tolist() == case["positions_of_rank"]


def test_log_probabilities_of_answers():
    data = json.loads((PARITY / "losses" / "dpo.json").read_text())["from_checkpoint"]
    model, processor = _opened(data["checkpoint"], "{}")
    picture = Image.open(PARITY / data["image"])
    sums, means = [], []
    for prompt, answer in zip(data["prompts"] * 2, data["chosen"] + data["rejected"]):
        inputs = processor(text=text_of(prompt + answer, [{}]), images=picture)
        ids = inputs["input_ids"][0, -len(answer) :]
        with torch.no_grad():
            logps = model(**inputs).logits[0, -len(answer) - 1 : -1].log_softmax(-1).gather(1, ids[:, None])
        sums.append(logps.sum().item()), means.append(logps.mean().item())
    assert sums == pytest.approx(data["sum_logps"], rel=1e-4) and means == pytest.approx(data["mean_logps"], rel=1e-4)
    lengths = [len(a) for a in data["chosen"]]
    assert -sum(sums[:2]) / sum(lengths) == pytest.approx(data["sft_loss_on_chosen"], rel=1e-4)
