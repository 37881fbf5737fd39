"""Models that are built in pieces, one on each rank: the same weights, read once, and refusals on all ranks."""

import pytest
import torch
import train_toy as toy
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

from longva.model.open import LANGUAGE, open_model, open_start
from longva.testing import word_tokenizer
from longva.train.engines import gathered, sharded
from longva.train.ranks import find_ranks
from longva.train.recipe import Recipe
from longva.train.run import weights_hash


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A language model and a vision tower in folders."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("parts")
    toy.tiny().save_pretrained(folder / "language")
    word_tokenizer(["a", "<image>", "<video>"]).save_pretrained(folder / "language")
    config = open_model("mini-short", device="cpu").config.vision_config
    CLIPVisionModel(config).save_pretrained(folder / "tower")
    return folder


def opened(folder, kind, dtype):
    if kind == "language":
        return open_model(folder / "language", kinds=(LANGUAGE,), device="cpu", dtype=dtype)
    if kind == "longva":
        return open_start("mini-short", dtype=dtype)[0]
    return open_start(None, None, (folder / "language", folder / "tower"), dtype, seed=5)[0]


def same_in_pieces(out, settings):
    """Open models whole and in pieces."""
    recipe = Recipe(steps=1, rows=6, engine="deepspeed", precision=settings["precision"])
    ranks = find_ranks(recipe)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    for kind in ("language", "longva", "joined"):
        whole = opened(settings["parts"], kind, dtype)
        with sharded(recipe, ranks):
            pieces = opened(settings["parts"], kind, dtype)
        here = sum(p.numel() + p.ds_tensor.numel() for p in pieces.parameters())
        assert here < 1.02 * whole.num_parameters() / ranks.world, (kind, here)
        assert_same(dict(whole.named_parameters()), dict(pieces.named_parameters()))
        assert_same(dict(whole.named_buffers()), dict(pieces.named_buffers()))
        assert weights_hash(whole) == weights_hash(pieces, ranks)


def assert_same(tensors, others):
    assert list(tensors) == list(others)
    for name, tensor in tensors.items():
        with gathered(others[name]):
            assert tensor.dtype == others[name].dtype, name
            assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("precision, world", [("fp32", 3), ("bf16", 2)])
def test_models_in_pieces_have_the_same_weights(parts, tmp_path, precision, world):
    """A language model, a LongVA, and one that is joined with a fresh projector; also numbers that 3 doesn't divide."""
    settings = {"body": same_in_pieces, "parts": parts, "precision": precision}
    for code, error in toy.wait(toy.start(tmp_path / "run", world, **settings)):
        assert code == 0, error[-3000:]


def extend_it(out, settings):
    from longva.train.extend import extend

    extend(
        "mini",
        settings["text"],
        out,
        model=settings["model"],
        length=32,
        steps=2,
        engine="deepspeed",
        corpus={"min_upsample": 16, "separator": 1},
    )


def test_a_misshapen_weight_is_one_sentence_on_all_ranks(parts, tmp_path):
    """Only the first rank reads the weights, and all hear of it."""
    model = tmp_path / "model"
    toy.tiny().save_pretrained(model)
    word_tokenizer(["a", "b"]).save_pretrained(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text"
    text.mkdir()
    for i in range(9):
        (text / f"{i}.txt").write_text("a b b a " * 50)
    for code, error in toy.wait(toy.start(tmp_path / "run", 2, body=extend_it, text=text, model=model)):
        assert code == 1 and "cannot be loaded" in error.strip().splitlines()[-1], error[-2000:]
