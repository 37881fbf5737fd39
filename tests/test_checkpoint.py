"""Checkpoints in the original's format, from folders that these tests write themselves, tensor by tensor; other
processes; two ranks."""

import json
import math
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from longva import CheckpointError, LongVA, LongVAConfig, LongVAProcessor, load_original, save_original
from longva.context.parallel import context_parallel, current_context, shard_batch, unshard
from longva.context.rope_report import rope_report
from longva.mini import folder as mini_folder
from longva.mini import load as load_mini
from longva.model.weights import weight_files

D, KV, FFN, V, C, S, P = 64, 32, 96, 160, 32, 28, 7
TOWER = dict(
    hidden_size=C,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=S,
    patch_size=P,
    projection_dim=C,
)
RAW = dict(
    architectures=["LlavaQwenForCausalLM"],
    model_type="llava_qwen",
    torch_dtype="bfloat16",
    attention_dropout=0.0,
    hidden_act="silu",
    vocab_size=V,
    hidden_size=D,
    intermediate_size=FFN,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.02,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1e9,
    rope_scaling=None,
    sliding_window=131072,
    use_sliding_window=False,
    max_window_layers=28,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
    use_cache=True,
    transformers_version="4.40.0.dev0",
    mm_vision_tower="openai/clip-tiny",
    mm_hidden_size=C,
    mm_projector_type="mlp2x_gelu",
    use_mm_proj=True,
    mm_vision_select_layer=-2,
    mm_vision_select_feature="patch",
    mm_patch_merge_type="unires",
    mm_resampler_type=None,
    mm_spatial_pool_stride=2,
    mm_spatial_pool_mode="average",
    mm_use_im_start_end=False,
    mm_use_im_patch_token=False,
    image_aspect_ratio="anyres",
    tokenizer_padding_side="right",
    tokenizer_model_max_length=32768,
    image_grid_pinpoints=[[S * c, S * r] for c in range(1, 50) for r in range(1, 50) if 1 < c * r <= 49],
)


def tensors(tied=False, dtype=torch.bfloat16):
    """An original state dict, written down from the names."""
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)} | (
        {} if tied else {"lm_head.weight": (V, D)}
    )
    for i in range(2):
        at = f"model.layers.{i}."
        for name, out in (("q", D), ("k", KV), ("v", KV)):
            shapes |= {f"{at}self_attn.{name}_proj.weight": (out, D), f"{at}self_attn.{name}_proj.bias": (out,)}
        shapes |= {
            f"{at}self_attn.o_proj.weight": (D, D),
            f"{at}mlp.gate_proj.weight": (FFN, D),
            f"{at}mlp.up_proj.weight": (FFN, D),
            f"{at}mlp.down_proj.weight": (D, FFN),
        }
        shapes |= {f"{at}input_layernorm.weight": (D,), f"{at}post_attention_layernorm.weight": (D,)}
    shapes |= {
        "model.mm_projector.0.weight": (D, C),
        "model.mm_projector.0.bias": (D,),
        "model.mm_projector.2.weight": (D, D),
        "model.mm_projector.2.bias": (D,),
    }
    at = "model.vision_tower.vision_tower.vision_model."
    shapes |= {
        f"{at}embeddings.class_embedding": (C,),
        f"{at}embeddings.patch_embedding.weight": (C, 3, P, P),
        f"{at}embeddings.position_embedding.weight": (17, C),
    }
    for name in (
        "pre_layrnorm",
        "post_layernorm",
        *(f"encoder.layers.{i}.layer_norm{j}" for i in range(3) for j in (1, 2)),
    ):
        shapes |= {f"{at}{name}.weight": (C,), f"{at}{name}.bias": (C,)}
    for i in range(3):
        for name, out, into in (
            *((f"self_attn.{n}_proj", C, C) for n in ("q", "k", "v", "out")),
            ("mlp.fc1", 48, C),
            ("mlp.fc2", C, 48),
        ):
            shapes |= {
                f"{at}encoder.layers.{i}.{name}.weight": (out, into),
                f"{at}encoder.layers.{i}.{name}.bias": (out,),
            }
    source = torch.Generator().manual_seed(0)
    return {
        k: (torch.randn(shape, generator=source) * 0.1 + (k.endswith("norm.weight") or "layer_norm" in k)).to(dtype)
        for k, shape in shapes.items()
    }


WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "system",
    "user",
    "assistant",
    *(f"w{i}" for i in range(100)),
]


