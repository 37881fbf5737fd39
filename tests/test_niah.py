"""The text needle test: the original's recorded prompts, any tokenizer, killed and resumed, and the command."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from original import PARITY, WHOLE
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen2ForCausalLM
from typer.testing import CliRunner

from longva.cli import app
from longva.mini.reader import write_book
from longva.mini.world import mini_tokenizer
from longva.model import open as opener
from longva.model.open import OpenError, open_language
from longva.needle.book import (
    PAPER,
    SEED,
    Stops,
    TextSpot,
    TextTest,
    TextWording,
    draw_numbers,
    insert_piece,
    make_pieces,
    prompt_shape,
    read_haystack,
    sentence_stops,
    text_prompt,
    token_ids,
    trial_draw,
)
from longva.needle.niah import TextReader, decide_text, run
from longva.needle.perplexity import perplexity
from longva.needle.trials import NeedleError, key, read_trials
from longva.testing import digit_tokenizer, small_qwen2

ROOT = Path(__file__).resolve().parents[1]
LONGVA = [sys.executable, "-c", "from longva.cli import app; app()"]
NOUNS = "river clock garden engine letter lamp valley road".split()
VERBS = "follows keeps opens paints".split()
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def story(sentences, seed=0):
    draw = np.random.default_rng(seed)
    lines = []
    for _ in range(sentences):
        sentence = f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}"
        lines.append(sentence + draw.choice([".", "?", " 3.5 times."]))
    return " ".join(lines)


def word_tokenizer(begin=False):
    texts = ["The times .?!", *NOUNS, *VERBS, PAPER.prefix, PAPER.question, PAPER.needle, PAPER.city, *PAPER.others]
    tokenizer = digit_tokenizer(" ".join(texts), special=["<s>"], bos_token="<s>")
    if begin:
        first = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = first
    return tokenizer


def byte_tokenizer(regex=SPLIT):
    "Like Qwen2's: a full stop and the line ends behind it can be one token."
    tokenizer = Tokenizer(models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    text = story(400).replace(". ", ".\n", 80) + ' He said "no." She (too!) went.'
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def meta_tokenizer():
    "Like Llama-2's: spaces are part of the next token."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    texts = [story(400), PAPER.prefix, PAPER.question, PAPER.needle, PAPER.city, *PAPER.others, "0123456789"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny(tokenizer, seed=0):
    return small_qwen2(len(tokenizer), seed, intermediate_size=48)


def is_one_sentence(error):
    text = str(error.value)
    return text.endswith(".") and "\n" not in text


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("things") / "book"
    folder.mkdir()
    (folder / "b.txt").write_text(story(80, seed=1))
    (folder / "a.txt").write_text(story(80))
    return folder


@pytest.fixture(scope="module")
def words():
    return word_tokenizer()


# --- the original's numbers


@pytest.fixture(scope="module")
def parity():
    data = json.loads((PARITY / "text_niah" / "text_niah.json").read_text())
    tokenizers = {}
    for name, t in data["tokenizers"].items():
        tokenizers[name] = PreTrainedTokenizerFast(tokenizer_file=str(PARITY / t["file"]))
    return data, PARITY / data["haystack_file"], tokenizers


class OriginalDraw:
    "The original's stream of places, with a record of what was drawn."

    def __init__(self, seed):
        self.stream = np.random.RandomState(seed)
        self.drawn = []

    def __call__(self, n):
        self.drawn.append([0, n, int(self.stream.randint(0, n))])
        return self.drawn[-1][2]


def easycontext_prompt(pieces, haystack, spot, draw):
    "EasyContext hides the needle first, and then the distractors."
    at = int(len(haystack) * spot.depth) if spot.depth else None
    middle, first = insert_piece(haystack, pieces.needles[0], at, pieces.stops)
    for piece in pieces.distractors:
        middle, _ = insert_piece(middle, piece, draw(len(middle)), pieces.stops)
    return np.concatenate([pieces.prefix, middle, pieces.question]), first


def test_parity_every_prompt(parity):
    data, file, tokenizers = parity
    assert len(data["cases"]) == (91 if PARITY == WHOLE else 31)
    for case in data["cases"]:
        tokenizer = tokenizers[case["tokenizer"]]
        ours = case["order"] == "longva"
        question = data["question" if ours else "question_easycontext"]
        wording = TextWording(question=question.replace("Singapore", "{city}"))
        pieces = make_pieces(tokenizer, [case["needle_number"]], case["distractor_numbers"], wording)
        pieces = replace(pieces, stops=Stops(np.array(case["period_ids"]), np.array([], dtype=int)))
        haystack = read_haystack(file, tokenizer, case["context_length"])
        spot = TextSpot(0, case["context_length"], case["depth"])
        draw = OriginalDraw(case["numpy_seed"])
        ids, first = (text_prompt if ours else easycontext_prompt)(pieces, haystack, spot, draw)
        assert draw.drawn == case["draws_low_high_value"] and pieces.answers[0] == case["answer_ids"]
        assert len(ids) == case["prompt_length"] and len(pieces.needles[0]) == case["needle_length"]
        assert hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest() == case["prompt_sha256_int32_le"], case["id"]
        if ours:
            answer = len(case["answer_ids"])
            assert first == case["needle_first_last"][0]
            assert prompt_shape(pieces, spot) == (len(ids) + answer - 1, answer)


def test_parity_pieces_and_numbers(parity):
    data, file, tokenizers = parity
    assert PAPER.prefix == data["prefix"] and PAPER.question.format(city=PAPER.city) == data["question"]
    assert PAPER.needle.format(city="Singapore", number="{}") == data["needle_format"]
    assert [PAPER.needle.format(city=c, number="{}") for c in PAPER.others] == data["distractor_formats"]
    for stream in data["number_streams"]:
        drawn = draw_numbers(stream["num_samples"], stream["num_distractor"], stream["digits"], stream["seed"])
        assert drawn == (stream["needle_numbers"], stream["distractor_numbers"])
    for name, recorded in data["tokenizers"].items():
        pieces = make_pieces(tokenizers[name], [1])
        assert pieces.prefix.tolist() == recorded["prefix_ids"]
        assert pieces.question.tolist() == recorded["question_ids"]
        assert len(token_ids(tokenizers[name], file.read_text())) == recorded["haystack_tokens"]
        assert {recorded["period_id"], recorded["exclamation_id"]} <= set(
            pieces.stops.ends
        )  # found without knowing them


def test_sentences_end_before_the_needle():
    """In the original's essays where they lie beside the repository, or else in the recorded story."""
    essays = WHOLE.parent / "data" / "essays"
    story = PARITY / "text_niah" / "haystack.txt"
    tokenizer = byte_tokenizer()
    haystack = read_haystack(essays if essays.is_dir() else story, tokenizer, 20_000, repeat=True)
    pieces = make_pieces(tokenizer, *draw_numbers(2, 5))
    for depth in np.linspace(0.1, 0.9, 9):
        spot = TextSpot(1, 20_000, float(depth))
        ids, place = text_prompt(pieces, haystack, spot, trial_draw(SEED, spot))
        before = tokenizer.decode(ids[len(pieces.prefix) : place]).rstrip().rstrip("\"')")
        assert before[-1] in ".!?", before[-40:]


