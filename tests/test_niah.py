"""The text needle test: against the original's recorded prompts, in any tokenizer, killed and resumed, and the command."""

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
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from longva.cli import app
from longva.mini import folder as mini_folder
from longva.mini.reader import write_book
from longva.mini.world import mini_tokenizer
from longva.needle.book import (
    PAPER,
    SEED,
    Spot,
    Stops,
    Wording,
    draw_numbers,
    encode,
    insert,
    make_pieces,
    make_prompt,
    read_haystack,
    sentence_stops,
    shape,
    trial_draw,
)
from longva.needle.niah import decisions, load, perplexity, run
from longva.needle.trials import NeedleError, key, read_trials

ROOT = Path(__file__).resolve().parents[1]
NOUNS, VERBS = "river clock garden engine letter lamp valley road".split(), "follows keeps opens paints".split()


def story(sentences, seed=0):
    draw = np.random.default_rng(seed)
    return " ".join(f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}{draw.choice(['.', '?', ' 3.5 times.'])}" for _ in range(sentences))


def word_tokenizer(begin=False):
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)])
    everything = " ".join(["The times", *NOUNS, *VERBS, "0123456789 .?!", PAPER.prefix, PAPER.question, PAPER.needle, PAPER.city, *PAPER.others])
    words = ["<unk>", "<s>", *sorted({w for w, _ in split.pre_tokenize_str(everything)})]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    if begin: tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def byte_tokenizer(regex=r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"):
    "Like Qwen2's: a full stop and the line ends behind it can be one token."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    text = story(400).replace(". ", ".\n", 80) + ' He said "no." She (too!) went.'
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def meta_tokenizer():
    "Like Llama-2's: spaces are part of the next token."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator([story(400), PAPER.prefix, PAPER.question, PAPER.needle, PAPER.city, *PAPER.others, "0123456789"], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny(tokenizer, seed=0):
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         bos_token_id=None, eos_token_id=None)
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("things") / "book"
    folder.mkdir()
    (folder / "b.txt").write_text(story(80, seed=1))
    (folder / "a.txt").write_text(story(80))
    return folder


@pytest.fixture(scope="module")
def words(): return word_tokenizer()


# --- the original's numbers

@pytest.fixture(scope="module")
def parity(shared_data):
    folder = shared_data / "parity"
    if not (folder / "text_niah" / "text_niah.json").exists(): pytest.skip("the parity numbers of the text needle test are not on this machine")
    data = json.loads((folder / "text_niah" / "text_niah.json").read_text())
    tokenizers = {name: PreTrainedTokenizerFast(tokenizer_file=str(folder / t["file"])) for name, t in data["tokenizers"].items()}
    return data, folder / data["haystack_file"], tokenizers


def test_parity_every_prompt(parity):
    data, file, tokenizers = parity
    assert len(data["cases"]) == 91
    for case in data["cases"]:
        tokenizer, stops = tokenizers[case["tokenizer"]], Stops(np.array(case["period_ids"]), np.array([], dtype=int))
        ours = case["order"] == "longva"
        wording = Wording(question=data["question" if ours else "question_easycontext"].replace("Singapore", "{city}"))
        pieces = replace(make_pieces(tokenizer, [case["needle_number"]], case["distractor_numbers"], wording), stops=stops)
        haystack, spot = read_haystack(file, tokenizer, case["context_length"]), Spot(0, case["context_length"], case["depth"])
        old, drawn = np.random.RandomState(case["numpy_seed"]), []
        def draw(n):
            drawn.append([0, n, int(old.randint(0, n))])
            return drawn[-1][2]
        if ours: ids, first = make_prompt(pieces, haystack, spot, draw)
        else:  # EasyContext hides the needle first, and then the distractors
            middle, first = insert(haystack, pieces.needles[0], int(len(haystack) * spot.depth) if spot.depth else None, stops)
            for piece in pieces.distractors: middle, _ = insert(middle, piece, draw(len(middle)), stops)
            ids = np.concatenate([pieces.prefix, middle, pieces.question])
        assert drawn == case["draws_low_high_value"] and pieces.answers[0] == case["answer_ids"]
        assert len(ids) == case["prompt_length"] and len(pieces.needles[0]) == case["needle_length"]
        assert hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest() == case["prompt_sha256_int32_le"], case["id"]
        if ours:
            assert first == case["needle_first_last"][0]
            assert shape(pieces, spot) == (len(ids) + len(case["answer_ids"]) - 1, len(case["answer_ids"]))


def test_parity_pieces_and_numbers(parity):
    data, file, tokenizers = parity
    assert PAPER.prefix == data["prefix"] and PAPER.question.format(city=PAPER.city) == data["question"]
    assert PAPER.needle.replace("{city}", "Singapore").replace("{number}", "{}") == data["needle_format"]
    assert [PAPER.needle.replace("{city}", c).replace("{number}", "{}") for c in PAPER.others] == data["distractor_formats"]
    for stream in data["number_streams"]:
        assert draw_numbers(stream["num_samples"], stream["num_distractor"], stream["digits"], stream["seed"]) == (stream["needle_numbers"], stream["distractor_numbers"])
    for name, told in data["tokenizers"].items():
        pieces = make_pieces(tokenizers[name], [1])
        assert pieces.prefix.tolist() == told["prefix_ids"] and pieces.question.tolist() == told["question_ids"]
        assert len(encode(tokenizers[name], file.read_text())) == told["haystack_tokens"]
        assert {told["period_id"], told["exclamation_id"]} <= set(pieces.stops.ends)  # found without being told


def test_the_real_essays(shared_data):
    folder = shared_data / "data" / "essays"
    if not folder.is_dir(): pytest.skip("the essays are not on this machine")
    tokenizer = byte_tokenizer()
    haystack, pieces = read_haystack(folder, tokenizer, 20_000), make_pieces(tokenizer, *draw_numbers(2, 5))
    for depth in np.linspace(0.1, 0.9, 9):
        spot = Spot(1, 20_000, float(depth))
        ids, place = make_prompt(pieces, haystack, spot, trial_draw(SEED, spot))
        before = tokenizer.decode(ids[len(pieces.prefix) : place]).rstrip().rstrip("\"')")
        assert before[-1] in ".!?", before[-40:]


# --- any tokenizer

@pytest.mark.parametrize("make", [word_tokenizer, lambda: word_tokenizer(begin=True), byte_tokenizer, lambda: byte_tokenizer(r"[\s\S]"), meta_tokenizer],
                         ids=["words", "words with <s>", "bytes", "characters", "metaspace"])
@pytest.mark.parametrize("distractors", [0, 3, 5])
def test_needles_stand_between_sentences(make, distractors):
    tokenizer, text = make(), story(150)
    haystack, pieces = encode(tokenizer, text), make_pieces(tokenizer, *draw_numbers(3, distractors))
    flat = lambda ids: "".join(tokenizer.decode(ids).split())
    for depth in (0, 0.1, 0.37, 0.5, 0.93, 1):
        spot = Spot(1, len(haystack) - 7, depth)
        ids, place = make_prompt(pieces, haystack, spot, trial_draw(SEED, spot))
        assert (ids[place : place + len(pieces.needles[1])] == pieces.needles[1]).all()
        assert len(ids) + len(pieces.answers[1]) - 1 == shape(pieces, spot)[0]
        said, before = flat(ids), flat(ids[:place])
        for city, number in zip(("Singapore", *PAPER.others), (draw_numbers(3)[0][1], *draw_numbers(3, distractors)[1])):
            assert said.count("".join(PAPER.sentence(city, number).split())) == 1  # whole, and once
        if depth == 0: assert place == len(pieces.prefix)
        elif depth < 0.9: assert before[-1] in ".?" and not before.endswith("3.")  # 3.5 is not torn
        assert ids.tolist().count(1) == ids[:1].tolist().count(1) or tokenizer.bos_token_id is None


def test_depth_is_where_it_says(words):
    haystack, pieces = encode(words, story(2000)), make_pieces(words, [77])
    for depth in np.linspace(0, 1, 21):
        _, place = make_prompt(pieces, haystack, Spot(0, 10_000, float(depth)))
        assert 0 <= place - len(pieces.prefix) - depth * 10_000 < 12  # the next sentence end, and no further


def test_stops_of_a_tokenizer():
    tokenizer = byte_tokenizer()
    ends = {tokenizer.decode([i]) for i in sentence_stops(tokenizer).ends}
    assert {".", "?", "!", ".\n"} <= ends and not {",", ":", "The"} & ends
    assert all(tokenizer.decode([i])[0].isdigit() for i in sentence_stops(tokenizer).digits)


# --- a whole sweep

def test_run_leaves_everything_and_asks_for_the_answer_only(book, words, tmp_path, monkeypatch):
    model, kept = tiny(words).train(), set()
    forward = Qwen2ForCausalLM.forward
    def watched(self, *args, logits_to_keep=0, **kwargs):
        out = forward(self, *args, logits_to_keep=logits_to_keep, **kwargs)
        kept.add((logits_to_keep, out.logits.shape[1]))
        return out
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", watched)
    seen, given = [], dict(model=model, tokenizer=words, haystack_folder=book, lengths=[100, 50], depths=[1, 0, 0.5], out=tmp_path, distractors=3, progress=False)
    trials = run(**given, train_length=50, on_trial=seen.append)
    assert kept == {(7, 7)} and model.training
    assert {p.name for p in tmp_path.iterdir()} == {"trials.jsonl", "settings.json", "all_accuracies.json", "avg_accuracy.txt", "heatmap.html", "heatmap.png"}
    assert len(trials) == 30 == len({key(t) for t in trials}) and read_trials(tmp_path / "trials.jsonl") == seen
    rows = json.loads((tmp_path / "all_accuracies.json").read_text())
    assert [(r["Context Length"], r["Document Depth"]) for r in rows] == [(n, d) for n in (50, 100) for d in (0.0, 50.0, 100.0)] and set(rows[0]) == {"Context Length", "Document Depth", "Score"}
    assert "Context Length" in (tmp_path / "heatmap.html").read_text() and "tokens, depth" in (tmp_path / "heatmap.html").read_text()
    assert run(**given, on_trial=seen.append) == trials and len(seen) == 30  # nothing was computed twice
    assert len(run(**(given | dict(lengths=[150], depths=[0.25])))) == 5 and len(read_trials(tmp_path / "trials.jsonl")) == 35  # the grid may grow


def test_each_trial_alone_and_the_long_way(book, words):
    model, pieces, haystack = tiny(words, seed=1), make_pieces(words, *draw_numbers(5, 5)), read_haystack(book, words, 200)
    spots = [Spot(j, n, d) for n in (40, 200) for d in (0.0, 0.3, 1.0) for j in range(5)]
    together = {s: (p, v) for batch in decisions(model, pieces, haystack, spots, batch_tokens=4000) for s, p, v, _ in batch}
    alone = {s: (p, v) for batch in decisions(model, pieces, haystack, spots, batch_tokens=1) for s, p, v, _ in batch}
    assert set(together) == set(alone) == set(spots)
    for s in spots:
        assert together[s][0] == alone[s][0] and together[s][1][:2] == alone[s][1][:2] and abs(together[s][1][2] - alone[s][1][2]) < 1e-4
        ids, place = make_prompt(pieces, haystack, s, trial_draw(SEED, s))
        with torch.no_grad(): full = model(input_ids=torch.tensor([[*ids.tolist(), *pieces.answers[s.number]]])).logits[0]
        best = full[len(ids) - 1 : -1].argmax(-1).tolist()
        assert (place, best, best == pieces.answers[s.number]) == (alone[s][0], *alone[s][1][:2])


def test_the_same_trials_whatever_was_run_before(book, words, tmp_path):
    given = dict(model=tiny(words), tokenizer=words, haystack_folder=book, distractors=5, progress=False)
    some = run(**given, lengths=[90], depths=[0.5], out=tmp_path / "a")
    more = run(**given, lengths=[30, 90], depths=[0, 0.5], out=tmp_path / "b")
    plain = lambda trials: [(key(t), t.insert, t.argmax_ids) for t in trials if (t.frames, t.depth) == (90, 0.5)]
    assert plain(some) == plain(more)


@pytest.mark.parametrize("change, word", [
    (dict(seed=1), "numbers"), (dict(distractors=2), "distractors"), (dict(numbers=3), "numbers"), (dict(name="other"), "model"), (dict(weights=1), "weights"),
    (dict(book="more"), "haystack"), (dict(wording=Wording(prefix="The clock")), "wording"), (dict(tokenizer=1), "tokens")])
def test_another_test_in_the_same_folder_is_refused(book, words, tmp_path, change, word):
    given = dict(model=tiny(words), tokenizer=words, haystack_folder=book, lengths=[40], depths=[0.5], out=tmp_path / "out", name="tiny", progress=False)
    run(**given)
    before = (tmp_path / "out" / "trials.jsonl").read_bytes()
    if change.get("weights"): given["model"] = tiny(words, seed=1)
    elif change.get("tokenizer"): given["tokenizer"] = word_tokenizer(begin=True)
    elif change.get("book"):
        given["haystack_folder"] = tmp_path / "book"
        given["haystack_folder"].mkdir()
        (tmp_path / "book" / "a.txt").write_text(story(80, seed=2))
    else: given |= change
    with pytest.raises(NeedleError, match="another test") as error: run(**given)
    assert word in str(error.value), str(error.value)
    assert (tmp_path / "out" / "trials.jsonl").read_bytes() == before


@pytest.mark.parametrize("change, said", [
    (dict(lengths=[40, 99_999]), "tokens and 99999 are wanted"), (dict(lengths=[0]), "whole number of tokens"), (dict(lengths=[]), "at least one"), (dict(lengths=[2.5]), "2.5"),
    (dict(depths=[1.5]), "1.5"), (dict(distractors=7), "from 0 to 6"), (dict(distractors=-1), "-1"), (dict(distractors=0.5), "0.5"),
    (dict(numbers=0), "numbers must be a whole number from 1 to"), (dict(numbers=1.5), "1.5"), (dict(numbers=10**9), "1000000000"), (dict(numbers=True), "True"),
    (dict(digits=19), "from 1 to 18"), (dict(digits=2.5), "2.5"), (dict(seed=-1), "seed must be a whole number from 0 to 4294967295, not -1"), (dict(seed=2**32), "4294967296"),
    (dict(seed=1.5), "1.5"), (dict(seed=math.nan), "nan"), (dict(lengths=[10**12], repeat=True), "more than 100000000"), (dict(lengths=[math.inf]), "inf"), (dict(depths=[math.nan]), "nan"),
    (dict(train_length=-5), "training length must be a whole number of at least 1, not -5"), (dict(train_length=math.inf), "inf"), (dict(batch_tokens=0), "batch_tokens"), (dict(batch_tokens=math.nan), "nan"),
    (dict(wording=Wording(needle=" The number is {number}."), distractors=1), "{city}"), (dict(haystack_folder="foreign"), "100%"),
    (dict(wording=Wording(city="Atlantis")), "doesn't know every word"), (dict(haystack_folder="nowhere"), "no haystack folder nowhere"),
    (dict(haystack_folder="empty"), "is empty"), (dict(haystack_folder="blank"), "holds no text"), (dict(haystack_folder="latin"), "not UTF-8"),
    (dict(model="gpt2"), "learned 64 positions")])
def test_refused_before_anything_is_computed(book, words, tmp_path, monkeypatch, change, said):
    for name in ("empty", "blank", "latin", "foreign"): (tmp_path / name).mkdir()
    (tmp_path / "foreign" / "a.txt").write_text("nesciunt quidem " * 50)
    (tmp_path / "blank" / "a.txt").touch()
    (tmp_path / "latin" / "a.txt").write_bytes("caf\xe9 ".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", lambda *a, **k: pytest.fail("the model was asked"))
    given = dict(model=tiny(words), tokenizer=words, haystack_folder=book, lengths=[40], depths=[0.5], out="out", progress=False) | change
    if given["model"] == "gpt2": given["model"] = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_embd=8, n_layer=1, n_head=1, n_positions=64, bos_token_id=None, eos_token_id=None))
    with pytest.raises(NeedleError) as error: run(**given)
    assert said in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value), str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, said", [
    (dict(needle="The number of {city}."), "no {number}"), (dict(needle="{number} {town}"), "{town}"), (dict(needle="{city} {number} {}"), "{}"), (dict(needle="{number} {"), "braces"),
    (dict(needle="{number} }"), "braces"), (dict(needle="{number:d}"), "{number:d}"), (dict(needle="{number!r}"), "{number!r}"), (dict(needle="{number:>{city}}"), "{number:"), (dict(needle="{{number}}"), "no {number}"),
    (dict(needle="{city.upper} {number}"), "{city.upper}"), (dict(needle="{city} {number[0]}"), "{number[0]}"), (dict(needle=7), "needle"), (dict(city=None), "city"),
    (dict(question="Which {town}?"), "{town}"), (dict(question="Is it {number} in {city}?"), "{number}"), (dict(question="{"), "braces"),
    (dict(others=("London", "Singapore")), "Singapore"), (dict(city="Paris"), "Paris"), (dict(others="Paris"), "others"), (dict(others=(1, 2)), "others"), (dict(others=None), "others"),
    (dict(others=("Paris", "Paris")), "twice")])
