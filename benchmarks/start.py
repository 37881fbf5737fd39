"""What each rank holds while a model is opened for ZeRO-3: whole on each, or in pieces.

    .venv/bin/python benchmarks/start.py --json start.json

A Qwen2 with random weights is written to a folder in bfloat16, as most models are, and opened in float32 by several CPU
ranks, once as transformers does alone and once inside `longva.train.engines.sharded`. What is measured is the growth of
a rank's own memory (RssAnon, looked at every two milliseconds) from before the model is opened to the peak and to the
end; pages of the file that the first rank reads are the system's, and not counted. Blocks of 64 KB and more are given
back to the system at once. A small model is opened first, so that all libraries are loaded.

ratio   the peak of the rank that holds most, over the bytes of the model in float32
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
LARGE = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8)


def own_memory():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """Look at this process's memory again and again."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.most = own_memory()
        self.over = False

    def run(self):
        while not self.over:
            self.most = max(self.most, own_memory())
            time.sleep(0.002)

    def end(self):
        self.over = True
        self.join()
        return max(self.most, own_memory()) - self.before


def case(folder, way):
    """Open the models in this process, and print bytes."""
    from contextlib import nullcontext

    import torch

    from longva.model.open import LANGUAGE, open_model
    from longva.train.engines import sharded
    from longva.train.ranks import find_ranks
    from longva.train.recipe import Recipe

    world = int(os.environ["WORLD_SIZE"])
    recipe = Recipe(steps=1, rows=world, engine="deepspeed", precision="fp32")
    ranks = find_ranks(recipe)

    def opened(name):
        with sharded(recipe, ranks) if way == "in pieces" else nullcontext():
            return open_model(Path(folder) / name, kinds=(LANGUAGE,), device="cpu", dtype=torch.float32)

    opened("small")
    peak = Peak()
    peak.start()
    model = opened("large")
    most = peak.end()
    print("RESULT", json.dumps(dict(peak=most, end=own_memory() - peak.before)), flush=True)
    del model
    os._exit(0)  # gloo's threads may wait for one another


def measure(folder, way, world):
    """Open the models in `world` processes; give the figures of all."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    common |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in range(world):
        env = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        words = [sys.executable, __file__, "--case", folder, way]
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    found = []
    for said, error in [p.communicate() for p in processes]:
        lines = [line for line in said.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(error[-2000:])
        found.append(json.loads(lines[0].removeprefix("RESULT ")))
    return found


def write_models(folder):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    for name, sizes in (("small", SMALL), ("large", LARGE)):
        Qwen2ForCausalLM(Qwen2Config(**sizes, vocab_size=8000)).bfloat16().save_pretrained(Path(folder) / name)
    return 2 * (Path(folder) / "large/model.safetensors").stat().st_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        case(*given.case)
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        size = write_models(folder)
        print(f"a model of {size / 1e6:.0f} MB, {given.ranks} ranks")
        print(f"{'':<12}{'peak MB of each rank':>28}{'in the end MB':>22}{'ratio':>8}")
        for way in ("whole", "in pieces"):
            found = measure(folder, way, given.ranks)
            ratio = max(one["peak"] for one in found) / size
            peaks, ends = (", ".join(f"{one[key] / 1e6:.0f}" for one in found) for key in ("peak", "end"))
            print(f"{way:<12}{peaks:>28}{ends:>22}{ratio:>8.2f}", flush=True)
            cases[way] = dict(ranks=found, ratio=round(ratio, 3))
    if given.json:
        given.json.write_text(json.dumps(dict(model=size, cases=cases), indent=1) + "\n")


if __name__ == "__main__":
    main()
