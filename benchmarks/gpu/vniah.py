"""V-NIAH on LongVA-7B's shape on one GPU: the trie beside one full pass a trial, memory, and the longest cell.

    python benchmarks/gpu/vniah.py --json vniah.json

The weights are random, so the answers mean nothing; time, memory and the agreement of both evaluators do. The small
sweep has 100, 200, 300 and 400 frames at six depths with one needle. Afterwards the trie decides one trial at each
depth behind `--longest` frames. In the file:

wall_ratio, token_ratio, flop_ratio    plain evaluator over trie, in the small sweep
decisions_equal                        of the small sweep, in bfloat16 (where both orders of summing round differently)
worst_logit_difference                 largest, over the largest logit
kv_bytes_vs_formula                    peak of the trie's walk above weights and haystack, less what a chunk takes for
                                       a moment, over 57,344 bytes a token of the longest sequence
longest_tokens, longest_gb, longest_seconds_per_trial
                                       of the longest cell: tokens, peak with weights and haystack, seconds (the
                                       haystack's prefill shared)
"""

from time import perf_counter

import torch
from common import options, peak_bytes, report
from prefill import build

from longva.model.prefill import work_bytes
from longva.needle.reader import Reader
from longva.needle.trie import Cost, decide_paths, trie_cost

ANSWER = (7, 8)


def grid(frames, depths, needles):
    """List the paths of a V-NIAH sweep."""
    before = ("ids", tuple(range(20, 40)))
    question = ("ids", tuple(range(40, 60)))
    paths = []
    for n in sorted(frames, reverse=True):
        for depth in sorted(depths, reverse=True):
            at = int(depth * n)
            paths += [(before, ("hay", 0, at), ("needle", j), ("hay", at, n), question) for j in range(needles)]
    return paths


def run(reader, paths, **how):
    """Decide the trials: (logits by path, seconds, cost)."""
    spent = Cost()
    found = {}
    start = perf_counter()
    for i, logits, _ in decide_paths(reader, paths, [ANSWER] * len(paths), spent=spent, **how):
        found[i] = logits.float().cpu()
    return found, perf_counter() - start, spent


def random_tokens(model, n):
    """Draw visual tokens [n,T,D]."""
    shape = n, model.config.tokens_per_grid, model.config.get_text_config().hidden_size
    return torch.randn(*shape, device=model.device, dtype=model.dtype) * 0.02


def small_sweep(reader, frames, depths, device):
    """Compare the trie with one full pass a trial: (figures, rows of the table)."""
    paths = grid(frames, depths, 1)
    run(reader, paths[-6:])  # warm
    (fast, fast_s, fast_cost), peak = peak_bytes(lambda: run(reader, paths), device)
    plain, plain_s, plain_cost = run(reader, paths, naive=True)
    same = [torch.equal(fast[i].argmax(-1), plain[i].argmax(-1)) for i in plain]
    apart = [float((fast[i] - plain[i]).abs().max() / plain[i].abs().max()) for i in plain]
    token = 2 * 2 * 4 * 128 * 28 if device.startswith("cuda") else 1  # bytes of keys and values
    figures = dict(
        wall_ratio=plain_s / fast_s,
        token_ratio=plain_cost.tokens / fast_cost.tokens,
        flop_ratio=plain_cost.flops / fast_cost.flops,
        decisions_equal=sum(same) / len(same),
        worst_logit_difference=max(apart),
        kv_bytes_vs_formula=(peak - work_bytes(reader.model.config)["prefill"]) / (token * fast_cost.longest),
        trie_tflops=fast_cost.flops / fast_s / 1e12,
        plain_tflops=plain_cost.flops / plain_s / 1e12,
    )
    rows = [
        ("plain", len(plain), f"{plain_cost.tokens:,}", f"{plain_s:.1f}", f"{figures['plain_tflops']:.0f}"),
        ("trie", len(fast), f"{fast_cost.tokens:,}", f"{fast_s:.1f}", f"{figures['trie_tflops']:.0f}"),
    ]
    return figures, rows


def longest_cell(reader, frames, device):
    """Decide two trials of the longest length: (figures, row of the table)."""
    paths = grid([frames], [0.8, 1.0], 1)
    expected = trie_cost(reader, paths, [ANSWER] * len(paths))
    (found, took, spent), peak = peak_bytes(lambda: run(reader, paths), device)
    held = sum(p.numel() * p.element_size() for p in [*reader.model.parameters(), reader.haystack])
    figures = dict(
        longest_tokens=spent.longest,
        longest_gb=(peak + held) / 1e9,
        longest_seconds_per_trial=took / len(paths),
        longest_tflops=expected.flops / took / 1e12,
    )
    row = (f"trie, {frames} frames", len(found), f"{spent.tokens:,}", f"{took:.1f}", f"{figures['longest_tflops']:.0f}")
    return figures, row


def main():
    given = options(__doc__, frames=[100, 200, 300, 400], longest=3000, depths=[0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    model = build(given.device)
    haystack = random_tokens(model, max(*given.frames, given.longest))
    reader = Reader(model).with_tokens(haystack, random_tokens(model, 1))
    figures, rows = small_sweep(reader, given.frames, given.depths, given.device)
    print(rows, figures, flush=True)
    if given.longest:
        more, row = longest_cell(reader, given.longest, given.device)
        figures |= more
        rows.append(row)
    columns = ("", "trials", "tokens read", "seconds", "TFLOPS")
    report("V-NIAH, LongVA-7B's shape, random weights", columns, rows, figures, given)


if __name__ == "__main__":
    main()
