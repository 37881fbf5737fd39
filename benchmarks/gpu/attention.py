"""The attention kernels on one GPU: how far from float64, how fast, and what eight ranks would make of them.

    python benchmarks/gpu/attention.py --json attention.json

Shapes are Qwen2-7B's (28 query heads, 4 key/value heads, head dimension 128), in bfloat16. The ranks are played one
after the other on the same GPU with the package's own schedule, so that a rank's time is known without a network.
In the file:

KERNEL_error                 out and gradients against float64, relative in norm, the largest of the four
KERNEL_forward_tflops        causal, products that are needed; KERNEL_backward_tflops likewise ring8_error_vs_kernel
error of the merged out of a ring of 8 over that of the single call gather8_error_vs_kernel      the same for all-
gather ring8_time_vs_kernel         time of all ranks' blocks over that of the single call; gather8_time_vs_kernel
likewise
"""

import torch
from common import options, report, seconds

from longva.context import kernels
from longva.context.parallel import Context, schedule

H, K, E, W = 28, 4, 128, 8


def inputs(L, device, dtype, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(1, L, h, E, generator=source).to(device, dtype) for h in (H, K, K, H)]


def off(got, right):
    return float((got.double() - right).norm() / right.norm())


def errors(kernel, q, k, v, dout, exact, exact_grads):
    out, lse = kernels._forward(kernel, q, k, v, True, E**-0.5)
    grads = kernels._backward(kernel, dout, q, k, v, out, lse, True, E**-0.5)
    return max(off(a, b) for a, b in zip((out, *grads), (exact, *exact_grads)))


def virtual(kind, q, k, v):
    "All ranks' out, one rank after the other, in the order of the sequence."
    L, whole = q.shape[1], torch.empty_like(q)
    for rank in range(W):
        context = Context(kind, W, rank)
        mine = torch.cat([torch.arange(a, b, device=q.device) for a, b in context.held(L)])
        out = torch.zeros(1, len(mine), H, E, device=q.device, dtype=torch.float32)
        lse = torch.full((1, H, len(mine)), -torch.inf, device=q.device)
        for step, blocks in enumerate(schedule(context, L)):
            source = (rank - step) % W
            theirs = (
                slice(None)
                if kind == "all_gather"
                else torch.cat([torch.arange(a, b, device=q.device) for a, b in context.held(L, source)])
            )
            keys, values = k[:, theirs], v[:, theirs]
            for b in blocks:
                at, seen = slice(*b.q), slice(*b.k)
                o, s = kernels.block_attention(q[:, mine][:, at], keys[:, seen], values[:, seen], b.causal)
                out[:, at], lse[..., at] = kernels.merge(out[:, at], lse[..., at], o, s)
        whole[:, mine] = out.to(q.dtype)
    return whole


def main():
    given = options(__doc__, length=32768, check=2048)
    device, dtype = given.device, torch.bfloat16 if given.device.startswith("cuda") else torch.float32
    print(kernels.explain(device, dtype, E))
    names = (
        dict(zip(("aten_flash", "cudnn", "flash_attn"), (kernels.aten_flash, kernels.cudnn, kernels.flash_attn)))
        if device.startswith("cuda")
        else dict(cpu_flash=kernels.cpu_flash)
    )
    q, k, v, dout = inputs(given.check, device, dtype)
    wide = [t.double() for t in (q, k, v)]
    exact, exact_lse = kernels._plain_forward(*wide, True, E**-0.5)
    exact_grads = kernels._plain_backward(dout.double(), *wide, exact, exact_lse, True, E**-0.5)
    figures, rows, work = {}, [], 4 * H * E * given.length**2 / 2
    long = inputs(given.length, device, dtype, 1)
    for name, kernel in names.items():
        try:
            error = errors(kernel, q, k, v, dout, exact, exact_grads)
        except Exception as why:
            rows.append((name, f"not here: {str(why).splitlines()[0][:60]}", "", ""))
            continue
        out, lse = kernels._forward(kernel, *long[:3], True, E**-0.5)
        forward = seconds(lambda: kernels._forward(kernel, *long[:3], True, E**-0.5), device)
        backward = seconds(lambda: kernels._backward(kernel, long[3], *long[:3], out, lse, True, E**-0.5), device)
        figures |= {
            f"{name}_error": error,
            f"{name}_forward_tflops": work / forward / 1e12,
            f"{name}_backward_tflops": 2.5 * work / backward / 1e12,
        }
        rows.append((name, f"{error:.1e}", f"{work / forward / 1e12:.0f}", f"{2.5 * work / backward / 1e12:.0f}"))
    plain_error = off(kernels.block_attention(q, k, v, True)[0], exact)
    once = seconds(lambda: kernels.block_attention(*long[:3], True), device)
    for name, kind in (("ring8", "ring"), ("gather8", "all_gather")):
        error, took = (
            off(virtual(kind, q, k, v), exact),
            seconds(lambda: virtual(kind, *long[:3]), device, turns=3, warm=1),
        )
        figures |= {f"{name}_error_vs_kernel": error / plain_error, f"{name}_time_vs_kernel": took / once}
        rows.append((f"{name} (8 ranks in turn)", f"{error:.1e}", f"{work / took / 1e12:.0f}", "-"))
    report(
        f"causal attention, L = {given.length} ({given.check} for errors)",
        ("", "error", "forward TFLOPS", "backward TFLOPS"),
        rows,
        figures,
        given,
    )


if __name__ == "__main__":
    main()
