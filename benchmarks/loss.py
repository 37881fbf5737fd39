"""Time and memory of the linear cross entropy, side by side with torch's own and with recomputing the chunks.

    .venv/bin/python benchmarks/loss.py --json loss.json

All methods work through chunks of the same size. They take turns, and a ratio is the median over the turns. Time is
processor time, so that other work on the machine doesn't count. Memory is the peak that torch's profiler counts, less
the gradients of hidden states and weight, which every method has to return. In the file:

extra_memory_growth   extra memory at the longest length over that at the shortest, less 1
speedup_vs_recompute  time of chunks under torch.utils.checkpoint over ours
time_vs_torch         our time over that of F.linear_cross_entropy with the same chunk
gradient_difference   relative, the larger of hidden states and weight, against float64 with all logits

`chunks` is the package's own code; without `kernel=` the function chooses between it and torch's.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import median
from time import process_time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from longva.context.loss import linear_cross_entropy


def recompute(hidden, weight, labels, chunk):
    "What one would write by hand: each chunk's logits are computed again in the backward pass."

    def one(h, y):
        return F.cross_entropy(h @ weight.T, y, reduction="sum")

    return (
        sum(checkpoint(one, h, y, use_reentrant=False) for h, y in zip(hidden.split(chunk), labels.split(chunk)))
        / (labels != -100).sum()
    )


def torchs_own(hidden, weight, labels, chunk):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, acc_policy="compact")
    return F.linear_cross_entropy(hidden, weight, labels, options=options)


methods = {
    "chunks": lambda *given: linear_cross_entropy(*given[:3], chunk=given[3], kernel="chunks"),
    "the function's choice": lambda *given: linear_cross_entropy(*given[:3], chunk=given[3]),
    "torch, same chunk": torchs_own,
    "recomputed chunks": recompute,
}


def inputs(L, D, V):
    hidden, weight, labels = (
        torch.randn(L, D).requires_grad_(),
        (torch.randn(V, D) * D**-0.5).requires_grad_(),
        torch.randint(V, (L,)),
    )
    labels[: L // 50] = -100  # as in real batches, some tokens don't count
    return hidden, weight, labels


def step(method, given, chunk):
    "Forward and backward: (seconds, gradients)."
    given[0].grad = given[1].grad = None
    start = process_time()
    methods[method](*given, chunk).backward()
    return process_time() - start, (given[0].grad, given[1].grad)


def extra_bytes(method, L, D, V, chunk):
    "Peak of allocated bytes in one step, less the gradients."
    given = inputs(L, D, V)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        methods[method](*given, chunk).backward()
    now = peak = 0
    for event in log.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak - 4 * (given[0].numel() + given[1].numel())


def main():
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--json", type=Path)
    ask.add_argument("--turns", type=int, default=16)
    ask.add_argument(
        "--sizes",
        type=int,
        nargs=4,
        default=[1024, 512, 8192, 256],
        metavar=("L", "D", "V", "CHUNK"),
        help="of the timing",
    )
    given = ask.parse_args()
    from rich.console import Console
    from rich.table import Table

    torch.manual_seed(0)
    L, D, V, chunk = given.sizes
    tensors = inputs(L, D, V)
    exact_h, exact_w = tensors[0].detach()[:].double().requires_grad_(), tensors[1].detach().double().requires_grad_()
    F.cross_entropy(exact_h @ exact_w.T, tensors[2]).backward()
    apart = {
        m: max(
            float((a - b).norm() / b.norm()) for a, b in zip(step(m, tensors, chunk)[1], (exact_h.grad, exact_w.grad))
        )
        for m in methods
    }
    del exact_h, exact_w
    order = list(methods)
    turns = [
        {m: step(m, tensors, chunk)[0] for m in order[i % 4 :] + order[: i % 4]} for i in range(given.turns)
    ]  # none always comes after the same one

    def over(a, b):
        return median(turn[a] / turn[b] for turn in turns)

    lengths = [1024, 4096, 16384]
    extra = {m: [extra_bytes(m, n, 32, 16384, 512) for n in lengths] for m in methods}
    growth = {m: found[-1] / found[0] - 1 for m, found in extra.items()}

    table = Table(
        "method", "median s", "over torch's", "gradients differ by", *(f"extra MB, L = {n}" for n in lengths), "growth"
    )
    for m in methods:
        row = [
            f"{median(t[m] for t in turns):.3f}",
            f"{over(m, 'torch, same chunk'):.2f}",
            f"{apart[m]:.0e}",
            *(f"{x / 1e6:.1f}" for x in extra[m]),
            f"{growth[m]:+.1%}",
        ]
        table.add_row(m, *row)
    Console(width=160).print(
        f"time: L = {L}, D = {D}, V = {V}, chunks of {chunk}, {given.turns} turns; memory: D = 32, V = 16384, "
        f"chunks of 512; torch {torch.__version__}",
        table,
    )
    figures = {
        "extra_memory_growth": max(growth["chunks"], growth["the function's choice"]),
        "speedup_vs_recompute": over("recomputed chunks", "chunks"),
        "time_vs_torch": over("chunks", "torch, same chunk"),
        "gradient_difference": max(apart["chunks"], apart["the function's choice"]),
    }
    Console().print(*(f"{name:<22}{value:.3g}" for name, value in figures.items()), sep="\n")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