# --- any tokenizer

TOKENIZERS = {
    "words": word_tokenizer,
    "words with <s>": lambda: word_tokenizer(begin=True),
    "bytes": byte_tokenizer,
    "characters": lambda: byte_tokenizer(r"[\s\S]"),
    "metaspace": meta_tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("distractors", [0, 3, 5])
def test_needles_stand_between_sentences(name, distractors):
    tokenizer = TOKENIZERS[name]()
    haystack = token_ids(tokenizer, story(150))
    numbers, others = draw_numbers(3, distractors)
    pieces = make_pieces(tokenizer, numbers, others)

    def flat(ids):
        return "".join(tokenizer.decode(ids).split())

    for depth in (0, 0.1, 0.37, 0.5, 0.93, 1):
        spot = TextSpot(1, len(haystack) - 7, depth)
        ids, place = text_prompt(pieces, haystack, spot, trial_draw(SEED, spot))
        assert (ids[place : place + len(pieces.needles[1])] == pieces.needles[1]).all()
        assert len(ids) + len(pieces.answers[1]) - 1 == prompt_shape(pieces, spot)[0]
        text = flat(ids)
        before = flat(ids[:place])
        for city, number in zip(("Singapore", *PAPER.others), (numbers[1], *others)):
            assert text.count("".join(PAPER.sentence(city, number).split())) == 1  # whole, and once
        if depth == 0:
            assert place == len(pieces.prefix)
        elif depth < 0.9:
            assert before[-1] in ".?" and not before.endswith("3.")  # 3.5 is not torn
        assert ids.tolist().count(1) == ids[:1].tolist().count(1) or tokenizer.bos_token_id is None


def test_depth_is_where_it_says(words):
    haystack = token_ids(words, story(2000))
    pieces = make_pieces(words, [77])
    for depth in np.linspace(0, 1, 21):
        _, place = text_prompt(pieces, haystack, TextSpot(0, 10_000, float(depth)))
        assert 0 <= place - len(pieces.prefix) - depth * 10_000 < 12  # the next sentence end, and no further


def test_stops_of_a_tokenizer():
    tokenizer = byte_tokenizer()
    ends = {tokenizer.decode([i]) for i in sentence_stops(tokenizer).ends}
    assert {".", "?", "!", ".\n"} <= ends and not {",", ":", "The"} & ends
    assert all(tokenizer.decode([i])[0].isdigit() for i in sentence_stops(tokenizer).digits)


# --- a whole sweep


def test_run_leaves_everything_and_asks_for_the_answer_only(book, words, tmp_path, monkeypatch):
    model = tiny(words).train()
    kept = set()
    forward = Qwen2ForCausalLM.forward

    def watched(self, *args, logits_to_keep=0, **kwargs):
        out = forward(self, *args, logits_to_keep=logits_to_keep, **kwargs)
        kept.add((logits_to_keep, out.logits.shape[1]))
        return out

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", watched)
    seen = []
    given = dict(
        reader=(model, words),
        test=TextTest(book, distractors=3),
        lengths=[100, 50],
        depths=[1, 0, 0.5],
        out=tmp_path,
        progress=False,
    )
    trials = run(**given, train_length=50, on_trial=seen.append)
    assert kept == {(7, 7)} and model.training
    assert {p.name for p in tmp_path.iterdir()} == {
        "trials.jsonl",
        "settings.json",
        "all_accuracies.json",
        "avg_accuracy.txt",
        "heatmap.html",
        "heatmap.png",
    }
    assert len(trials) == 30 == len({key(t) for t in trials}) and read_trials(tmp_path / "trials.jsonl") == seen
    rows = json.loads((tmp_path / "all_accuracies.json").read_text())
    cells = [(r["Context Length"], r["Document Depth"]) for r in rows]
    assert cells == [(n, d) for n in (50, 100) for d in (0.0, 50.0, 100.0)]
    assert set(rows[0]) == {"Context Length", "Document Depth", "Score"}
    page = (tmp_path / "heatmap.html").read_text()
    assert "Context Length" in page and "tokens, depth" in page
    assert run(**given, on_trial=seen.append) == trials and len(seen) == 30  # nothing was computed twice
    assert len(run(**(given | dict(lengths=[150], depths=[0.25])))) == 5  # the grid may grow
    assert len(read_trials(tmp_path / "trials.jsonl")) == 35


def decided(reader, pieces, haystack, spots):
    return {
        spot: (place, verdict)
        for batch in decide_text(reader, pieces, haystack, spots)
        for spot, place, verdict, _ in batch
    }


def test_each_trial_alone_and_the_long_way(book, words):
    model = tiny(words, seed=1)
    pieces = make_pieces(words, *draw_numbers(5, 5))
    haystack = read_haystack(book, words, 200)
    spots = [TextSpot(j, n, d) for n, d, j in product((40, 200), (0.0, 0.3, 1.0), range(5))]
    together = decided(TextReader(model, words, batch_tokens=4000), pieces, haystack, spots)
    alone = decided(TextReader(model, words, batch_tokens=1), pieces, haystack, spots)
    assert set(together) == set(alone) == set(spots)
    for s in spots:
        place, (argmax, correct, margin) = alone[s]
        assert together[s][0] == place and together[s][1][:2] == (argmax, correct)
        assert abs(together[s][1][2] - margin) < 1e-4
        ids, where = text_prompt(pieces, haystack, s, trial_draw(SEED, s))
        with torch.no_grad():
            full = model(input_ids=torch.tensor([[*ids.tolist(), *pieces.answers[s.number]]])).logits[0]
        best = full[len(ids) - 1 : -1].argmax(-1).tolist()
        assert (where, best, best == pieces.answers[s.number]) == (place, argmax, correct)


def test_the_same_trials_whatever_was_run_before(book, words, tmp_path):
    given = dict(reader=(tiny(words), words), test=TextTest(book, distractors=5), progress=False)
    some = run(**given, lengths=[90], depths=[0.5], out=tmp_path / "a")
    more = run(**given, lengths=[30, 90], depths=[0, 0.5], out=tmp_path / "b")

    def plain(trials):
        return [(key(t), t.insert, t.argmax_ids) for t in trials if (t.frames, t.depth) == (90, 0.5)]

    assert plain(some) == plain(more)


def other_book(tmp_path):
    folder = tmp_path / "book"
    folder.mkdir()
    (folder / "a.txt").write_text(story(80, seed=2))
    return folder


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(seed=1), "numbers"),
        (dict(distractors=2), "distractors"),
        (dict(numbers=3), "numbers"),
        ("name", "model"),
        ("weights", "weights"),
        ("book", "haystack"),
        (dict(wording=TextWording(prefix="The clock")), "wording"),
        ("tokenizer", "tokens"),
    ],
)
def test_another_test_in_the_same_folder_is_refused(book, words, tmp_path, change, word):
    grid = dict(lengths=[40], depths=[0.5], out=tmp_path / "out", progress=False)
    run(TextReader(tiny(words), words, "tiny"), TextTest(book), **grid)
    before = (tmp_path / "out" / "trials.jsonl").read_bytes()
    model = tiny(words, seed=1 if change == "weights" else 0)
    tokenizer = word_tokenizer(begin=True) if change == "tokenizer" else words
    reader = TextReader(model, tokenizer, "other" if change == "name" else "tiny")
    haystack = other_book(tmp_path) if change == "book" else book
    test = TextTest(haystack, **(change if isinstance(change, dict) else {}))
    with pytest.raises(NeedleError, match="another test") as error:
        run(reader, test, **grid)
    assert word in str(error.value), str(error.value)
    assert (tmp_path / "out" / "trials.jsonl").read_bytes() == before