def test_wordings_that_nothing_can_be_asked_with(change, said):
    with pytest.raises(NeedleError) as error: Wording(**change)
    assert said in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value), str(error.value)


def test_wordings_that_are_unusual_but_fine():
    braces = Wording(needle="{{{city}}} {number} {number}", prefix="{", question="{city}")
    assert braces.sentence("Rome", 12) == "{Rome} 12 12"
    assert Wording(question="And the number is ", others=()).others == ()


def test_a_book_in_words_that_the_tokenizer_does_not_know(words, tmp_path):
    for share, fine in [(0.4, True), (0.6, False), (1, False)]:
        (tmp_path / "a.txt").write_text(" ".join("unheard" if i % 10 < 10 * share else "river" for i in range(100)))
        if fine: assert len(read_haystack(tmp_path, words, 100)) == 100
        else:
            with pytest.raises(NeedleError, match=f"{share:.0%} are unknown to the tokenizer"): read_haystack(tmp_path, words, 100)
            with pytest.raises(NeedleError, match=f"{share:.0%} are unknown to the tokenizer"): perplexity(tiny(words), words, (tmp_path / "a.txt").read_text(), [50], progress=False)
    assert len(read_haystack(tmp_path, byte_tokenizer(), 100)) == 100  # bytes spell everything