def tokenizer():
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def write(folder, changes=None, state=None, words=True, tower=True):
    """An original folder. The tower's folder beside it has other weights, as the hub's CLIP has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (RAW | (changes or {})).items() if v != "absent"}))
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=2, pad_token_id=0, do_sample=False)))
    save_file(tensors() if state is None else state, folder / "model.safetensors", {"format": "pt"})
    if words:
        tokenizer().save_pretrained(folder)
    if tower:
        torch.manual_seed(7)
        CLIPVisionModel(CLIPVisionConfig(**TOWER)).save_pretrained(folder.parent / "openai" / "clip-tiny")
        (folder.parent / "openai" / "clip-tiny" / "preprocessor_config.json").write_text(
            json.dumps(dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]))
        )
    return folder


@pytest.fixture
def original(tmp_path):
    return write(tmp_path / "model")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("something went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def refused(call, *words, error=CheckpointError):
    with pytest.raises(error) as raised:
        call()
    text = str(raised.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 600, text
    assert all(word in text for word in words), text
    return text


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a
    )


def film(n=3):
    return np.random.default_rng(0).integers(0, 256, (n, 20, 31, 3), dtype=np.uint8)


# ---- reading


def test_every_tensor_and_no_network(original, no_network):
    for model in (
        LongVA.from_pretrained(original),
        load_original(original),
        load_original(str(original), device_map="cpu"),
    ):
        assert same(dict(model.state_dict()), tensors()) and model.dtype == torch.bfloat16
        assert model.generation_config.pad_token_id == 0
    assert load_original(original, dtype=torch.float32).dtype == torch.float32
    assert (
        load_original(original, dtype="auto").dtype
        == LongVA.from_pretrained(original, torch_dtype="auto").dtype
        == torch.bfloat16
    )
    assert load_original(original, dtype=torch.float16).dtype == torch.float16  # whoever asks for it gets it
    model, info = LongVA.from_pretrained(original, output_loading_info=True, max_grids=4, low_cpu_mem_usage=True)
    assert not any(info.values()) and model.config.max_grids == 4
    with pytest.raises(TypeError, match="no_such_setting"):
        LongVA.from_pretrained(original, no_such_setting=1)
    assert LongVA.from_pretrained(original, attn_implementation="eager").model.config._attn_implementation == "eager"
    processor = LongVAProcessor.from_pretrained(original)
    assert processor.image_processor.image_mean == [0.4, 0.5, 0.6] and processor.image_processor.image_std == [
        0.2,
        0.3,
        0.25,
    ]
    assert (
        (processor.image_token_id, processor.video_token_id)
        == (model.config.image_token_id, model.config.video_token_id)
        == (len(WORDS), len(WORDS) + 1)
    )
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]}], add_generation_prompt=True
    )
    assert (
        prompt
        == "<|im_start|>system\nYou are a helpful"
        " assistant.<|im_end|>\n<|im_start|>user\n<image>\nw1<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_known_clip_needs_nothing_at_all(tmp_path, no_network):
    from longva.model.original import translate_config

    raw = RAW | dict(mm_vision_tower="openai/clip-vit-large-patch14-336", image_grid_pinpoints=[[336, 672], [672, 336]])
    vision = LongVAConfig(**translate_config(raw)).vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 24, 336, 14)


def test_the_tower_folder_is_found(tmp_path):
    inside = write(tmp_path / "a" / "model", dict(mm_vision_tower="/their/cluster/clip-tiny"), tower=False)
    refused(lambda: LongVA.from_pretrained(inside), "clip-tiny", "config.json")
    CLIPModel(
        CLIPConfig(
            vision_config=TOWER,
            text_config=dict(
                hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
            ),
        )
    ).config.save_pretrained(inside / "clip-tiny")
    model = LongVA.from_pretrained(inside)  # a CLIP with its text half; only its shape counts
    assert same(dict(model.state_dict()), tensors()) and str(tmp_path) not in json.dumps(
        model.config.to_dict()["vision_config"]
    )


@pytest.mark.parametrize(
    "changes, fields",
    [
        (
            dict(mm_spatial_pool_stride="absent", mm_spatial_pool_mode="absent"),
            dict(pool_stride=2, pool_mode="average", image_pool=(2, "average")),
        ),
        (dict(mm_spatial_pool_stride=None, mm_spatial_pool_mode=None), dict(pool_stride=2, pool_mode="average")),
        (
            dict(mm_spatial_pool_stride=4, mm_spatial_pool_mode="max"),
            dict(pool_stride=4, pool_mode="max", image_pool=(2, "average")),
        ),
        (
            dict(mm_resampler_type="spatial_pool", mm_spatial_pool_out_channels=C),
            dict(pool_stride=2, image_pool=(2, "average")),
        ),
        (dict(image_aspect_ratio="pad"), dict(image_fit="pad", pool_stride=2, image_pool=(1, "average"))),
        (dict(image_aspect_ratio="pad", mm_patch_merge_type="flat"), dict(image_fit="pad", image_pool=(1, "average"))),
        (
            dict(image_aspect_ratio="square", mm_patch_merge_type="flat", image_grid_pinpoints="absent"),
            dict(image_fit="crop", image_pool=(1, "average")),
        ),
        (dict(mm_vision_select_layer=-1), dict(vision_feature_layer=-1)),
        (
            dict(image_grid_pinpoints="[(28, 56), (56, 28), (56, 56), (84, 28), (28, 84)]"),
            dict(grids=[[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]),
        ),
        (dict(image_grid_pinpoints="(1x1),...,(3x3)"), dict(grids=[[i, j] for i in (1, 2, 3) for j in (1, 2, 3)])),
        (
            dict(image_grid_pinpoints=[[28 * c, 28 * r] for c in range(1, 10) for r in range(1, 10) if 1 < c * r <= 9]),
            dict(grids=None, max_grids=9),
        ),
        (dict(model_type="qwen2"), dict(pool_stride=2)),
        (dict(torch_dtype="float16"), dict(dtype=torch.bfloat16)),
    ],
)
def test_settings_as_the_original_treats_them(tmp_path, changes, fields):
    folder = write(tmp_path / "model", changes)
    model = LongVA.from_pretrained(folder)
    assert {k: getattr(model.config, k) for k in fields} == fields
    assert model.config.text_config.rope_parameters == dict(rope_type="default", rope_theta=1e9)
    processor = LongVAProcessor.from_pretrained(folder)
    batch = processor(text="w1 <image> w2 <video>", images=Image.new("RGB", (90, 50)), videos=film())
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    stride, _ = model.config.image_pool
    grids = int(batch["image_layouts"].prod())
    assert (batch["input_ids"] == model.config.image_token_id).sum() == grids * (4 // stride) ** 2
    save_original(model, tmp_path / "back")
    again = LongVA.from_pretrained(tmp_path / "back").config
    assert {k: getattr(again, k) for k in fields} == fields


def turning(kind, width=D // 4, base=1e9, factor=4.0, trained=16):
    """The angle per position of every pair, by the papers' formulas; a short call."""
    plain = [base ** (-2 * i / width) for i in range(width // 2)]
    if kind == "linear":
        return [f / factor for f in plain]
    if kind != "yarn":
        return plain
    low, high = (width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
    ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(width // 2)]
    return [f / factor * r + f * (1 - r) for f, r in zip(plain, ramp)]


YARN = dict(factor=4.0, original_max_position_embeddings=16)
SCALINGS = [("linear", dict(factor=4.0)), ("dynamic", dict(factor=4.0)), ("yarn", YARN)]


@pytest.mark.parametrize("name", ["type", "rope_type"])
@pytest.mark.parametrize("kind, details", SCALINGS)
@pytest.mark.parametrize("where", ["original", "top", "text_config", "given"])
def test_a_rope_scaling_is_in_force(tmp_path, where, kind, details, name):
    """Wherever it stands, and with the base beside it: transformers would let it replace the base, or overlook it."""
    scaling = {name: kind} | details
    if where == "original":
        folder = write(tmp_path / "model", dict(rope_scaling=scaling))
        model = LongVA.from_pretrained(folder)
    else:
        folder = tmp_path / "ours"
        LongVA.from_pretrained(write(tmp_path / "model")).save_pretrained(folder)
        file = folder / "config.json"
        raw = json.loads(file.read_text())
        if where != "given":
            (raw if where == "top" else raw["text_config"])["rope_scaling"] = scaling
            file.write_text(json.dumps(raw))
        model = LongVA.from_pretrained(folder, **(dict(rope_scaling=scaling) if where == "given" else {}))
    live = model.model.rotary_emb
    assert live.rope_type == kind and model.config.text_config.rope_parameters["rope_theta"] == 1e9
    torch.testing.assert_close(live.inv_freq, torch.tensor(turning(kind)), rtol=1e-5, atol=0)
    assert abs(live.attention_scaling - (0.1 * math.log(4) + 1 if kind == "yarn" else 1)) < 1e-6
    assert rope_report(model, logits=False).theta is None or kind != "yarn"
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(LongVA.from_pretrained(tmp_path / "again").model.rotary_emb.inv_freq, live.inv_freq)


BAD_ROPE = [
    (dict(rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3])), "of type 'mrope'"),
    (dict(rope_scaling=dict(type="default", mrope_section=[2, 3, 3])), "mrope_section"),
    (dict(rope_scaling=dict(type="linear", factor="2.0")), "'2.0', which must be a number"),
    (dict(rope_scaling=dict(type="yarn", factor=True)), "must be a number"),
    (dict(rope_scaling=dict(type="linear", factor=float("nan"))), "must be a number"),
    (dict(rope_scaling=dict(type="linear")), "has no factor"),
    (dict(rope_scaling=dict(type="linear", rope_type="yarn", factor=2.0)), "another type than rope_type"),
    (dict(rope_scaling=dict(type="dynamic", factor=2.0, alpha=8.0)), "alpha"),
    (dict(rope_scaling="yarn"), "'yarn', and must be an object"),
    (dict(rope_theta="1e6"), "'1e6', which must be a number"),
    (dict(rope_theta=1), "above 1"),
    (dict(rope_type="yarn"), "rope_type = yarn"),
    (dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), "full_attention"),
]


@pytest.mark.parametrize("change, words", BAD_ROPE)
def test_a_rope_that_is_not_built_is_named(tmp_path, change, words):
    folder = write(tmp_path / "model", change)
    refused(lambda: LongVA.from_pretrained(folder), words)
    LongVA.from_pretrained(write(tmp_path / "fine" / "model")).save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | change))
    refused(lambda: LongVA.from_pretrained(tmp_path / "ours"), words, error=ValueError)
    file.write_text(json.dumps(raw))
    if "rope_type" not in change:
        refused(lambda: LongVA.from_pretrained(tmp_path / "ours", **change), words, error=ValueError)


