"""The paper's V-NIAH grid, scaled to the miniature: the trie, a full pass for each trial, and full passes in batches, side by side.

    .venv/bin/python benchmarks/vniah.py --json vniah.json

15 lengths, 6 depths and 5 needles, as in the paper, with frames of 4 tokens and the longest film of 600 of them. All three run in one process, one
after the other, on one thread, over the same visual tokens; each full pass computes logits for the answer only. In the file:

token_ratio           tokens through the model, full passes over trie
flop_ratio            operations of their products, likewise
wall_ratio            seconds, likewise
cpu_ratio             seconds of the processor, which other work on the machine doesn't lengthen
wall_ratio_batched    seconds of full passes in batches of equal length, over the trie's
decisions_equal       every arg-max of every trial is the same
margin_difference     largest, over all trials
kv_ratio              bytes that are alive during the walk, over one buffer of the longest sequence
paper_token_ratio     the same on the paper's own grid with LongVA-7B, by counting
paper_flop_ratio
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from longva.context.plan import per_token
from longva.mini.bench import mini_bench
from longva.model.modeling import longva_7b
from longva.model.prefill import LiveBytes
from longva.needle.forecast import Unloaded, forecast_walks
from longva.needle.reader import Prompt
from longva.needle.sweep import judge
from longva.needle.trie import Cost, decide_paths, trie_cost
from longva.needle.vniah import Spot, decisions

DEPTHS = (0, 0.2, 0.4, 0.6, 0.8, 1)


def timed(call):
    "(what comes of it, wall seconds, processor seconds)"
    wall, cpu = perf_counter(), process_time()
    made = call()
    return made, perf_counter() - wall, process_time() - cpu


def by_paths(reader, paths, answers, naive):
    "{trial: verdict} and what was read."
    spent = Cost()
    return {i: judge(logits, answers[i]) for i, logits, _ in decide_paths(reader, paths, answers, naive=naive, spent=spent)}, spent


def by_batches(bench, spots):
    found = {}
    for batch in decisions(bench.reader, bench.prompts, spots):
        found |= {spot: verdict for spot, verdict, _ in batch}
    return {i: found[s] for i, s in enumerate(spots)}


def kv_bytes(reader, paths, answers):
    "Most bytes that the walk holds between two trials, over one buffer of the longest sequence."
    with LiveBytes([*reader.model.parameters(), *reader.model.buffers(), reader.haystack, reader.needles]) as live:
        held = [live.now for _ in decide_paths(reader, paths, answers)]
    return max(held) / (trie_cost(reader, paths, answers).longest * per_token(reader.model.config, reader.model.dtype.itemsize)["kv"])


def papers_grid():
    text = Prompt(list(range(14)), list(range(30)), [1, 2])
    paths = []
    for n in range(200, 3001, 200):
        for depth in DEPTHS:
            paths += [Spot(j, n, depth).path(text) for j in range(5)]
    return forecast_walks(Unloaded(longva_7b()), [(paths, [text.answer] * len(paths))], speed=1)


def measure(step, needles):
    bench = mini_bench("mini-longva", 15 * step)
    reader = bench.reader
    spots = [Spot(j, n, d) for n in range(step, 15 * step + 1, step) for d in DEPTHS for j in range(needles)]
    paths = [s.path(bench.prompts[s.needle]) for s in spots]
    answers = [bench.prompts[s.needle].answer for s in spots]
    few = [i for i, s in enumerate(spots) if s.frames in (step, 15 * step)]
    kv = kv_bytes(reader, [paths[i] for i in few], [answers[i] for i in few])  # and the machine is warm
    (trie, spent), *ours = timed(lambda: by_paths(reader, paths, answers, False))
    (full, naive), *theirs = timed(lambda: by_paths(reader, paths, answers, True))
    batched, *batches = timed(lambda: by_batches(bench, spots))
    paper = papers_grid()
    return dict(
        token_ratio=naive.tokens / spent.tokens, flop_ratio=naive.flops / spent.flops, wall_ratio=theirs[0] / ours[0], cpu_ratio=theirs[1] / ours[1],
        wall_ratio_batched=batches[0] / ours[0], decisions_equal=all(trie[i][:2] == full[i][:2] == batched[i][:2] for i in full),
        margin_difference=max(abs(trie[i][2] - full[i][2]) for i in full), kv_ratio=kv,
        paper_token_ratio=paper.plain.tokens / paper.cost.tokens, paper_flop_ratio=paper.plain.flops / paper.cost.flops,
        trials=len(spots), right=sum(v[1] for v in trie.values()), longest_tokens=spent.longest, trie_seconds=ours[0], naive_seconds=theirs[0], batched_seconds=batches[0],
        machine=f"{platform.machine()}, {torch.get_num_threads()} thread", torch=torch.__version__, transformers=version("transformers"), python=platform.python_version())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--step", type=int, default=40, help="frames between two lengths; there are 15")
    parser.add_argument("--needles", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(given.step, given.needles)
    for name, value in figures.items(): print(f"{name:<20} {value:.4g}" if isinstance(value, float) else f"{name:<20} {value}")
    if given.json: given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__": main()
