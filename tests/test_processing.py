"""Model and processor together, where notebooks are the wrong place: other processes, real vocabulary sizes, random
batches, training."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlavaForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)

from longva.model.modeling import LongVA, LongVAConfig, longva_7b, mini_config
from longva.model.processing import LongVAImageProcessor, LongVAProcessor
from longva.model.prompt import frames_text
from longva.vision.video import Frames, VideoError, read_frames, write_video

SPECIAL = ["<pad>", "<eos>", "<unk>", "<image>", "<video>", "<|im_start|>", "<|im_end|>"]


def word_tokenizer(words, special):
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", extra_special_tokens=special
    )


@pytest.fixture
def tokenizer():
    return word_tokenizer(SPECIAL + [f"w{i}" for i in range(40)], SPECIAL[3:])


@pytest.fixture(params=["unires", "anyres"])
def pair(request, tokenizer):
    torch.manual_seed(0)
    config = mini_config(len(tokenizer), 3, 4, eos_token_id=1, max_grids=9, encoding=request.param)
    return LongVA(config).eval(), LongVAProcessor.from_config(config, tokenizer)


def picture(rng):
    return Image.fromarray(rng.integers(0, 256, (*rng.integers(5, 120, 2), 3), dtype=np.uint8))


def film(rng):
    return rng.integers(0, 256, (rng.integers(1, 5), 20, 31, 3), dtype=np.uint8)


def prompt(rng):
    """A random text with its pictures and films."""
    words, images, videos = [], [], []
    for _ in range(rng.integers(2, 9)):
        kind = rng.integers(0, 4)
        words.append(f"w{rng.integers(40)}" if kind > 1 else "<image>" if kind else "<video>")
        if kind == 1:
            images.append(picture(rng))
        if kind == 0:
            videos.append(film(rng))
    return " ".join(["w0", *words]), images, videos


def test_a_qwen2_vocabulary_keeps_its_size():
    words = [f"w{i}" for i in range(151641)] + ["<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = word_tokenizer(words, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert len(tokenizer) == 151646
    config = longva_7b()
    processor = LongVAProcessor.from_config(config, tokenizer)
    assert (processor.image_token_id, processor.video_token_id) == (151646, 151647)
    assert len(tokenizer) <= config.text_config.vocab_size
    ids = processor(text="w1 <video> w2", videos=np.zeros((2, 40, 60, 3), np.uint8))["input_ids"][0]
    assert ids.tolist() == [1] + [151647] * 288 + [2]


def test_random_batches_equal_their_rows(pair):
    model, processor = pair
    rng = np.random.default_rng(0)
    for _ in range(5):
        texts, images, videos = zip(*(prompt(rng) for _ in range(3)))
        batch = processor(text=list(texts), images=list(images), videos=list(videos))
        with torch.no_grad():
            logits = model(**batch).logits
            for row, (text, pictures, films) in enumerate(zip(texts, images, videos)):
                alone = processor(text=text, images=pictures, videos=films)
                keep = batch["attention_mask"][row].bool()
                assert keep[-1]  # on the left, where generation wants the padding
                assert torch.equal(batch["input_ids"][row][keep], alone["input_ids"][0])
                torch.testing.assert_close(logits[row][keep], model(**alone).logits[0], atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The tokenizer does not know")  # nor need it, here
def test_padded_generation_equals_generation_alone(pair):
    model, processor = pair
    rng = np.random.default_rng(1)
    texts, images, videos = zip(*(prompt(rng) for _ in range(3)))
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(**processor(text=list(texts), images=list(images), videos=list(videos)), **how)[:, -5:]
    for row, (text, pictures, films) in enumerate(zip(texts, images, videos)):
        assert torch.equal(
            together[row], model.generate(**processor(text=text, images=pictures, videos=films), **how)[0, -5:]
        )
    right = processor(text=["w1", "w1 w2 w3"], padding_side="right")  # for training
    assert right["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]] and processor(text=["w1", "w1 w2 w3"])[
        "attention_mask"
    ].tolist() == [[0, 0, 1], [1, 1, 1]]
    refused(lambda: model.generate(**right, **how), "padded on the right", "left")
    refused(lambda: processor(text="w1", padding_side="top"), "padding_side", "'top'")
    talks = [[{"role": "user", "content": "w1"}], [{"role": "user", "content": "w1 w2"}]]
    sides = [
        processor.apply_chat_template(talks, tokenize=True, return_dict=True, **more)["attention_mask"][0].tolist()
        for more in ({}, {"padding_side": "right"})
    ]
    assert sides[0][::-1] == sides[1] and sides[0][0] == 0


def test_a_thumbnail_is_counted_only_for_anyres(pair):
    model, processor = pair
    batch = processor(text="<image>", images=Image.new("RGB", (84, 84)))
    thumbnail = model.config.encoding == "anyres"
    columns, rows = batch["image_layouts"][0].tolist()
    assert len(batch["pixel_values"]) == columns * rows + thumbnail
    assert batch["input_ids"].shape[1] == 4 * (columns * rows + thumbnail)


def test_a_fresh_process_gives_the_same_numbers(pair, tmp_path):
    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    rng = np.random.default_rng(2)
    pixels, frames = np.asarray(picture(rng)), film(rng)
    np.savez(tmp_path / "seen.npz", pixels=pixels, frames=frames)
    code = f"""
