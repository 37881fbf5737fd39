"""Thousands of frames through LongVA-7B's shape on one GPU: memory and seconds beside the estimate that is printed
before a chat.

    python benchmarks/gpu/prefill.py --json prefill.json

The weights are random, in bfloat16: memory and speed do not depend on them. Frames are noise, made when it is their
turn. In the file, for N frames:

peak_gb_N, estimated_gb_N    peak of allocated memory, weights included, and what `estimate` says before
seconds_N, tflops_N          tower and prefill together, and the rate of their products
seconds_vs_estimate_N        measured over estimated (40% of 989 TFLOPS)
tower_frames_per_second      of the vision tower with projector and pooling
words_per_second_N           of greedy decoding behind the longest input
"""

from time import perf_counter

import torch
from common import options, peak_bytes, report, seconds

from longva.model.modeling import LongVA, longva_7b, mini_config
from longva.model.prefill import estimate, kv_cache, prefill, reserve


def build(device):
    "LongVA-7B with random weights; a small one for a CPU."
    config = longva_7b() if device.startswith("cuda") else mini_config(400, 3, 4)
    with torch.device("meta"):
        model = LongVA(config)
    model = model.to(torch.bfloat16 if device.startswith("cuda") else torch.float32).to_empty(device=device).eval()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.fill_(1) if "norm" in name and name.endswith("weight") else p.normal_(
                0, 0.02
            ) if p.ndim > 1 else p.zero_()
    for module in model.modules():  # what is computed and not stored: RoPE's frequencies, positions of the tower
        if hasattr(module, "original_inv_freq") or type(module).__name__.endswith("RotaryEmbedding"):
            module.register_buffer(
                "inv_freq", type(module)(config.get_text_config()).inv_freq.to(device), persistent=False
            )
        if isinstance(getattr(module, "position_ids", None), torch.Tensor):
            module.position_ids.copy_(torch.arange(module.position_ids.shape[-1], device=device)[None])
    return model


def main():
    given = options(__doc__, frames=[256, 1000, 3000], at_once=64, words=16)
    device, model = given.device, build(given.device)
    side, dtype, sync = (
        model.config.vision_config.image_size,
        model.dtype,
        torch.cuda.synchronize if given.device.startswith("cuda") else (lambda: None),
    )
    noise = torch.randn(given.at_once, 3, side, side, device=device, dtype=dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        tower = given.at_once / seconds(lambda: model.encode_frames(noise), device)
    figures, rows = {"tower_frames_per_second": tower}, []
    for n in given.frames:
        before = estimate(model, n * model.config.tokens_per_grid + 32, n, given.words, frames=given.at_once)
        words = model.get_input_embeddings()(torch.arange(32, device=device)[None])

        def pieces():
            with torch.no_grad():
                for i in range(0, n, given.at_once):
                    yield model.encode_frames(noise[: min(given.at_once, n - i)]).flatten(0, 1)[None]
                yield words

        def read():
            cache = kv_cache(model)
            reserve(cache, before.tokens + given.words)
            sync()
            start = perf_counter()
            logits, cache = prefill(model, pieces(), cache)
            sync()
            middle = perf_counter()
            for _ in range(given.words - 1):
                logits, cache = prefill(model, model.get_input_embeddings()(logits[:, -1].argmax(-1)[None]), cache)
            sync()
            return middle - start, (perf_counter() - middle) / max(given.words - 1, 1), bool(logits.isfinite().all())

        (took, word, finite), peak = peak_bytes(read, device)
        assert finite, "The logits are not finite."
        work, expected = sum(before.flops.values()), before.seconds["tower"] + before.seconds["prefill"]
        figures |= {
            f"peak_gb_{n}": (peak + weights) / 1e9,
            f"estimated_gb_{n}": before.total / 1e9,
            f"seconds_{n}": took,
            f"tflops_{n}": work / took / 1e12,
            f"seconds_vs_estimate_{n}": took / expected,
            f"words_per_second_{n}": 1 / word,
        }
        rows.append(
            (
                n,
                f"{before.tokens:,}",
                f"{(peak + weights) / 1e9:.1f}",
                f"{before.total / 1e9:.1f}",
                f"{took:.1f}",
                f"{expected:.1f}",
                f"{work / took / 1e12:.0f}",
                f"{1 / word:.1f}",
            )
        )
        print(rows[-1], flush=True)
    report(
        f"LongVA-7B's shape, random weights, {dtype}",
        ("frames", "tokens", "peak GB", "estimated GB", "seconds", "estimated s", "TFLOPS", "words/s"),
        rows,
        figures,
        given,
    )


if __name__ == "__main__":
    main()
