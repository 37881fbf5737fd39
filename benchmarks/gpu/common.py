"What the benchmarks for one GPU have in common: the machine's name, a clock, memory, a table, a file."

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from statistics import median

import torch


def options(text, **more):
    "--json FILE, --device and what a benchmark adds: name=default."
    ask = argparse.ArgumentParser(description=text.split("\n")[0])
    ask.add_argument("--json", type=Path)
    ask.add_argument("--device", default="cuda", help="cuda, or cpu to try the script with small sizes")
    for name, default in more.items():
        kind = dict(type=type(default[0]), nargs="+") if isinstance(default, list) else dict(type=type(default))
        ask.add_argument(f"--{name.replace('_', '-')}", default=default, **kind)
    given = ask.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        ask.exit(
            1,
            "There is no CUDA device here: "
            "this benchmark needs one (--device cpu tries the script with small sizes).\n",
        )
    return given


def machine(device):
    "Where the figures come from."
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        return dict(
            gpu=card.name,
            gpu_gib=round(card.total_memory / 2**30, 1),
            driver_cuda=torch.version.cuda,
            python=platform.python_version(),
            **versions,
        )
    return dict(
        gpu="none",
        cpu=platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        **versions,
    )


def seconds(call, device, turns=5, warm=2):
    "Median time of a call, by device events."
    if not device.startswith("cuda"):
        from time import perf_counter

        times = []
        for _ in range(turns):
            start = perf_counter()
            call()
            times.append(perf_counter() - start)
        return median(times)
    for _ in range(warm):
        call()
    times = []
    for _ in range(turns):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        call()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) / 1e3)
    return median(times)


def peak_bytes(call, device):
    "(what the call returns, bytes that it took at most above what was there); 0 bytes without CUDA."
    if not device.startswith("cuda"):
        return call(), 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    return out, torch.cuda.max_memory_allocated() - before


def report(title, columns, rows, figures, given):
    "A table on the screen, and the figures with the machine as a flat JSON object."
    widths = [max(len(str(x)) for x in column) for column in zip(columns, *rows)]
    print(title)
    for row in (columns, *rows):
        print("  ".join(f"{x:>{w}}" if i else f"{x:<{w}}" for i, (x, w) in enumerate(zip(map(str, row), widths))))
    print(
        *(
            f"{name:<34}{value:.4g}" if isinstance(value, float) else f"{name:<34}{value}"
            for name, value in figures.items()
        ),
        sep="\n",
        flush=True,
    )
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(machine(given.device) | figures, indent=1) + "\n")