import numpy as np, torch
import longva.model.processing
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = {str(tmp_path)!r}
seen = np.load(folder + "/seen.npz")
model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
batch = processor(text="w1 <image> w2 <video> w3", images=seen["pixels"], videos=seen["frames"])
with torch.no_grad(): save_file({{"logits": model(**batch).logits}}, folder + "/logits.safetensors")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with torch.no_grad():
        here = model(**processor(text="w1 <image> w2 <video> w3", images=pixels, videos=frames)).logits
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], here, atol=1e-6, rtol=0)


def test_sixteen_bits_keep_the_frequencies(pair, tmp_path):
    model, processor = pair
    model.save_pretrained(tmp_path)
    half = LongVA.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16 and half.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        logits = half(**processor(text="w1 <video>", videos=np.zeros((3, 30, 30, 3), np.uint8))).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_attention_is_chosen_for_both_parts(pair, tmp_path):
    model, processor = pair
    model.save_pretrained(tmp_path)
    eager = LongVA.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tower = eager.model.vision_tower["vision_tower"]["vision_model"]
    assert eager.model.config._attn_implementation == tower.config._attn_implementation == "eager"
    batch = processor(text="w1 <image> w2", images=Image.new("RGB", (50, 70), "teal"))
    with torch.no_grad():
        torch.testing.assert_close(eager(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_every_part(pair, checkpointing):
    model, processor = pair
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    batch = processor(text="w1 <image> w2 w3", images=Image.new("RGB", (50, 70), "teal"))
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    model(**batch, labels=labels).loss.backward()
    dead = {name for name, p in model.named_parameters() if p.grad is None}
    # CLIP's last layer and last norm lie behind the layer that is read
    assert dead == {n for n, _ in model.named_parameters() if "encoder.layers.2." in n or "post_layernorm" in n}


def test_wrong_numbers_are_one_sentence(pair, tmp_path):
    model, processor = pair
    broken = tmp_path / "film.mp4"
    broken.write_bytes(b"this is no film")
    with pytest.raises(VideoError):
        processor(text="<video>", videos=broken)
    batch = processor(text="w1 <image> w2", images=Image.new("RGB", (50, 70)))
    cut = batch["input_ids"][:, :5]
    with pytest.raises(ValueError, match="The text has 4 image placeholders, but the images give"):
        model(input_ids=cut, pixel_values=batch["pixel_values"], image_layouts=batch["image_layouts"])
    with pytest.raises(ValueError, match="must be normalised floats of shape"):
        model(
            input_ids=batch["input_ids"],
            pixel_values=batch["pixel_values"].movedim(1, -1),
            image_layouts=batch["image_layouts"],
        )


def test_three_thousand_frames_of_placeholders(tokenizer):
    """The text of the longest film of the paper, without its pixels."""
    from longva.model.prompt import expand_placeholders

    text = expand_placeholders(["w1 <video> w2"], "<video>", [3000 * 144])
    LongVAProcessor.from_config(mini_config(len(tokenizer), 3, 4), tokenizer)
    assert len(tokenizer(text)["input_ids"][0]) == 432_002


# ---- what does not add up


def refused(call, *words):
    """The one sentence that a call must raise."""
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 300, text
    assert all(word in text for word in words), text
    return text


@pytest.mark.filterwarnings("ignore:The tokenizer does not know")  # nor need it, here
def test_each_text_gets_its_own_pictures(pair):
    _, processor = pair
    a, b, c = (Image.new("RGB", size, "teal") for size in ((30, 30), (40, 90), (90, 40)))
    texts = ["<image> w1", "<image> <image> w2"]
    refused(lambda: processor(text=texts, images=[[a, b], [c]]), "'<image> w1'", "1 <image>", "2 images")
    refused(
        lambda: processor(text=["w1", "<video> w2"], videos=[[film(np.random.default_rng(0))], []]),
        "'w1'",
        "0 <video>",
        "1 video",
    )
    refused(lambda: processor(text=texts, images=[[a], [b, c], []]), "3 lists", "2 texts")
    refused(lambda: processor(text=texts, images=[[a], b, c]), "one list per text")
    refused(lambda: processor(text="<image> <image>", images=[[a], [b]]), "2 lists", "1 text")
    right = processor(text=texts, images=[[a], [b, c]])
    for same in ([a, b, c], (a, b, c), ((a,), (b, c))):
        assert all(torch.equal(right[k], v) for k, v in processor(text=texts, images=same).items())
    for none in ([None, [a]], [[], [a]]):
        assert len(processor(text=["w1", "w2 <image>"], images=none)["image_layouts"]) == 1
    assert processor(text="<image> <image>", images=[[a, b]])["image_layouts"].shape == (2, 2)
    talks = [
        [{"role": "user", "content": [{"type": "text", "text": "w1"}]}],
        [{"role": "user", "content": [{"type": "image", "image": a}]}],
    ]
    assert len(processor.apply_chat_template(talks, tokenize=True, return_dict=True)["image_layouts"]) == 1


def test_what_is_no_picture(pair, tmp_path, monkeypatch):
    _, processor = pair
    monkeypatch.chdir(tmp_path)
    Path("notes.png").write_text("no picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save("whole.png")
    Path("half.png").write_bytes(Path("whole.png").read_bytes()[:2000])
    for name, words in {
        "nope.png": ("no file nope.png",),
        ".": ("folder",),
        "": ("empty",),
        "notes.png": ("notes.png", "image"),
        "half.png": ("half.png",),
        "a" * 5000: (),
        "nul\0.png": (),
    }.items():
        refused(lambda: processor(text="<image>", images=name), *words)
        refused(lambda: processor.image_processor(name), *words)
    assert len(processor(text="<image>", images=Path("whole.png"))["image_layouts"]) == 1
    for nothing in ([], ()):
        refused(lambda: processor.image_processor(nothing), "no images")
    refused(lambda: processor.image_processor(None), "image")
    refused(lambda: processor.image_processor([None]), "image")


def test_what_is_no_text(pair):
    _, processor = pair
    for text in (5, [None], [["w1"]], ["w1", 2], [], None, {"a": 1}):
        refused(lambda: processor(text=text), "text")


def test_a_processor_needs_both_parts(pair, tokenizer):
    refused(lambda: LongVAProcessor(), "image_processor", "tokenizer")
    refused(lambda: LongVAProcessor(LongVAImageProcessor()), "tokenizer")
    refused(lambda: LongVAProcessor(tokenizer=tokenizer), "image_processor")


@pytest.mark.parametrize(
    "setting, word",
    [
        ({"frames_fit": "stretch"}, "stretch"),
        ({"encoding": "x"}, "'x'"),
        ({"max_grids": 0}, "max_grids"),
        ({"max_grids": 1}, "max_grids"),
        ({"pool_stride": 0}, "pool"),
        ({"grid": 0}, "grid"),
        ({"patch_size": 0}, "patch"),
        ({"pool_stride": 25}, "token"),
    ],
)
def test_image_settings_that_do_not_exist(setting, word):
    refused(lambda: LongVAImageProcessor(**setting), word)


@pytest.mark.parametrize(
    "setting, word",
    [
        ({"pool_stride": 0}, "pool_stride"),
        ({"pool_stride": -2}, "pool_stride"),
        ({"pool_stride": 5}, "4 x 4"),
        ({"max_grids": 0}, "max_grids"),
        ({"max_grids": 1}, "max_grids"),
        ({"vision_feature_layer": 99}, "vision_feature_layer"),
        ({"vision_feature_layer": 4}, "-4 to 3"),
        ({"vision_feature_layer": -5}, "-4 to 3"),
        ({"encoding": "x"}, "encoding"),
    ],
)
def test_settings_that_do_not_exist(setting, word):
    refused(lambda: mini_config(64, 62, 63, **setting), word)


def test_settings_at_their_ends():
    for layer in (-4, 3):
        model = LongVA(mini_config(64, 62, 63, vision_feature_layer=layer, pool_stride=4, max_grids=2))
        assert model.encode_frames(torch.zeros(2, 3, 28, 28)).shape == (2, 1, 128)
    assert LongVAConfig().tokens_per_grid > 0


def test_pictures_as_numpy(pair):
    model, processor = pair
    rng = np.random.default_rng(0)
    what = dict(text="w1 <image> <video>", images=picture(rng), videos=film(rng))
    arrays, tensors = processor(**what, return_tensors="np"), processor(**what)
    assert all(isinstance(v, np.ndarray) for v in arrays.values()), {k: type(v) for k, v in arrays.items()}
    assert all(isinstance(v, torch.Tensor) for v in tensors.values())
    assert all(np.array_equal(arrays[k], v.numpy()) for k, v in tensors.items())
    assert all(
        isinstance(v, np.ndarray) for v in processor.image_processor(what["images"], return_tensors="np").values()
    )
    for other in ("tf", "x", 5):
        refused(lambda: processor(**what, return_tensors=other), "return_tensors")


def test_placeholders_without_pixels(pair):
    model, processor = pair
    rng = np.random.default_rng(3)
    images, videos = (processor(text="w1 <image>", images=picture(rng)), processor(text="w1 <video>", videos=film(rng)))
    for batch, kind in ((images, "image"), (videos, "video")):
        for call in (model, model.embed, lambda input_ids: model.generate(input_ids=input_ids, max_new_tokens=2)):
            refused(lambda: call(input_ids=batch["input_ids"]), f"{kind} placeholder", "pixel_values")
    both = torch.cat([images["input_ids"], videos["input_ids"]], 1)
    refused(
        lambda: model(input_ids=both, pixel_values=images["pixel_values"], image_layouts=images["image_layouts"]),
        "video",
        "pixel_values_videos",
    )


LLAVAS = (LlavaForConditionalGeneration, LlavaOnevisionForConditionalGeneration)
REFUSED = {  # keywords of transformers' LLaVAs -> a value, which no LongVA can do
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_9",
    "image_sizes": [[20, 31]],
    "image_sizes_videos": [[20, 31]],
    "batch_num_images": [1],
    "mm_encoder_outputs": {},
}
SAME = {  # keywords that a Qwen2 reads too -> a value
    "position_ids": torch.arange(3, 40)[None],
    "attention_mask": torch.ones(1, 37, dtype=torch.long),
    "labels": torch.arange(37)[None],
    "logits_to_keep": 3,
    "use_cache": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": True,
    "num_items_in_batch": 9,
}
GENERATE = {  # keywords of generate -> settings
    "attention_mask": {},
    "num_beams": dict(num_beams=3),
    "num_return_sequences": dict(num_beams=3, num_return_sequences=2),
    "cache_implementation": dict(cache_implementation="static"),
    "min_new_tokens": dict(min_new_tokens=4),
    "bad_words_ids": dict(bad_words_ids=[[9], [11]]),
    "do_sample": dict(do_sample=True, temperature=2.0, top_k=5, top_p=0.9),
    "output_logits": dict(output_logits=True, return_dict_in_generate=True),
}


def beside_a_qwen2(pair):
    """(the model, its inputs, the language model alone, the row that it reads)."""
    model, processor = pair
    rng = np.random.default_rng(5)
    frames = rng.integers(0, 256, (2, 20, 31, 3), dtype=np.uint8)
    batch = processor(text="w1 <image> w2 <video> w3", images=Image.new("RGB", (20, 31)), videos=frames)
    alone = Qwen2ForCausalLM(model.config.text_config).eval()
    words = {name: value for name, value in model.state_dict().items() if "vision_tower" not in name}
    alone.load_state_dict({name: value for name, value in words.items() if "mm_projector" not in name})
    with torch.no_grad():
        return model, dict(batch), alone, model.embed(**{k: v for k, v in batch.items() if k != "attention_mask"})


def test_every_keyword_of_transformers_llavas(pair):
    """Each is read with the same answer as by the language model alone, or refused with a sentence."""
    model, batch, alone, row = beside_a_qwen2(pair)
    own = {"input_ids", "inputs_embeds", "pixel_values", "pixel_values_videos", "past_key_values", "kwargs", "self"}
    for llava in LLAVAS:
        assert set(inspect.signature(llava.forward).parameters) <= own | set(REFUSED) | set(SAME)
    for name, value in REFUSED.items():
        refused(lambda: model(**batch, **{name: value}), f"does not read {name}:")
        model(**batch, **{name: None})
    refused(lambda: model(**batch, logits_to_kep=1), "logits_to_kep")
    length = row.shape[1]
    for name, value in SAME.items():
        if isinstance(value, torch.Tensor):
            value = torch.cat([value, value], 1)[:, :length] if length > 37 else value[:, :length]
        settings = {name: value} | ({"labels": SAME["labels"][:, :1].expand(1, length)} if "num_items" in name else {})
        with torch.no_grad():
            mine = model(**(batch | settings))
            theirs = alone(inputs_embeds=row, **settings)
        torch.testing.assert_close(mine.logits, theirs.logits)
        assert (mine.loss is None) == (theirs.loss is None) and mine.keys() == theirs.keys()
        if mine.loss is not None:
            torch.testing.assert_close(mine.loss, theirs.loss)
        for part in ("hidden_states", "attentions"):
            for a, b in zip(mine.get(part) or (), theirs.get(part) or (), strict=True):
                assert a is b is None or torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", GENERATE)
def test_keywords_of_generate(pair, name):
    """Beside a Qwen2 that reads the same row; from ids, and from their embeddings."""
    model, batch, alone, row = beside_a_qwen2(pair)
    how = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0) | GENERATE[name]
    ids = batch.pop("input_ids")
    made = []
    for call, inputs in (
        (alone.generate, dict(inputs_embeds=row)),
        (model.generate, batch | dict(inputs_embeds=model.get_input_embeddings()(ids))),
        (model.generate, batch | dict(input_ids=ids)),
    ):
        torch.manual_seed(0)
        out = call(**inputs, **how)
        made.append(out.sequences if hasattr(out, "sequences") else out)
    assert torch.equal(made[0][:, -5:], made[1][:, -5:])
    assert torch.equal(made[1][:, -5:], made[2][:, -5:])
    with pytest.raises(ValueError, match="not used by the model: ..image_sizes"):  # transformers' own sentence
        model.generate(**batch, input_ids=ids, image_sizes=[[1, 1]])


def test_pixels_beside_embeddings(pair):
    """Their places are found by the placeholder's embedding; a placeholder without one is refused."""
    model, batch, alone, row = beside_a_qwen2(pair)
    ids = batch.pop("input_ids")
    words = model.get_input_embeddings()(ids)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=words, **batch).logits, alone(inputs_embeds=row).logits)
    refused(lambda: model(inputs_embeds=words[:, :-2], **batch | {"attention_mask": None, "pixel_values": None,
                          "video_frames": [9]}), "frames together")
    refused(lambda: model(inputs_embeds=words, input_ids=ids), "one of them")
    refused(lambda: model(), "one of them")
    model.config.image_token_id = -200
    refused(lambda: model(inputs_embeds=words, **batch), "placeholder -200 has no embedding")


