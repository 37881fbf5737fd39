"""Context parallel attention: is zigzag faster than plain pieces, is its load even, does it send what it should?

    .venv/bin/python benchmarks/attention.py --json benchmarks/results/attention.json
    .venv/bin/python benchmarks/attention.py --others        the same cases with torch, ring_flash_attn and DeepSpeed

Two CPU ranks of one thread each, forward and backward, kinds in turns in the same processes. The contiguous ring
gives rank 1 three times the work of rank 0, so zigzag can be at most 1.50 times faster. The best of the rounds
counts: what else runs on the machine can only make a round slower. As a check on a busy machine, the processor time
of the slowest rank is compared, too.
"""

import argparse
import importlib.util
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

RANKS, TOKENS, HEADS, DIM = 2, 6144, (8, 2), 64


def start(work, ranks, *args, seconds=900):
    "Run work(rank, *args) in so many forked processes of one thread; a list of what they return."
    import torch
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        started = mp.start_processes(_one_rank, (work, ranks, folder, args), ranks, join=False, start_method="fork")
        end = time.monotonic() + seconds
        while not started.join(timeout=1):
            if time.monotonic() > end:
                for p in started.processes:
                    p.kill()
                raise TimeoutError(f"{ranks} ranks were not done after {seconds} seconds.")
        return [torch.load(Path(folder) / str(r), weights_only=False) for r in range(ranks)]


def _one_rank(rank, work, ranks, folder, args):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.save(work(rank, *args), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def tensors(tokens, heads, dim, dtype=None):
    import torch

    return [torch.randn(1, tokens, h, dim, dtype=dtype).requires_grad_() for h in (heads[0], heads[1], heads[1])]


def timed(rank, kinds, rounds):
    "kind -> [(wall seconds, processor seconds of this rank)] of forward and backward."
    import torch.distributed as dist

    from longva.context.parallel import context_parallel, parallel_attention

    q, k, v = tensors(TOKENS // RANKS, HEADS, DIM)
    found = {kind: [] for kind in kinds}
    for i in range(rounds + 1):  # the first one warms up
        for kind in kinds:
            with context_parallel(kind=kind):
                dist.barrier()
                wall, busy = time.perf_counter(), time.process_time()
                parallel_attention(q, k, v).sum().backward()
                busy = time.process_time() - busy
                dist.barrier()
                if i:
                    found[kind].append((time.perf_counter() - wall, busy))
    return found


def counted(rank, kinds):
    "kind -> (bytes handed to torch.distributed in one forward and backward, bytes by the formula)."
    import torch
    import torch.distributed as dist

    from longva.context import parallel

    total, W = [0], dist.get_world_size()
    send, gather, scatter = dist.batch_isend_irecv, parallel._all_gather, parallel._reduce_scatter

    def add(number, call, *args, **more):
        total[0] += number
        return call(*args, **more)

    dist.batch_isend_irecv = lambda ops: add(sum(op.tensor.nbytes for op in ops if op.op is dist.isend), send, ops)
    parallel._all_gather = lambda out, given, **more: add(given.nbytes * (W - 1), gather, out, given, **more)
    parallel._reduce_scatter = lambda out, given, **more: add(out.nbytes * (W - 1), scatter, out, given, **more)
    found = {}
    for kind in kinds:
        with parallel.context_parallel(kind=kind) as context:
            q, k, v = tensors(32, HEADS, DIM, torch.bfloat16)
            total[0] = 0
            parallel.parallel_attention(q, k, v).sum().backward()
            found[kind] = total[0], sum(parallel.bytes_sent(context, 32 * W, HEADS[1], DIM))
    return found


def balance():
    "W -> largest number of pairs of a rank over the mean, for zigzag and for plain pieces."
    from longva.context.parallel import Context, schedule

    found = {}
    for W in (2, 3, 4, 8, 16, 32, 64):
        for kind in ("ring", "all_gather", "contiguous"):
            load = [sum(b.pairs for step in schedule(Context(kind, W, r), 64 * W) for b in step) for r in range(W)]
            found[W, kind] = max(load) * W / sum(load)
    return found


# what others say


def _sentence(error):
    first = next((line for line in str(error).strip().splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {first.strip()[:150]}"


def torch_says(rank, heads, documents, tokens):
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn import functional as F

    q, k, v = (t.detach().transpose(1, 2).contiguous() for t in tensors(tokens, heads, 8))
    which = torch.bucketize(torch.arange(tokens), torch.tensor([*documents, tokens]), right=True)
    mask = (which[:, None] == which).tril() if documents else None
    try:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        with context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2], no_restore_buffers={q, k, v}):
            for t in (q, k, v):
                t.requires_grad_()
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            ).sum().backward()
        return "runs"
    except Exception as e:
        return _sentence(e)


def ring_flash_says():
    try:
        import ring_flash_attn  # noqa: F401

        return "imports; wants CUDA"
    except ImportError as e:
        return _sentence(e)


def ulysses_says(rank, heads, documents, tokens):
    """DeepSpeed's class around transformers' sdpa attention, without a mask, as its own wrapper calls it.

    Documents are in the position ids, which the class gathers; flash_attention_2 would read them there, sdpa doesn't.
    """
    try:
        import deepspeed
        import torch
        import torch.distributed as dist
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        deepspeed.init_distributed("gloo", verbose=False)
        W, (H, K) = dist.get_world_size(), heads
        layer = UlyssesSPAttentionHF(
            sdpa_attention_forward, 1, H, 8, K, 1, dist.group.WORLD, seq_length_is_variable=True
        )
        if tokens % W:
            return f"not asked: its data loader refuses lengths that are no multiple of {W}"
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, h, tokens, 8) for h in (H, K, K))
        module = type("Layer", (torch.nn.Module,), dict(is_causal=True, num_key_value_groups=H // K))()
        positions = torch.cat([torch.arange(b - a) for a, b in zip((0, *documents), (*documents, tokens))])[None]
        mine = slice(rank * tokens // W, (rank + 1) * tokens // W)
        out = layer(
            module,
            *(t[:, :, mine] for t in (q, k, v)),
            None,
            scaling=8**-0.5,
            position_ids=positions[:, mine].contiguous(),
        )[0]
        which = torch.bucketize(torch.arange(tokens), torch.tensor([*documents, tokens]), right=True)
        right = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=(which[:, None] == which).tril(), enable_gqa=True
        )
        far = (out.reshape(1, -1, H, 8) - right.transpose(1, 2)[:, mine]).abs().max().item()
        return "runs, equal to one process" if far < 1e-4 else f"runs without a word, and out is wrong by {far:.1f}"
    except Exception as e:
        return _sentence(e)


def ours(rank, heads, documents, tokens):
    import torch

    from longva.context.parallel import context_parallel, parallel_attention, shard, unshard

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, h, 8) for h in (heads[0], heads[1], heads[1]))
    which = torch.bucketize(torch.arange(tokens), torch.tensor([*documents, tokens]), right=True)
    right = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=(which[:, None] == which).tril(), enable_gqa=True
    )
    with context_parallel() as context:
        borders = sorted({0, *documents, tokens, tokens + -tokens % context.multiple})
        far = (
            (
                unshard(parallel_attention(*map(shard, (q, k, v)), [tuple(borders)]), length=tokens)
                - right.transpose(1, 2)
            )
            .abs()
            .max()
            .item()
        )
    return "runs, equal to one process" if far < 1e-4 else f"wrong by {far:.1f}"