@pytest.mark.parametrize("change, said", [
    (dict(windows=0), "count of windows must be"), (dict(windows=-3), "-3"), (dict(windows=1.5), "1.5"), (dict(windows=math.inf), "inf"), (dict(score=0), "not 0"),
    (dict(score=-1), "not -1"), (dict(score=2.5), "2.5"), (dict(score=math.nan), "nan"), (dict(lengths=[1]), "at least 2"), (dict(lengths=[-4]), "-4"), (dict(lengths=[math.nan]), "nan"),
    (dict(lengths=[10**12]), "are wanted"), (dict(text=""), "holds 0 tokens")])
def test_perplexity_refuses(words, change, said):
    with pytest.raises(NeedleError) as error: perplexity(**dict(model=tiny(words), tokenizer=words, text=story(30), lengths=[16, 32], progress=False) | change)
    assert said in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value), str(error.value)


def test_repeat_is_a_decision(book, words, tmp_path):
    have = len(read_haystack(book, words, 1, repeat=True)) and len(encode(words, story(80))) + len(encode(words, story(80, seed=1)))
    with pytest.raises(NeedleError, match=f"holds {have} tokens"): read_haystack(book, words, have + 1)
    twice = read_haystack(book, words, 2 * have, repeat=True)
    assert (twice[:have] == twice[have:]).all() and (twice[:have] == read_haystack(book, words, have)).all()
    assert len(run(tiny(words), words, book, [have + 100], [0.5], tmp_path, numbers=1, repeat=True, progress=False)) == 1


