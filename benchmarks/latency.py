"""From a move of the needle to its new answer, in the bench and in the real page.

    .venv/bin/python benchmarks/latency.py --json benchmarks/results/latency.json

The needle app is started, a browser clicks at drawn places of the strip, and the clock runs until the page shows
that answer. p95 is the slowest of 20 moves in 19 of 20 cases; the aim is 1 s at 64 frames and 3 s at 512, on two
cores with the miniature.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def percentiles(seconds):
    """Give the median and the 95th percentile."""
    import numpy as np

    return [round(float(np.percentile(seconds, q)), 4) for q in (50, 95)]


def bench_alone(lengths, depths):
    """Move the needle of the bench: {frames: seconds of each move}."""
    from longva.mini.bench import mini_bench

    bench = mini_bench("mini-longva")
    result = {}
    for n in lengths:
        bench.look(0, n, 0.5)  # the first pass is slower
        result[n] = []
        for depth in depths:
            start = time.perf_counter()
            bench.look(0, n, depth)
            result[n].append(time.perf_counter() - start)
    return result


def move_needle(page, n, depths):
    """Move the page's needle to each depth: seconds until its answer is shown."""
    page.fill("#frames input[type=range]", str(n))
    page.wait_for_selector(f'#verdict .card[data-frames="{n}"]')
    seconds = []
    now = None
    strip = page.locator("#strip .attention").bounding_box()
    for depth in (round(400 * depth) / 400 for depth in depths):  # the steps of a click
        if int(depth * n) == now:
            continue
        now = int(depth * n)
        begin = time.perf_counter()
        page.mouse.click(strip["x"] + strip["width"] * (0.5 + 20 * depth) / 21, strip["y"] + 20)  # 21 pictures
        page.wait_for_selector(f'#verdict .card[data-insert="{now}"][data-frames="{n}"]')
        seconds.append(time.perf_counter() - begin)
    return seconds


def in_the_page(lengths, depths, browser):
    """Move the needle in a page of the running app: {frames: seconds of each move}."""
    from app_toy import flags, free_port, start, wait_for
    from playwright.sync_api import sync_playwright

    process = start("needle", "--port", free_port())
    try:
        address = wait_for(process, "http://").split()[1]
        with sync_playwright() as playwright:
            window = playwright.chromium.launch(executable_path=browser, args=flags)
            page = window.new_page(viewport=dict(width=1280, height=900))
            page.set_default_timeout(60_000)
            page.goto(address)
            page.wait_for_selector("#verdict .card")
            return {n: move_needle(page, n, depths) for n in lengths}
    finally:
        process.terminate()
        process.wait(30)


def find_browser():
    """Find Chromium, or exit."""
    found = [path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path]
    if not found:
        sys.exit(
            "There is no Chromium here, and the page is measured in one: install it (Debian: apt-get install chromium)."
        )
    return found[0]


def machine(load):
    """Describe the machine, the load that it had before, and the versions."""
    import torch

    from longva.files import versions

    return dict(
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        machine=platform.machine(),
        load_before=round(load, 1),
        load_after=round(os.getloadavg()[0], 1),
        **versions(),
    )


def main():
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--frames", type=int, nargs="+", default=[64, 512])
    ask.add_argument("--moves", type=int, default=40)
    ask.add_argument("--json", type=Path)
    given = ask.parse_args()
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    depths = [k / 400 for k in np.random.default_rng(0).permutation(401)[: given.moves].tolist()]
    load = os.getloadavg()[0]
    browser = find_browser()
    alone = bench_alone(given.frames, depths)
    page = in_the_page(given.frames, depths, browser)
    table = Table("frames", "moves", "bench p50", "bench p95", "page p50", "page p95")
    result = {}
    for n in given.frames:
        figures = [*percentiles(alone[n]), *percentiles(page[n])]
        table.add_row(str(n), str(len(page[n])), *(f"{s:.3f} s" for s in figures))
        result |= dict(zip((f"bench_p50_{n}", f"bench_p95_{n}", f"p50_{n}", f"p95_{n}"), figures))
    result |= dict(moves=given.moves, model="mini-longva", **machine(load))
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
