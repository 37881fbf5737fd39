"""The same numbers as the original code, from its own checkpoints.

The parity folder (tiny random checkpoints in the original format, pictures, and what the original computes from them) lies beside the
repository in shared/parity. Without it these tests are skipped. Limits are those of its README.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"
if not PARITY.is_dir():
    pytest.skip("The parity data is not here (shared/parity beside the repository), so parity with the original is not checked.", allow_module_level=True)

from safetensors.torch import load_file  # noqa: E402
from transformers import CLIPVisionConfig, Qwen2Config  # noqa: E402

from longva.model.modeling import LongVA, LongVAConfig  # noqa: E402
from longva.model.processing import LongVAImageProcessor  # noqa: E402
from longva.vision.unires import fit_image  # noqa: E402

VISUAL, LOGITS, PIXELS = 5e-5, 1e-4, 1e-5
IMAGE_ID, VIDEO_ID = 0, 510  # ids that no case uses as text
IMAGE_CASES = json.loads((PARITY / "cases.json").read_text())["cases"]
VIDEO_CASES = json.loads((PARITY / "video_cases.json").read_text())["cases"]


def named(cases, *kinds):
    return [pytest.param(c, id=c["id"]) for c in cases if c["kind"] in kinds]


def config_of(folder, overrides):
    """Our configuration, by hand, from the original's."""
    raw = json.loads((PARITY / folder / "config.json").read_text()) | overrides
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    text = Qwen2Config(**{k: raw[k] for k in keys}, rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]})
    vision = CLIPVisionConfig(**json.loads((PARITY / raw["mm_vision_tower"] / "config.json").read_text()))
    stride = 1 if raw["image_aspect_ratio"] == "pad" and raw["mm_patch_merge_type"] != "flat" else raw["mm_spatial_pool_stride"]  # single tiles are not pooled
    return LongVAConfig(text_config=text, vision_config=vision, vision_feature_layer=raw["mm_vision_select_layer"], pool_stride=stride,
                        pool_mode=raw["mm_spatial_pool_mode"], image_token_id=IMAGE_ID, video_token_id=VIDEO_ID)


@cache
def _model(folder, overrides):
    model = LongVA(config_of(folder, json.loads(overrides))).eval()
    state = {}
    for file in sorted((PARITY / folder).glob("*.safetensors")):
        state |= load_file(file)
    model.load_state_dict(state, strict=True)
    return model


def model_of(case):
    return _model(case["checkpoint"], json.dumps(case.get("config_overrides", {}), sort_keys=True))


@cache
def stored(name):
    return load_file(PARITY / f"{name}.safetensors")


def processor_of(model):
    vision = model.config.vision_config
    return LongVAImageProcessor(vision.image_size, vision.patch_size, model.config.pool_stride)


def frames_of(names):
    return np.stack([np.asarray(Image.open(PARITY / name).convert("RGB")) for name in names])


def pixels_of(case, picture, processor):
    """Pixels [G,3,S,S] and (columns, rows) of one image of a case."""
    image, side = Image.open(PARITY / picture["file"]).convert("RGB"), processor.grid
    if case["id"].startswith("pad_single_tile"):
        return processor.preprocess_frames(np.array(image)[None], "pad"), (1, 1)
    columns, rows = picture["grid"]
    if "image_grid_pinpoints" in case.get("config_overrides", {}):  # other canvases than ours: take the grid as given
        canvas = np.array(fit_image(image, side, columns, rows))
        tiles = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        return processor.preprocess_frames(tiles, "resize"), (columns, rows)
    cut = processor(image)
    assert cut["image_layouts"].tolist() == [[columns, rows]]
    return cut["pixel_values"], (columns, rows)


def inputs_of(case, model):
    """Model inputs of a case, and its pixels picture by picture."""
    processor = processor_of(model)
    pixels, layouts, films, counts = [], [], [], []
    for picture in case.get("images", [{"video_frames": case["frames"]}] if "frames" in case else []):
        if "video_frames" in picture:
            films.append(processor.preprocess_frames(frames_of(picture["video_frames"])))
            counts.append((VIDEO_ID, len(films[-1]) * processor.tokens_per_grid))
        elif "file" in picture:
            tiles, layout = pixels_of(case, picture, processor)
            pixels.append(tiles), layouts.append(layout)
            counts.append((IMAGE_ID, len(tiles) * processor.tokens_per_grid))
    left = iter(counts)

    def merge(ids):
        return [i for id in ids for i in ([id] if id != -200 else (lambda t: [t[0]] * t[1])(next(left)))]

    rows = case["input_ids"] if case["kind"] == "batch" else [case["input_ids"]]
    inputs = {"input_ids": [merge(row) for row in rows]}
    if pixels:
        inputs |= {"pixel_values": torch.cat(pixels), "image_layouts": torch.tensor(layouts)}
    if films:
        inputs |= {"pixel_values_videos": torch.cat(films), "video_frames": torch.tensor([len(f) for f in films])}
    return inputs


def check_logits(case, logits, tensors):
    assert (logits - tensors[case["tensors"]["logits"]]).abs().max() <= LOGITS
    if "argmax_at_logit_positions" in case:
        assert logits.argmax(-1).tolist() == case["argmax_at_logit_positions"]


def check_greedy(case, model, inputs):
    for key, eos in (("eight_ids_ignoring_eos", None), ("ids_with_eos_511", 511)):
        if "greedy" in case:
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=509)
            assert out[0, inputs["input_ids"].shape[1]:].tolist() == case["greedy"][key]