GRID = ("lengths", "depths", "train_length")


@pytest.mark.parametrize(
    "change, words_of_error",
    [
        (dict(lengths=[40, 99_999]), "tokens and 99999 are wanted"),
        (dict(lengths=[0]), "whole number of tokens"),
        (dict(lengths=[]), "at least one"),
        (dict(lengths=[2.5]), "2.5"),
        (dict(depths=[1.5]), "1.5"),
        (dict(distractors=7), "from 0 to 6"),
        (dict(distractors=-1), "-1"),
        (dict(distractors=0.5), "0.5"),
        (dict(numbers=0), "numbers must be a whole number from 1 to"),
        (dict(numbers=1.5), "1.5"),
        (dict(numbers=10**9), "1000000000"),
        (dict(numbers=True), "True"),
        (dict(digits=19), "from 1 to 18"),
        (dict(digits=2.5), "2.5"),
        (dict(seed=-1), "seed must be a whole number from 0 to 4294967295, not -1"),
        (dict(seed=2**32), "4294967296"),
        (dict(seed=1.5), "1.5"),
        (dict(seed=math.nan), "nan"),
        (dict(lengths=[10**12], repeat=True), "more than 100000000"),
        (dict(lengths=[math.inf]), "inf"),
        (dict(depths=[math.nan]), "nan"),
        (dict(train_length=-5), "training length must be a whole number of at least 1, not -5"),
        (dict(train_length=math.inf), "inf"),
        (dict(batch_tokens=0), "batch_tokens"),
        (dict(batch_tokens=math.nan), "nan"),
        (dict(wording=dict(needle=" The number is {number}."), distractors=1), "{city}"),
        (dict(wording=dict(city="Atlantis")), "doesn't know every word"),
        (dict(haystack="foreign"), "100%"),
        (dict(haystack="nowhere"), "no haystack folder nowhere"),
        (dict(haystack="empty"), "is empty"),
        (dict(haystack="blank"), "holds no text"),
        (dict(haystack="latin"), "not UTF-8"),
        (dict(model="gpt2"), "learned 64 positions"),
    ],
)
def test_refused_before_anything_is_computed(book, words, tmp_path, monkeypatch, change, words_of_error):
    for name in ("empty", "blank", "latin", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / "a.txt").write_text("nesciunt quidem " * 50)
    (tmp_path / "blank" / "a.txt").touch()
    (tmp_path / "latin" / "a.txt").write_bytes("caf\xe9 ".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", lambda *a, **k: pytest.fail("the model was asked"))
    model = tiny(words)
    if change.get("model") == "gpt2":
        sizes = dict(n_embd=8, n_layer=1, n_head=1, n_positions=64)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), bos_token_id=None, eos_token_id=None, **sizes))
    grid = dict(lengths=[40], depths=[0.5]) | {k: v for k, v in change.items() if k in GRID}
    asked = {k: v for k, v in change.items() if k not in (*GRID, "batch_tokens", "model")}
    with pytest.raises(NeedleError) as error:
        asked["wording"] = TextWording(**asked.get("wording", {}))
        test = TextTest(**dict(haystack=book) | asked)
        run(
            TextReader(model, words, batch_tokens=change.get("batch_tokens", 4096)),
            test,
            **grid,
            out="out",
            progress=False,
        )
    assert words_of_error in str(error.value) and is_one_sentence(error), str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, words_of_error",
    [
        (dict(needle="The number of {city}."), "no {number}"),
        (dict(needle="{number} {town}"), "{town}"),
        (dict(needle="{city} {number} {}"), "{}"),
        (dict(needle="{number} {"), "braces"),
        (dict(needle="{number} }"), "braces"),
        (dict(needle="{number:d}"), "{number:d}"),
        (dict(needle="{number!r}"), "{number!r}"),
        (dict(needle="{number:>{city}}"), "{number:"),
        (dict(needle="{{number}}"), "no {number}"),
        (dict(needle="{city.upper} {number}"), "{city.upper}"),
        (dict(needle="{city} {number[0]}"), "{number[0]}"),
        (dict(needle=7), "needle"),
        (dict(city=None), "city"),
        (dict(question="Which {town}?"), "{town}"),
        (dict(question="Is it {number} in {city}?"), "{number}"),
        (dict(question="{"), "braces"),
        (dict(others=("London", "Singapore")), "Singapore"),
        (dict(city="Paris"), "Paris"),
        (dict(others="Paris"), "others"),
        (dict(others=(1, 2)), "others"),
        (dict(others=None), "others"),
        (dict(others=("Paris", "Paris")), "twice"),
    ],
)
def test_wordings_that_nothing_can_be_asked_with(change, words_of_error):
    with pytest.raises(NeedleError) as error:
        TextWording(**change)
    assert words_of_error in str(error.value) and is_one_sentence(error), str(error.value)