def test_a_placeholder_that_the_model_itself_says_is_a_word(pair):
    """Later steps of generation bring no pixels, and a model may well choose the id of a placeholder."""
    model, _ = pair
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        model.lm_head.weight.zero_()  # tied: every logit is 0, and the first id wins ...
        model.model.embed_tokens.weight[3] = 50 * model.model.norm.weight  # ... or this one
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert model(input_ids=torch.tensor([[3]]), past_key_values=cache).logits.shape[1] == 1
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] <= 6


def test_models_without_placeholders(tokenizer):
    torch.manual_seed(0)
    ids = torch.arange(40)[None]
    for placeholders in ((None, None), (-1, -1), (40, 41)):
        model = LongVA(mini_config(40, *placeholders)).eval()
        assert model(input_ids=ids).logits.shape == (1, 40, 40)


def test_wrong_shapes_are_one_sentence(pair):
    model, processor = pair
    batch = processor(text="<image>", images=Image.new("RGB", (84, 84)))
    for layouts in ([1, 2], [[1, 2, 3]], [[1, 2], [3]], "x", [], [[1.5, 2]], [[0, 2]], [[-1, -2]], torch.tensor(3)):
        refused(lambda: model.embed(batch["input_ids"], batch["pixel_values"], layouts), "image_layouts")
    for frames, chunk in ((0, 64), (2, 0), (2, -1), (2, 1.5), (2, None)):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                refused(
                    lambda: model.encode_frames(torch.zeros(frames, 3, 28, 28), chunk=chunk),
                    "chunk" if frames else "no frames",
                )