def test_rope_settings_that_are_given(original, tmp_path):
    """A base alone is the base alone; what is given counts more than the file; two that differ are refused."""
    model = LongVA.from_pretrained(original, rope_theta=1e6, max_position_embeddings=77)
    assert model.config.text_config.rope_parameters == dict(rope_type="default", rope_theta=1e6)
    assert model.config.text_config.max_position_embeddings == 77
    assert abs(model.model.rotary_emb.inv_freq[-1] - 1e6 ** (-14 / 16)) < 1e-12
    text = dict(rope_scaling=dict(type="linear", factor=2.0))
    model = LongVA.from_pretrained(original, text_config=text)
    assert model.config.text_config.rope_parameters == dict(rope_type="linear", factor=2.0, rope_theta=1e9)
    model.save_pretrained(tmp_path / "ours")
    again = LongVA.from_pretrained(tmp_path / "ours", rope_theta=1e7).config.text_config.rope_parameters
    assert again == dict(rope_type="linear", factor=2.0, rope_theta=1e7)
    beside = dict(config=model.config, rope_theta=1e6)
    refused(lambda: LongVA.from_pretrained(original, **beside), "rope_theta came", error=ValueError)
    refused(lambda: LongVAConfig(text_config=dict(rope_theta=1e9), rope_theta=1e6), "said twice", error=ValueError)
    refused(lambda: LongVAConfig(text_config=Qwen2Config(), max_position_embeddings=7), "said twice", error=ValueError)


def test_a_qwen2_in_both_spellings_keeps_its_base(tmp_path):
    """transformers reads rope_scaling alone, and takes 10,000 for the base of rope_parameters."""
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=V, hidden_size=D, intermediate_size=FFN, num_hidden_layers=1,
                                        num_attention_heads=4, num_key_value_heads=2))
    qwen.save_pretrained(tmp_path / "qwen")
    file = tmp_path / "qwen" / "config.json"
    new = dict(rope_parameters=dict(rope_type="default", rope_theta=1e9), rope_scaling=dict(type="linear", factor=4.0))
    file.write_text(json.dumps(json.loads(file.read_text()) | new))
    tower = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    made = LongVA.from_parts(tmp_path / "qwen", tower)
    torch.testing.assert_close(made.model.rotary_emb.inv_freq, torch.tensor(turning("linear")), rtol=1e-5, atol=0)
    again = LongVA.from_parts(tmp_path / "qwen", tower, rope_theta=1e6)
    assert again.config.text_config.rope_parameters == dict(rope_type="linear", factor=4.0, rope_theta=1e6)