def test_wordings_that_are_unusual_but_fine():
    braces = TextWording(needle="{{{city}}} {number} {number}", prefix="{", question="{city}")
    assert braces.sentence("Rome", 12) == "{Rome} 12 12"
    assert TextWording(question="And the number is ", others=()).others == ()


@pytest.mark.parametrize("unknown", [0.4, 0.6, 1])
def test_a_book_in_words_that_the_tokenizer_does_not_know(words, tmp_path, unknown):
    text = " ".join("unheard" if i % 10 < 10 * unknown else "river" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    if unknown < 0.5:
        assert len(read_haystack(tmp_path, words, 100)) == 100
    else:
        message = f"{unknown:.0%} are unknown to the tokenizer"
        with pytest.raises(NeedleError, match=message):
            read_haystack(tmp_path, words, 100)
        with pytest.raises(NeedleError, match=message):
            perplexity((tiny(words), words), text, [50], progress=False)
    assert len(read_haystack(tmp_path, byte_tokenizer(), 100)) == 100  # bytes spell everything


@pytest.mark.parametrize(
    "change, words_of_error",
    [
        (dict(windows=0), "count of windows must be"),
        (dict(windows=-3), "-3"),
        (dict(windows=1.5), "1.5"),
        (dict(windows=math.inf), "inf"),
        (dict(score=0), "not 0"),
        (dict(score=-1), "not -1"),
        (dict(score=2.5), "2.5"),
        (dict(score=math.nan), "nan"),
        (dict(lengths=[1]), "at least 2"),
        (dict(lengths=[-4]), "-4"),
        (dict(lengths=[math.nan]), "nan"),
        (dict(lengths=[10**12]), "are wanted"),
        (dict(text=""), "holds 0 tokens"),
    ],
)
def test_perplexity_refuses(words, change, words_of_error):
    given = dict(reader=(tiny(words), words), text=story(30), lengths=[16, 32], progress=False) | change
    with pytest.raises(NeedleError) as error:
        perplexity(**given)
    assert words_of_error in str(error.value) and is_one_sentence(error), str(error.value)


def test_repeat_is_a_decision(book, words, tmp_path):
    have = len(token_ids(words, story(80))) + len(token_ids(words, story(80, seed=1)))
    with pytest.raises(NeedleError, match=f"holds {have} tokens"):
        read_haystack(book, words, have + 1)
    twice = read_haystack(book, words, 2 * have, repeat=True)
    assert (twice[:have] == twice[have:]).all() and (twice[:have] == read_haystack(book, words, have)).all()
    test = TextTest(book, numbers=1, repeat=True)
    assert len(run((tiny(words), words), test, [have + 100], [0.5], tmp_path, progress=False)) == 1


def test_no_memory_and_no_numbers_are_sentences(book, words, tmp_path, monkeypatch):
    model = tiny(words)
    given = dict(reader=(model, words), test=TextTest(book), lengths=[40], depths=[0.5], progress=False)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 97 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(Qwen2ForCausalLM, "forward", full)
        with pytest.raises(NeedleError, match="tokens do not fit into memory"):
            run(**given, out=tmp_path)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(NeedleError, match="bfloat16"):
        run(**given, out=tmp_path / "b")
    assert read_trials(tmp_path / "trials.jsonl") == []


def test_the_language_model_inside_a_miniature(tmp_path):
    model, tokenizer = open_language("mini-longva")
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / "a.txt").write_text("bear red plain . sofa blue dots . " * 40)
    words = dict(
        prefix=".", needle="{city} number {number} .", question="{city} number", city="lima", others=("paris",)
    )
    test = TextTest(tmp_path / "facts", digits=2, wording=TextWording(**words, between=" "))
    trials = run((model, tokenizer), test, [32], [0, 0.5, 1], tmp_path / "out", progress=False)
    pieces = test.pieces(tokenizer)
    haystack = test.read(tokenizer, 32)
    for t in trials[::5]:
        ids, _ = text_prompt(pieces, haystack, TextSpot(int(t.needle[0]) - 1, t.frames, t.depth))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids.tolist(), *t.answer_ids]])).logits
        assert logits[0, len(ids) - 1 : -1].argmax(-1).tolist() == t.argmax_ids


