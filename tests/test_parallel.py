"""Context parallel attention over real ranks (gloo) against one process: attention, a whole model, and refusals.

All cases of one number of ranks run in one set of processes; each test looks up its own case.
"""

import gc
import traceback
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from transformers import (
    CTRLConfig,
    CTRLLMHeadModel,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from longva.context import parallel
from longva.context.parallel import (
    KINDS,
    Context,
    bytes_sent,
    context_parallel,
    documents_of,
    longva_cp,
    parallel_attention,
    schedule,
    shard,
    shard_batch,
    unshard,
)

HEADS = [(28, 4), (14, 2), (4, 4)]
DOCUMENTS = [(0, 37), (0, 5, 6, 20, 37)]
BOUND = 1e-5


def far(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def right_answer(q, k, v, dout, documents):
    "out, dq, dk, dv in float64, from the definition."
    given = [t.clone().requires_grad_() for t in (q, k, v)]
    groups, L = q.shape[2] // k.shape[2], q.shape[1]
    which = torch.stack([torch.bucketize(torch.arange(L), torch.tensor(d[1:]), right=True) for d in documents])
    scores = torch.einsum("blhe,bshe->bhls", given[0], given[1].repeat_interleave(groups, 2)) / q.shape[-1] ** 0.5
    allowed = (which[:, :, None] == which[:, None]).tril()[:, None]
    out = torch.einsum(
        "bhls,bshe->blhe", scores.masked_fill(~allowed, -torch.inf).softmax(-1), given[2].repeat_interleave(groups, 2)
    )
    return [out.detach(), *torch.autograd.grad(out, given, dout)]


def attention(kind, heads, documents, dtype=torch.float32):
    "Largest relative difference over out, dq, dk, dv; documents has a row for each sequence of the batch."
    source, L = torch.Generator().manual_seed(5), documents[0][-1]
    q, k, v, dout = (
        torch.randn(len(documents), L, h, 8, generator=source, dtype=torch.float64)
        for h in (heads[0], heads[1], heads[1], heads[0])
    )
    right = right_answer(q, k, v, dout, documents)
    with context_parallel(kind=kind) as cp:
        mine, padded = [shard(t).to(dtype).requires_grad_() for t in (q, k, v)], L + -L % cp.multiple
        out = parallel_attention(*mine, documents if padded == L else [(*d, padded) for d in documents])
        found = [out.detach(), *torch.autograd.grad(out, mine, shard(dout).to(dtype))]
        return max(far(unshard(a, length=L), b) for a, b in zip(found, right, strict=True))


def tiny(attention, heads, seed=1):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50,
            hidden_size=heads[0] * 4,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=heads[0],
            num_key_value_heads=heads[1],
            initializer_range=0.1,
            attn_implementation=attention,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def batch_of(documents):
    ids = torch.randint(50, (1, documents[-1]), generator=torch.Generator().manual_seed(9))
    labels = torch.cat([ids[:, 1:], torch.tensor([[-100]])], 1)
    labels[:, [d - 1 for d in documents[1:]]] = -100
    labels[:, 3:11] = -100  # ranks have different numbers of labels
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2))
    return dict(
        input_ids=ids,
        labels=labels,
        weights=weights,
        position_ids=torch.cat([torch.arange(b - a) for a, b in zip(documents, documents[1:])])[None],
    )


def weighted_loss(model, batch):
    "(weighted sum of the token losses, sum of the weights); the embeddings are given, as a model with pictures would."
    logits = model(
        inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), position_ids=batch["position_ids"]
    ).logits.float()
    each = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none", ignore_index=-100)
    return (each * batch["weights"].flatten()).sum(), (batch["weights"] * (batch["labels"] != -100)).sum()


@lru_cache(maxsize=None)
def one_process(heads, documents):
    model = tiny("sdpa", heads)
    total, weight = weighted_loss(model, batch_of(documents))
    (total / weight).backward()
    return (total / weight).item(), [p.grad for p in model.parameters()]