# ---- conversations, and text between frames


@pytest.mark.filterwarnings("ignore:The tokenizer does not know")  # nor need it, here
def test_conversations_with_files(pair, tmp_path):
    _, processor = pair
    rng = np.random.default_rng(4)
    a, b = picture(rng), picture(rng)
    a.save(tmp_path / "a.png")
    frames = rng.integers(0, 256, (8, 32, 48, 3), dtype=np.uint8)
    path = write_video(frames, tmp_path / "film.mp4", fps=2.0)
    first = [
        {"role": "system", "content": "w0"},
        {
            "role": "user",
            "content": [
                {"type": "video", "video": str(path)},
                {"type": "text", "text": "w1"},
                {"type": "image", "path": str(tmp_path / "a.png")},
                {"type": "image", "image": b},
                {"type": "text", "text": "w2"},
            ],
        },
    ]
    second = [
        *first,
        {"role": "assistant", "content": [{"type": "text", "text": "w3"}]},
        {"role": "user", "content": [{"type": "video", "video": frames[:3]}, {"type": "text", "text": "w4"}]},
    ]
    batch = processor.apply_chat_template(
        [first, second], tokenize=True, return_dict=True, add_generation_prompt=True, num_frames=4, frames_fit="pad"
    )
    assert (
        batch["video_frames"].tolist() == [4, 4, 3]
        and len(batch["image_layouts"]) == 4
        and len(batch["input_ids"]) == 2
    )
    texts = [
        "<|im_start|>system\nw0<|im_end|>\n<|im_start|>user\n<video>\nw1<image>\n<image>\nw2<|im_end|>\n<|im_start|>"
    ]
    texts = [
        texts[0] + "assistant\n",
        texts[0] + "assistant\nw3<|im_end|>\n<|im_start|>user\n<video>\nw4<|im_end|>\n<|im_start|>assistant\n",
    ]
    right = processor(
        text=texts, images=[[a, b]] * 2, videos=[[path], [path, frames[:3]]], num_frames=4, frames_fit="pad"
    )
    assert all(torch.equal(batch[k], v) for k, v in right.items())
    assert processor.apply_chat_template([first, second], add_generation_prompt=True) == texts