def test_a_tokenizer_is_loaded_as_it_was_saved(saved, words):
    model, tokenizer = open_language(saved)
    tokens = ["The", "river", "keeps", "3", ".", "5", "."]
    assert tokenizer.tokenize("The river keeps 3.5.") == words.tokenize("The river keeps 3.5.") == tokens
    assert isinstance(model, Qwen2ForCausalLM)


def test_unknown_models(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "teapot"}')
    words_of_error = {"empty": "holds no model", "odd": "holds no tokenizer"}
    for name, words in words_of_error.items():
        with pytest.raises(OpenError, match=f"{name} {words}") as error:
            open_language(tmp_path / name)
        assert is_one_sentence(error)


def test_a_name_on_an_unreachable_hub_is_asked_for_once(book, tmp_path):
    "Port 9 doesn't answer. The hub itself would try five more times, pausing for 23 seconds, a warning each."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    call = [*LONGVA, *command("unknown/name", book, "out")]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert (
        done.stderr
        == "No language model can be loaded from unknown/name: it is no folder here, and the Hugging Face hub can't be "
        "reached to look for the name there: check the path, or the network.\n"
    )


def test_names_that_the_hub_does_not_know(monkeypatch):
    monkeypatch.setattr(opener, "file_exists", lambda *names: False)
    with pytest.raises(
        OpenError, match="unknown/name: it is no folder here, and the Hugging Face hub shows no such model"
    ):
        open_language("unknown/name")
    monkeypatch.setattr(opener, "file_exists", lambda *names: pytest.fail("the hub was asked"))
    with pytest.raises(OpenError, match="no/such/folder: it is no folder here, and can't be a name"):
        open_language("no/such/folder")


