"""The chunked loss between real processes, on odd shapes, and the choice of who computes it."""

import json
import sys
import time
import types
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from original import PARITY
from safetensors.torch import load_file

import longva.context.loss as loss_module
from longva.context.loss import linear_cross_entropy, loss_kernel


def oracle(hidden, weight, labels, weights=None):
    "Value and gradients in float64, with all logits, and the mean written out."
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    chance = (h @ w.T).log_softmax(-1)
    counts = (labels != -100).double() * (1 if weights is None else weights.double())
    losses = -chance.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    value = (losses * counts).sum() / counts.sum().clamp(min=1e-30)
    value.backward()
    return value.detach(), h.grad, w.grad


def ours(hidden, weight, labels, *more, **options):
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    value = linear_cross_entropy(h, w, labels, *more, **options)
    value.backward()
    return value.detach(), h.grad, w.grad


def apart(found, wanted):
    return max(float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, wanted))


def case(L=57, D=12, V=37, ignored=0.3, seed=0):
    torch.manual_seed(seed)
    labels = torch.randint(V, (L,))
    labels[torch.rand(L) < ignored] = -100
    return torch.randn(L, D), torch.randn(V, D), labels, torch.rand(L)


def mean_of_chunk_means(hidden, weight, labels, chunks, **options):
    """The original's loss: the mean over equal slices of the sequence of each slice's mean."""
    length = labels.shape[1] // chunks * chunks  # the original leaves out the rest
    parts = zip(hidden[:, :length].chunk(chunks, 1), labels[:, :length].chunk(chunks, 1))
    return torch.stack([linear_cross_entropy(h, weight, y, **options) for h, y in parts]).mean()