def asked(rank, W):
    "All cases of one number of ranks: (heads, documents, tokens) -> library -> its word."
    found = {}
    for heads in ((28, 4), (14, 2), (4, 4)):
        for documents, tokens in (((), 16 * W), ((5, 20), 16 * W), ((), 16 * W + 1)):
            found[heads, documents, tokens] = {
                "longva": ours(rank, heads, documents, tokens),
                "torch context_parallel": torch_says(rank, heads, documents, tokens),
                "DeepSpeed Ulysses": ulysses_says(rank, heads, documents, tokens),
            }
    return found


def others(console):
    from rich.table import Table

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")  # once, before the processes fork
    console.print(f"ring_flash_attn, any case: {ring_flash_says()}")
    for W in (2, 8):
        found, table = (
            start(asked, W, W)[0],
            Table(
                "heads",
                "documents",
                "tokens",
                "longva",
                "torch context_parallel",
                "DeepSpeed Ulysses",
                title=f"{W} CPU ranks",
            ),
        )
        for (heads, documents, tokens), said in found.items():
            table.add_row(f"{heads[0]}/{heads[1]}", str(len(documents) + 1), str(tokens), *said.values())
        console.print(table)


def main():
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--json", type=Path)
    ask.add_argument("--rounds", type=int, default=7)
    ask.add_argument("--others", action="store_true", help="ask the other libraries instead")
    given = ask.parse_args()
    warnings.filterwarnings("ignore")
    from rich.console import Console
    from rich.table import Table

    from longva.context.kernels import explain
    from longva.context.parallel import KINDS

    console = Console(width=160)
    if given.others:
        return others(console)
    console.print(explain("cpu", head_dim=DIM))
    measured = start(timed, RANKS, KINDS, given.rounds)
    wall = {kind: min(max(r[kind][i][0] for r in measured) for i in range(given.rounds)) for kind in KINDS}
    busy = {kind: max(min(b for _, b in r[kind]) for r in measured) for kind in KINDS}
    table = Table(
        "kind",
        "seconds",
        "against contiguous",
        "processor seconds, slowest rank",
        "against contiguous",
        title=f"{TOKENS} tokens, {HEADS[0]}/{HEADS[1]} heads of {DIM}, {RANKS} ranks, forward and backward",
    )
    for kind in KINDS:
        table.add_row(
            kind,
            f"{wall[kind]:.3f}",
            f"{wall['contiguous'] / wall[kind]:.2f}",
            f"{busy[kind]:.3f}",
            f"{busy['contiguous'] / busy[kind]:.2f}",
        )
    console.print(table)

    even = balance()
    table = Table(
        "ranks", "zigzag ring", "zigzag all-gather", "contiguous", title="pairs of the busiest rank over the mean"
    )
    for W in sorted({W for W, _ in even}):
        table.add_row(str(W), *(f"{even[W, kind]:.3f}" for kind in ("ring", "all_gather", "contiguous")))
    console.print(table)

    table, ratios = (
        Table("ranks", "kind", "bytes sent", "by the formula", title="bytes per rank and layer, bfloat16"),
        [],
    )
    for W in (2, 4):
        for kind, pairs in ((kind, [r[kind] for r in found]) for found in [start(counted, W, KINDS)] for kind in KINDS):
            ratios += [sent / formula for sent, formula in pairs]
            table.add_row(str(W), kind, f"{pairs[0][0]:,}", f"{pairs[0][1]:,}")
    console.print(table)
    result = dict(
        zigzag_speedup_w2=wall["contiguous"] / wall["ring"],
        zigzag_speedup_w2_processor=busy["contiguous"] / busy["ring"],
        all_gather_speedup_w2=wall["contiguous"] / wall["all_gather"],
        pairs_max_over_mean=max(r for (_, kind), r in even.items() if kind != "contiguous"),
        bytes_sent_over_formula=max(ratios, key=lambda r: abs(r - 1)),
    )
    console.print(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