# --- perplexity


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(book, words):
    model = tiny(words)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = perplexity((model, words), book, [16, 64, 256], progress=False)
    assert [r.length for r in rows] == [16, 64, 256]
    assert all(math.isclose(r.perplexity, len(words), rel_tol=1e-5) and r.tokens == 32 for r in rows)


@pytest.mark.parametrize("begin", [False, True])
def test_perplexity_by_hand(begin):
    tokenizer = word_tokenizer(begin)
    model = tiny(tokenizer, seed=2)
    ids = token_ids(tokenizer, story(60))[:200]
    given = tokenizer.decode(ids)
    assert (token_ids(tokenizer, given) == ids).all()
    rows = perplexity((model, tokenizer), given, [32, 100], score=20, windows=3, progress=False)
    for row in rows:
        total = 0.0
        for end in (100, 150, 200):
            window = torch.tensor([[*([1] if begin else []), *ids[end - row.length : end].tolist()]])
            with torch.no_grad():
                logits = model(input_ids=window).logits[0].double()
            likelihood = logits[:-1].log_softmax(-1)[range(window.shape[1] - 1), window[0, 1:]]
            total -= likelihood[-20:].sum().item()
        assert abs(row.loss - total / 60) < 1e-5 and row.tokens == 60
        assert math.isclose(row.perplexity, math.exp(row.loss))
    with pytest.raises(NeedleError, match="holds 200 tokens and 201"):
        perplexity((model, tokenizer), given, [201], progress=False)
    with pytest.raises(NeedleError, match="from 1 to 31, not 32"):
        perplexity((model, tokenizer), given, [32], score=32, progress=False)


