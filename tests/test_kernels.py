"""Blocks of attention against an oracle in float64, and what a kernel may not be asked."""

import subprocess
import sys

import pytest
import torch

from longva.context import kernels
from longva.context.kernels import block_attention, block_attention_backward, cpu_flash, explain, merge, plain

HEADS = [(28, 4), (14, 2), (4, 4)]


def draw(L, S, H, K, E=8, B=1, dtype=torch.float32, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=source).to(dtype) for s in ((B, L, H, E), (B, S, K, E), (B, S, K, E), (B, L, H, E))
    ]


def oracle(q, k, v, dout, allowed):
    "Out, lse, dq, dk, dv in float64 under a mask [L,S]."
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("blhe,bshe->bhls", q, k.repeat_interleave(groups, 2)) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~allowed, -torch.inf)
    out = torch.einsum("bhls,bshe->blhe", scores.softmax(-1), v.repeat_interleave(groups, 2))
    return [out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, (q, k, v), dout.double())]


def far(found, right):
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("H,K", HEADS)
@pytest.mark.parametrize(
    "L,S,causal", [(1, 1, True), (7, 7, True), (5, 12, True), (6, 3, False), (1, 9, False), (33, 65, True)]
)
def test_one_block(L, S, causal, H, K, dtype, bound):
    q, k, v, dout = draw(L, S, H, K, dtype=dtype)
    allowed = torch.ones(L, S, dtype=torch.bool)
    right = oracle(q, k, v, dout, allowed.tril(S - L) if causal else allowed)
    out, lse = block_attention(q, k, v, causal)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    found = [out, lse, *block_attention_backward(dout, q, k, v, out, lse, causal)]
    if L == S == 1:  # softmax over one key: its gradients of q and k are nothing but rounding
        assert max(found[2].abs().max(), found[3].abs().max()) < 20 * bound
        found, right = found[:2] + found[4:], right[:2] + right[4:]
    assert far(found, right) < bound


@pytest.mark.parametrize("kernel", [plain, cpu_flash], ids=lambda k: k.name)
@pytest.mark.parametrize("seed", range(4))
def test_any_cut_of_the_keys_gives_the_same(kernel, seed, monkeypatch):
    monkeypatch.setattr(kernels, "_kernel", lambda q, packed=False: kernel)
    draw_cut = torch.Generator().manual_seed(seed)
    L, S = 9, 31
    q, k, v, dout = draw(L, S, 14, 2, dtype=torch.float64, seed=seed)
    right = oracle(q, k, v, dout, torch.ones(L, S, dtype=torch.bool))
    cuts = [0, *sorted((torch.randperm(S - 1, generator=draw_cut)[:seed] + 1).tolist()), S]
    pieces = [list(zip(cuts, cuts[1:]))[i] for i in torch.randperm(len(cuts) - 1, generator=draw_cut).tolist()]
    out, lse = torch.zeros_like(q), torch.full((1, 14, L), -torch.inf, dtype=q.dtype)
    for a, b in pieces:
        out, lse = merge(out, lse, *block_attention(q, k[:, a:b], v[:, a:b], False))
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for a, b in pieces:
        part, dk[:, a:b], dv[:, a:b] = block_attention_backward(dout, q, k[:, a:b], v[:, a:b], out, lse, False)
        dq += part
    assert far([out, lse, dq, dk, dv], right) < 1e-12


def test_nothing_seen_is_nothing_said():
    q, k, v, dout = draw(5, 3, 4, 2)
    out, lse = block_attention(q, k, v, True)  # two of five queries stand before all keys
    assert (out[:, :2] == 0).all() and (lse[..., :2] == -torch.inf).all() and lse[..., 2:].isfinite().all()
    for L, S in ((0, 3), (5, 0), (0, 0)):
        out, lse = block_attention(q[:, :L], k[:, :S], v[:, :S], False)
        grads = block_attention_backward(dout[:, :L], q[:, :L], k[:, :S], v[:, :S], out, lse, False)
        assert (
            not out.any()
            and (lse == -torch.inf).all()
            and [g.shape[1] for g in grads] == [L, S, S]
            and not any(g.any() for g in grads)
        )
    empty = torch.zeros(1, 5, 4, 8), torch.full((1, 4, 5), -torch.inf)
    assert not merge(*empty, *empty)[0].isnan().any()


def test_mixed_dtypes_are_a_sentence():
    q, k, v, dout = draw(4, 4, 4, 4)
    for given in ((q.half(), k, v), (q, k.half(), v), (q, k, v.half())):
        with pytest.raises(ValueError, match="one dtype.*float16"):
            block_attention(*given, True)
        with pytest.raises(ValueError, match="one dtype.*float16"):
            block_attention_backward(dout, *given, q, q[..., 0].mT, True)


def test_a_nan_is_not_hidden():
    q, k, v, _ = draw(4, 4, 4, 4)
    v[0, 2] = torch.nan
    first, second = block_attention(q, k[:, :2], v[:, :2], False), block_attention(q, k[:, 2:], v[:, 2:], False)
    assert merge(*first, *second)[0].isnan().all()


def test_the_naked_cpu_kernel_dies_without_keys():
    "The reason for a guard. If this fails, torch has mended it, and the notebook's sentence about it is out of date."
    code = (
        "import torch; q = torch.randn(1, 2, 3, 8);"
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q[:, :, :0], q[:, :, :0], 0.0, False)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode < 0


@pytest.mark.parametrize("H,K", HEADS)
def test_documents_do_not_see_each_other(H, K):
    cu_q, cu_k = (0, 1, 6, 13), (0, 4, 9, 16)
    q, k, v, dout = draw(13, 16, H, K, B=2)
    allowed = torch.zeros(13, 16, dtype=torch.bool)
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        allowed[a:b, c:d] = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
    out, lse = block_attention(q, k, v, True, cu_q=cu_q, cu_k=cu_k)
    found = [out, lse, *block_attention_backward(dout, q, k, v, out, lse, True, cu_q=cu_q, cu_k=cu_k)]
    assert far(found, oracle(q, k, v, dout, allowed)) < 2e-6


def test_choice_leaves_random_numbers_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    kernels._verdicts.cache_clear()
    said = explain("cpu", torch.float32, 24)
    assert torch.equal(torch.rand(3), want) and "cpu flash: used" in said


def test_a_kernel_that_fails_makes_room_for_the_next(monkeypatch):
    def broken(*args):
        raise RuntimeError("out of order")

    monkeypatch.setattr(kernels, "cpu_flash", kernels.Kernel("cpu flash", broken, broken))
    kernels._verdicts.cache_clear()
    try:
        said = explain("cpu", torch.float32, 40)
        assert "cpu flash: not used, RuntimeError: out of order" in said and "plain: used" in said
    finally:
        kernels._verdicts.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu():
    q, k, v, dout = (t.to("cuda") for t in draw(70, 130, 28, 4, E=128, dtype=torch.bfloat16))
    out, lse = block_attention(q, k, v, True)
    found = [out, lse, *block_attention_backward(dout, q, k, v, out, lse, True)]
    right = oracle(*(t.cpu() for t in (q, k, v, dout)), torch.ones(70, 130, dtype=torch.bool).tril(60))
    assert far([t.cpu() for t in found], right) < 5e-2
