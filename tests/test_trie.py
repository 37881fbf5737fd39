"""The trie: every trial as a pass of its own decides it, its cost by an independent formula; killed, resumed."""

import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from longva.context.parallel import context_parallel
from longva.context.plan import per_token, sizes
from longva.model.prefill import LiveBytes
from longva.needle.reader import Reader
from longva.needle.sweep import judge
from longva.needle.trials import NeedleError, key, read_trials
from longva.needle.trie import Cost, Counting, decide_paths, join, shares, trie, trie_cost
from longva.needle.vniah import Reading, Spot, run

sys.path.insert(0, str(Path(__file__).parent))
from needle_toy import film, needles, toy
from original import same_columns
from test_vniah import parity  # noqa: F401


@pytest.fixture(scope="module")
def reader():
    model, _ = toy()
    source = torch.Generator().manual_seed(1)

    def tokens(n):
        return torch.randn(n, 4, model.config.text_config.hidden_size, generator=source)

    return Reader(model).with_tokens(tokens(12), tokens(3))


def odd_paths(count=40, seed=0):
    """Any order of text, frames and needles; some paths twice, some the beginning of others."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        a = draw.randrange(1, 6)
        middle = (
            [("hay", 0, draw.randrange(1, 12))]
            if draw.random() < 0.5
            else [("hay", k, k + 1) for k in draw.sample(range(12), 4)]
        )
        if draw.random() < 0.7:
            middle.insert(draw.randrange(len(middle) + 1), ("needle", draw.randrange(3)))
        first = ("ids", (1, 2, *draw.sample(range(5, 8), draw.randrange(3))))
        made.append(
            (first, *middle, ("needle", a % 3), ("ids", tuple(draw.sample(range(4, 14), draw.randrange(1, 4)))))
        )
    return made + made[:3], [[draw.randrange(14) for _ in range(1 + k % 3)] for k in range(count + 3)]


def by_hand(reader, path, answer):
    """All embeddings in a row, one call of the model, all logits."""
    words = reader.model.get_input_embeddings()
    rows = [
        (
            words(torch.tensor(p[1]))
            if p[0] == "ids"
            else reader.haystack[p[1] : p[2]].flatten(0, 1) if p[0] == "hay" else reader.needles[p[1]]
        )
        for p in path
    ]
    rows.append(words(torch.tensor(answer[:-1], dtype=torch.long)))
    with torch.no_grad():
        return reader.model(inputs_embeds=torch.cat(rows)[None]).logits[0, -len(answer) :]


@pytest.mark.parametrize("how", [dict(), dict(chunk=1), dict(chunk=9), dict(host=True), dict(naive=True)])
def test_every_path_as_if_alone(reader, how):
    paths, answers = odd_paths()
    found = {i: logits for i, logits, seconds in decide_paths(reader, paths, answers, **how) if seconds > 0}
    assert sorted(found) == list(range(len(paths)))
    for i, logits in found.items():
        assert (logits - by_hand(reader, paths[i], answers[i])).abs().max() < 1e-4
    assert reader.model.config.text_config._attn_implementation == "sdpa"


def test_exact_in_float64(reader):
    paths, answers = odd_paths(20)
    wide = Reader(toy()[0].double()).with_tokens(reader.haystack.double(), reader.needles.double())
    for i, logits, _ in decide_paths(wide, paths, answers, chunk=16):
        assert logits.dtype == torch.float64 and (logits - by_hand(wide, paths[i], answers[i])).abs().max() < 1e-11


def test_generated_as_generate_does(reader):
    paths, _ = odd_paths(12)
    answers = [[3] * (1 + k % 4) for k in range(len(paths))]
    spent = Cost()
    full = Cost()
    found, plain = (
        {i: logits for i, logits, _ in decide_paths(reader, paths, answers, generate=True, naive=naive, spent=count)}
        for naive, count in ((False, spent), (True, full))
    )
    for i, path in enumerate(paths):
        with torch.no_grad():
            made = reader.model.generate(
                inputs_embeds=reader.embed(path, None)["inputs_embeds"],
                max_new_tokens=len(answers[i]),
                do_sample=False,
                eos_token_id=None,
            )[0]
        assert (
            found[i].argmax(-1).tolist() == plain[i].argmax(-1).tolist() == made.tolist()
            and (found[i] - plain[i]).abs().max() < 1e-4
        )
    assert spent == trie_cost(reader, paths, answers, generate=True) and full == trie_cost(
        reader, paths, answers, naive=True, generate=True
    )


def test_no_beginning_is_read_twice(reader):
    paths, answers = odd_paths()
    beginnings = set()  # of every path without its question: each token with all before it
    for path in paths:
        row = [
            t
            for p in path[:-1]
            for t in (
                [("id", x) for x in p[1]]
                if p[0] == "ids"
                else (
                    [("hay", f, t) for f in range(*p[1:]) for t in range(4)]
                    if p[0] == "hay"
                    else [(*p, t) for t in range(4)]
                )
            )
        ]
        beginnings |= {tuple(row[: k + 1]) for k in range(len(row))}
    cost = trie_cost(reader, paths, answers)
    assert cost.tokens == len(beginnings) + sum(len(p[-1][1]) + len(a) - 1 for p, a in zip(paths, answers))
    assert sum(node.tokens for node in trie(reader, paths)) == len(beginnings)


def test_the_papers_grid():
    """Tokens and operations against sums that know nothing of tries."""
    m = sizes("qwen2-7b")
    T = 144
    q = 33
    b = 15
    J = 5
    lengths = range(200, 3001, 200)
    depths = [0, 0.2, 0.4, 0.6, 0.8, 1]
    cells = [(n, int(d * n)) for n in lengths for d in depths]
    paths = [
        (
            ("ids", tuple(range(b))),
            ("hay", 0, i),
            ("needle", j),
            ("hay", i, n),
            ("ids", tuple(range(100 * j, 100 * j + q))),
        )
        for n, i in cells
        for j in range(J)
    ]
    answers = [[1]] * len(paths)
    spent = Cost()
    full = Cost()
    for _ in decide_paths(Counting(m, T), paths, answers, spent=spent):
        pass
    for _ in decide_paths(Counting(m, T), paths, answers, naive=True, spent=full):
        pass
    far = {i: max(n for n, k in cells if k == i) for _, i in cells}

    def place(frames):
        return b + T * frames

    shared = [(0, place(max(far)))] + [
        (place(i), place(n + 1)) for i, n in far.items()
    ] * J  # stretches that are read once
    asked = [(place(n + 1), place(n + 1) + q) for n, _ in cells] * J

    def read(spans, layers):
        return sum(2 * layers * m.products * (y - x) + 2 * layers * m.H * m.E * (y**2 - x**2) for x, y in spans)

    last = sum(2 * m.D * m.E * (m.H + 2 * m.K) * (y - x) for x, y in shared)
    head = 2 * m.D * m.V * len(paths)
    assert spent.tokens == sum(y - x for x, y in shared + asked) and full.tokens == sum(y for _, y in asked)
    assert spent.flops == pytest.approx(read(shared, m.N - 1) + last + read(asked, m.N) + head, rel=1e-9)
    assert full.flops == pytest.approx(read([(0, y) for _, y in asked], m.N) + head, rel=1e-9)
    assert full.tokens / spent.tokens >= 3.29 and full.flops / spent.flops >= 2.4
    assert spent.longest == full.longest == place(3001) + q


def test_one_buffer(reader):
    model = reader.model
    source = torch.Generator().manual_seed(2)
    hay = torch.randn(400, 4, model.config.text_config.hidden_size, generator=source)
    paths = [
        (("ids", (1, 2)), ("hay", 0, i), ("needle", j), ("hay", i, n), ("ids", (5, 6)))
        for n in (200, 400)
        for i in (0, 150)
        for j in (0, 1)
    ]
    answers = [[3, 4]] * len(paths)
    want = trie_cost(reader, paths, answers).longest * per_token(model.config, 4)["kv"]
    for host in (False, True):
        with LiveBytes([*model.parameters(), *model.buffers(), hay, reader.needles]) as live:
            ready = Reader(model).with_tokens(hay, reader.needles)
            held = [live.now for _ in decide_paths(ready, paths, answers, host=host)]
        assert max(held) < 1.02 * want * (
            1 + host / model.config.text_config.num_hidden_layers
        )  # the stage is one layer more


def test_shares_are_whole_and_even():
    reader = Counting(sizes("qwen2-7b"), 144)
    paths = [
        (("ids", (1, 2)), ("hay", 0, i), ("needle", j), ("hay", i, n), ("ids", (5, 6)))
        for n in range(200, 3001, 200)
        for i in range(0, n + 1, n // 5)
        for j in range(5)
    ]
    answers = [[1]] * len(paths)
    whole = trie_cost(reader, paths, answers).flops
    for workers in (1, 2, 4, 8):
        parts = shares(reader, paths, answers, workers)
        assert len(parts) == workers and sorted(i for part in parts for i in part) == list(range(len(paths)))
        dearest = max(trie_cost(reader, [paths[i] for i in part], [answers[i] for i in part]).flops for part in parts)
        assert dearest < 1.35 * whole / workers
    assert len(shares(reader, paths[:1], answers[:1], 4)) == 1


def test_the_pieces_of_a_path():
    assert join([("ids", (1,)), ("ids", (2,)), ("hay", 0, 2), ("hay", 2, 3), ("hay", 4, 5), ("x",), ("x",)]) == (
        ("ids", (1, 2)),
        ("hay", 0, 3),
        ("hay", 4, 5),
        ("x",),
        ("x",),
    )


def test_original_numbers_through_the_trie(parity):  # noqa: F811
    model, data, tensors, prompts = parity
    spots = [Spot(j, c["num_frames"], c["depth"]) for c in data["cells"] for j in range(len(prompts))]
    verdicts = [
        (c["argmax_answer_span"][j], bool(c["pass"][j]), c["min_margin"][j])
        for c in data["cells"]
        for j in range(len(prompts))
    ]
    rows = iter(tensors["answer_span_logits"])
    logits = [torch.stack([next(rows) for _ in prompts[s.needle].answer]) for s in spots]
    answers = [prompts[s.needle].answer for s in spots]
    spent = Cost()
    seen = 0
    for i, found, _ in decide_paths(
        Reader(model).with_tokens(tensors["haystack"], tensors["needles"]),
        [s.path(prompts[s.needle]) for s in spots],
        answers,
        spent=spent,
    ):
        assert (same_columns(found, logits[i]) - logits[i]).abs().max() < 1e-4
        best, correct, margin = judge(found, answers[i])
        assert (best, correct) == verdicts[i][:2] and (not correct or abs(margin - verdicts[i][2]) < 2e-4)
        seen += 1
    assert seen == 100 == spent.trials and next(rows, None) is None


def _rank(rank, folder, tensors):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = toy()[0]
    paths, answers = odd_paths(6)
    model.set_attn_implementation({"text_config": "longva_cp"})
    with context_parallel():
        with pytest.raises(NeedleError, match="naive=True"):
            next(decide_paths(Reader(model).with_tokens(*tensors), paths, answers))
        ready = Reader(model).with_tokens(*tensors)
        torch.save({i: x for i, x, _ in decide_paths(ready, paths, answers, naive=True)}, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_full_passes_over_two_ranks(reader, tmp_path):
    """One sequence on two ranks: both get the logits that one rank alone gets; the trie refuses several ranks."""
    mp.start_processes(_rank, (str(tmp_path), (reader.haystack, reader.needles)), 2, start_method="fork")
    paths, answers = odd_paths(6)
    for rank in range(2):
        found = torch.load(tmp_path / str(rank))
        assert sorted(found) == list(range(len(paths)))
        for i, logits in found.items():
            assert (logits - by_hand(reader, paths[i], answers[i])).abs().max() < 1e-4


# --- sweeps: shared by processes, killed and taken up again


def sweep(out, pause=0.0, **how):
    model, processor = toy()
    reader = Reader(model, processor, name="toy")
    shown = dict(progress=False, on_trial=lambda trial: time.sleep(pause))
    return run(reader, film(10), needles(), range(2, 11, 2), [0, 0.5, 1], out, reading=Reading(**how), **shown)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("unbroken"))


def equal(folder, trials):
    found = read_trials(folder / "trials.jsonl")
    assert Counter(map(key, found)) == Counter(map(key, trials))  # each once
    right = {key(t): t for t in trials}
    for t in found:
        other = right[key(t)]
        assert (t.argmax_ids, t.correct, t.insert, t.answer_ids) == (
            other.argmax_ids,
            other.correct,
            other.insert,
            other.answer_ids,
        ) and abs(t.margin - other.margin) < 1e-4
    assert len(json.loads((folder / "all_accuracies.json").read_text())) == 15


def test_killed_five_times(tmp_path, unbroken):
    draw = random.Random(7)
    log = tmp_path / "trials.jsonl"
    for _ in range(5):
        begun = log.read_bytes().count(b"\n") if log.exists() else 0
        limit = time.time() + 120
        process = mp.get_context("fork").Process(target=sweep, args=(tmp_path, 0.05))
        process.start()
        while (
            time.time() < limit and process.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") > begun)
        ):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and begun < log.read_bytes().count(b"\n") < len(unbroken)
    sweep(tmp_path)
    equal(tmp_path, unbroken)


def test_two_processes(tmp_path, unbroken):
    sweep(tmp_path, workers=2)
    equal(tmp_path, unbroken)


def test_modes_agree_and_generation_is_another_test(tmp_path, unbroken):
    for out, how in (("naive", dict(naive=True)), ("host", dict(kv="host", batch_tokens=8))):
        sweep(tmp_path / out, **how)
        equal(tmp_path / out, unbroken)
    written = sweep(tmp_path / "written", generate=True)
    assert [t.correct for t in written] == [
        t.correct for t in unbroken
    ]  # a right word is followed by the same words either way
    assert any(len(t.answer_ids) > 1 for t in written)
    with pytest.raises(NeedleError, match="generate"):
        sweep(tmp_path / "written")
