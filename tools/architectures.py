"""Measure every causal language model of transformers, tiny: does the loss run right here, or is it refused?

    python tools/architectures.py                 # those that tests/data/architectures.json lacks
    python tools/architectures.py qwen2 falcon    # these, again
    python tools/architectures.py --all           # all, again
    python tools/architectures.py --check         # all, again: say what differs from the list, and leave it alone

The list is written after each architecture, so that a stopped run can go on. Each architecture has a process of its own
for each rank, and a time limit. Loss and gradients are compared with transformers' own: eager attention, all logits,
one document at a time.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longva.context.parallel import context_parallel, shard_batch, unshard
from longva.train.batch import TokenLoss, collate

LIST = Path(__file__).resolve().parents[1] / "tests" / "data" / "architectures.json"
BOUND = 1e-4  # how far loss and gradients may be off, relative
SECONDS = 120  # for one architecture
LARGEST = 20_000_000  # parameters of a tiny model

TOKENS = 30
DOCUMENTS = (13, 17)  # of the packed row
CASES = ("one document", "several documents")
WAYS = {
    "one rank": "TokenLoss with the attention that transformers chooses",
    "longva_cp": "the model called inside of context_parallel, one rank",
    "two ranks": "TokenLoss, two ranks share the sequence",
    "called": "the model called inside of context_parallel, two ranks",
}

# what a tiny model has, by the name of the field
SMALL = dict(
    hidden_size=32, d_model=32, n_embd=32, dim=32, emb_dim=32, embedding_size=32, hidden_dim=32,
    input_embedding_size=32, output_embedding_size=32, hidden_size_global=32, cross_attention_hidden_size=32,
    intermediate_size=48, ffn_dim=48, n_inner=48, d_ff=48, d_inner=48, decoder_ffn_dim=48, encoder_ffn_dim=48,
    dim_ff=48, block_ff_dim=48, ffn_hidden_size=48, ffn_intermediate_size=48, intermediate_size_mlp=48,
    dense_intermediate_size=48, mlp_hidden_size=48,
    num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2, encoder_layers=2, decoder_layers=2,
    num_encoder_layers=2, num_decoder_layers=2, depth=2,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, encoder_attention_heads=4, decoder_attention_heads=4,
    num_encoder_attention_heads=4, num_decoder_attention_heads=4,
    num_key_value_heads=2, num_kv_heads=2, num_global_key_value_heads=2, swa_num_attention_heads=4,
    swa_num_key_value_heads=2, head_dim=8, global_head_dim=8, swa_head_dim=8, swa_v_head_dim=8, kv_channels=8, d_kv=8,
    dim_head=8, attention_head_dim=8, v_head_dim=8, qk_nope_head_dim=8, qk_rope_head_dim=4, qk_head_dim=12,
    q_lora_rank=16, kv_lora_rank=16, o_lora_rank=16, index_n_heads=2, index_head_dim=8, index_topk=8, rotary_dim=4,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_topk=2,
    moe_k=2, top_k_experts=2, num_experts_per_token=2, n_group=1, topk_group=1,
    n_shared_experts=1, num_shared_experts=1,
    first_k_dense_replace=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, expert_ffn_hidden_size=16,
    moe_shared_expert_intermediate_size=16, shared_intermediate_size=16, zero_expert_num=2, moe_num_shared_experts=1,
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_d_conv=4, mamba_num_heads=4, mamba_head_dim=16,
    ssm_state_size=8, state_size=8, n_groups=1, mamba_n_groups=1, mamba_ngroups=1, mamba_d_ssm=64, n_mamba_heads=2,
    mamba_dt_rank=4, time_step_rank=4, chunk_size=8, mamba_chunk_size=8, lru_width=32,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    lightning_nope_head_dim=8, lightning_rope_head_dim=8,
    vocab_size=128, vocab_size_per_layer_input=128, hidden_size_per_layer_input=8,
    max_position_embeddings=256, n_positions=256, n_ctx=256, max_seq_len=256, max_target_positions=256,
    max_source_positions=64, sliding_window=8, attention_chunk_size=8, window_size=8, attention_window=8,
    attention_window_size=8, local_attention=8, laurel_rank=8, num_kv_shared_layers=0,
    image_size=16, patch_size=4, num_mel_bins=8, num_channels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "hybrid_override_pattern")

# what is different for one architecture
GEMMA4 = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    vocab_size_per_layer_input=128, hidden_size_per_layer_input=8)
GEMMA4_UNIFIED = {name: value for name, value in GEMMA4.items() if "per_layer" not in name}
SHARED = dict(num_kv_shared_layers=2)
DOTS3 = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, kv_lora_rank=16, q_lora_rank=16,
    qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8, num_experts_per_tok=2, index_topk=8, index_head_dim=8,
    index_n_heads=2, head_dim=12, shared_experts_intermediate_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
QWEN4 = dict(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2,
    ngram_vocab_size_base=64, split_ngram_parts=2, hc_lowrank=8, layer_types=["linear_attention", "full_attention"])
OWN = {
    "cohere_compass_text": dict(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={kind: dict(rope_type="default", rope_theta=1e4) for kind in
                         ("sliding_attention", "full_attention")},
        bos_token_id=1, eos_token_id=2),
    "dbrx": dict(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=256, vocab_size=128,
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2)),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4_UNIFIED,
    "gemma4": dict(text_config=GEMMA4),
    "gemma4_unified": dict(text_config=GEMMA4_UNIFIED),
    "dots3_note_text": DOTS3,
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots3_note": dict(text_config=DOTS3, vision_config=dict(
        adapter_in_dim=32, adapter_out_dim=32, hidden_size=32, num_attention_heads=4),
        audio_config=dict(adapter_out_dim=32)),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "ministral": dict(head_dim=8),
    "nemotron": dict(head_dim=8, num_key_value_heads=2),
    "qwen4_exp_text": QWEN4,
    "qwen4_exp": dict(text_config=QWEN4),
    "reformer": dict(is_decoder=True, attention_head_size=8, axial_pos_shape=[16, 16], axial_pos_embds_dim=[16, 16]),
    "blt": dict(
        vocab_size=128, encoder_hash_byte_group_vocab=64, encoder_hash_byte_group_size=[3, 4],
        patcher_config=dict(vocab_size=128), encoder_config=dict(vocab_size=128),
        decoder_config=dict(vocab_size=128)),
    "gemma4_assistant": dict(
        text_config=dict(GEMMA4, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, **SHARED),
        backbone_hidden_size=32),
    "gemma4_unified_assistant": dict(
        text_config=dict(GEMMA4_UNIFIED, **SHARED), backbone_hidden_size=32),
    "mamba2": dict(head_dim=16),
    "zamba": dict(
        num_hidden_layers=6, layer_types=...,
        layers_block_type=["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid",
                           "linear_attention"]),
    "xmod": dict(default_language="en_XX"),
    "zaya": dict(num_experts_per_tok=1),
}

# their defaults can't be read, or don't fit together
ALL_THEIR_OWN = (
    "cohere_compass_text", "dots3_note", "dots3_note_text", "gemma4", "gemma4_text", "gemma4_unified",
    "gemma4_unified_text", "gemma4_assistant", "gemma4_unified_assistant", "dbrx")


def known_fields(config) -> set:
    """Name the fields that a configuration has, also under transformers' common names."""
    names = set(vars(config)) | set(config.attribute_map or {})
    return {name for name in names if not name.startswith("_")}


