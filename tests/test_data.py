"""Corpora: killed and resumed, broken text, and the reader against a plain reading of the files."""
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train_toy as toy

from longva.testing import word_tokenizer
from longva.train import data as D
from longva.train.text import TextFolder

words = ["<|endoftext|>", "<unk>", *"abcdefgh"]


def tokenizer():
    return word_tokenizer(words)


def write(folder, sizes, seed=0):
    """One .jsonl a domain: name -> (documents, mean length)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name, (n, mean) in sizes.items():
        lengths = np.maximum(rng.lognormal(np.log(mean), 0.7, n).astype(int), 1)
        rows = [json.dumps({"text": " ".join(rng.choice(words[2:], k))}) + "\n" for k in lengths]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    sizes = {"mail": (1500, 20), "papers": (150, 300), "books": (40, 1200)}
    return write(tmp_path_factory.mktemp("text") / "text", sizes)


def prepare(text, out, **kw):
    return D.prepare_corpus(text, tokenizer(), out, **{"length": 256, "min_upsample": 512, "shard": 2**13, **kw})


@pytest.fixture(scope="module")
def made(text, tmp_path_factory):
    """The corpus of the text, and its report."""
    out = tmp_path_factory.mktemp("made") / "corpus"
    return out, prepare(text, out)


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def slow(out, settings):
    """A preparation that takes its time over every file."""
    write = D._write
    D._write = lambda path, content: (time.sleep(0.05), write(path, content))
    prepare(settings["text"], out)


def test_sigkill_changes_nothing(text, made, tmp_path):
    for shards in (1, 3):
        (process,) = toy.start(tmp_path / "killed", body=slow, text=str(text))
        end = time.time() + 120
        while len(list((tmp_path / "killed").glob("shard-*[0-9].bin"))) < shards:
            assert process.exitcode is None and time.time() < end
            time.sleep(0.005)
        process.kill()
        process.join()
        assert not (tmp_path / "killed/corpus.json").exists()
        with pytest.raises(D.CorpusError, match="half a corpus"):
            D.Corpus(tmp_path / "killed")
    prepare(text, tmp_path / "killed")
    left = files(tmp_path / "killed")
    assert {k: v for k, v in left.items() if not k.endswith(".part")} == files(made[0])


def test_mixture_stays_and_long_documents_gain(made):
    """Counted again from the tokens on disk."""
    report, corpus = made[1], D.Corpus(made[0], length=2)
    flat = np.concatenate([t for t, _ in corpus.shards])
    lengths = np.diff(np.append(np.flatnonzero(flat == 0), len(flat))) - 1
    reported = sum(tokens for _, tokens in report.after.values())
    assert abs(reported - lengths.sum()) < 256  # less than a sample is dropped
    long_before = sum(tokens for (_, _, long), (_, tokens) in report.before.items() if long)
    before = long_before / sum(tokens for _, tokens in report.before.values())
    assert (lengths[lengths > 512].sum() / lengths.sum()) > before + 0.02
    for was, now, _, _ in report.domains().values():
        assert abs(was - now) < 0.02


def test_no_class_of_length_is_off_by_more_than_a_document(text, tmp_path):
    """Against the formula, domain by domain; without tokens= no document comes twice."""
    w = 3.0
    report = prepare(text, tmp_path / "corpus", weight=w)
    S = dict.fromkeys(("mail", "papers", "books"), 0)  # tokens in short documents
    M = dict(S)  # and in long ones
    for (d, _, long), (_, tokens) in report.before.items():
        (M if long else S)[d] += tokens
    f = min(min(1, (S[d] + w * M[d]) / (w * (S[d] + M[d]))) for d in S if M[d])
    for (d, octave, long), (n, _) in report.before.items():
        rate = f * (S[d] + M[d]) / (S[d] + w * M[d]) * (w if long else 1)
        assert rate < 1 + 1e-9
        assert abs(report.after.get((d, octave, long), [0])[0] - n * rate) < 1


@pytest.mark.parametrize("tokens", [20_000, 250_000])
def test_asked_amount(text, tmp_path, tokens):
    """Less than there is, or more: then documents come again."""
    report = prepare(text, tmp_path / "corpus", tokens=tokens)
    assert abs(sum(t for _, t in report.after.values()) / tokens - 1) < 0.25


def test_stream_stops_at_the_wanted_amount(tmp_path):
    rows = [{"text": " ".join("a" * (1 + i % 50)), "domain": "even" if i % 2 else "odd"} for i in range(4000)]
    report = prepare(rows, tmp_path / "corpus", measured=500, tokens=20_000)
    assert 20_000 <= sum(n + t for n, t in report.after.values()) < 20_100
    assert abs(report.domains()["even"][1] - 26 / 51) < 0.05


def test_samples_are_the_tokens_in_a_row(made):
    flat = np.concatenate([np.fromfile(p, dtype=np.uint16) for p in sorted(made[0].glob("shard-?????.bin"))])
    corpus = D.Corpus(made[0], documents=True)
    read = torch.cat([corpus[i]["input_ids"] for i in range(len(corpus))])
    assert torch.equal(read, torch.from_numpy(flat[: len(corpus) * 256].astype(np.int64)))
    for i in (0, 5, len(corpus) - 1):
        p = 0
        expected = []
        for k, token in enumerate(corpus[i]["input_ids"].tolist()):
            p = 0 if k == 0 or token == 0 else p + 1
            expected.append(p)
        assert corpus[i]["position_ids"].tolist() == expected


def test_order_depends_on_step_and_row_alone(made):
    one, two = (D.Corpus(made[0], rows=4) for _ in range(2))
    two(7, 1)
    assert torch.equal(one(3, 2)["input_ids"], two(3, 2)["input_ids"])
    other = D.Corpus(made[0], rows=4, seed=1)
    assert any(not torch.equal(one(k, 0)["input_ids"], other(k, 0)["input_ids"]) for k in range(3))


def test_copies_come_in_rounds(tmp_path):
    """More tokens than there are: neighbours are never copies of each other, but where rounds meet."""
    rows = [{"text": f"{a} {b} {c}"} for a in "abcdefgh" for b in "abcdefgh" for c in "ab"]
    report = prepare(rows, tmp_path / "corpus", length=8, tokens=1500)
    shards = sorted((tmp_path / "corpus").glob("shard-?????.bin"))
    flat = np.concatenate([np.fromfile(p, dtype=np.uint16) for p in shards])
    documents = [tuple(d) for d in flat[: len(flat) // 4 * 4].reshape(-1, 4)]
    assert sum(n for n, _ in report.after.values()) == 500
    assert sum(a == b for a, b in zip(documents, documents[1:])) == 0
    assert set(map(documents.count, documents)) <= {3, 4, 5}
    assert documents[:128] == documents[128:256]  # a stream comes as it comes


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


@pytest.mark.parametrize("wrong", [
    dict(weight=0), dict(weight=float("nan")), dict(weight=0.5), dict(tokens=0), dict(tokens=-5),
    dict(measured=0, tokens=9), dict(separator=70_000), dict(separator=-1), dict(seed=-1), dict(length=2.5),
    dict(length=1), dict(shard=0),
])
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


class Stream:
    """As an IterableDataset of `datasets`: it begins anew each time, skips, and may break off in one of its passes."""
    def __init__(self, rows, broken=None):
        self.rows, self.broken, self.passes = rows, broken, 0

    def __iter__(self):
        self.passes += 1
        for n, row in enumerate(self.rows):
            if self.broken == (self.passes, n):
                raise ConnectionError("Connection reset by peer")
            yield row

    def skip(self, n):
        rest = Stream(self.rows[n:])
        if self.broken:
            self.passes += 1
            rest.broken = (1, self.broken[1] - n) if self.passes == self.broken[0] else None
        return rest


def test_stream_of_the_hub_resumes_where_it_broke_off(tmp_path, monkeypatch):
    """By its name, with a `datasets` of three lines: the result is that of a list. Another dataset is noticed."""
    rows = []
    for i in range(400):
        letters = ["abcdefgh"[(i * k) % 8] for k in range(1 + i % 40)]
        rows.append({"text": " ".join(letters), "domain": "even" if i % 2 else "odd"})
    served = {}
    hub = type(sys)("datasets")
    hub.load_dataset = lambda name, split, streaming: served[name]
    monkeypatch.setitem(sys.modules, "datasets", hub)

    def make(source, out):
        prepare(source, tmp_path / out, length=32, min_upsample=30, shard=256)

    def shards(out):
        return {name: data for name, data in files(tmp_path / out).items() if name.startswith("shard")}

    make(rows, "list")
    served["some/text"] = Stream(rows)
    make("some/text", "whole")
    assert shards("whole") == shards("list")
    # in the first rows, while measuring, while packing before a shard and after
    for number, broken in enumerate([(1, 3), (2, 100), (3, 1), (3, 250)]):
        served["some/text"] = Stream(rows, broken)
        message = rf"^some/text broke off at row {broken[1]} .Connection reset by peer.: call again"
        with pytest.raises(D.StreamError, match=message):
            make("some/text", f"broken-{number}")
        assert (tmp_path / f"broken-{number}/journal.json").exists() == (broken[0] == 3)
        served["some/text"] = Stream(rows)
        make("some/text", f"broken-{number}")
        assert shards(f"broken-{number}") == shards("list")
    served |= {"some/text": Stream([dict(rows[0], text="h h h"), *rows[1:]]), "other/text": Stream(rows)}
    for name, out in (("some/text", "whole"), ("other/text", "whole")):
        with pytest.raises(D.CorpusError, match="another text"):
            make(name, out)
    with pytest.raises(D.CorpusError, match="another text"):
        make(rows[:-1] + [dict(rows[-1], text="h")], "list")


def test_hub_without_datasets_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(D.CorpusError, match="pip install datasets"):
        prepare("someone/some-dataset", tmp_path / "corpus")