def test_no_memory_and_no_numbers_are_sentences(book, words, tmp_path, monkeypatch):
    given = dict(model=tiny(words), tokenizer=words, haystack_folder=book, lengths=[40], depths=[0.5], out=tmp_path, progress=False)
    def full(*args, **kwargs): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 97 GiB.")
    with monkeypatch.context() as patch:
        patch.setattr(Qwen2ForCausalLM, "forward", full)
        with pytest.raises(NeedleError, match="tokens do not fit into memory"): run(**given)
    with torch.no_grad(): given["model"].lm_head.weight.fill_(float("inf"))
    with pytest.raises(NeedleError, match="bfloat16"): run(**(given | dict(out=tmp_path / "b")))
    assert read_trials(tmp_path / "trials.jsonl") == []


def test_the_language_model_inside_a_miniature(tmp_path):
    model, tokenizer = load(mini_folder("mini-longva"))
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / "a.txt").write_text("bear red plain . sofa blue dots . " * 40)
    wording = Wording(prefix=".", needle="{city} number {number} .", question="{city} number", city="lima", others=("paris",), between=" ")
    trials = run(model, tokenizer, tmp_path / "facts", [32], [0, 0.5, 1], tmp_path / "out", digits=2, wording=wording, progress=False)
    for t in trials[::5]:
        pieces, spot = make_pieces(tokenizer, draw_numbers(5, 0, 2)[0], (), wording), Spot(int(t.needle[0]) - 1, t.frames, t.depth)
        ids, _ = make_prompt(pieces, read_haystack(tmp_path / "facts", tokenizer, 32), spot)
        with torch.no_grad(): best = model(input_ids=torch.tensor([[*ids.tolist(), *t.answer_ids]])).logits[0, len(ids) - 1 : -1].argmax(-1)
        assert best.tolist() == t.argmax_ids


