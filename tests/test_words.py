"""`<image>` and `<video>` where they stand for no picture: words, in rows, in pairs and in a chat."""

import json

import pytest
import torch
from PIL import Image

from longva.model.chat import Chat
from longva.model.config import mini_config
from longva.model.modeling import LongVA
from longva.model.processing import LongVAProcessor
from longva.model.prompt import as_words, tokens_of_words
from longva.testing import chat_tokenizer
from longva.train.clips import Clips
from longva.train.pair_batch import encode_pair
from longva.train.pairs import read_pair
from longva.train.rows import BadRow, Row
from longva.train.samples import Reading, read_row, row_length

TEXT = "You are a helpful assistant. system user what is the < / > tag image video canvas of svg 1 2 , red\n"


@pytest.fixture(scope="module")
def parts():
    tokenizer = chat_tokenizer(TEXT)
    config = mini_config(len(tokenizer), *tokenizer.convert_tokens_to_ids(["<image>", "<video>"]))
    torch.manual_seed(0)
    return LongVA(config).eval(), LongVAProcessor.from_config(config, tokenizer)


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def sample(parts, folder, row, **settings):
    """Read a row, whose length must be known beforehand, too."""
    row = Row(str(folder / "x.json"), 1, row)
    reading = Reading(parts[1], **settings)
    made = read_row(row, reading)
    assert row_length(row, reading) == len(made["input_ids"])
    return made



@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize("tag", ["image", "video"])
def test_a_row_learns_tags_as_it_learns_other_words(parts, tmp_path, tag, answers_only):
    """The labels are those of the same text with <canvas> in their place, but for the ids."""
    turns = talk("what is the <X> tag of svg", "1 <canvas> 2 <X>", "<X>", "<X> <X>")
    system = {"from": "system", "value": "the <X> tag"}
    row = json.dumps(dict(conversations=[system, *turns]))
    ours = sample(parts, tmp_path, json.loads(row.replace("X", tag)), answers_only=answers_only)
    wanted = sample(parts, tmp_path, json.loads(row.replace("X", "canvas")), answers_only=answers_only)
    here, there = parts[1].tokenizer.convert_tokens_to_ids([tag, "canvas"])
    assert set(ours) == set(wanted) == {"input_ids", "labels"} and (ours["input_ids"] == here).sum() == 6
    for name in wanted:
        found = torch.where(ours[name] == here, there, ours[name])
        assert torch.equal(found, wanted[name])
    placeholders = torch.tensor([parts[1].image_token_id, parts[1].video_token_id])
    assert not torch.isin(ours["input_ids"], placeholders).any()


def test_beside_a_picture_only_its_own_tag_in_the_question_is_a_placeholder(parts, tmp_path):
    processor = parts[1]
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    row = dict(image="a.png", conversations=talk("<image>\nwhat is the <video> tag", "<image> , <video>"))
    made = sample(parts, tmp_path, row)
    image, video = processor.tokenizer.convert_tokens_to_ids(["image", "video"])
    count = processor.image_processor.tokens_of(*made["image_layouts"][0].tolist())
    assert (made["input_ids"] == processor.image_token_id).sum() == count
    assert (made["input_ids"] == processor.video_token_id).sum() == 0
    assert (made["input_ids"] == image).sum() == 1 and (made["input_ids"] == video).sum() == 2
    assert not torch.isin(made["labels"], torch.tensor([processor.image_token_id])).any()
    with pytest.raises(BadRow, match="1 images are named, but the text has 2 places <image>"):
        sample(parts, tmp_path, row | dict(conversations=talk("<image> is the <image> tag", "red")))


def test_a_pair_prefers_tags_as_words(parts, tmp_path):
    model, processor = parts
    clips = Clips(model, processor)
    image, video = processor.tokenizer.convert_tokens_to_ids(["image", "video"])

    def encoded(**row):
        return encode_pair(read_pair(Row(str(tmp_path / "x.jsonl"), 1, row)), clips)

    made = encoded(prompt="what is the <image> tag", chosen="1 <image>", rejected="2 <video>")
    same = encoded(prompt="what is the <canvas> tag", chosen="1 <canvas>", rejected="2 <canvas>")
    canvas = processor.tokenizer.convert_tokens_to_ids("canvas")
    for name in ("prompt", "chosen", "rejected"):
        words = torch.where((made[name] == image) | (made[name] == video), canvas, made[name])
        assert torch.equal(words, same[name])
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    shown = encoded(image="a.png", prompt="<image>\nwhat is the tag", chosen="<image>", rejected="<video>")
    assert (shown["prompt"] == processor.image_token_id).any() and (shown["chosen"] == image).sum() == 1
    with pytest.raises(BadRow, match="files that the row names: 1"):
        encoded(image="a.png", prompt="<image> what is the <image> tag", chosen="1", rejected="2")


