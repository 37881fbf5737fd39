"""Corpora: killed and gone on with, broken text, and the reader against a plain reading of the files."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from longva.train import data as D
from longva.train.text import TextFolder

words = ["<|endoftext|>", "<unk>", *"abcdefgh"]


def tokenizer():
    toy = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    toy.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=toy, unk_token="<unk>")


def write(folder, sizes, seed=0):
    "One .jsonl a domain: name -> (documents, mean length)."
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name, (n, mean) in sizes.items():
        lengths = np.maximum(rng.lognormal(np.log(mean), 0.7, n).astype(int), 1)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": " ".join(rng.choice(words[2:], k))}) + "\n" for k in lengths))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write(tmp_path_factory.mktemp("text") / "text", {"mail": (1500, 20), "papers": (150, 300), "books": (40, 1200)})


def prepare(text, out, **kw):
    return D.prepare_corpus(text, tokenizer(), out, **{"length": 256, "min_upsample": 512, "shard": 2**13, **kw})


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_sigkill_changes_nothing(text, tmp_path):
    prepare(text, tmp_path / "whole")
    code = f"""
import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_data as T
T.D._write = (lambda write: lambda path, save: (time.sleep(0.05), write(path, save)))(T.D._write)
T.prepare({str(text)!r}, {str(tmp_path / 'killed')!r})
"""
    for shards in (1, 3):
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
        end = time.time() + 120
        while len(list((tmp_path / "killed").glob("shard-*[0-9].bin"))) < shards:
            assert process.poll() is None and time.time() < end
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed/corpus.json").exists()
        with pytest.raises(D.CorpusError, match="half a corpus"):
            D.Corpus(tmp_path / "killed")
    prepare(text, tmp_path / "killed")
    left = files(tmp_path / "killed")
    assert {k: v for k, v in left.items() if not k.endswith(".part")} == files(tmp_path / "whole")


def test_mixture_stays_and_long_documents_gain(text, tmp_path):
    "Counted again from the tokens on disk."
    report = prepare(text, tmp_path / "corpus")
    corpus = D.Corpus(tmp_path / "corpus", length=2)
    flat = np.concatenate([t for t, _ in corpus.shards])
    lengths = np.diff(np.append(np.flatnonzero(flat == 0), len(flat))) - 1
    assert abs(sum(n for cell in report.after.values() for n in cell[1:]) - lengths.sum()) < 256  # less than a sample is dropped
    before = sum(t for (_, _, long), (_, t) in report.before.items() if long) / sum(t for _, t in report.before.values())
    assert (lengths[lengths > 512].sum() / lengths.sum()) > before + 0.02
    for was, now, _, _ in report.domains().values():
        assert abs(was - now) < 0.02


def test_no_class_of_length_is_off_by_more_than_a_document(text, tmp_path):
    "Against the formula, domain by domain; without tokens= no document comes twice."
    w, report = 3.0, prepare(text, tmp_path / "corpus", weight=3.0)
    S, M = ({d: sum(t for (e, _, long), (_, t) in report.before.items() if e == d and long == kind) for d in ("mail", "papers", "books")} for kind in (False, True))
    f = min(min(1, (S[d] + w * M[d]) / (w * (S[d] + M[d]))) for d in S if M[d])
    for (d, octave, long), (n, _) in report.before.items():
        rate = f * (S[d] + M[d]) / (S[d] + w * M[d]) * (w if long else 1)
        assert rate < 1 + 1e-9 and abs(report.after.get((d, octave, long), [0])[0] - n * rate) < 1


@pytest.mark.parametrize("tokens", [20_000, 400_000])
def test_asked_amount(text, tmp_path, tokens):
    "Less than there is, or more: then documents come again."
    report = prepare(text, tmp_path / "corpus", tokens=tokens)
    assert abs(sum(t for _, t in report.after.values()) / tokens - 1) < 0.25


def test_stream_stops_at_the_wanted_amount(tmp_path):
    rows = [{"text": " ".join("a" * (1 + i % 50)), "domain": "even" if i % 2 else "odd"} for i in range(4000)]
    report = prepare(rows, tmp_path / "corpus", measured=500, tokens=20_000)
    assert 20_000 <= sum(n + t for n, t in report.after.values()) < 20_100
    assert abs(report.domains()["even"][1] - 26 / 51) < 0.05


def test_samples_are_the_tokens_in_a_row(text, tmp_path):
    prepare(text, tmp_path / "corpus")
    flat = np.concatenate([np.fromfile(p, dtype=np.uint16) for p in sorted((tmp_path / "corpus").glob("shard-?????.bin"))])
    corpus = D.Corpus(tmp_path / "corpus", documents=True)
    assert torch.equal(torch.cat([corpus[i]["input_ids"] for i in range(len(corpus))]), torch.from_numpy(flat[: len(corpus) * 256].astype(np.int64)))
    for i in (0, 5, len(corpus) - 1):
        p, expected = 0, []
        for k, token in enumerate(corpus[i]["input_ids"].tolist()):
            p = 0 if k == 0 or token == 0 else p + 1
            expected.append(p)
        assert corpus[i]["position_ids"].tolist() == expected


def test_order_depends_on_step_and_row_alone(text, tmp_path):
    prepare(text, tmp_path / "corpus")
    one, two = (D.Corpus(tmp_path / "corpus", rows=4) for _ in range(2))
    two(7, 1)
    assert torch.equal(one(3, 2)["input_ids"], two(3, 2)["input_ids"])
    other = D.Corpus(tmp_path / "corpus", rows=4, seed=1)
    assert any(not torch.equal(one(k, 0)["input_ids"], other(k, 0)["input_ids"]) for k in range(3))


def test_copies_come_in_rounds(tmp_path):
    "More tokens than there are: neighbours are never copies of each other, but where rounds meet."
    rows = [{"text": f"{a} {b} {c}"} for a in "abcdefgh" for b in "abcdefgh" for c in "ab"]
    report = prepare(rows, tmp_path / "corpus", length=8, tokens=1500)
    flat = np.concatenate([np.fromfile(p, dtype=np.uint16) for p in sorted((tmp_path / "corpus").glob("shard-?????.bin"))])
    documents = [tuple(d) for d in flat[: len(flat) // 4 * 4].reshape(-1, 4)]
    assert sum(n for n, _ in report.after.values()) == 500 and sum(a == b for a, b in zip(documents, documents[1:])) == 0
    assert set(map(documents.count, documents)) <= {3, 4, 5} and documents[:128] == documents[128:256]  # a stream comes as it comes


def test_stream_with_a_new_domain_is_refused_and_a_short_one_says_so(tmp_path):
    rows = [{"text": "a b", "domain": "x"}] * 50
    with pytest.raises(D.CorpusError, match="domain 'y' comes after those that were measured"):
        prepare(rows + [{"text": "a b", "domain": "y"}], tmp_path / "corpus", length=8, measured=50, tokens=8000)
    assert not (tmp_path / "corpus").exists()
    report = prepare(rows, tmp_path / "corpus", length=8, measured=50, tokens=8000)
    assert "8,000 tokens were asked for, and 150 came" in str(report) and "6 tokens at the end" in str(report)


def test_another_text_of_the_same_size_or_another_tokenizer_is_noticed(tmp_path):
    text = write(tmp_path / "text", {"mail": (50, 20)})
    prepare(text, tmp_path / "corpus", length=16)
    other = tokenizer()
    other.get_vocab = lambda: {w: i for i, w in enumerate(reversed(words))}
    with pytest.raises(D.CorpusError, match="another tokenizer"):
        D.prepare_corpus(text, other, tmp_path / "corpus", length=16, min_upsample=512, shard=2**13, separator=0)
    mail = text / "mail.jsonl"
    mail.write_text(mail.read_text().replace("a b", "b a", 1))
    with pytest.raises(D.CorpusError, match="another text"):
        prepare(text, tmp_path / "corpus", length=16)


def test_too_little_text_leaves_room_for_the_advice(tmp_path):
    text = write(tmp_path / "text", {"mail": (2, 20)})
    with pytest.raises(D.CorpusError, match="a smaller length"):
        prepare(text, tmp_path / "corpus", length=4096)
    prepare(text, tmp_path / "corpus", length=4)
    assert len(D.Corpus(tmp_path / "corpus")) > 1


@pytest.mark.parametrize("wrong", [dict(weight=0), dict(weight=float("nan")), dict(weight=0.5), dict(tokens=0), dict(tokens=-5), dict(measured=0, tokens=9),
                                   dict(separator=70_000), dict(separator=-1), dict(seed=-1), dict(length=2.5), dict(length=1), dict(shard=0)])
def test_impossible_settings_are_a_sentence(tmp_path, wrong):
    with pytest.raises(D.CorpusError):
        prepare([{"text": "a b c"}] * 9, tmp_path / "corpus", **{"length": 4, **wrong})
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("row", ['{"text": "\\ud800"}', '{"text": "a", "n": ' + "1" * 5000 + "}", "[" * 10**5])
def test_odd_json_is_named_by_line(tmp_path, row):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + row + "\n")
    with pytest.raises(D.CorpusError, match="line 2"):
        prepare(tmp_path / "a.jsonl", tmp_path / "corpus")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa b")
    assert TextFolder(tmp_path)[0] == ("text", "a b")


def test_broken_line_is_found_before_anything_is_written(text, tmp_path):
    broken = write(tmp_path / "text", {"mail": (20, 20)})
    with open(broken / "mail.jsonl", "a") as file:
        file.write('{"text": "a b\n')
    with pytest.raises(D.CorpusError, match=r"mail\.jsonl, line 21: broken JSON"):
        prepare(broken, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_hub_without_datasets_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(D.CorpusError, match="pip install datasets"):
        prepare("someone/some-dataset", tmp_path / "corpus")