def test_images_have_their_own_pool(tmp_path):
    """Frames by the configured pool, grids of an image by a fixed 2x2 average, a single square not at all."""
    model = LongVA.from_pretrained(
        write(tmp_path / "a" / "model", dict(mm_spatial_pool_stride=4, mm_spatial_pool_mode="max")), dtype=torch.float32
    )
    pixels = torch.randn(2, 3, S, S, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        patches = model.model.patch_features(pixels).unflatten(1, (4, 4))
        torch.testing.assert_close(model.encode_frames(pixels)[:, 0], patches.amax((1, 2)))
        torch.testing.assert_close(
            model.encode_image(pixels, 2, 1),
            torch.stack(
                [patches[g, i : i + 2, j : j + 2].mean((0, 1)) for g in (0, 1) for i in (0, 2) for j in (0, 2)]
            ),
        )
        single = LongVA.from_pretrained(
            write(tmp_path / "b" / "model", dict(image_aspect_ratio="pad")), dtype=torch.float32
        )
        torch.testing.assert_close(single.encode_image(pixels[:1], 1, 1), patches[0].flatten(0, 1))


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(mm_projector_type="linear"), "linear"),
        (dict(mm_projector_type="absent"), "mm_projector_type"),
        (dict(mm_resampler_type="qformer"), "qformer"),
        (dict(mm_patch_merge_type="spatial_unpad"), "spatial_unpad"),
        (dict(image_aspect_ratio="highres"), "highres"),
        (dict(mm_vision_select_feature="cls_patch"), "cls_patch"),
        (dict(s2=True), "s2"),
        (dict(mm_use_im_start_end=True), "mm_use_im_start_end"),
        (dict(mm_vision_tower=None), "mm_vision_tower"),
        (dict(mm_patch_merge_type="flat"), "flat"),
        (dict(image_grid_pinpoints="absent"), "image_grid_pinpoints"),
        (dict(image_grid_pinpoints=[[30, 56]]), "multiples of 28"),
        (dict(image_grid_pinpoints="[]"), "image_grid_pinpoints"),
        (dict(image_grid_pinpoints="(1xa)"), "image_grid_pinpoints"),
    ],
)
def test_settings_that_are_not_built_are_named(tmp_path, changes, word):
    folder = write(tmp_path / "model", changes)
    refused(lambda: LongVA.from_pretrained(folder), word)


def test_the_vocabulary_keeps_its_size(original):
    assert LongVA.from_pretrained(original).get_input_embeddings().weight.shape == (V, D)
    rows = {
        k: v[: len(WORDS)] if k in ("model.embed_tokens.weight", "lm_head.weight") else v for k, v in tensors().items()
    }
    tight = write(
        original.parent / "tight", dict(vocab_size=len(WORDS)), rows
    )  # no row is left for a placeholder, and none is needed
    model, processor = LongVA.from_pretrained(tight), LongVAProcessor.from_pretrained(tight)
    assert model.lm_head.weight.shape == (len(WORDS), D) and model.config.video_token_id == len(WORDS) + 1
    reply = model.generate(**processor(text="w1 <video> w2", videos=film()), max_new_tokens=3)
    assert reply[0, 1:13].eq(len(WORDS) + 1).all()


def test_without_a_tokenizer(tmp_path):
    folder = write(tmp_path / "model", words=False)
    assert (
        LongVA.from_pretrained(folder).config.image_token_id,
        LongVA.from_pretrained(folder).config.video_token_id,
    ) == (-200, -201)
    refused(lambda: LongVAProcessor.from_pretrained(folder), "tokenizer")


