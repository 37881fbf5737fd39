"""The shipped miniatures on every variant of the needle test.

    python benchmarks/variants.py [--json FILE] [--frames 16,64,256] [--needles 20]

Prints, for each miniature and variant, right answers, their share and Wilson's interval. Shares are results, not
speeds: they are the same on every quiet or busy machine.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

from longva.files import versions
from longva.mini import NAMES
from longva.needle.trials import wilson
from longva.needle.variants import VARIANTS
from longva.study.variants import measure_variants

FREE = ("vniah", "vniah-d", "several", "absent", "shuffled", "question-first")  # 8 colours on 8 backgrounds
CHANCE = dict.fromkeys(FREE, 1 / 64) | {
    "order": 1 / 2,
    "relation": 1 / 2,
    "count": 1 / 4,
    "choice": 1 / 4,
    "blind": 1 / 4,
    "tenth": 1 / 10,
    "joint": 1 / 640,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--frames", default="16,64,256")
    parser.add_argument("--needles", type=int, default=20)
    parser.add_argument("--seed", type=int, default=20261127)
    given = parser.parse_args()
    frames = [int(n) for n in given.frames.split(",")]
    depths = [0, 0.25, 0.5, 0.75, 1]
    variants = tuple(name for name in VARIANTS if name != "clock")
    results = {}
    print(f"{'model':>12}  {'variant':>14}  {'right':>9}  share  95% interval  chance")
    for name in NAMES:
        with tempfile.TemporaryDirectory() as out:
            found = measure_variants(name, frames, depths, out, given.needles, given.seed, variants, distance=12)
        for variant, trials in found.items():
            k = sum(trial.correct for trial in trials)
            n = len(trials)
            low, high = wilson(k, n)
            counts = f"{f'{k}/{n}':>9}  {k / n:>5.3f}  {low:.3f} to {high:.3f}"
            print(f"{name:>12}  {variant:>14}  {counts}  {CHANCE[variant]:.3f}", flush=True)
            row = f"{name} {variant}"
            results |= {row: k / n, f"{row} low": low, f"{row} high": high, f"{row} trials": n}
    settings = dict(frames=given.frames, needles=given.needles, seed=given.seed, distance=12)
    settings |= dict(machine=platform.machine(), **versions())
    if given.json:
        given.json.write_text(json.dumps(results | settings, indent=1) + "\n")


if __name__ == "__main__":
    main()