def test_a_tokenizer_is_loaded_as_it_was_saved(saved, words):
    model, tokenizer = load(saved)
    assert tokenizer.tokenize("The river keeps 3.5.") == words.tokenize("The river keeps 3.5.") == ["The", "river", "keeps", "3", ".", "5", "."]
    assert isinstance(model, Qwen2ForCausalLM)


def test_unknown_models(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "teapot"}')
    for name in ("empty", "odd"):
        with pytest.raises(NeedleError, match="No language model can be loaded") as error: load(tmp_path / name)
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
        assert "give a folder with a saved model and its tokenizer" in str(error.value)


def test_a_name_on_an_unreachable_hub_is_asked_for_once(book, tmp_path):
    "Nobody listens on port 9. The hub's own patience is five more attempts, with pauses of 23 seconds together, each with a warning."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", "from longva.cli import app; app()", *command("unknown/name", book, "out")], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr == ("No language model can be loaded from unknown/name: it is no folder here, and the Hugging Face hub can't be reached to look for the name there: "
                           "check the path, or the network.\n")


def test_names_that_the_hub_does_not_know(monkeypatch):
    from longva.needle import niah
    monkeypatch.setattr(niah, "file_exists", lambda *names: False)
    with pytest.raises(NeedleError, match="unknown/name: it is no folder here, and the Hugging Face hub shows no such model"): load("unknown/name")
    monkeypatch.setattr(niah, "file_exists", lambda *names: pytest.fail("the hub was asked"))
    with pytest.raises(NeedleError, match="no/such/folder: it is no folder here, and can't be a name"): load("no/such/folder")