def test_qwen2s_own_tokenizer_from_its_slow_files(tmp_path):
    """vocab.json and merges.txt, as the original wants them: bytes, and ChatML's words as added tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = write(
        tmp_path / "model",
        dict(vocab_size=300),
        {k: v for k, v in tensors().items()}
        | {k: torch.zeros(300, D, dtype=torch.bfloat16) for k in ("model.embed_tokens.weight", "lm_head.weight")},
        words=False,
    )
    letters = list(bytes_to_unicode().values())
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {
        str(256 + i): dict(content=c, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
        for i, c in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    }
    text_only = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{%"
        " endfor %}"
    )
    settings = dict(
        tokenizer_class="Qwen2Tokenizer",
        added_tokens_decoder=added,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token=None,
        chat_template=text_only,
        model_max_length=32768,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model, processor = LongVA.from_pretrained(folder), LongVAProcessor.from_pretrained(folder)
    assert (
        (model.config.image_token_id, model.config.video_token_id)
        == (processor.image_token_id, processor.video_token_id)
        == (259, 260)
    )
    talk = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (28, 56))}, {"type": "text", "text": "hi"}],
        }
    ]
    batch = processor.apply_chat_template(talk, tokenize=True, return_dict=True, add_generation_prompt=True)
    letter = {chr(b): letters.index(u) for b, u in bytes_to_unicode().items()}

    def ids(text):
        return [letter[c] for c in text]

    right = [
        257,
        *ids("system\nYou are a helpful assistant."),
        258,
        *ids("\n"),
        257,
        *ids("user\n"),
        *[259] * 8,
        *ids("\nhi"),
        258,
        *ids("\n"),
        257,
        *ids("assistant\n"),
    ]
    assert batch["input_ids"][0].tolist() == right
    (folder / "merges.txt").unlink()
    (folder / "vocab.json").write_text("{")
    refused(lambda: LongVAProcessor.from_pretrained(folder), "tokenizer")


def test_a_hub_id_is_fetched_as_a_folder(original, monkeypatch):
    from longva.model import weights

    asked = []

    def snapshot(name, allow_patterns, **options):
        asked.append((name, allow_patterns[-1], options))
        return str(original)

    monkeypatch.setattr(weights, "snapshot_download", snapshot)
    for call in (LongVA.from_pretrained, load_original):
        assert same(dict(call("lmms-lab/LongVA-7B", revision="main", token="t").state_dict()), tensors())
    assert asked == [("lmms-lab/LongVA-7B", "*.safetensors", dict(revision="main", token="t"))] * 2
    torch.save(tensors(), original / "pytorch_model.bin")
    (original / "model.safetensors").unlink()
    LongVA.from_pretrained("lmms-lab/LongVA-7B")
    assert [patterns for _, patterns, _ in asked[2:]] == ["*.safetensors", "*.bin"]


def test_where_the_folder_is(original, monkeypatch):
    monkeypatch.chdir(original)
    for name in (".", "../model", str(original) + "/"):
        assert same(dict(LongVA.from_pretrained(name).state_dict()), tensors())
    Qwen2ForCausalLM(Qwen2Config(**LANGUAGE)).save_pretrained(original / "qwen")
    refused(lambda: LongVA.from_pretrained("qwen"), "qwen is a qwen2", "from_parts")


# ---- tensors that are not right


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("model.norm.weight"), ("missing model.norm.weight",)),
        (
            lambda s: s.pop("model.vision_tower.vision_tower.vision_model.post_layernorm.bias"),
            ("missing", "post_layernorm.bias"),
        ),
        (lambda s: s.update({"model.image_newline": torch.zeros(D)}), ("extra model.image_newline",)),
        (
            lambda s: s.update({"lm_head.weight": torch.zeros(V - 1, D)}),
            ("misshapen lm_head.weight", "[159, 64]", "[160, 64]"),
        ),
        (lambda s: [s.pop(k) for k in list(s) if "vision_tower" in k], ("missing", "more")),
        (
            lambda s: (s.pop("lm_head.weight"), s.update({"lm_head.bias": torch.zeros(V)})),
            ("missing lm_head.weight", "extra lm_head.bias"),
        ),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, words):
    state = tensors()
    change(state)
    folder = write(tmp_path / "model", state=state)
    refused(lambda: LongVA.from_pretrained(folder), *words)
    refused(lambda: load_original(folder), *words)


def test_tensors_that_are_computed_may_be_there(tmp_path):
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    assert same(dict(LongVA.from_pretrained(write(tmp_path / "model", state=tensors() | more)).state_dict()), tensors())


def test_our_own_format_is_checked_as_well(original, tmp_path):
    LongVA.from_pretrained(original).save_pretrained(tmp_path / "ours")
    refused(lambda: load_original(tmp_path / "ours"), "ours", "llava_qwen")
    state = load_file(tmp_path / "ours" / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if k != "model.mm_projector.0.bias"},
        tmp_path / "ours" / "model.safetensors",
        {"format": "pt"},
    )
    refused(lambda: LongVA.from_pretrained(tmp_path / "ours"), "mm_projector.0.bias")
    (tmp_path / "ours" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "ours" / "pytorch_model.bin")
    refused(lambda: LongVA.from_pretrained(tmp_path / "ours"), "no model.safetensors")


def shards(folder, suffix="safetensors"):
    state, stem = tensors(), "model" if suffix == "safetensors" else "pytorch_model"
    names = list(state)
    files = {f"{stem}-0000{i}-of-00002.{suffix}": {k: state[k] for k in names[i - 1 :: 2]} for i in (1, 2)}
    for name, part in files.items():
        save_file(part, folder / name, {"format": "pt"}) if suffix == "safetensors" else torch.save(part, folder / name)
    index = dict(metadata=dict(total_size=1), weight_map={k: name for name, part in files.items() for k in part})
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return list(files)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(original, suffix):
    names = shards(original, suffix)
    assert same(dict(LongVA.from_pretrained(original).state_dict()), tensors())
    index = next(original.glob("*.index.json"))
    kept = index.read_text()
    for wrong in ("{}", '{"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}', '{"weight_map": [1]}'):
        index.write_text(wrong)
        refused(lambda: LongVA.from_pretrained(original), index.name)
    index.write_text(kept)
    (original / names[1]).unlink()
    refused(lambda: LongVA.from_pretrained(original), names[1])


def test_broken_files(original):
    file = original / "model.safetensors"
    whole = file.read_bytes()
    for bytes_ in (
        whole[: len(whole) // 2],
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 15\n",
        b"",
        b"\xff" * 100,
    ):
        file.write_bytes(bytes_)
        refused(lambda: LongVA.from_pretrained(original), "model.safetensors")
    file.unlink()
    refused(lambda: LongVA.from_pretrained(original), "no weights")
    for text in ("{", "[1]", "", "\x00"):
        (original / "config.json").write_text(text)
        refused(lambda: LongVA.from_pretrained(original), "config.json")
    (original / "config.json").unlink()
    refused(lambda: LongVA.from_pretrained(original), "no config.json")
    refused(lambda: LongVA.from_pretrained(original / "nowhere"), "nowhere")
    refused(lambda: LongVA.from_pretrained("nobody/nothing"), "nobody/nothing")


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("it_ran"),)


def test_pickles(original, monkeypatch):
    monkeypatch.chdir(original.parent)
    torch.save({"model.norm.weight": Trap()}, original / "pytorch_model.bin")
    assert same(dict(LongVA.from_pretrained(original).state_dict()), tensors())  # safetensors win
    (original / "model.safetensors").unlink()
    refused(lambda: LongVA.from_pretrained(original), "pytorch_model.bin", "safetensors")
    assert not Path("it_ran").exists()
    torch.save(tensors(), original / "pytorch_model.bin")
    assert same(dict(LongVA.from_pretrained(original).state_dict()), tensors())


# ---- and back


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(tmp_path, tied):
    first = write(tmp_path / "model", dict(tie_word_embeddings=tied), tensors(tied))
    LongVA.from_pretrained(first).save_pretrained(tmp_path / "ours")
    save_original(LongVA.from_pretrained(tmp_path / "ours"), tmp_path / "back", max_shard_size="100KB")
    files = weight_files(tmp_path / "back")
    assert len(files) > 1 and same({k: v for f in files for k, v in load_file(f).items()}, tensors(tied))
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {k: raw[k] for k in RAW} == RAW | dict(tie_word_embeddings=tied)
    tower = load_file(
        tmp_path / "back" / "clip-tiny" / "model.safetensors"
    )  # the tuned one, for code that builds its tower from here
    assert torch.equal(
        tower["vision_model.pre_layrnorm.weight"],
        tensors(tied)["model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"],
    )
    tokenizer().save_pretrained(tmp_path / "back")
    a, b = (
        LongVAProcessor.from_pretrained(f)(text="w1 <image>", images=Image.new("RGB", (70, 40), "teal"))
        for f in (first, tmp_path / "back")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_nothing_half_written(original, tmp_path, monkeypatch):
    model = LongVA.from_pretrained(original)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused(lambda: save_original(model, tmp_path / "full"), "full")
    before = sorted(p.name for p in tmp_path.iterdir())
    model.config.encoding = "anyres"
    refused(lambda: save_original(model, tmp_path / "new"), "anyres")
    model.config.encoding = "unires"
    monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        save_original(model, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_what_the_original_has_no_word_for(original, tmp_path):
    from longva import extend_rope

    model = LongVA.from_pretrained(original)
    extend_rope(model, "yarn", factor=4)
    refused(lambda: save_original(model, tmp_path / "new"), "rope of type yarn")
    model = LongVA.from_pretrained(original)
    extend_rope(model, "base", theta=5e6)
    save_original(model, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["rope_theta"] == 5e6


# ---- other processes, and Hugging Face's doors


@pytest.mark.filterwarnings("ignore:The tokenizer does not know")  # nor need it, here
def test_auto_classes_in_a_fresh_process(original, tmp_path):
    model, processor = LongVA.from_pretrained(original, dtype=torch.float32), LongVAProcessor.from_pretrained(original)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    code = f"""