def test_a_chat_reads_tags_as_words_and_answers_as_generate_does(parts):
    model, processor = parts
    picture = Image.new("RGB", (40, 30), "red")
    talked = [{"role": "user", "content": "what is the <image> tag of <video>"}]
    inputs = processor.apply_chat_template(talked, tokenize=True, return_dict=True, add_generation_prompt=True)
    placeholders = torch.tensor([processor.image_token_id, processor.video_token_id])
    assert not torch.isin(inputs["input_ids"], placeholders).any()
    assert processor.tokenizer.decode(inputs["input_ids"][0]).count("the <image> tag of <video>") == 1
    chat = Chat(model, processor)
    turn = chat.prepare(talked[0]["content"])
    assert turn.visual == 0 and turn.ids.tolist() == inputs["input_ids"][0].tolist()
    wanted = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, turn.tokens :]
    said = "".join(chat.ask(turn, max_new_tokens=3))
    assert said == processor.tokenizer.decode(wanted, skip_special_tokens=True)
    turn = chat.prepare("<image> , <image>", images=picture)
    count = processor.image_processor.tokens_of(*turn.images[0][1])
    assert turn.visual == count and turn.message["content"][-1]["text"] == "<image> , <image>"
    "".join(chat.ask(turn, max_new_tokens=3))
    assert chat.messages[2]["content"][-1]["text"] == "<image> , <image>"
    assert chat.prepare("<video>").visual == 0


def test_batches_with_such_words_are_padded(parts):
    processor = parts[1]
    batch = [[{"role": "user", "content": text}] for text in ("the <image> tag", "the")]
    made = processor.apply_chat_template(batch, tokenize=True, return_dict=True, padding_side="right")
    assert made["input_ids"].shape == made["attention_mask"].shape and made["attention_mask"][1, -1] == 0
    with pytest.raises(ValueError, match="1 <image> placeholder, but 0 images"):
        processor(text="the <image> tag")
    with pytest.raises(ValueError, match="no truncation for a text in which"):
        processor(text=as_words("the <image> tag"), truncation=True, max_length=3)


def test_words_with_the_tokenizers_of_others():
    """BPE over bytes, with a start of text; a tag is what it would be to a tokenizer that has no such token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("i", "m"), ("a", "g"), ("im", "ag"), ("<", "i"), ("Ġ", "<")]
    vocabulary = {each: i for i, each in enumerate([*letters, *map("".join, merges), "<s>", "<|end|>"])}

    def made(special):
        inside = Tokenizer(models.BPE(vocabulary | {}, merges))
        inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inside.decoder = decoders.ByteLevel()
        inside.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", vocabulary["<s>"])])
        return PreTrainedTokenizerFast(tokenizer_object=inside, bos_token="<s>", extra_special_tokens=special)

    plain, ours = made(["<|end|>"]), made(["<|end|>", "<image>", "<video>"])
    for text in ("an <image> tag<|end|>", "<image><video>", "a\n<video><|end|><|end|>é <image>"):
        assert tokens_of_words(ours, as_words(text)) == plain(text)["input_ids"] != ours(text)["input_ids"]
        bare = plain(text, add_special_tokens=False)["input_ids"]
        assert tokens_of_words(ours, as_words(text), add_special_tokens=False) == bare


@pytest.mark.parametrize("tag", ["<image>", "<video>"])
def test_a_needle_may_ask_for_a_tag(parts, tag):
    from longva.needle.needles import Needle
    from longva.needle.reader import make_prompt

    processor = parts[1]
    needle = Needle("x", Image.new("RGB", (28, 28), "red"), f"what is the {tag} tag", f"1 {tag}")
    prompt = make_prompt(processor, needle)
    assert tag in processor.tokenizer.decode(prompt.after) and processor.tokenizer.decode(prompt.answer) == f"1 {tag}"
    ids = {*prompt.before, *prompt.after, *prompt.answer}
    assert not ids & {processor.image_token_id, processor.video_token_id}