def model(kind, heads, documents, checkpointing, late=False, group=None):
    "Largest relative difference of the loss and of every gradient."
    loss, grads = one_process(heads, documents)
    ours = tiny("longva_cp", heads).train()
    if checkpointing:
        ours.activation_checkpointing_enable(
            **({} if checkpointing is True else {"activation_checkpointing_kwargs": {"use_reentrant": True}})
        )
    with context_parallel(group, kind) as cp:
        total, weight = weighted_loss(ours, shard_batch(batch_of(documents)))
        if dist.is_initialized():
            dist.all_reduce(weight, group=cp.group)
        if not late:
            (total / weight).backward()
    if late:
        (total / weight).backward()
    shares = [(total / weight).detach(), *(p.grad for p in ours.parameters())]
    if dist.is_initialized():
        for t in shares:
            dist.all_reduce(t, group=cp.group)
    return max(abs(shares[0].item() - loss) / loss, *(far(a, b) for a, b in zip(shares[1:], grads, strict=True)))


def sent(kind):
    "(forward, backward) bytes handed to torch.distributed, and by the formula."
    counted = [0]
    real, gather, scatter = dist.batch_isend_irecv, parallel._all_gather, parallel._reduce_scatter

    def count_sends(ops):
        counted[0] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return real(ops)

    def count_gather(out, given, group):
        counted[0] += given.nbytes * (dist.get_world_size(group) - 1)
        return gather(out, given, group=group)

    def count_scatter(out, given, group):
        counted[0] += out.nbytes * (dist.get_world_size(group) - 1)
        return scatter(out, given, group=group)

    dist.batch_isend_irecv, parallel._all_gather, parallel._reduce_scatter = count_sends, count_gather, count_scatter
    try:
        with context_parallel(kind=kind) as cp:
            L = 16 * cp.ranks
            q, k, v = (torch.randn(1, 16, h, 8, dtype=torch.bfloat16, requires_grad=True) for h in (14, 2, 2))
            out = parallel_attention(q, k, v)
            forward, counted[0] = counted[0], 0
            out.sum().backward()
            return (forward, counted[0]), bytes_sent(cp, L, 2, 8)
    finally:
        dist.batch_isend_irecv, parallel._all_gather, parallel._reduce_scatter = real, gather, scatter