import torch
from longva import LongVA
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in ({str(tmp_path / "ours")!r}, {str(original)!r}):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model) is LongVA and type(processor).__name__ == "LongVAProcessor"
    image = {{"type": "image", "image": Image.new("RGB", (70, 40), "teal")}}
    talk = [{{"role": "user", "content": [image, {{"type": "text", "text": "w1"}}]}}]
    batch = processor.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        save_file({{"logits": model(**batch).logits}}, folder + "/logits.safetensors")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    talk = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (70, 40), "teal")}, {"type": "text", "text": "w1"}],
        }
    ]
    with torch.no_grad():
        here = model(
            **processor.apply_chat_template(talk, tokenize=True, return_dict=True, add_generation_prompt=True)
        ).logits
    for folder in (tmp_path / "ours", original):
        torch.testing.assert_close(load_file(folder / "logits.safetensors")["logits"], here, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:The tokenizer does not know")  # nor need it, here
def test_the_pipeline(tmp_path):
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=str(mini_folder("mini-longva")))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    said = pipe(images=picture, text="<image> find ball", max_new_tokens=3, return_full_text=False)
    talk = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture},
                {"type": "video", "video": film()},
                {"type": "text", "text": "find ball"},
            ],
        }
    ]
    talked = pipe(text=talk, max_new_tokens=3, return_full_text=False)
    batch = pipe.processor.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    reply = pipe.model.generate(**batch, max_new_tokens=3)[0, batch["input_ids"].shape[1] :]
    model, processor = load_mini("mini-longva")
    assert (
        pipeline("image-text-to-text", model=model, processor=processor)(
            text=talk, max_new_tokens=3, return_full_text=False
        )
        == talked
    )
    assert (
        isinstance(said[0]["generated_text"], str)
        and talked[0]["generated_text"].split() == pipe.processor.decode(reply, skip_special_tokens=True).split()
    )


# ---- parts

LANGUAGE = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=FFN,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters=dict(rope_type="default", rope_theta=1e9),
)
HALF = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
SIGLIP = {k: v for k, v in TOWER.items() if k != "projection_dim"}


def tower_models():
    yield CLIPVisionModel(CLIPVisionConfig(**TOWER))
    yield CLIPModel(CLIPConfig(vision_config=TOWER, text_config=HALF))
    yield SiglipVisionModel(SiglipVisionConfig(**SIGLIP))
    yield SiglipModel(SiglipConfig(vision_config=SIGLIP, text_config=HALF))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("live", [False, True])
def test_from_parts(tmp_path, tied, which, live):
    torch.manual_seed(0)
    qwen = Qwen2ForCausalLM(Qwen2Config(**LANGUAGE, tie_word_embeddings=tied))
    tower = list(tower_models())[which].eval()
    qwen.generation_config.max_new_tokens = 17
    if live:
        parts = qwen, tower
    else:
        parts = tmp_path / "qwen", tmp_path / "tower"
        qwen.save_pretrained(parts[0]), tower.save_pretrained(parts[1]), tokenizer().save_pretrained(parts[0])
    torch.manual_seed(1)
    model = LongVA.from_parts(*parts, tokenizer=tokenizer() if live else None, max_grids=9)
    assert (model.config.image_token_id, model.config.max_grids, model.generation_config.max_new_tokens) == (
        len(WORDS),
        9,
        17,
    )
    ours = model.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in qwen.state_dict().items())
    vision = getattr(tower, "vision_model", tower)
    pixels = torch.randn(2, 3, S, S)
    with torch.no_grad():
        right = vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1 if which < 2 else 0 :]
        torch.testing.assert_close(model.model.patch_features(pixels), model.model.mm_projector(right))
        assert model.encode_frames(pixels).shape == (2, 4, D)
        model.lm_head.weight.zero_()
    assert qwen.lm_head.weight.abs().sum() > 0  # a copy
    model.save_pretrained(tmp_path / "made")
    assert same(dict(LongVA.from_pretrained(tmp_path / "made").state_dict()), dict(model.state_dict()))
    mean = LongVAProcessor.from_config(model.config, tokenizer()).image_processor.image_mean
    assert mean == ([0.5] * 3 if which > 1 else pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4))