@pytest.mark.filterwarnings("ignore:The tokenizer does not know")  # nor need it, here
def test_time_stamps_and_delimiters(pair, tmp_path):
    model, processor = pair
    frames = np.random.default_rng(5).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)
    path = write_video(frames, tmp_path / "film.mp4", fps=2.0)

    def words(**how):
        ids = processor(text="w1 <video> w2", **how)["input_ids"][0]
        return processor.decode(ids).replace(" ", "")

    frame, stamp = "<video>" * 4, "<unk><unk>"  # "<0.5" and "seconds>" are no words of this vocabulary
    assert (
        words(videos=path)
        == words(videos=frames)
        == words(videos=[Image.fromarray(f) for f in frames])
        == "w1" + frame * 4 + "w2"
    )
    assert (
        words(videos=path, time_stamps=True)
        == words(videos=frames, time_stamps=True, fps=2)
        == words(videos=Frames(frames, np.arange(4.0), 2.0), time_stamps=True)
        == "w1" + (stamp + frame) * 4 + "w2"
    )
    assert words(videos=frames, frame_delimiters="w7") == "w1" + "w7".join([frame] * 4) + "w2"
    with pytest.raises(ValueError, match="fps"):
        words(videos=frames, time_stamps=True)
    made = LongVAProcessor(processor.image_processor, processor.tokenizer, time_stamps=True, frame_delimiters="w7")
    made.save_pretrained(tmp_path / "saved")
    again = LongVAProcessor.from_pretrained(tmp_path / "saved")
    a, b = (p(text="w1 <video>", videos=path) for p in (made, again))
    assert all(torch.equal(a[k], b[k]) for k in a) and torch.equal(
        again(text="<video>", videos=path, time_stamps=False, frame_delimiters="")["input_ids"],
        processor(text="<video>", videos=path)["input_ids"],
    )
    with torch.no_grad():
        assert model(**a).logits.isfinite().all()  # text between frames is text to the model
        rows = model.embed(**{k: v for k, v in a.items() if k != "attention_mask"})[0]
        assert torch.equal(rows[a["input_ids"][0] == 4], model.encode_frames(a["pixel_values_videos"]).flatten(0, 1))
    assert [processor.tokenizer.tokenize(frames_text("<video>", 1, 2, [0.0, 61.25], ";"))] and frames_text(
        "<video>", 1, 2, [0.0, 61.25], ";"
    ) == "<0.0 seconds><video>;<61.2 seconds><video>"


def test_one_square_per_image(pair):
    """The original's other ways: no grids, no thumbnail, a pool of their own."""
    _, processor = pair
    config = mini_config(len(processor.tokenizer), 3, 4, image_fit="pad", image_pool_stride=1, encoding="anyres")
    torch.manual_seed(0)
    model, single = LongVA(config).eval(), LongVAProcessor.from_config(config, processor.tokenizer)
    for image in (Image.new("RGBA", (90, 30), "teal"), Image.new("L", (30, 90)), Image.new("P", (28, 28))):
        batch = single(text="w1 <image> <video>", images=image, videos=film(np.random.default_rng(0)))
        assert (
            batch["image_layouts"].tolist() == [[1, 1]]
            and (batch["input_ids"] == 3).sum() == 16
            and len(batch["pixel_values"]) == 1
        )
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()


