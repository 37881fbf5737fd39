"""Train the miniatures from several seeds and put their rows side by side.

    .venv/bin/python benchmarks/mini_seeds.py --seeds 0 1 2 --json benchmarks/results/mini_seeds.json

Chains that are already there (runs/mini-seeds/0, ...) are not trained again. Each row is 100 trials: 20 needles at 5
depths in a drawn video whose seed is used for nothing else. `no needle` is the control without the needle frame.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


LENGTHS = [16, 32, 64, 128, 256, 512]


def panel(folder, seed, work):
    """Give {frames: [right, trials]} of one miniature, and [right, trials] without the needle frame, over all
    lengths."""
    import numpy as np

    from longva import mini
    from longva.mini import world
    from longva.needle.trials import by_frames
    from longva.needle.vniah import Control, run
    from longva.vision.video import Frames

    pair = mini.load(folder)
    name = Path(folder).name
    drawn = world.video_frames(max(LENGTHS), seed)
    video = Frames(drawn, np.arange(len(drawn), dtype=float), 1.0)
    needles = world.write_needles(work / "needles", 20, seed)
    shown = dict(seed=seed, progress=False)
    found = by_frames(run(pair, video, needles, LENGTHS, [0, 0.25, 0.5, 0.75, 1], work / name, **shown))
    control = by_frames(run(pair, video, needles, LENGTHS, [0], work / f"{name}-removed", Control(), **shown))
    right = sum(k for k, _ in control.values())
    trials = sum(n for _, n in control.values())
    return {str(frames): list(counts) for frames, counts in found.items()}, [right, trials]


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--chains", type=Path, default=Path("runs/mini-seeds"), help="where the chains are trained")
    parser.add_argument("--film-seed", type=int, default=271828, help="of the evaluation")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main():
    given = options()
    from rich.console import Console
    from rich.table import Table

    from longva.files import versions
    from longva.mini import NAMES
    from longva.mini.recipe import train_chain

    table = Table("seed", "model", *map(str, LENGTHS), "no needle")
    result = {"film_seed": given.film_seed, "versions": versions(), "seeds": {}}
    for seed in given.seeds:
        folder = train_chain(seed, given.chains / str(seed))
        panels = {}
        for name in NAMES:
            found, control = panel(folder / name, given.film_seed, folder / "evaluation")
            panels[name] = {"by_frames": found, "removed": control}
            shares = [f"{k / n:.2f}" for k, n in found.values()]
            table.add_row(str(seed), name, *shares, f"{control[0] / control[1]:.3f}")
        result["seeds"][str(seed)] = {"panels": panels}
        if given.json:
            given.json.write_text(json.dumps(result, indent=1))
    Console().print(table)


if __name__ == "__main__":
    main()