# --- perplexity

def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(book, words):
    model = tiny(words)
    with torch.no_grad(): model.lm_head.weight.zero_()
    rows = perplexity(model, words, book, [16, 64, 256], progress=False)
    assert [r.length for r in rows] == [16, 64, 256] and all(math.isclose(r.perplexity, len(words), rel_tol=1e-5) and r.tokens == 32 for r in rows)


@pytest.mark.parametrize("begin", [False, True])
def test_perplexity_by_hand(begin):
    tokenizer = word_tokenizer(begin)
    model, text = tiny(tokenizer, seed=2), story(60)
    ids, total = encode(tokenizer, text)[:200], 0.0
    given = tokenizer.decode(ids)
    assert (encode(tokenizer, given) == ids).all()
    rows = {r.length: r for r in perplexity(model, tokenizer, given, [32, 100], score=20, windows=3, progress=False)}
    for n in (32, 100):
        total = 0.0
        for end in (100, 150, 200):
            window = torch.tensor([[*([1] if begin else []), *ids[end - n : end].tolist()]])
            with torch.no_grad(): logits = model(input_ids=window).logits[0].double()
            total -= logits[:-1].log_softmax(-1)[range(window.shape[1] - 1), window[0, 1:]][-20:].sum().item()
        assert abs(rows[n].loss - total / 60) < 1e-5 and rows[n].tokens == 60 and math.isclose(rows[n].perplexity, math.exp(rows[n].loss))
    with pytest.raises(NeedleError, match="holds 200 tokens and 201"): perplexity(model, tokenizer, given, [201], progress=False)
    with pytest.raises(NeedleError, match="from 1 to 31, not 32"): perplexity(model, tokenizer, given, [32], score=32, progress=False)