def test_a_part_of_another_kind(pair):
    _, processor = pair
    with pytest.raises(Exception, match="text, image or video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "sound", "sound": "x.wav"}]}])


def test_a_slip_of_the_pen_is_no_setting(pair, tmp_path):
    model, processor = pair
    config, tokenizer, frames = model.config, processor.tokenizer, np.zeros((2, 30, 30, 3), np.uint8)
    processor.save_pretrained(tmp_path)
    for call, word in (
        (lambda: LongVAImageProcessor(frame_fit="pad"), "frames_fit"),
        (lambda: LongVAImageProcessor.from_config(config, max_grid=4), "max_grids"),
        (lambda: LongVAProcessor.from_config(config, tokenizer, frame_fit="pad"), "frames_fit"),
        (lambda: LongVAProcessor.from_pretrained(tmp_path, time_stamp=True), "time_stamps"),
        (lambda: LongVAProcessor.from_pretrained(tmp_path, frame_fit="pad"), "frames_fit"),
        (lambda: processor(text="w1", vidoes=frames), "videos"),
        (lambda: processor(text="<video>", videos=frames, frame_fit="pad"), "frames_fit"),
        (lambda: processor(text="w1", zebra=1), "zebra"),
        (lambda: processor.image_processor(Image.new("RGB", (30, 30)), max_grid=2), "max_grid"),
        (lambda: processor(text="<video>", videos=frames, num_frames=1), "2 frames"),
    ):
        refused(call, word)
    again = LongVAProcessor.from_pretrained(
        tmp_path, time_stamps=True, frame_delimiters="w7", frames_fit="resize", max_grids=4
    )
    assert (
        again.time_stamps,
        again.frame_delimiters,
        again.image_processor.frames_fit,
        again.image_processor.max_grids,
    ) == (True, "w7", "resize", 4)


def test_pictures_as_people_see_them(pair, tmp_path, monkeypatch):
    """Oracles are the 8-bit picture from which each file is made."""
    from longva.vision.image import open_image

    grey = np.linspace(0, 255, 60 * 40).astype(np.uint8).reshape(40, 60)
    colour = Image.fromarray(np.stack([grey, grey[::-1], grey[:, ::-1]], -1))
    saved = {
        "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "deep.tif": Image.fromarray(grey.astype(np.uint16) * 257),
        "plain.png": Image.fromarray(grey),
        "la.png": Image.fromarray(grey).convert("LA"),
    }
    for name, image in saved.items():
        image.save(tmp_path / name)
        assert np.array_equal(np.asarray(open_image(tmp_path / name)), grey[..., None].repeat(3, -1)), name
    assert np.array_equal(np.asarray(open_image(Image.fromarray(grey.astype(np.uint16) * 257)))[..., 0], grey)
    clear = colour.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(60) < 30, 255, 0).astype(np.uint8)[None].repeat(40, 0)))
    clear.save(tmp_path / "clear.png")
    seen = np.asarray(open_image(tmp_path / "clear.png"))
    assert np.array_equal(seen[:, :30], np.asarray(colour)[:, :30]) and (seen[:, 30:] == 255).all()
    few = colour.quantize(8)
    few.save(tmp_path / "few.gif")
    assert np.array_equal(np.asarray(open_image(tmp_path / "few.gif")), np.asarray(few.convert("RGB")))
    colour.convert("CMYK").save(tmp_path / "print.tif")
    assert np.array_equal(
        np.asarray(open_image(tmp_path / "print.tif")), np.asarray(colour.convert("CMYK").convert("RGB"))
    )
    exif = colour.getexif()
    exif[0x112] = 6
    colour.save(tmp_path / "phone.png", exif=exif)
    for turned in (tmp_path / "phone.png", Image.open(tmp_path / "phone.png")):
        assert np.array_equal(np.asarray(open_image(turned)), np.rot90(np.asarray(colour), -1))
    colour.save(tmp_path / "two.gif", save_all=True, append_images=[colour.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    _, processor = pair
    refused(lambda: processor(text="<image>", images=tmp_path / "two.gif"), "two.gif", "2 pictures", "video")
    refused(lambda: processor(text="<image>", images=tmp_path / "float.tif"), "float.tif", "8 bits")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused(lambda: processor(text="<image>", images=tmp_path / "plain.png"), "plain.png", "make it smaller")


def test_a_long_file_is_read_in_parts(pair, tmp_path):
    """Twenty times as many frames, and beside the result no more memory."""
    import tracemalloc

    _, processor = pair
    path = write_video((np.full((360, 640, 3), i % 250, np.uint8) for i in range(200)), tmp_path / "film.mp4", fps=10)
    peaks = []
    for n in (10, 200):
        tracemalloc.start()
        seen = processor(text="<video>", videos=path, num_frames=n)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(seen["pixel_values_videos"]) == n
    assert peaks[1] < 100 * 360 * 640 * 3  # two parts of 32, and half of the film would be 100
    frames = read_frames(path, n=200).array
    assert torch.equal(seen["pixel_values_videos"], processor(text="<video>", videos=frames)["pixel_values_videos"])


# ---- as people know it from transformers


def test_unknown_words_are_named(pair, recwarn, monkeypatch):
    """The tokenizer writes <unk> for them, and the model would answer another question."""
    _, processor = pair
    processor(text=["w1 <video> w2", "w3"], videos=film(np.random.default_rng(0)))
    processor(text="<unk> w1 <pad>")  # written by hand
    assert not recwarn.list, [str(w.message) for w in recwarn]
    for how in ({}, {"return_tensors": "np"}, {"return_tensors": None}, {"padding": "max_length", "max_length": 99}):
        with pytest.warns(UserWarning, match="does not know the words 'Find', 'heart\\?'.*47 words") as said:
            processor(text="w1 <video> Find heart? Find", videos=np.zeros((2, 30, 30, 3), np.uint8), **how)
        assert len(said) == 1 and said[0].filename == __file__ and "video" not in str(said[0].message)
    with pytest.warns(UserWarning, match="does not know the word 'sees'"):
        processor(text=["w1", "<|im_start|>sees"])
    with pytest.warns(UserWarning, match="and others"):
        processor(text=" ".join(f"x{i}" for i in range(9)))
    with monkeypatch.context() as slow, pytest.warns(UserWarning, match="does not know the words 'Find', 'heart\\?'"):
        slow.setattr(PreTrainedTokenizerFast, "is_fast", False)  # one that does not say where a token stands
        processor(text="w1 <video> Find heart? Find", videos=np.zeros((2, 30, 30, 3), np.uint8))


def test_a_tokenizer_without_an_unknown_word_is_not_asked(recwarn):
    """As Qwen2's, which writes any text in bytes."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=None)
    config = mini_config(300, 256, 257)
    assert (
        LongVAProcessor.from_config(config, fast)(text="Find heart?")["input_ids"].shape == (1, 11) and not recwarn.list
    )


@pytest.mark.filterwarnings("ignore:The tokenizer does not know")  # nor need it, here
def test_settings_in_transformers_nested_way(pair):
    _, processor = pair
    rng = np.random.default_rng(6)
    what = dict(text=["w1 <image>", "w2 w3 <video>"], images=picture(rng), videos=film(rng))
    plain = processor(**what, padding_side="right", frames_fit="pad", frame_delimiters="w7", return_tensors="np")
    nested = processor(
        **what,
        text_kwargs={"padding": True, "padding_side": "right"},
        videos_kwargs={"frames_fit": "pad", "frame_delimiters": "w7"},
        images_kwargs={},
        audio_kwargs=None,
        common_kwargs={"return_tensors": "np"},
    )
    assert nested.keys() == plain.keys() and all(np.array_equal(nested[k], plain[k]) for k in plain)
    talk = [{"role": "user", "content": [{"type": "video", "video": np.zeros((2, 30, 60, 3), np.uint8)}]}]
    a, b = (
        processor.apply_chat_template(talk, tokenize=True, return_dict=True, **how)
        for how in ({"frames_fit": "pad"}, {"videos_kwargs": {"frames_fit": "pad"}})
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    refused(lambda: processor(**what, padding=True, text_kwargs={"padding": True}), "padding", "text_kwargs", "twice")
    refused(lambda: processor(**what, videos_kwargs={"frame_fit": "pad"}), "videos_kwargs", "frames_fit")
    refused(lambda: processor(**what, videos_kwargs={"padding": True}), "videos_kwargs", "padding")
    refused(lambda: processor(**what, images_kwargs={"max_grids": 2}), "images_kwargs", "max_grids")
    refused(lambda: processor(**what, images_kwargs=3), "images_kwargs", "3")


@pytest.mark.filterwarnings("ignore:The tokenizer does not know")  # nor need it, here
def test_assistants_words_are_marked(pair):
    _, processor = pair
    rng = np.random.default_rng(7)
    talk = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture(rng)},
                {"type": "text", "text": "w1"},
                {"type": "video", "video": film(rng)},
            ],
        },
        {"role": "assistant", "content": " w2 w3 "},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": [{"type": "text", "text": " w5 "}]},
    ]
    short = [{"role": "user", "content": "w6"}, {"role": "assistant", "content": " w7 "}]
    for side in ("left", "right"):
        plain = processor.apply_chat_template([talk, short], tokenize=True, return_dict=True, padding_side=side)
        batch = processor.apply_chat_template(
            [talk, short],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            padding_side=side,
            frame_delimiters=None,
        )
        assert batch.keys() == {*plain, "assistant_masks"} and all(torch.equal(batch[k], plain[k]) for k in plain)
        assert (
            isinstance(batch["assistant_masks"], torch.Tensor)
            and batch["assistant_masks"].shape == batch["input_ids"].shape
        )
        for row, words in enumerate((["w2", "w3", "<|im_end|>", "w5", "<|im_end|>"], ["w7", "<|im_end|>"])):
            ids = batch["input_ids"][row][batch["assistant_masks"][row].bool()]
            assert processor.tokenizer.convert_ids_to_tokens(ids) == words
    one = processor.apply_chat_template(
        short, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="np"
    )
    assert isinstance(one["assistant_masks"], np.ndarray) and one["assistant_masks"].sum() == 2
    unmarked = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    refused(
        lambda: processor.apply_chat_template(
            short, chat_template=unmarked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        ),
        "generation",
        "chat_template",
    )


def test_the_marks_do_not_change_what_is_written(pair):
    """Qwen2's ChatML written out here, with all that can stand in a message."""
    _, processor = pair
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " a\n"}, {"type": "video"}]},
        {"role": "assistant", "content": "b\n\n"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": [{"type": "text", "text": "d"}, {"type": "image"}]},
    ]
    said = ["s", "<image>\n a\n<video>\n", "b\n\n", "c", "d<image>\n"]
    for n in range(1, 6):
        for ask in (False, True):
            want = (
                "".join(f"<|im_start|>{m['role']}\n{text}<|im_end|>\n" for m, text in zip(talk[:n], said))
                + "<|im_start|>assistant\n" * ask
            )
            assert processor.apply_chat_template(talk[:n], add_generation_prompt=ask) == want
            assert (
                processor.tokenizer.apply_chat_template(
                    talk[:n], chat_template=processor.chat_template, tokenize=False, add_generation_prompt=ask
                )
                == want
            )
    assert processor.apply_chat_template(talk[1:2]).startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>"
    )


