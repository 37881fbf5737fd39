"""The planner's memory beside what training processes really hold.

    .venv/bin/python benchmarks/memory.py --json memory.json

Each case is a step of a small Qwen2 in processes of its own: both engines (ZeRO-3 on two ranks), both precisions, with
and without recomputed layers. What is measured is the growth of the first rank's resident memory, from before the
model is built to the peak of a step, so without Python and its libraries; a small model is trained first, so that all
of them are loaded. Blocks of 64 KB and more are given back to the system at once
(MALLOC_MMAP_THRESHOLD_): glibc's heap keeps much more than the tensors need, and what it keeps depends on the order in
which they come and go.

ratio   planned bytes over measured bytes
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
LARGE = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2)


def memory(name):
    """Read a figure of this process: VmRSS is what it holds, VmHWM the most that it has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


class Training:
    """A model with its engine."""

    def __init__(self, sizes, recipe, ranks):
        import torch
        from transformers import AutoModelForCausalLM, Qwen2Config

        from longva.train.batch import TokenLoss
        from longva.train.engines import make_engine, recompute_layers, weight_groups
        from longva.train.presets import weights_dtype

        config = Qwen2Config(**sizes, vocab_size=4000, max_position_embeddings=1 << 17, attn_implementation="sdpa")
        torch.set_default_dtype(weights_dtype(recipe))
        self.model = AutoModelForCausalLM.from_config(config).train()
        torch.set_default_dtype(torch.float32)
        if recipe.checkpointing:
            recompute_layers(self.model, use_reentrant=recipe.engine == "deepspeed")
        self.loss = TokenLoss(self.model)
        self.engine = make_engine(self.loss, weight_groups(self.loss, recipe), recipe, ranks)
        self.recipe = recipe
        self.ranks = ranks

    def step(self, length):
        import torch

        from longva.train.loop import collate_step

        def rows(step, row):
            return dict(input_ids=torch.randint(4000, (length,), generator=torch.Generator().manual_seed(row)))

        data = collate_step(self.loss, rows, 0, self.recipe, self.ranks)
        for batch in data.micro_batches:
            self.engine.backward(self.engine.forward(batch, data.normalizer))
        self.engine.clip_and_step(1.0)


def case(setting):
    """Train two steps in this process, and print bytes."""
    from longva.train.ranks import find_ranks
    from longva.train.recipe import Recipe
    from longva.train.throughput import plan_step

    length = setting.pop("length")
    world = int(os.environ["WORLD_SIZE"])
    recipe = Recipe(steps=1, rows=world, **setting)
    ranks = find_ranks(recipe)
    small = Training(SMALL, recipe, ranks)
    small.step(64)
    before = memory("VmRSS")
    large = Training(LARGE, recipe, ranks)
    planned = plan_step(large.model, length, recipe, ranks)
    large.step(64)
    forget_peak()
    large.step(length)
    measured = memory("VmHWM") - before
    parts = {name: size for name, size in planned.parts[0].items() if name != "Python and its libraries"}
    if ranks.rank == 0:
        print("RESULT", json.dumps(dict(measured=measured, planned=round(sum(parts.values())))), flush=True)
    os._exit(0)  # gloo's threads may wait for one another


def measure(setting, world):
    """Run a case in `world` processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    processes = []
    for rank in range(world):
        env = os.environ | HEAP | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
        words = [sys.executable, __file__, "--case", json.dumps(setting)]
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [p.communicate() for p in processes]
    for out, _ in said:
        for line in out.splitlines():
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(said[0][1][-2000:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        case(json.loads(given.case))
    found = {}
    print(f"{'':<40}{'planned MB':>12}{'measured MB':>13}{'ratio':>8}")
    for engine, world in (("plain", 1), ("deepspeed", 2)):
        for precision in ("fp32", "bf16"):
            for checkpointing in (False, True):
                setting = dict(engine=engine, precision=precision, checkpointing=checkpointing, length=given.length)
                one = measure(setting, world)
                name = f"{engine} {precision} {'recomputed layers' if checkpointing else 'all kept'}"
                ratio = one["planned"] / one["measured"]
                planned, measured = one["planned"] / 1e6, one["measured"] / 1e6
                print(f"{name:<40}{planned:>12,.0f}{measured:>13,.0f}{ratio:>8.2f}", flush=True)
                found[name] = dict(planned=one["planned"], measured=one["measured"], ratio=round(ratio, 3))
    if given.json:
        given.json.write_text(json.dumps(dict(length=given.length, cases=found), indent=1) + "\n")


if __name__ == "__main__":
    main()