def small_fields(config) -> dict:
    """Give the fields of a tiny model like this configuration."""
    names = known_fields(config)
    fields = {}
    for name in names:
        value = config.attribute_map.get(name, name) in vars(config) and getattr(config, name, None)
        if name in SMALL and value is not None and value is not False and not isinstance(value, (list, dict)):
            fields[name] = SMALL[name]
        elif ("dropout" in name or "pdrop" in name or "layerdrop" in name) and isinstance(value, float):
            fields[name] = 0.0
        elif isinstance(value, PreTrainedConfig):
            fields[name] = dict(small_fields(value), model_type=value.model_type)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= 10:
            fields[name] = 3 + sum(map(ord, name)) % 7
    if "qk_rope_head_dim" in fields:
        fields["head_dim"] = fields["qk_rope_head_dim"]  # RoPE's
        fields["num_key_value_heads"] = SMALL["num_attention_heads"]  # all heads share one latent
    for name in KINDS_OF_LAYERS:
        kinds = getattr(config, name, None)
        computed = isinstance(getattr(type(config), config.attribute_map.get(name, name), None), property)
        if isinstance(kinds, (list, tuple)) and kinds and not computed:
            fields[name] = list(dict.fromkeys(kinds))
    depth = max([len(fields[name]) for name in KINDS_OF_LAYERS if name in fields] + [2])
    for name in KINDS_OF_LAYERS:
        if name in fields:
            fields[name] = (fields[name] * depth)[:depth]
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if name in fields:
            fields[name] = depth
    return fields