def test_a_projector_is_fresh_and_seeded(tmp_path):
    qwen, tower = Qwen2ForCausalLM(Qwen2Config(**LANGUAGE)), next(tower_models())
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(LongVA.from_parts(qwen, tower).model.mm_projector[0])
    assert torch.equal(made[0].weight, made[1].weight) and not torch.equal(made[0].weight, made[2].weight)
    assert made[0].weight.abs().max() <= C**-0.5 and abs(made[0].weight.std() - (3 * C) ** -0.5) < 0.01


def test_parts_that_do_not_fit(tmp_path):
    qwen, tower = Qwen2ForCausalLM(Qwen2Config(**LANGUAGE)), next(tower_models())
    refused(lambda: LongVA.from_parts(tower, tower), "clip_vision_model", "qwen2")
    refused(lambda: LongVA.from_parts(LlamaForCausalLM(LlamaConfig(**HALF)), tower), "llama")
    refused(lambda: LongVA.from_parts(qwen, qwen), "qwen2", "SigLIP")
    refused(lambda: LongVA.from_parts(tmp_path / "nothing", tower), "nothing")
    refused(lambda: LongVA.from_parts(Qwen2Model(Qwen2Config(**LANGUAGE)), tower), "missing lm_head.weight")
    headless = LongVA.from_parts(Qwen2Model(Qwen2Config(**LANGUAGE, tie_word_embeddings=True)), tower)
    assert headless.lm_head.weight is headless.model.embed_tokens.weight
    tower.save_pretrained(tmp_path / "tower")
    state = load_file(tmp_path / "tower" / "model.safetensors")
    (tmp_path / "tower" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "tower" / "pytorch_model.bin")  # as OpenAI's CLIP lies on the hub
    assert LongVA.from_parts(qwen, tmp_path / "tower").encode_frames(torch.zeros(1, 3, S, S)).shape == (1, 4, D)
    assert AutoConfig.for_model("longva").model_type == "longva"


def test_a_projector_alone(original, tmp_path):
    from longva.model.checkpoint import load_projector

    model = LongVA.from_parts(Qwen2ForCausalLM(Qwen2Config(**LANGUAGE)), next(tower_models()))
    trained = {k: v for k, v in tensors().items() if "mm_projector" in k}
    torch.save(trained, tmp_path / "mm_projector.bin")
    for file in (tmp_path / "mm_projector.bin", original / "model.safetensors"):
        model.model.mm_projector[0].weight.data.zero_()
        load_projector(model, file)
        assert all(torch.equal(model.state_dict()[k], v.float()) for k, v in trained.items())
    torch.save({k: v for k, v in trained.items() if "0.bias" not in k}, tmp_path / "mm_projector.bin")
    refused(lambda: load_projector(model, tmp_path / "mm_projector.bin"), "0.bias")
    refused(lambda: load_projector(model, tmp_path / "none.bin"), "none.bin")
    torch.save({"model.mm_projector.0.weight": Trap()}, tmp_path / "mm_projector.bin")
    refused(lambda: load_projector(model, tmp_path / "mm_projector.bin"), "mm_projector.bin")


def test_a_processor_that_is_not_there(tmp_path):
    """What the model says of such a folder, the processor says, too."""
    _, processor = load_mini("mini-longva")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(lambda: LongVAProcessor.from_pretrained(empty), "empty", "processor_config.json")
    refused(lambda: LongVA.from_pretrained(empty), "empty", "config.json")
    for place in (tmp_path / "nowhere", "no/where", str(tmp_path / "nowhere")):
        assert refused(lambda: LongVAProcessor.from_pretrained(place)) == refused(lambda: LongVA.from_pretrained(place))
    (tmp_path / "notes.txt").write_text("x")
    refused(lambda: LongVAProcessor.from_pretrained(tmp_path / "notes.txt"), "notes.txt", "folder")
    for number, file in enumerate(("tokenizer.json", "processor_config.json")):
        for damage in (Path.unlink, lambda f: f.write_text("{")):
            folder = tmp_path / f"{number}{damage is Path.unlink}"
            processor.save_pretrained(folder)
            damage(folder / file)
            refused(lambda: LongVAProcessor.from_pretrained(folder), folder.name, file)
    processor.save_pretrained(tmp_path / "alone")  # without a model
    assert LongVAProcessor.from_pretrained(tmp_path / "alone").tokenizer.get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.filterwarnings("ignore:The tokenizer does not know")  # nor need it, here
def test_settings_of_a_processor(original, tmp_path):
    LongVAProcessor.from_pretrained(original, time_stamps=True, frame_delimiters=" w9 ").save_pretrained(
        tmp_path / "ours"
    )
    LongVA.from_pretrained(original).save_pretrained(tmp_path / "ours")
    for folder in (original, tmp_path / "ours"):
        model, processor = LongVA.from_pretrained(
            folder, pool_stride=4, encoding="anyres"
        ), LongVAProcessor.from_pretrained(folder, pool_stride=4, encoding="anyres", frames_fit="pad")
        assert processor.image_processor.frames_fit == "pad"
        batch = processor(text="w1 <image> <video>", images=Image.new("RGB", (56, 28)), videos=film(), fps=1)
        with torch.no_grad():
            assert model(**batch).logits.shape[1] == 1 + 3 + 3 + (3 * 2 + 2) * (
                folder != original
            )  # times and delimiters
    again = LongVAProcessor.from_pretrained(tmp_path / "ours")
    assert (again.time_stamps, again.frame_delimiters) == (True, " w9 ")
    text = again.decode(again(text="<video>", videos=film(), fps=2)["input_ids"][0])
    assert text.count("w9") == 2 and text.count("<unk>") == 6 and text.count("<video>") == 12


