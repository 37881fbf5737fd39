"""The paper's V-NIAH grid, scaled to the miniature: the trie, a full pass for each trial, and full passes in batches.

    .venv/bin/python benchmarks/vniah.py --json vniah.json

15 lengths, 6 depths and 5 needles, as in the paper, with frames of 4 tokens and the longest video of 600 of them.
All three run in one process, one after the other, on one thread, over the same visual tokens; each full pass computes
logits for the answer only. In the file:

token_ratio           tokens through the model, full passes over trie flop_ratio            operations of their
products, likewise wall_ratio            seconds, likewise cpu_ratio             seconds of the processor, which
other work on the machine doesn't lengthen wall_ratio_batched    seconds of full passes in batches of equal length,
over the trie's decisions_equal       every arg-max of every trial is the same margin_difference     largest, over
all trials kv_ratio              bytes that are alive during the walk, over one buffer of the longest sequence
paper_token_ratio     the same on the paper's own grid with LongVA-7B, by counting paper_flop_ratio
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
    """Call, and give (its result, (wall seconds, processor seconds))."""
    wall = perf_counter()
    cpu = process_time()
    result = call()
    return result, (perf_counter() - wall, process_time() - cpu)


def by_paths(reader, paths, answers, naive):
    """Decide trials with the trie or one by one: ({trial: verdict}, what was read)."""
    spent = Cost()
    verdicts = {}
    for i, logits, _ in decide_paths(reader, paths, answers, naive=naive, spent=spent):
        verdicts[i] = judge(logits, answers[i])
    return verdicts, spent


def by_batches(bench, spots):
    """Decide trials by full passes in batches of equal length: {trial: verdict}."""
    found = {}
    for batch in decisions(bench.reader, bench.prompts, spots):
        for spot, verdict, _ in batch:
            found[spot] = verdict
    return {i: found[spot] for i, spot in enumerate(spots)}


def kv_bytes(reader, paths, answers):
    """Compare the most bytes that a walk holds between two trials with one buffer of the longest sequence."""
    model = reader.model
    with LiveBytes([*model.parameters(), *model.buffers(), reader.haystack, reader.needles]) as live:
        held = [live.now for _ in decide_paths(reader, paths, answers)]
    token = per_token(model.config, model.dtype.itemsize)["kv"]
    return max(held) / (trie_cost(reader, paths, answers).longest * token)


def papers_grid():
    """Forecast the paper's own grid with LongVA-7B."""
    text = Prompt(list(range(14)), list(range(30)), [1, 2])
    paths = [spot.path(text) for spot in grid(range(200, 3001, 200), 5)]
    return forecast_walks(Unloaded(longva_7b()), [(paths, [text.answer] * len(paths))], speed=1)


def grid(lengths, needles):
    """List the trials of a grid."""
    spots = []
    for n in lengths:
        for depth in DEPTHS:
            spots += [Spot(j, n, depth) for j in range(needles)]
    return spots


def measure(step, needles):
    """Run all three evaluators on one grid, and give the figures."""
    bench = mini_bench("mini-longva", 15 * step)
    reader = bench.reader
    spots = grid(range(step, 15 * step + 1, step), needles)
    paths = [spot.path(bench.prompts[spot.needle]) for spot in spots]
    answers = [bench.prompts[spot.needle].answer for spot in spots]
    few = [i for i, spot in enumerate(spots) if spot.frames in (step, 15 * step)]
    kv = kv_bytes(reader, [paths[i] for i in few], [answers[i] for i in few])  # the machine is warm afterwards
    (trie, spent), (trie_wall, trie_cpu) = timed(lambda: by_paths(reader, paths, answers, False))
    (full, naive), (full_wall, full_cpu) = timed(lambda: by_paths(reader, paths, answers, True))
    batched, (batched_wall, _) = timed(lambda: by_batches(bench, spots))
    paper = papers_grid()
    return dict(
        token_ratio=naive.tokens / spent.tokens,
        flop_ratio=naive.flops / spent.flops,
        wall_ratio=full_wall / trie_wall,
        cpu_ratio=full_cpu / trie_cpu,
        wall_ratio_batched=batched_wall / trie_wall,
        decisions_equal=all(trie[i][:2] == full[i][:2] == batched[i][:2] for i in full),
        margin_difference=max(abs(trie[i][2] - full[i][2]) for i in full),
        kv_ratio=kv,
        paper_token_ratio=paper.plain.tokens / paper.cost.tokens,
        paper_flop_ratio=paper.plain.flops / paper.cost.flops,
        trials=len(spots),
        right=sum(verdict[1] for verdict in trie.values()),
        longest_tokens=spent.longest,
        trie_seconds=trie_wall,
        naive_seconds=full_wall,
        batched_seconds=batched_wall,
        machine=f"{platform.machine()}, {torch.get_num_threads()} thread",
        torch=torch.__version__,
        transformers=version("transformers"),
        python=platform.python_version(),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--step", type=int, default=40, help="frames between two lengths; there are 15")
    parser.add_argument("--needles", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(given.step, given.needles)
    for name, value in figures.items():
        print(f"{name:<20} {value:.4g}" if isinstance(value, float) else f"{name:<20} {value}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