def said(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ValueError as e:
        return str(e)
    return "nothing"


def uncut():
    "A model whose positions nobody cut."
    with context_parallel():
        return said(tiny("longva_cp", (4, 4)), torch.arange(8)[None])


def other_batch():
    with context_parallel():
        return said(shard_batch, dict(input_ids=torch.arange(9)[None] + dist.get_rank()))


def generating():
    "A text of eight tokens, and one of a single token."
    model = tiny("longva_cp", (4, 4)).eval()
    with context_parallel():
        return [
            said(model.generate, torch.arange(3, 3 + n)[None], max_new_tokens=2, do_sample=False, use_cache=True)
            for n in (8, 1)
        ]


def with_cache():
    with context_parallel():
        return said(
            longva_cp,
            SimpleNamespace(is_causal=True),
            torch.randn(1, 4, 1, 8),
            torch.randn(1, 4, 5, 8),
            torch.randn(1, 4, 5, 8),
            None,
        )


def falcon():
    "A model that keeps its own attention, and mixes documents."
    torch.manual_seed(0)
    config = FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    ours = FalconForCausalLM(config).eval()
    ours.set_attn_implementation("longva_cp")
    return ours


def every_way_of_calling():
    "A model that must be refused, called without positions and with positional arguments."
    shard = torch.arange(3, 11)[None]
    with context_parallel():
        cut = shard_batch(dict(input_ids=torch.arange(3, 19)[None]))
        return [
            said(falcon(), shard),
            said(falcon(), input_ids=shard),
            said(falcon(), cut["input_ids"], None, None, cut["position_ids"]),
            said(tiny("longva_cp", (4, 4)), shard),
        ]


def fails_on_rank_one(kind, layer, reading, error):
    "What ranks say when layer number `layer` of rank 1 breaks in its reading number `reading` of the probe."
    ours = tiny("longva_cp", (4, 4)).eval()
    readings = []

    def breaks(*_):
        readings.append(1)
        if dist.get_rank() == 1 and len(readings) == reading:
            raise error

    ours.model.layers[layer].mlp.register_forward_pre_hook(breaks)
    with context_parallel(kind=kind):
        batch = shard_batch(dict(input_ids=torch.arange(3, 30)[None]))
        first = said(ours, **batch)
        second = said(ours, **batch)  # the ranks still understand one another, and the fault was passing
    return first, second


def in_half_precision():
    "The gate in bfloat16: a model that is right, and one whose attention never hears of documents."
    torch.manual_seed(0)
    deaf = CTRLLMHeadModel(CTRLConfig(n_embd=32, dff=48, n_layer=2, n_head=4, vocab_size=64, n_positions=64))
    deaf.set_attn_implementation("longva_cp")
    with torch.no_grad():
        for p in deaf.parameters():
            p.mul_(6 if p.ndim == 2 else 1)  # or bfloat16 rounds away what attention does
    with context_parallel():
        batch = shard_batch(dict(input_ids=torch.arange(3, 30)[None]))
        return [said(m.bfloat16().eval(), **batch) for m in (tiny("longva_cp", (4, 4)), deaf)]


def autocast():
    "Under autocast the rotated q and k are float32 and v is bfloat16; the loss must come near the one in float32."
    with context_parallel(kind="ring"), torch.autocast("cpu", torch.bfloat16):
        total, weight = weighted_loss(tiny("longva_cp", (4, 4)), shard_batch(batch_of(DOCUMENTS[1])))
        (total / weight).backward()
    for t in (total, weight):
        dist.all_reduce(t)
    return abs((total / weight).item() / one_process((4, 4), DOCUMENTS[1])[0] - 1)


def halves():
    "Two groups of two ranks, each with its own sequence: data parallel x context parallel."
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return model("ring", (4, 4), DOCUMENTS[dist.get_rank() // 2], True, group=groups[dist.get_rank() // 2])


def cases(W):
    "name -> what to do"
    found = {
        (kind, heads, documents): (attention, kind, heads, [documents])
        for kind in KINDS
        for heads in HEADS
        for documents in DOCUMENTS
    }
    found |= {("short", kind): (attention, kind, (4, 4), [(0, 3)]) for kind in KINDS}
    found |= {("rows", kind): (attention, kind, (14, 2), [(0, 13), (0, 4, 13), (0, 13)]) for kind in KINDS}
    found |= {("half", kind): (attention, kind, (28, 4), [(0, 9, 29)], torch.bfloat16) for kind in KINDS}
    if W == 8:
        return found
    found |= {
        ("model", kind, heads, documents): (model, kind, heads, documents, True)
        for kind in KINDS
        for heads in HEADS
        for documents in DOCUMENTS
    }
    found |= {("plain", kind): (model, kind, (14, 2), DOCUMENTS[1], False) for kind in KINDS}
    if W == 2:
        found |= {
            "late": (model, "ring", (14, 2), DOCUMENTS[1], True, True),
            "reentrant": (model, "ring", (14, 2), DOCUMENTS[1], "reentrant"),
        }
    if W == 2:
        found |= {f.__name__: (f,) for f in (uncut, generating, other_batch, with_cache, autocast)}
        found |= {f.__name__: (f,) for f in (every_way_of_calling, in_half_precision)}
        found |= {
            ("fails", kind, layer, reading): (fails_on_rank_one, kind, layer, reading, IndexError("row 9 of 8"))
            for kind in KINDS
            for layer in (0, 1)
            for reading in (1, 3)
        }
    if W == 4:
        found["halves"] = (halves,)
    if W > 1:
        found |= {("sent", kind): (sent, kind) for kind in KINDS}
    return found


def one_rank(rank, W, folder):
    torch.set_num_threads(1)
    if W > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=W)
    results = {}
    for name, (work, *args) in cases(W).items():
        try:
            results[name] = work(*args)
        except Exception:
            results[name] = (
                traceback.format_exc()
            )  # on one rank only, this would leave the others waiting: the time limit ends them
    torch.save(results, f"{folder}/{rank}")
    if W > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    "W -> what each rank found, per case."

    @lru_cache(maxsize=None)
    def results(W, seconds=900):
        folder = tmp_path_factory.mktemp(f"ranks{W}")
        if W == 1:
            one_rank(0, 1, folder)
        else:
            mp.get_context("forkserver").set_forkserver_preload(
                ["transformers.models.qwen2.modeling_qwen2", "longva.context.parallel"]
            )
            started = mp.start_processes(one_rank, (W, folder), W, join=False, start_method="forkserver")
            for _ in range(seconds):
                if started.join(timeout=1):
                    break
            else:
                for p in started.processes:
                    p.kill()
                pytest.fail(f"{W} ranks were not done after {seconds} seconds")
        return [torch.load(folder / str(r)) for r in range(W)]

    return results


def worst(ranks, W, name):
    found = [r[name] for r in ranks(W)]
    assert not [f for f in found if isinstance(f, str)], next(f for f in found if isinstance(f, str))
    return max(found)


@pytest.mark.parametrize("documents", DOCUMENTS, ids=["one", "packed"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}-{h[1]}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("W", [1, 2, 3, 4, 8])
def test_attention(ranks, W, kind, heads, documents):
    assert worst(ranks, W, (kind, heads, documents)) < BOUND


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("W", [1, 2, 3, 4, 8])
def test_short_rows_and_half_precision(ranks, W, kind):
    assert worst(ranks, W, ("short", kind)) < BOUND, "three tokens"
    assert worst(ranks, W, ("rows", kind)) < BOUND, "rows with different documents"
    assert worst(ranks, W, ("half", kind)) < 3e-2, "bfloat16"


@pytest.mark.parametrize("documents", DOCUMENTS, ids=["one", "packed"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}-{h[1]}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("W", [1, 2, 4])
def test_model_with_checkpointing(ranks, W, kind, heads, documents):
    assert worst(ranks, W, ("model", kind, heads, documents)) < BOUND


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("W", [1, 2, 4])
def test_model_without_checkpointing(ranks, W, kind):
    assert worst(ranks, W, ("plain", kind)) < BOUND


def test_backward_after_the_context_and_reentrant_checkpointing(ranks):
    assert worst(ranks, 2, "late") < BOUND and worst(ranks, 2, "reentrant") < BOUND


def test_two_groups(ranks):
    assert worst(ranks, 4, "halves") < BOUND


def test_autocast(ranks):
    assert worst(ranks, 2, "autocast") < 2e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("W", [2, 3, 4])
def test_bytes_sent(ranks, W, kind):
    for rank in ranks(W):
        assert rank["sent", kind][0] == rank["sent", kind][1], rank["sent", kind]


def test_silent_mistakes_are_sentences(ranks):
    for rank in ranks(2):
        assert (
            "Every rank holds the same positions, 0 to 7" in rank["uncut"]
            and "cut the batch with shard_batch" in rank["uncut"]
        )
        for sentence in (rank["uncut"], rank["with_cache"], *rank["generating"]):
            assert "leave context_parallel" in sentence and "can't be spread over ranks" in sentence
        assert "Ranks [1] hold another batch than rank 0" in rank["other_batch"]


def test_a_model_is_refused_however_it_is_called(ranks):
    for rank in ranks(2):
        *refused, uncut = rank["every_way_of_calling"]
        for sentence in refused:
            assert "This falcon was given a shard of a sequence" in sentence
        assert "Every rank holds the same positions" in uncut


def test_when_one_rank_fails_in_the_probe_all_say_why(ranks):
    names = [name for name in cases(2) if name[0] == "fails"]
    assert len(names) == 12
    for name in names:
        (first, second), other = (rank[name] for rank in ranks(2))
        assert other == (first, second), name
        assert "rank 1" in first and "IndexError: row 9 of 8" in first, name
        assert second == "nothing", name


def test_the_gate_in_half_precision(ranks):
    for rank in ranks(2):
        right, deaf = rank["in_half_precision"]
        assert right == "nothing"
        assert "two documents in a row" in deaf


def test_documents_that_would_be_mixed_are_refused_on_one_rank():
    ids = torch.arange(3, 19)[None]
    packed = torch.cat([torch.arange(9), torch.arange(7)])[None]
    model = falcon()
    with torch.no_grad(), context_parallel():
        assert said(model, **shard_batch(dict(input_ids=ids))) == "nothing"
        for _ in range(2):
            assert "falcon" in said(model, **shard_batch(dict(input_ids=ids, position_ids=packed)))
            assert "one document a row" in said(model, ids, None, None, packed)
        assert said(tiny("longva_cp", (4, 4)), ids, position_ids=packed) == "nothing"
        assert said(tiny("sdpa", (4, 4)), ids, position_ids=packed) == "nothing"


@pytest.mark.parametrize("W", [2, 3, 8, 64])
def test_zigzag_balances_to_the_pair(W):
    L = 6 * W
    for kind in ("all_gather", "ring"):
        load = [sum(b.pairs for step in schedule(Context(kind, W, r), L) for b in step) for r in range(W)]
        assert set(load) == {L * (L + 1) // 2 // W}


def test_attention_that_is_not_causal_is_left_alone():
    q, k, v = torch.randn(3, 1, 4, 6, 8).unbind(0)
    out, _ = longva_cp(SimpleNamespace(is_causal=False, training=False), q, k, v, None)
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v).transpose(1, 2), atol=1e-6)


def test_inference_mode_and_documents():
    ours, theirs = tiny("longva_cp", (4, 4)).eval(), tiny("sdpa", (4, 4)).eval()
    batch = batch_of(DOCUMENTS[1])
    with torch.inference_mode():
        ask = dict(input_ids=batch["input_ids"], position_ids=batch["position_ids"].clone())
        assert torch.allclose(ours(**ask).logits, theirs(**ask).logits, atol=1e-5)
    assert documents_of(batch["position_ids"]) == [DOCUMENTS[1]]
    del ask
    gc.collect()
    assert not list(parallel._known.values()), "nothing is remembered of positions that are gone"


def test_a_static_cache_is_refused():
    "Its keys stand in a buffer of the final length, and nothing tells the full places from the empty ones."
    ids, (model, plain) = torch.arange(3, 14)[None], (tiny(name, (4, 2)).eval() for name in ("longva_cp", "eager"))
    said = [m.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True) for m in (model, plain)]
    assert torch.equal(*said)
    with pytest.raises(ValueError, match="needs a dynamic cache"):
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True, cache_implementation="static")


def test_checksum_sees_order_and_single_ids():
    ids = torch.arange(20_000)[None]
    other = ids.clone()
    other[0, 1] += 1
    assert len({parallel._checksum(t) for t in (ids, ids.flip(1), other)}) == 3
    assert parallel._checksum(ids.float()) != parallel._checksum(ids.flip(1).float())


def test_documents_and_keys_must_fit_the_queries():
    q, k = torch.randn(3, 4, 4, 8), torch.randn(3, 8, 2, 8)
    for keys, documents in [(k, None), (k[:, :4], [(0, 3, 4)] * 2), (k[:, :4], [(0, 3, 2, 4)] * 3)]:
        with pytest.raises(ValueError, match="same tokens|never back"):
            parallel.parallel_attention(q, keys, keys, documents)


def test_a_mask_that_numbers_documents_is_refused():
    ids, mask = torch.arange(6)[None], torch.tensor([[1, 1, 1, 2, 2, 0]])
    assert "restart at 0" in said(shard_batch, dict(input_ids=ids, attention_mask=mask))
    assert shard_batch(dict(input_ids=ids, attention_mask=mask.clamp(max=1)))["input_ids"].tolist() == ids.tolist()
    q = torch.randn(1, 4, 6, 8)
    assert "restart at 0" in said(longva_cp, SimpleNamespace(is_causal=True), q, q, q, mask)


def test_generation_after_packed_documents_is_refused():
    "A token that follows them must not see all of them; a text of one document is generated as ever."
    ids, (model, plain) = torch.arange(3, 14)[None], (tiny(name, (4, 2)).eval() for name in ("longva_cp", "eager"))
    packed, more = torch.cat([torch.arange(5), torch.arange(6)])[None], torch.tensor([[7]])
    with torch.no_grad():
        for how in (dict(position_ids=packed), dict(position_ids=packed, cu_seq_lens_q=torch.tensor([0, 5, 11]))):
            cache = model(ids, use_cache=True, **how).past_key_values
            for position in ({}, dict(position_ids=torch.tensor([[6]]))):
                assert "several documents" in said(model, more, past_key_values=cache, use_cache=True, **position)
        assert "several documents" in said(
            model.generate, ids, position_ids=packed, max_new_tokens=3, do_sample=False, use_cache=True
        )
        assert "several documents" in said(
            model,
            more,
            past_key_values=model(ids, use_cache=True).past_key_values,
            cu_seq_lens_q=torch.tensor([0, 5, 12]),
        )
        assert torch.equal(
            *(m.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True) for m in (model, plain))
        )