def test_outputs_as_a_tuple(pair):
    model, processor = pair
    batch = processor(text="w1 <image> w2", images=Image.new("RGB", (50, 70), "teal"))
    with torch.no_grad():
        named, plain = model(**batch, labels=batch["input_ids"]), model(
            **batch, labels=batch["input_ids"], return_dict=False
        )
        assert type(plain) is tuple and torch.equal(plain[0], named.loss) and torch.equal(plain[1], named.logits)
        assert type(model(**batch, return_dict=True)) is type(named)
        model.config.return_dict = False
        assert type(model(**batch)) is tuple
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_features_of_pictures(pair):
    """The rows that `embed` puts into the text, picture by picture."""
    model, processor = pair
    rng = np.random.default_rng(8)
    batch = processor(
        text="<image> w1 <image> <video> <video>", images=[picture(rng), picture(rng)], videos=[film(rng), film(rng)]
    )
    with torch.no_grad():
        rows = model.embed(**{k: v for k, v in batch.items() if k != "attention_mask"})[0]
        images = model.get_image_features(
            pixel_values=batch["pixel_values"], image_layouts=batch["image_layouts"]
        ).pooler_output
        videos = model.get_video_features(
            pixel_values_videos=batch["pixel_values_videos"], video_frames=batch["video_frames"]
        ).pooler_output
        whole = model.get_video_features(batch["pixel_values_videos"]).pooler_output
        assert type(model.get_image_features(batch["pixel_values"], batch["image_layouts"], return_dict=False)) is tuple
    assert len(images) == len(videos) == 2 and len(whole) == 1 and torch.equal(whole[0], torch.cat(videos))
    assert torch.equal(torch.cat(images), rows[batch["input_ids"][0] == 3]) and torch.equal(
        torch.cat(videos), rows[batch["input_ids"][0] == 4]
    )
    assert [len(v) for v in videos] == [4 * n for n in batch["video_frames"].tolist()]
    refused(lambda: model.get_image_features(batch["pixel_values"]), "image_layouts")
    refused(lambda: model.get_video_features(batch["pixel_values_videos"], [99]), "99 frames")