# ---- one sequence on one and on two ranks


def cp_batch(model, processor):
    """Embeddings of pictures, a film and words; positions of two documents; labels already shifted."""
    rng = np.random.default_rng(3)
    batch = processor(
        text="w1 <image> w2 w3 w4 <video> w5 w6 w7",
        images=Image.fromarray(rng.integers(0, 256, (50, 90, 3), dtype=np.uint8)),
        videos=film(),
    )
    ids, split = batch["input_ids"], 11
    labels = torch.where(ids >= len(WORDS), -100, ids)
    positions = torch.cat([torch.arange(split), torch.arange(ids.shape[1] - split)])[None]
    pixels = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    shifted[:, split - 1] = -100
    return dict(inputs_embeds=model.embed(ids, **pixels), position_ids=positions, shift_labels=shifted), (
        ids,
        pixels,
        labels,
    )


def cp_gradients(model, batch, ranks):
    count = (batch["shift_labels"] != -100).sum().item()
    parts = dict(batch)
    if ranks > 1:
        parts = shard_batch({"labels" if k == "shift_labels" else k: v for k, v in batch.items()})
        parts["shift_labels"] = parts.pop("labels")
    out = model(**parts, num_items_in_batch=count, use_cache=False)
    out.loss.backward()
    grads = {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    loss = out.loss.detach().clone()
    if ranks > 1:
        for t in (loss, *grads.values()):
            dist.all_reduce(t)
    return loss, grads


def cp_model(folder, attention):
    model, processor = LongVA.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ), LongVAProcessor.from_pretrained(folder)
    return model.train(), processor


def cp_worker(rank, ranks, folder, out):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=ranks)
        found = {}
        for kind in ("all_gather", "ring"):
            model, processor = cp_model(folder, "longva_cp")
            with context_parallel(kind=kind):
                batch, (ids, pixels, labels) = cp_batch(model, processor)
                loss, grads = cp_gradients(model, batch, ranks)
                if kind == "ring":
                    with torch.no_grad():
                        parts = shard_batch({k: v.detach() for k, v in batch.items() if k != "shift_labels"})
                        whole = unshard(model.eval()(**parts, use_cache=False).logits, length=ids.shape[1])
                    with pytest.raises(ValueError, match="would shift them"):
                        model(**parts, labels=parts["position_ids"])
                    found["logits"] = whole
            found |= {f"{kind}.{n}": g for n, g in grads.items()} | {f"{kind}.loss": loss[None]}
        assert current_context().ranks == 1
        if rank == 0:
            save_file({k: v.contiguous() for k, v in found.items()}, f"{out}/found.safetensors")
        dist.destroy_process_group()
    except Exception:
        Path(out, f"error{rank}").write_text(traceback.format_exc())
        raise


def test_training_with_context_parallel(original, tmp_path):
    """Visual tokens embedded on every rank, then cut; loss and gradients are those of one process, up to the tower."""
    model, processor = cp_model(original, "sdpa")
    ids, pixels, labels = cp_batch(model, processor)[1]
    # the right answer: two documents, each alone
    loss, count = 0, 0
    embeds = model.embed(ids, **pixels)
    for a, b in ((0, 11), (11, ids.shape[1])):
        out = model(inputs_embeds=embeds[:, a:b], labels=labels[:, a:b], num_items_in_batch=1, use_cache=False)
        loss, count = loss + out.loss, count + (labels[:, a + 1 : b] != -100).sum().item()
    (loss / count).backward()
    right = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    one, processor = cp_model(original, "longva_cp")
    batch, _ = cp_batch(one, processor)
    mine, grads = cp_gradients(one, batch, 1)
    torch.testing.assert_close(mine, (loss / count).detach(), atol=1e-5, rtol=1e-5)
    assert all((grads[n] - g).abs().max() <= 1e-5 * max(1, g.abs().max()) for n, g in right.items())
    assert right["model.mm_projector.0.weight"].abs().sum() > 0
    mp.set_start_method("spawn", force=True)
    workers = mp.spawn(cp_worker, (2, str(original), str(tmp_path)), nprocs=2, join=False)
    assert workers.join(timeout=240) or workers.join(timeout=60), "two ranks did not end"
    found = load_file(tmp_path / "found.safetensors")
    for kind in ("all_gather", "ring"):
        torch.testing.assert_close(found[f"{kind}.loss"][0], mine, atol=1e-5, rtol=1e-5)
        worst = max(((found[f"{kind}.{n}"] - g).abs().max() / max(1, g.abs().max())).item() for n, g in right.items())
        assert worst <= 1e-5
    with torch.no_grad():
        alone = one.eval()(
            inputs_embeds=batch["inputs_embeds"].detach(), position_ids=batch["position_ids"], use_cache=False
        ).logits
    torch.testing.assert_close(found["logits"], alone, atol=1e-4, rtol=1e-4)


def test_labels_and_positions_on_one_rank(original):
    """A plain training step: labels, position ids, longva_cp; and the same with sdpa."""
    rng, losses = np.random.default_rng(5), []
    image = Image.fromarray(rng.integers(0, 256, (50, 90, 3), dtype=np.uint8))
    for attention in ("sdpa", "longva_cp"):
        model, processor = cp_model(original, attention)
        batch = processor(text=["w1 <image> w2 w3", "w4 <video> w5"], images=image, videos=film(), padding_side="right")
        labels = torch.where(
            batch["attention_mask"].bool() & (batch["input_ids"] < len(WORDS)), batch["input_ids"], -100
        )
        positions = torch.arange(labels.shape[1]).expand(2, -1)
        loss = model(**batch, labels=labels, position_ids=positions).loss
        loss.backward()
        losses.append((loss.item(), model.model.mm_projector[0].weight.grad.norm().item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