def merged(fields: dict, more: dict) -> dict:
    """Put `more` over `fields`, also inside of dictionaries; None takes a field away."""
    result = dict(fields)
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(result.get(name), dict):
            value = merged(result[name], value)
        result[name] = value
        if value is ...:
            del result[name]
    return result


def tiny_config(kind: str) -> PreTrainedConfig:
    """Make the configuration of a tiny model of an architecture."""
    build = CONFIG_MAPPING[kind]
    own = OWN.get(kind, {})
    if kind in ALL_THEIR_OWN:
        return build(**own)
    return build(**merged(small_fields(build()), own))


def tiny(kind: str, **how):
    """Make a tiny model whose attention matters: matrices keep the size of what they multiply, biases are not 0."""
    config = tiny_config(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, **how).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters are not tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), **how).float().eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and p.shape[-1] > 1:
                p.normal_(0, p.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                p.normal_(0, 0.2)
        if head is not None and head.weight is model.get_input_embeddings().weight:
            head.weight.mul_(2)
    return model.train() if kind == "reformer" else model  # Reformer has gradients in training mode only


def rows(packed: bool):
    """Give the documents [L] of a row."""
    ids = torch.randint(10, 120, (TOKENS,), generator=torch.Generator().manual_seed(0))
    return list(ids.split(DOCUMENTS)) if packed else [ids]


def batch_of(packed: bool) -> dict:
    """Put the documents into one row."""
    documents = rows(packed)
    positions = torch.cat([torch.arange(len(ids)) for ids in documents])
    return collate([dict(input_ids=torch.cat(documents), position_ids=positions)])


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), ignore_index=-100)


def logits_of(model, **inputs):
    """Call a model with what it takes of a batch."""
    return model(**inputs, use_cache=False).logits


def gradients(model) -> dict:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def own_answer(kind: str, packed: bool) -> tuple:  # (loss, gradients, logits)
    """Compute with transformers alone, one document after the other."""
    model = tiny(kind, attn_implementation="eager")
    batch = batch_of(packed)
    logits = torch.cat([logits_of(model, input_ids=ids[None]) for ids in rows(packed)], 1)
    loss = cross_entropy(logits, batch["labels"])
    loss.backward()
    return loss.item(), gradients(model), logits.detach()


def apart(found: dict, right: dict) -> float:
    """Measure how far the worst gradient is off, relative to itself or to a hundredth of all, if that is more."""
    whole = sum(float(g.double().square().sum()) for g in right.values()) ** 0.5
    worst = 0.0
    for name, g in right.items():
        far = float((found[name].double() - g.double()).norm())
        worst = max(worst, far / max(float(g.double().norm()), whole / 100))
    return worst


def by_loss(kind: str, packed: bool, right: tuple, shared: bool) -> float:
    """Train with TokenLoss, on one rank or several: how far loss and gradients are off."""
    model = tiny(kind)
    loss = TokenLoss(model)
    batch = batch_of(packed)
    normalizer = loss.count(batch)
    if not shared:
        found = loss(batch, normalizer)
        found.backward()
        return max(abs(found.item() / right[0] - 1), apart(gradients(model), right[1]))
    model.set_attn_implementation("longva_cp")
    with context_parallel():
        found = loss(loss.shard(batch), normalizer)
        found.backward()
    found = found.detach()
    mine = gradients(model)
    for tensor in (found, *mine.values()):
        dist.all_reduce(tensor)
    return max(abs(found.item() / right[0] - 1), apart(mine, right[1]))