# --- killed, stopped, and the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny(words).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def command(saved, book, out, lengths="60,120", **more):
    given = dict(model=saved, haystack=book, lengths=lengths, depths="0,0.25,0.5,0.75,1", distractors="0,3", out=out)
    words = ["niah"]
    for name, value in (given | more).items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def test_the_command(saved, book, tmp_path):
    more = {"perplexity": True, "train-length": 60, "rope-base": 1e6}
    done = CliRunner().invoke(app, command(saved, book, tmp_path / "out", **more))
    assert done.exit_code == 0, (done.output, done.exception)
    for k in (0, 3):
        folder = tmp_path / "out" / f"distractors_{k}"
        assert len(read_trials(folder / "trials.jsonl")) == 50 and (folder / "heatmap.png").exists()
        assert f"{k} distractors" in done.output
    assert "tokens" in done.output and "/25" in done.output
    rows = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert [r["length"] for r in rows] == [60, 120] and "perplexity" in done.output


@pytest.mark.parametrize(
    "change, code, words_of_error",
    [
        (dict(model="nowhere/at-all"), 2, "No language model can be loaded from nowhere/at-all"),
        (dict(haystack="nowhere"), 1, "no haystack folder nowhere"),
        (dict(lengths="60,many"), 2, "--lengths takes whole numbers"),
        (dict(lengths="60,9999999"), 1, "are wanted"),
        (dict(depths="2"), 2, "--depths: A depth must lie between 0 (the start) and 1 (the end), not at 2"),
        (dict(lengths="0"), 2, "--lengths: A length must be"),
        (dict(model=""), 2, "--model is empty"),
        (dict(distractors="9"), 1, "from 0 to 6"),
        (dict(distractors="0,9"), 1, "from 0 to 6"),
        (dict(distractors="some"), 2, "--distractors takes"),
        (dict(model="mini-longva"), 1, "are unknown to the tokenizer"),
        (dict(lengths="1000000000000", repeat=True), 1, "more than 100000000"),
        (dict(lengths=""), 2, "--lengths takes"),
        (dict(lengths="1,60", perplexity=True), 2, "--perplexity"),
        (dict(haystack=None), 2, "Say with --haystack"),
        (dict(haystack=None, model="no/where"), 2, "No model can be loaded"),
        ({"rope-base": "0.5"}, 2, "--rope-base must be"),
        ({"rope-base": "inf"}, 2, "--rope-base must be"),
    ],
)
def test_one_sentence_and_nothing_written(saved, book, tmp_path, monkeypatch, change, code, words_of_error):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, command(saved, book, "out", **change))
    mini = change.get("model") == "mini-longva"
    printed = "Wording: the miniature's own, 2 digits of lima.\n" if mini else ""
    assert (done.exit_code, done.stdout) == (code, printed), (done.stdout, done.stderr, done.exception)
    assert words_of_error in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option, value", [("numbers", 0), ("train-length", -5)])
def test_numbers_out_of_range(saved, book, tmp_path, monkeypatch, option, value):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, command(saved, book, "out", **{option: value}))
    assert done.exit_code == 2 and not done.stdout and f"--{option}" in done.stderr.splitlines()[-1], done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved_mini(tmp_path_factory):
    "Untrained, in a folder such as `longva extend` leaves."
    folder = tmp_path_factory.mktemp("runs") / "long" / "model"
    tiny(mini_tokenizer()).save_pretrained(folder)
    mini_tokenizer().save_pretrained(folder)
    return folder