# --- killed, stopped, and the command

@pytest.fixture(scope="module")
def saved(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny(words).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def command(saved, book, out, lengths="60,120", **more):
    given = dict(model=saved, haystack=book, lengths=lengths, depths="0,0.25,0.5,0.75,1", distractors="0,3", out=out) | more
    return ["niah", *(str(w) for k, v in given.items() if v is not None for w in ((f"--{k}", v) if v is not True else (f"--{k}",)))]


def test_the_command(saved, book, tmp_path):
    done = CliRunner().invoke(app, command(saved, book, tmp_path / "out", **{"perplexity": True, "train-length": 60, "rope-base": 1e6}))
    assert done.exit_code == 0, (done.output, done.exception)
    for k in (0, 3):
        assert len(read_trials(tmp_path / "out" / f"distractors_{k}" / "trials.jsonl")) == 50 and (tmp_path / "out" / f"distractors_{k}" / "heatmap.png").exists()
        assert f"{k} distractors" in done.output
    assert "tokens" in done.output and "/25" in done.output
    rows = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert [r["length"] for r in rows] == [60, 120] and "perplexity" in done.output


@pytest.mark.parametrize("change, code, said", [
    (dict(model="nowhere/at-all"), 2, "No language model can be loaded from nowhere/at-all"), (dict(haystack="nowhere"), 1, "no haystack folder nowhere"),
    (dict(lengths="60,many"), 2, "--lengths takes whole numbers"), (dict(lengths="60,9999999"), 1, "are wanted"), (dict(depths="2"), 2, "--depths: A depth must lie between 0 (the start) and 1 (the end), not at 2"), (dict(lengths="0"), 2, "--lengths: A length must be"),
    (dict(model=""), 2, "--model is empty"),
    (dict(distractors="9"), 1, "from 0 to 6"), (dict(distractors="0,9"), 1, "from 0 to 6"), (dict(distractors="some"), 2, "--distractors takes"),
    (dict(model="mini-longva"), 1, "are unknown to the tokenizer"), (dict(numbers=0), 1, "not 0"), ({"train-length": -5}, 1, "not -5"), (dict(lengths="1000000000000", repeat=True), 1, "more than 100000000"),
    (dict(lengths=""), 2, "--lengths takes"), (dict(lengths="1,60", perplexity=True), 2, "--perplexity"), (dict(haystack=None), 2, "Say with --haystack"), (dict(haystack=None, model="no/where"), 2, "No model can be loaded"),
    ({"rope-base": "0.5"}, 2, "--rope-base must be"), ({"rope-base": "inf"}, 2, "--rope-base must be")])
def test_one_sentence_and_nothing_written(saved, book, tmp_path, monkeypatch, change, code, said):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, command(saved, book, "out", **change))
    told = "Wording: the miniature's own, 2 digits of lima.\n" if change.get("model") == "mini-longva" else ""
    assert done.exit_code == code and done.stdout == told and said in done.stderr, (done.stdout, done.stderr, done.exception)
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


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
    out = tmp_path / "runs" / "niah" / "long_book"
    assert "Wording: the miniature's own" in done.stdout and f"Haystack: a book of the miniature's world, written to {out.relative_to(tmp_path) / 'book'}." in done.stdout
    text = (out / "book" / "scenes.txt").read_text()
    assert text == (write_book(tmp_path / "again") / "scenes.txt").read_text()
    for k in (0, 5):
        trials, settings = read_trials(out / f"distractors_{k}" / "trials.jsonl"), json.loads((out / f"distractors_{k}" / "settings.json").read_text())
        assert Counter(t.frames for t in trials) == dict.fromkeys((64, 128, 256, 384, 496), 10)
        assert settings["wording"]["city"] == "lima" and max(settings["numbers"]) < 100 and settings["distractors"] == draw_numbers(2, k, 2)[1]
    assert [r["length"] for r in json.loads((out / "perplexity.json").read_text())] == [64, 128, 256, 384, 496]
    before = (out / "distractors_0" / "trials.jsonl").read_bytes()
    assert CliRunner().invoke(app, words).exit_code == 0 and (out / "distractors_0" / "trials.jsonl").read_bytes() == before  # gone on with, nothing left to do
    given = ["niah", "--model", str(saved_mini), "--haystack", str(out / "book"), "--lengths", "64", "--numbers", "1", "--out", "own"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0 and "Wording" in done.stdout and "Haystack" not in done.stdout and not (tmp_path / "own" / "book").exists()


def test_a_miniatures_book_is_refused_before_it_is_written(saved_mini, tmp_path):
    go = lambda *more: CliRunner().invoke(app, ["niah", "--model", str(saved_mini), "--out", str(tmp_path / "out"), *more])
    for more, code, said in [(["--lengths", "9000"], 1, "holds 2000 tokens and 9000 are wanted"), (["--distractors", "6"], 1, "from 0 to 5"), (["--numbers", "0"], 1, "not 0"),
                             (["--train-length", "-5"], 1, "not -5"), (["--lengths", "1000000000000", "--repeat"], 1, "more than 100000000")]:
        done = go(*more)
        assert done.exit_code == code and said in done.stderr and len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir()), (done.output, done.exception)
    (tmp_path / "out" / "book").mkdir(parents=True)
    (tmp_path / "out" / "book" / "scenes.txt").write_text("bear red plain .")
    done = go()
    assert done.exit_code == 1 and "holds something else" in done.stderr and (tmp_path / "out" / "book" / "scenes.txt").read_text() == "bear red plain ."
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["book"]


def test_killed_then_stopped_then_finished(saved, book, tmp_path):
    words = command(saved, book, tmp_path / "out", lengths="400,500,600,700,800", distractors="3", numbers=20)
    log = tmp_path / "out" / "distractors_3" / "trials.jsonl"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    counts = [0]
    for sent in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen([sys.executable, "-c", "from longva.cli import app; app()", *words], cwd=tmp_path, env=env, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        limit = time.time() + 200
        while time.time() < limit and process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= counts[-1] + 10): time.sleep(0.005)
        if process.poll() is not None: pytest.fail(f"it ended before it could be stopped: {process.communicate()}")
        os.killpg(process.pid, sent)
        _, errors = process.communicate(timeout=100)
        counts.append(log.read_bytes().count(b"\n"))
        assert process.returncode == (130 if sent == signal.SIGINT else -9), errors
    assert errors.count("Stopped") == 1 and "run the same command again to resume." in errors and "Traceback" not in errors
    assert counts[-2] < counts[-1] < 500
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(read_trials(log)) == 500 and set(Counter(map(key, read_trials(log))).values()) == {1}