def test_nothing_to_read_is_refused(pair):
    _, processor = pair
    for text in ("", " \n", ["w1", ""]):
        refused(lambda: processor(text=text), "empty")


def test_labels_of_another_length(pair):
    model, processor = pair
    batch = processor(text=["w1 w2 w3", "w4 w5 w6"])
    labels = batch["input_ids"]
    for wrong in (labels[:, :1], labels[:1], labels[0], torch.cat([labels, labels], 1)):
        for name in ("labels", "shift_labels"):
            refused(lambda: model(**batch, **{name: wrong}), name, "[2, 3]", str(list(wrong.shape)))


def test_arrays_are_seen_as_pillow_sees_them(pair):
    """Each array beside the PIL image made of the same bytes."""
    _, processor = pair
    rng = np.random.default_rng(9)

    def look(image):
        return processor(text="<image>", images=image)

    grey, colour, clear = (
        rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((40, 60), (40, 60, 3), (40, 60, 4))
    )
    for array, mode, size in (
        (grey, "L", grey.shape[::-1]),
        (grey[..., None], "L", grey.shape[::-1]),
        (colour, "RGB", (60, 40)),
        (clear, "RGBA", (60, 40)),
        (clear[..., :2], "LA", (60, 40)),
        (colour.transpose(2, 0, 1), "RGB", (60, 40)),
        (colour[:, ::-1][:, ::-1], "RGB", (60, 40)),
    ):
        right = array.transpose(1, 2, 0) if array.shape[0] == 3 else array
        seen = look(Image.frombytes(mode, size, np.ascontiguousarray(right).tobytes()))
        for same in (array, torch.from_numpy(array.copy()), [torch.from_numpy(array.copy())]):
            assert all(torch.equal(look(same)[k], v) for k, v in seen.items()), (array.shape, mode)
    assert all(
        torch.equal(look(np.full((30, 30, 4), (9, 9, 9, 0), np.uint8))[k], v)
        for k, v in look(Image.new("RGB", (30, 30), "white")).items()
    )
    for wrong in (
        grey.astype(np.uint16),
        grey.astype(np.float32),
        grey > 9,
        torch.zeros(30, 30),
        torch.zeros(3, 30, 30, dtype=torch.bfloat16),
        np.zeros((5, 30, 30), np.uint8),
        np.zeros((30, 30, 5), np.uint8),
        np.zeros((2, 30, 30, 3), np.uint8),
        np.zeros(9, np.uint8),
        np.zeros((0, 3), np.uint8),
        np.zeros((3, 0, 9), np.uint8),
        torch.zeros(30, 0, 3, dtype=torch.uint8),
    ):
        refused(lambda: look(wrong), str(list(wrong.shape)), "uint8")


@pytest.mark.parametrize(
    "first",
    [
        "from longva import LongVA",
        "from longva import LongVAProcessor",
        "import longva; longva.LongVAConfig",
        "from longva import mini; mini.load('mini-longva')",
    ],
)
def test_what_makes_the_auto_classes_know_longva(first):
    code = f"""
{first}
from longva.mini import folder
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
for auto in (AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoImageProcessor):
    print(type(auto.from_pretrained(folder("mini-longva"))).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["LongVAConfig", "LongVA", "LongVAProcessor", "LongVAImageProcessor"], done.stderr
