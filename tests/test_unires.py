"""Grids, canvases, squares and frames, against numbers recorded from the original code."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from original import PARITY, WHOLE
from PIL import Image
from safetensors.torch import load_file

from longva.vision.unires import (
    PAD_COLOUR,
    anyres_tokens,
    choose_grid,
    fit_frames,
    fit_image,
    grid_choices,
    normalize,
    place_image,
    tile_image,
    token_count,
    token_order,
    unires_tokens,
)

SIDE = {"checkpoint": 28, "checkpoint_336": 336}


def stored(name):
    return json.loads((PARITY / name).read_text())


def grids_of(pinpoints, side):
    if isinstance(pinpoints, str):
        return [(a, b) for a in range(1, 7) for b in range(1, 7)]  # "(1x1),...,(6x6)"
    return [(w // side, h // side) for w, h in pinpoints]


def cases(name, kind):
    return [c for c in stored(name)["cases"] if kind(c)]


def assert_stats(values, stats, points):
    "Mean, deviation, extremes and sampled points of every square [G,3,S,S]."
    assert len(values) == len(stats)
    for square, want in zip(values.double(), stats):
        assert square.mean((1, 2)).tolist() == pytest.approx(want["mean"], abs=1e-5)
        assert square.std((1, 2), correction=0).tolist() == pytest.approx(want["std"], abs=1e-5)
        assert [square.min().item(), square.max().item()] == pytest.approx([want["min"], want["max"]], abs=1e-5)
        assert [square[tuple(p)].item() for p in points] == pytest.approx(want["samples"], abs=1e-5)


@pytest.mark.parametrize("name", ["pinpoints_200", "pinpoints_5", "range_string"])
def test_every_recorded_grid(name):
    all_grids = stored("grids.json")
    side, part = all_grids["tile"], all_grids[name]
    choices = grids_of(part["image_grid_pinpoints"], side)
    if name == "pinpoints_200":
        assert choices == grid_choices(49)
    for entry in part["entries"]:
        width, height = entry["size"]
        grid = choose_grid(width, height, side, 49, None if name == "pinpoints_200" else choices)
        size, corner = place_image(width, height, side, *grid)
        tokens = token_count(*grid, grid=side, patch=side // all_grids["patches_per_side"], pool=all_grids["pool"])
        assert (list(grid), list(size), list(corner), tokens) == tuple(
            entry[k] for k in ("grid", "resized", "offset", "n_visual_tokens")
        ), entry["size"]
        assert [grid[0] * side, grid[1] * side] == entry["canvas"] and grid[0] * grid[1] + 1 == entry[
            "n_tiles_with_thumbnail"
        ]


def picture_cases():
    return [(c, i) for c in cases("cases.json", lambda c: True) for i in c.get("images", []) if "grid" in i]


@pytest.mark.parametrize(
    "case, image", [pytest.param(c, i, id=f"{c['id']}-{Path(i['file']).stem}") for c, i in picture_cases()]
)
def test_squares_of_recorded_pictures(case, image):
    side = SIDE[case["checkpoint"]]
    pinpoints = case.get("config_overrides", {}).get("image_grid_pinpoints")
    grids = pinpoints and grids_of(json.loads(pinpoints.replace("(", "[").replace(")", "]")), side)
    picture = Image.open(PARITY / image["file"]).convert("RGB")
    tiles = tile_image(picture, side, thumbnail=True, grids=grids)
    values = normalize(tiles.pixels)
    assert [tiles.columns, tiles.rows] == image["grid"] and len(tiles.pixels) == image["n_tiles_with_thumbnail"]
    assert_stats(values, image["tile_stats"], stored("cases.json")["probe_points_by_tile"][str(side)])
    if "pixel_values" in image:
        want = load_file(PARITY / "image_cases.safetensors")[image["pixel_values"]]
        torch.testing.assert_close(values, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c["id"]) for c in cases("cases.json", lambda c: c["id"].startswith("pad_single"))]
)
def test_padded_single_squares(case):
    image = case["images"][0]
    values = normalize(
        fit_frames(np.asarray(Image.open(PARITY / image["file"]).convert("RGB"))[None], SIDE[case["checkpoint"]], "pad")
    )
    assert_stats(values, image["tile_stats"], stored("cases.json")["probe_points_by_tile"]["28"])
    if "pixel_values" in image:
        want = load_file(PARITY / "image_cases.safetensors")[image["pixel_values"]]
        torch.testing.assert_close(values[0], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c["id"]) for c in cases("video_cases.json", lambda c: "frame_stats" in c)]
)
def test_both_video_front_ends(case):
    side = SIDE[case["checkpoint"]]
    how = {"clip_center_crop": "crop", "pad_to_square_mean_colour": "pad"}[case["front_end"]]
    frames = np.stack([np.asarray(Image.open(PARITY / f).convert("RGB")) for f in case["frames"]])
    values = normalize(fit_frames(frames, side, how))
    assert_stats(values, case["frame_stats"], stored("video_cases.json")["probe_points_by_tile"][str(side)])
    if "pixel_values" in case["tensors"]:
        want = load_file(PARITY / "video_cases.safetensors")[case["tensors"]["pixel_values"]]
        torch.testing.assert_close(values, want, atol=1e-5, rtol=0)


def test_parity_cases_are_not_empty():
    most = (15, 7) if PARITY == WHOLE else (11, 5)
    found = (len(picture_cases()), len(cases("video_cases.json", lambda c: "frame_stats" in c)))
    assert found[0] >= most[0] and found[1] >= most[1], found


@pytest.mark.parametrize(
    "size, grid",
    [
        ((100, 100), (1, 2)),
        ((336, 336), (1, 2)),
        ((640, 480), (2, 2)),
        ((1024, 768), (4, 3)),
        ((1280, 720), (4, 3)),
        ((1920, 1080), (6, 4)),
        ((2352, 2352), (7, 7)),
        ((3840, 2160), (9, 5)),
        ((4000, 3000), (8, 6)),
    ],
)
def test_known_grids_without_any_data(size, grid):
    assert choose_grid(*size) == grid
    assert choose_grid(np.int64(size[0]), np.int32(size[1])) == grid  # sizes often come out of arrays


@pytest.mark.parametrize("columns, rows", [(1, 2), (3, 2), (7, 7), (1, 1)])
def test_orders_hold_every_token_once(columns, rows):
    G, T, D = columns * rows, 9, 5
    features = torch.randn(1 + G, T, D)
    for tokens, inside in [
        (unires_tokens(features[1:], columns, rows), features[1:]),
        (anyres_tokens(features, columns, rows), features),
    ]:
        flat = inside.reshape(-1, D)
        assert tokens.shape == flat.shape
        assert torch.equal(tokens[tokens[:, 0].argsort()], flat[flat[:, 0].argsort()])
    # the raster, written the slow way
    slow = [features[0]] + [
        features[1 + r * columns + c, y * 3 : (y + 1) * 3]
        for r in range(rows)
        for y in range(3)
        for c in range(columns)
    ]
    assert torch.equal(anyres_tokens(features, columns, rows), torch.cat(slow))
    assert (
        token_order(columns, rows, 3)[0, 0] == 0 and token_order(columns, rows, 3, "anyres")[-1, -1] == (1 + G) * T - 1
    )


def test_orders_keep_gradients_and_types():
    features = torch.randn(5, 4, 3, dtype=torch.bfloat16, requires_grad=True)
    out = anyres_tokens(features, 2, 2)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and torch.equal(features.grad, torch.ones_like(features))


def test_extreme_pictures_have_squares():
    for size in [(1, 1), (1, 5000), (5000, 1), (3, 2), (28, 28)]:
        tiles = tile_image(Image.new("RGB", size, (10, 200, 30)), 28, thumbnail=True)
        assert tiles.pixels.shape == (1 + tiles.columns * tiles.rows, 28, 28, 3) and tiles.pixels.dtype == np.uint8
    for size in [(1, 500), (500, 1), (1, 1)]:
        for how in ("crop", "pad", "resize"):
            assert fit_frames(np.zeros((1, size[1], size[0], 3), np.uint8), 28, how).shape == (1, 28, 28, 3)


def test_no_warning_about_arrays_that_cannot_be_written(recwarn):
    for size in [(1, 1), (1, 2), (30, 60)]:
        tiles = tile_image(Image.new("RGB", size, (10, 200, 30)), 28)
        normalize(tiles.pixels)
        assert tiles.pixels.flags.writeable
    seen = np.asarray(Image.new("RGB", (4, 4), (9, 8, 7)))  # Pillow lends its memory for reading only
    assert torch.equal(normalize(seen), normalize(seen.copy())) and torch.equal(normalize(seen[::-1]), normalize(seen))
    assert not recwarn.list, [str(w.message) for w in recwarn.list]


def test_array_and_picture_give_the_same():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8))
    assert np.array_equal(tile_image(picture, 28).pixels, tile_image(np.asarray(picture), 28).pixels)
    before = np.asarray(picture).copy()
    fit_image(picture, 28, 2, 2)
    assert np.array_equal(before, np.asarray(picture))


BAD = [
    (choose_grid, (0, 5)),
    (choose_grid, (5, -1)),
    (choose_grid, (5, 5, 0)),
    (choose_grid, (5, 5, 336, 0)),
    (choose_grid, (5, 5, 336, 1)),
    (choose_grid, (5.5, 5)),
    (choose_grid, (5, 5, 336, 49, [])),
    (place_image, (5, 5, 28, 0, 1)),
    (tile_image, (Image.new("L", (5, 5)),)),
    (tile_image, (Image.new("RGBA", (5, 5)),)),
    (tile_image, (Image.new("RGB", (0, 5)),)),
    (tile_image, (np.zeros((5, 5, 3)),)),
    (tile_image, (np.zeros((0, 5, 3), np.uint8),)),
    (tile_image, (None,)),
    (tile_image, (Image.new("RGB", (5, 5)), -3)),
    (fit_frames, (np.zeros((5, 5, 3), np.uint8),)),
    (fit_frames, (np.zeros((0, 5, 5, 3), np.uint8),)),
    (fit_frames, (np.zeros((1, 5, 5, 3)),)),
    (fit_frames, (np.zeros((1, 5, 5, 3), np.uint8), 0)),
    (fit_frames, (np.zeros((1, 5, 5, 3), np.uint8), 28, "zoom")),
    (normalize, (np.zeros((5, 5, 3)),)),
    (normalize, (np.zeros((3, 5, 5), np.uint8),)),
    (unires_tokens, (torch.zeros(3, 4, 5), 2, 2)),
    (anyres_tokens, (torch.zeros(4, 4, 5), 2, 2)),
    (anyres_tokens, (torch.zeros(5, 3, 5), 2, 2)),
    (token_count, (0, 1)),
    (token_count, (1, 1, 336, 14, 2, "other")),
    (token_order, (1, 1, 2, "x")),
    (token_order, (0, 1, 2)),
    (token_order, (1, "1", 2)),
    (token_order, (1, 1, 0)),
]


@pytest.mark.parametrize("call, args", BAD, ids=[f"{c.__name__}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_is_one_sentence(call, args):
    with pytest.raises(ValueError) as error:
        call(*args)
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and 20 < len(text) < 250


@pytest.mark.parametrize("size", [(3000, 20), (20, 3000), (401, 100), (100, 401), (1999, 1), (3, 777)])
def test_thin_pictures_are_fitted_as_before(size):
    "By what was done until now: resize all, then cut; and build the whole square, then resize."
    width, height = size
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    image = Image.fromarray(ramp)
    scaled = image.resize(tuple(int(56 * side / min(size)) for side in size), Image.Resampling.BICUBIC)
    x, y = ((side - 56) // 2 for side in scaled.size)
    want = np.asarray(scaled.crop((x, y, x + 56, y + 56))).astype(int)
    assert np.abs(fit_frames(ramp[None], 56, "crop")[0] - want).max() <= 2
    square = Image.new("RGB", (max(size),) * 2, PAD_COLOUR)
    square.paste(image, tuple((max(size) - side) // 2 for side in size))
    want = np.asarray(square.resize((56, 56), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(fit_frames(ramp[None], 56, "pad")[0] - want).max() <= 2


@pytest.mark.parametrize("how", ["crop", "pad", "resize"])
@pytest.mark.parametrize("size", [(60000, 2), (2, 60000)])
def test_thin_pictures_take_little_memory(how, size):
    code = (
        "import resource, sys, numpy as np\n"
        "from longva.vision.unires import fit_frames\n"
        f"frames = np.zeros((1, {size[1]}, {size[0]}, 3), np.uint8)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"assert fit_frames(frames, 336, {how!r}).shape == (1, 336, 336, 3)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 250 << 10  # KiB; the square would be 10 GB