def check_case(case, tensors):
    model = model_of(case)
    inputs = inputs_of(case, model)
    inputs["input_ids"] = torch.tensor(inputs["input_ids"])
    with torch.no_grad():
        rows = model.embed(**inputs)[:, : case["merged_length"]]
        spans = [rows[0, a:b] for a, b in case.get("visual_spans", [])]
        if "visual_tokens" in case["tensors"]:
            assert (torch.cat(spans) - tensors[case["tensors"]["visual_tokens"]]).abs().max() <= VISUAL
        if "merged_embeds" in case["tensors"]:
            assert (rows[0] - tensors[case["tensors"]["merged_embeds"]]).abs().max() <= VISUAL
        assert rows.shape[1] == case["merged_length"]
        positions = torch.tensor([case["position_ids"]]) if "position_ids" in case else None
        check_logits(case, model(inputs_embeds=rows, position_ids=positions, logits_to_keep=torch.tensor(case["logit_positions"])).logits[0], tensors)
        if case["merged_length"] == inputs["input_ids"].shape[1] and positions is None:
            whole = model(**inputs, logits_to_keep=torch.tensor(case["logit_positions"])).logits[0]
            check_logits(case, whole, tensors)
            check_greedy(case, model, inputs)


@pytest.mark.parametrize("folder", ["checkpoint", "checkpoint_336"])
def test_names_and_shapes_are_the_original_ones(folder):
    model = _model(folder, "{}")  # loads strictly
    state = {}
    for file in (PARITY / folder).glob("*.safetensors"):
        state |= load_file(file)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    tower = load_file(PARITY / json.loads((PARITY / folder / "config.json").read_text())["mm_vision_tower"] / "model.safetensors")
    name = "vision_model.embeddings.class_embedding"
    assert not torch.equal(model.state_dict()[f"model.vision_tower.vision_tower.{name}"], tower[name].float())


@pytest.mark.parametrize("case", named(IMAGE_CASES, "image", "image+video", "text"))
def test_images_and_text(case):
    check_case(case, stored("image_cases"))


@pytest.mark.parametrize("case", named(VIDEO_CASES, "video"))
def test_videos(case):
    check_case(case, stored("video_cases"))


@pytest.mark.parametrize("case", named(VIDEO_CASES, "vniah_frontend"))
def test_needle_front_end(case):
    model, tensors = model_of(case), stored("video_cases")
    pixels = processor_of(model).preprocess_frames(frames_of(case["frames"]), "pad")
    if "pixel_values" in case["tensors"]:
        assert (pixels - tensors[case["tensors"]["pixel_values"]]).abs().max() <= PIXELS
    with torch.no_grad():
        tokens = model.encode_frames(pixels, chunk=2)
    assert tokens.shape[1] == case["tokens_per_frame"]
    assert (tokens - tensors[case["tensors"]["frame_tokens"]]).abs().max() <= VISUAL


@pytest.mark.parametrize("case", named([c for c in VIDEO_CASES if "pixel_values" in c["tensors"]], "video"))
def test_frame_pixels(case):
    pixels = processor_of(model_of(case)).preprocess_frames(frames_of(case["frames"]), "crop")
    assert (pixels - stored("video_cases")[case["tensors"]["pixel_values"]]).abs().max() <= PIXELS


@pytest.mark.parametrize("case", named(IMAGE_CASES, "image"))
def test_image_pixels(case):
    """Where pixels are stored they agree; elsewhere the mean and deviation of every grid do."""
    processor = processor_of(model_of(case))
    for picture in case["images"]:
        pixels, _ = pixels_of(case, picture, processor)
        first = 0 if case["id"].startswith("pad_single_tile") else 1  # stored with the thumbnail, which we do not make
        if "pixel_values" in picture:
            theirs = stored("image_cases")[picture["pixel_values"]]
            assert (pixels - (theirs[None] if theirs.ndim == 3 else theirs[first:])).abs().max() <= PIXELS
        if "tile_stats" in picture:
            theirs = picture["tile_stats"][first:]
            means, deviations = pixels.double().mean((2, 3)), pixels.double().std((2, 3), correction=0)
            assert (means - torch.tensor([t["mean"] for t in theirs])).abs().max() <= 1e-5
            assert (deviations - torch.tensor([t["std"] for t in theirs])).abs().max() <= 1e-5


def test_tower_and_projector():
    case, tensors = IMAGE_CASES[0], stored("image_cases")
    model = model_of(case)
    pixels = tensors[case["images"][0]["pixel_values"]]
    with torch.no_grad():
        tower = model.model.vision_tower["vision_tower"]["vision_model"].features(pixels, -2)
        assert (tower - tensors[case["tensors"]["tower_features"]]).abs().max() <= VISUAL
        assert (model.model.patch_features(pixels) - tensors[case["tensors"]["projector_features"]]).abs().max() <= VISUAL


@pytest.mark.parametrize("case", named(IMAGE_CASES, "batch"))
def test_padded_batches(case):
    model, tensors = model_of(case), stored("image_cases")
    inputs, mask = inputs_of(case | {"input_ids": [np.array(ids)[np.array(keep) == 1].tolist() for ids, keep in zip(case["input_ids"], case["attention_mask"])]}, model), torch.tensor(case["merged_attention_mask"])
    ids = torch.ones_like(mask)
    ids[mask.bool()] = torch.tensor(sum(inputs["input_ids"], []))
    inputs["input_ids"] = ids
    with torch.no_grad():
        out = model(**inputs, attention_mask=mask, labels=torch.tensor(case["merged_labels"]))
    assert abs(out.loss.item() - case["loss"]) <= 1e-4 * case["loss"]
    for i, row in enumerate(case["rows"]):
        check_logits(row, out.logits[i, row["row_offset"] + torch.tensor(row["logit_positions"])], tensors)