def by_call(kind: str, packed: bool, right: tuple, group=None) -> float:
    """Call the model inside of context_parallel: how far its logits are off."""
    model = tiny(kind)
    model.set_attn_implementation("longva_cp")
    batch = batch_of(packed)
    inputs = dict(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    with torch.no_grad(), context_parallel(group):
        logits = unshard(logits_of(model, **shard_batch(inputs)), 1, TOKENS)
    return float((logits - right[2]).abs().max() / right[2].abs().max())


def measure(kind: str, alone) -> dict:  # way -> case -> how far off, or the error
    """Measure an architecture in every way and case; two ranks call this together."""
    found = {way: {} for way in WAYS}
    for case in CASES:
        packed = case == "several documents"
        right = own_answer(kind, packed)
        tries = {
            "one rank": (by_loss, False),
            "longva_cp": (by_call, alone),
            "two ranks": (by_loss, True),
            "called": (by_call, None),
        }
        for way, (run, how) in tries.items():
            try:
                found[way][case] = run(kind, packed, right, how)
            except Exception as error:
                found[way][case] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return found


def quiet():
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def one_rank(rank: int, kinds: list, folder: str):
    """Be one of two ranks, and leave in the folder what was found of each architecture."""
    quiet()
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=limit)
    groups = [dist.new_group([r]) for r in range(2)]
    found = {}
    for kind in kinds:
        try:
            found[kind] = measure(kind, groups[rank])
        except Exception as error:
            found[kind] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def forking():
    """Give a server that has imported everything once, and forks ranks."""
    folders = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))  # the server looks there for this module
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["architectures"])
    return context


def measured(context, kinds: list) -> dict:  # architecture -> what `measure` gives, or why it could not be measured
    """Let two ranks measure architectures one after the other; context: of multiprocessing."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=one_rank, args=(rank, kinds, folder)) for rank in range(2)]
        for process in ranks:
            process.start()
        end = time.monotonic() + SECONDS * len(kinds)
        for process in ranks:
            process.join(max(0.1, end - time.monotonic()))
        for process in ranks:
            process.kill()
        files = [Path(folder, f"{rank}.json") for rank in range(2)]
        if not all(file.exists() for file in files):
            return {kind: f"TimeoutError: not done after {SECONDS} seconds" for kind in kinds}
        return json.loads(files[0].read_text())


def verdict_of(found) -> str:
    """Say what a number or an error means: runs, wrong, or the first words of the refusal."""
    if isinstance(found, float):
        return "runs" if found <= BOUND else f"WRONG by {found:.0e}"
    kind, _, message = found.partition(": ")
    words = re.split(r"[:.,;(]", message)[0].strip()
    return f"refused: {words}" if kind in ("ValueError", "TrainError") else f"RAISES {kind}: {message[:100]}"


def entry(found) -> dict:
    """Make the entry of the list."""
    if isinstance(found, str):
        return {"not built": found[:200]}
    return {way: {case: verdict_of(value) for case, value in cases.items()} for way, cases in found.items()}


def read_list(path: Path = LIST) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def write_list(entries: dict, path: Path = LIST) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures, by their model_type; by default those not in the list")
    parser.add_argument("--all", action="store_true", help="measure those in the list, too")
    parser.add_argument("--check", action="store_true", help="measure, compare with the list, and leave it alone")
    given = parser.parse_args()
    os.nice(5)
    context = forking()
    listed = read_list()
    entries = {kind: listed[kind] for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in listed}
    again = given.all or given.check or given.names
    different = 0
    for kind in given.names or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if kind in entries and not again:
            continue
        start = time.monotonic()
        found = measured(context, [kind])[kind]
        new = entry(found)
        print(f"{kind} ({time.monotonic() - start:.0f} s)", json.dumps(found)[:2000], flush=True)
        if given.check and new != listed.get(kind):
            different += 1
            print(f"  the list says {json.dumps(listed.get(kind))}", flush=True)
        if not given.check:
            entries[kind] = new
            write_list(entries)
    sys.exit(f"{different} differ from the list" if different else 0)


if __name__ == "__main__":
    main()