@pytest.mark.parametrize("kernel", ["auto", "chunks", "torch"])
def test_the_originals_chunked_loss(kernel):
    """Without ignored labels it is the mean over tokens. With them it isn't, and only that mean is right."""
    known = json.loads((PARITY / "losses" / "chunked_ce.json").read_text())
    tensors = load_file(PARITY / "losses" / "chunked_ce.safetensors")
    for entry in known["cases"]:
        hidden, weight, labels = (tensors[f"ce{entry['id']}.{name}"] for name in ("x", "weight", "labels"))
        labels = labels.long()
        used = entry.get("positions_used", entry["length"])
        value, grad_h, grad_w = ours(
            hidden[:, :used], weight, labels[:, :used], chunk=entry["length"] // entry["chunks"], kernel=kernel)
        assert float(value) == pytest.approx(entry["loss"], rel=1e-6)
        whole = ours(hidden, weight, labels, chunk=7, kernel=kernel)[0]
        assert float(whole) == pytest.approx(entry["loss_unchunked"], rel=1e-6)
        if "gradients" in entry:
            assert (grad_h - tensors[entry["gradients"][0]]).abs().max() <= 1e-6
            assert (grad_w - tensors[entry["gradients"][1]]).abs().max() <= 1e-6
    for entry in known["ignored_labels"]:
        given = (tensors["ce0.x"], tensors["ce0.weight"], tensors[entry["labels"]].long())
        assert float(ours(*given, chunk=4, kernel=kernel)[0]) == pytest.approx(entry["loss_token_mean"], rel=1e-6)
        theirs = mean_of_chunk_means(*given, entry["chunks"], kernel=kernel)
        assert float(theirs) == pytest.approx(entry["loss_as_mean_of_chunk_means"], rel=1e-6)


@pytest.mark.parametrize("kernel", ["auto", "chunks", "torch"])
@pytest.mark.parametrize(
    "L, chunk, ignored",
    [(1, 16, 0), (15, 16, 0.3), (16, 16, 0), (57, 16, 0.05), (57, 16, 0.9), (57, 1, 0.3), (57, 1000, 0)],
)
def test_any_length_and_chunk(L, chunk, ignored, kernel):
    hidden, weight, labels, _ = case(L, ignored=ignored, seed=L + chunk)
    labels[0] = 3
    assert apart(ours(hidden, weight, labels, chunk=chunk, kernel=kernel), oracle(hidden, weight, labels)) < 1e-5


def test_token_weights_and_float64():
    hidden, weight, labels, weights = case()
    weights[5:20] = 0
    assert apart(ours(hidden, weight, labels, weights, chunk=8), oracle(hidden, weight, labels, weights)) < 1e-5
    assert (
        apart(
            ours(hidden.double(), weight.double(), labels, weights.double(), chunk=8),
            oracle(hidden, weight, labels, weights.double()),
        )
        < 1e-13
    )


def test_batch_dimensions_and_large_logits():
    hidden, weight, labels, _ = case(L=60)
    found = ours(hidden.view(3, 20, -1) * 100, weight, labels.view(3, 20), chunk=7, kernel="chunks")
    wanted = oracle(hidden.view(3, 20, -1) * 100, weight, labels.view(3, 20))
    assert found[1].shape == (3, 20, 12) and all(torch.isfinite(x).all() for x in found) and apart(found, wanted) < 1e-5


@pytest.mark.parametrize("kernel", ["auto", "chunks", "torch"])
def test_nothing_counts(kernel):
    hidden, weight, labels, _ = case()
    value, grad_h, grad_w = ours(hidden, weight, torch.full_like(labels, -100), kernel=kernel)
    assert value == 0 and not grad_h.any() and not grad_w.any()


def test_only_one_gradient_or_none():
    hidden, weight, labels, _ = case()
    value, grad_h, grad_w = oracle(hidden, weight, labels)
    for wants_h, wants_w in [(True, False), (False, True), (False, False)]:
        h, w = hidden.clone().requires_grad_(wants_h), weight.clone().requires_grad_(wants_w)
        found = linear_cross_entropy(h, w, labels, chunk=10, kernel="chunks")
        assert abs(found - value) < 1e-5 and found.requires_grad == (wants_h or wants_w)
        if wants_h or wants_w:
            found.backward()
            assert (
                apart(
                    [x.grad for x in (h, w) if x.grad is not None],
                    [g for g, on in ((grad_h, wants_h), (grad_w, wants_w)) if on],
                )
                < 1e-5
            )


def test_nan_weights_give_a_nan_loss_and_no_error():
    "A training loop watches the loss: it must see the nan, and with the sum of the weights as normalizer too."
    hidden, weight, labels, weights = case(ignored=0)
    weights[3] = float("nan")
    for normalizer in (None, weights.sum().item()):
        assert ours(hidden, weight, labels, weights, normalizer=normalizer)[0].isnan()


def test_gradient_accumulation_by_normalizer():
    hidden, weight, labels, _ = case(L=60, ignored=0.6)
    count = int((labels != -100).sum())
    parts = [ours(hidden[a : a + 20], weight, labels[a : a + 20], normalizer=count, chunk=6) for a in (0, 20, 40)]
    wanted = oracle(hidden, weight, labels)
    assert apart([sum(p[0] for p in parts), torch.cat([p[1] for p in parts]), sum(p[2] for p in parts)], wanted) < 1e-5


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_sixteen_bits_lose_only_the_last_rounding(low):
    hidden, weight, labels, _ = case(L=400, ignored=0.1)
    hidden, weight = hidden.to(low), weight.to(low)
    found, wanted = ours(hidden, weight, labels, chunk=4), oracle(hidden, weight, labels)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == low
    assert abs(found[0] / wanted[0] - 1) < 1e-6 and apart(found[1:], wanted[1:]) < torch.finfo(low).eps


def test_mixed_dtypes_and_autocast():
    hidden, weight, labels, _ = case()
    wanted = oracle(hidden.bfloat16(), weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(hidden.bfloat16(), weight, labels)
    assert found[1].dtype == torch.bfloat16 and found[2].dtype == torch.float32
    assert abs(found[0] / wanted[0] - 1) < 1e-6 and apart(found[2:], wanted[2:]) < 1e-5


def test_second_backward_is_refused():
    hidden, weight, labels, _ = case()
    value = linear_cross_entropy(hidden.requires_grad_(), weight, labels, kernel="chunks")
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already"):
        value.backward()


def test_labels_that_are_no_tokens():
    hidden, weight, labels, _ = case()
    for wrong in (37, -1):
        labels[3] = wrong
        with pytest.raises(ValueError, match=r"but the weight has rows for 0 to 36: give -100"):
            linear_cross_entropy(hidden, weight, labels)


def test_without_torchs_own(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    hidden, weight, labels, _ = case(V=400, ignored=0)
    assert loss_kernel(hidden, weight)[0] == "chunks"
    assert apart(ours(hidden, weight, labels), oracle(hidden, weight, labels)) < 1e-5


def test_liger_is_called_as_it_wants_to_be(monkeypatch):
    "Without a GPU: a stand-in for Liger takes the same arguments, and the rule is asked about tensors that claim CUDA."
    calls = {}

    class LigerFusedLinearCrossEntropyLoss:
        def __init__(self, **options):
            calls.update(options)

        def __call__(self, lin_weight, _input, target):
            return F.cross_entropy(
                _input @ lin_weight.T, target, ignore_index=calls["ignore_index"], reduction=calls["reduction"]
            )

    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    stand_in = types.ModuleType("liger_kernel.transformers")
    stand_in.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    hidden, weight, labels, _ = case()
    assert apart(ours(hidden, weight, labels, kernel="liger"), oracle(hidden, weight, labels)) < 1e-5
    assert calls == {"ignore_index": -100, "reduction": "sum", "accum_dtype": torch.float32}

    monkeypatch.setattr(loss_module, "find_spec", lambda name: name == "liger_kernel")

    def on_cuda(*shape):
        return types.SimpleNamespace(shape=torch.Size(shape), dtype=torch.bfloat16, is_cuda=True)

    assert loss_kernel(on_cuda(44_032, 3584), on_cuda(152_064, 3584))[0] == "liger"
    assert loss_kernel(on_cuda(45_000, 3584), on_cuda(152_064, 3584))[0] == "chunks"


def one_rank(rank, world, meeting, folder, uneven):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    hidden, weight, labels, weights = case(L=60, ignored=0.4)
    edges = [0, 7, 20, 60] if uneven else [0, 20, 40, 60]
    if uneven:
        labels[7:20] = -100  # a rank on which nothing counts
    mine = slice(edges[rank], edges[rank + 1] if rank < world - 1 else 60)
    found = ours(hidden[mine], weight, labels[mine], weights[mine], chunk=8, group=dist.group.WORLD)
    plain = ours(hidden[mine], weight, labels[mine], chunk=8, group=dist.group.WORLD)
    empty = ours(hidden[mine], weight, torch.full_like(labels[mine], -100), group=dist.group.WORLD)
    torch.save((found, plain, empty), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world, uneven", [(2, False), (3, True)])
def test_ranks_weigh_by_token(tmp_path, world, uneven):
    started, deadline = (
        mp.spawn(one_rank, (world, tmp_path / "meeting", tmp_path, uneven), nprocs=world, join=False),
        time.monotonic() + 240,
    )
    while not started.join(timeout=2):
        if time.monotonic() > deadline:
            for process in started.processes:
                process.kill()
            pytest.fail("the ranks did not end")
    hidden, weight, labels, weights = case(L=60, ignored=0.4)
    if uneven:
        labels[7:20] = -100
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world)]
    for i, wanted in enumerate([oracle(hidden, weight, labels, weights), oracle(hidden, weight, labels)]):
        assert all(torch.equal(r[i][0], ranks[0][i][0]) for r in ranks), "the value is the same everywhere"
        together = [ranks[0][i][0], torch.cat([r[i][1] for r in ranks]), sum(r[i][2] for r in ranks)]
        assert apart(together, wanted) < 1e-5
    assert all(r[2][0] == 0 and not r[2][1].any() and not r[2][2].any() for r in ranks)


def test_requests_that_make_no_sense():
    hidden, weight, labels, weights = case()
    for more, sentence in [
        (dict(weights=-weights.abs() - 1), "negative"),
        (dict(normalizer=0), "normalizer"),
        (dict(chunk=1.5), "whole number"),
        (dict(labels=labels.int()), "int64"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            linear_cross_entropy(hidden, weight, **(dict(labels=labels) | more))
