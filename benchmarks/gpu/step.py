"""One optimizer step of the text extension on one GPU: memory and seconds beside the planner's.

    python benchmarks/gpu/step.py --json step.json

Qwen2-0.5B's shape with random weights, whole in memory with its optimizer (weights in float32, products in bfloat16),
layers recomputed, one row a step, through `longva.train.loop.train`.
In the file, for a row of L tokens:

seconds_L                    of a step after the first mfu_L                        model operations a second over
the card's peak (989 TFLOPS for Hopper) peak_gb_L                    peak of allocated memory
"""

import json
import tempfile
from pathlib import Path

import torch
from common import options, report
from transformers import Qwen2Config, Qwen2ForCausalLM

from longva.context.plan import MODELS, operations
from longva.train.loop import train


def main():
    given = options(__doc__, lengths=[32768, 131072], steps=3, tflops=989.0)
    cuda = given.device.startswith("cuda")
    shape = (
        dict(MODELS["qwen2-0.5b"])
        if cuda
        else dict(
            MODELS["qwen2-0.5b"],
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=512,
        )
    )
    shape.pop("model_type")
    figures, rows = {}, []
    for L in given.lengths:
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                **shape, max_position_embeddings=1 << 20, rope_parameters={"rope_type": "default", "rope_theta": 1e9}
            )
        )
        model.set_attn_implementation("longva_cp")
        ids = torch.randint(shape["vocab_size"], (L + 1,))

        def batches(step, row):
            return dict(input_ids=ids[:L].roll(step))

        batches.length = L
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            train(
                model,
                batches,
                folder,
                given.steps,
                rows=1,
                checkpointing=True,
                precision="bf16" if cuda else "fp32",
                save_every=10**6,
            )
            log = [json.loads(line) for file in Path(folder).glob("*.jsonl") for line in file.read_text().splitlines()]
        print(log[-1], flush=True)
        took = min(line["seconds"] for line in log[1:] if "seconds" in line)
        work, peak = operations(model.config, L), torch.cuda.max_memory_allocated() if cuda else 0
        figures |= {
            f"seconds_{L}": took,
            f"mfu_{L}": work["model"] / took / given.tflops / 1e12,
            f"peak_gb_{L}": peak / 1e9,
        }
        rows.append(
            (
                L,
                f"{took:.2f}",
                f"{work['model'] / took / 1e12:.0f}",
                f"{work['model'] / took / given.tflops / 1e12:.0%}",
                f"{peak / 1e9:.1f}",
            )
        )
        del model
    report(
        "one step, Qwen2-0.5B's shape", ("tokens", "seconds", "model TFLOPS", "MFU", "peak GB"), rows, figures, given
    )


if __name__ == "__main__":
    main()