def test_padding_in_a_batch_says_what_to_do():
    model, ids, mask = (
        tiny("longva_cp", (4, 2)).eval(),
        torch.arange(3, 19).view(2, 8),
        torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
    )
    left = said(model, ids, attention_mask=mask.flip(1))
    assert "padding_side to right" in left and "to generate, give prompts of one length" in left
    right = said(model.generate, ids, attention_mask=mask, max_new_tokens=3, do_sample=False, use_cache=True)
    assert "give prompts of one length" in right and "padding_side" not in right
    assert said(model, ids, attention_mask=mask) == "nothing"


@pytest.mark.parametrize(
    "Config, Model, settings, off",
    [
        (
            Qwen2Config,
            Qwen2ForCausalLM,
            dict(use_sliding_window=True, max_window_layers=1),
            dict(use_sliding_window=False),
        ),
        (MistralConfig, MistralForCausalLM, {}, dict(sliding_window=None)),
        (Gemma3TextConfig, Gemma3ForCausalLM, {}, dict(layer_types=["full_attention"] * 2)),
    ],
)
def test_a_sliding_window_is_refused_by_its_own_setting(Config, Model, settings, off):
    def build(**more):
        return Model(
            Config(
                vocab_size=50,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=4,
                attn_implementation="longva_cp",
                pad_token_id=0,
                **dict(sliding_window=4) | more,
            )
        ).eval()

    (name,), ids = off, torch.arange(8)[None]
    sentence = said(build(**settings), ids)
    assert f"set {name} to" in sentence and said(build(**settings), ids[:, :4]) == "nothing"
    assert said(build(**settings | off), ids) == "nothing"  # the advice helps


def test_odd_shapes_and_dtypes_are_sentences():
    ids = torch.arange(16).view(2, 8)
    assert "input_ids [5]" in said(shard_batch, dict(input_ids=torch.arange(5)))
    assert "labels [2, 7]" in said(shard_batch, dict(input_ids=ids, labels=ids[:, 1:]))
    first = shard_batch(dict(position_ids=torch.arange(8)[None], input_ids=ids), Context(ranks=2))
    assert first["input_ids"].tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]] and first["position_ids"].tolist() == [
        [0, 1, 6, 7]
    ]
    for length in (99, -1):
        assert f"not {length}" in said(unshard, ids, length=length)
    assert "1 token per rank" in said(unshard, ids[:, :1], context=Context(ranks=2)) and "7 tokens per rank" in said(
        unshard, ids[:, :7], context=Context(ranks=2)
    )
    q, k = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 2, 8)
    for given in ((q.half(), k, k), (q, k.half(), k), (q, k, k.half())):
        assert "one dtype" in said(parallel_attention, *given)