def test_a_miniature_has_a_book_and_words_of_its_own(saved_mini, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["niah", "--model", str(saved_mini), "--distractors", "0,5", "--numbers", "2", "--perplexity"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    out = Path("runs") / "niah" / "long_book"
    assert "Wording: the miniature's own" in done.stdout
    assert f"Haystack: a book of the miniature's world, written to {out / 'book'}." in done.stdout
    text = (out / "book" / "scenes.txt").read_text()
    assert text == (write_book(tmp_path / "again") / "scenes.txt").read_text()
    for k in (0, 5):
        trials = read_trials(out / f"distractors_{k}" / "trials.jsonl")
        settings = json.loads((out / f"distractors_{k}" / "settings.json").read_text())
        assert Counter(t.frames for t in trials) == dict.fromkeys((64, 128, 256, 384, 496), 10)
        assert settings["wording"]["city"] == "lima" and max(settings["numbers"]) < 100
        assert settings["distractors"] == draw_numbers(2, k, 2)[1]
    assert [r["length"] for r in json.loads((out / "perplexity.json").read_text())] == [64, 128, 256, 384, 496]
    before = (out / "distractors_0" / "trials.jsonl").read_bytes()
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (out / "distractors_0" / "trials.jsonl").read_bytes() == before  # resumed, nothing left to do


def test_a_book_that_is_given_is_not_written(saved_mini, tmp_path):
    folder = write_book(tmp_path / "book")
    words = ["niah", "--model", str(saved_mini), "--haystack", str(folder), "--lengths", "64", "--numbers", "1"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "own")])
    assert done.exit_code == 0 and "Wording" in done.stdout and "Haystack" not in done.stdout
    assert not (tmp_path / "own" / "book").exists()


@pytest.mark.parametrize(
    "more, words_of_error",
    [
        (["--lengths", "9000"], "holds 2000 tokens and 9000 are wanted"),
        (["--distractors", "6"], "from 0 to 5"),
        (["--lengths", "1000000000000", "--repeat"], "more than 100000000"),
    ],
)
def test_a_miniatures_book_is_refused_before_it_is_written(saved_mini, tmp_path, more, words_of_error):
    done = CliRunner().invoke(app, ["niah", "--model", str(saved_mini), "--out", str(tmp_path / "out"), *more])
    assert done.exit_code == 1 and words_of_error in done.stderr, (done.output, done.exception)
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_another_book_is_not_overwritten(saved_mini, tmp_path):
    (tmp_path / "out" / "book").mkdir(parents=True)
    (tmp_path / "out" / "book" / "scenes.txt").write_text("bear red plain .")
    done = CliRunner().invoke(app, ["niah", "--model", str(saved_mini), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "holds something else" in done.stderr
    assert (tmp_path / "out" / "book" / "scenes.txt").read_text() == "bear red plain ."
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["book"]


def stop_when_it_runs(words, tmp_path, log, least, sent) -> tuple:  # (exit status, standard error)
    "Run the command, and send it a signal as soon as its log has so many lines."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([*LONGVA, *words], cwd=tmp_path, env=env, start_new_session=True, **pipes)
    limit = time.time() + 200
    while time.time() < limit and process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= least:
            break
        time.sleep(0.005)
    if process.poll() is not None:
        pytest.fail(f"it ended before it could be stopped: {process.communicate()}")
    os.killpg(process.pid, sent)
    _, errors = process.communicate(timeout=100)
    return process.returncode, errors


def test_killed_then_stopped_then_finished(saved, book, tmp_path):
    words = command(saved, book, tmp_path / "out", lengths="400,500,600,700,800", distractors="3", numbers=20)
    log = tmp_path / "out" / "distractors_3" / "trials.jsonl"
    status, _ = stop_when_it_runs(words, tmp_path, log, 10, signal.SIGKILL)
    killed = log.read_bytes().count(b"\n")
    assert status == -9
    status, errors = stop_when_it_runs(words, tmp_path, log, killed + 10, signal.SIGINT)
    assert status == 130, errors
    assert errors.count("Stopped") == 1 and "run the same command again to resume." in errors
    assert "Traceback" not in errors
    assert killed < log.read_bytes().count(b"\n") < 500
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(read_trials(log)) == 500 and set(Counter(map(key, read_trials(log))).values()) == {1}
