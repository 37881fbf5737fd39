"""Train the miniatures from several seeds and put their rows side by side.

    .venv/bin/python benchmarks/mini_seeds.py --seeds 0 1 2 --json benchmarks/results/mini_seeds.json

Chains that are already there (runs/mini-seeds/0, ...) are not trained again. Each row is 100 trials: 20 needles at 5 depths in a drawn film whose seed
is used for nothing else. `guess` is the control without the needle frame.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


def rows(folder, seed, work):
    """The panel of one miniature: {frames: [right, trials]}, and the control at 64 frames."""
    import numpy as np

    from longva import mini
    from longva.mini import world
    from longva.needle.trials import by_frames
    from longva.needle.vniah import Control, run
    from longva.vision.video import Frames

    model, processor = mini.load(folder)
    lengths = [16, 32, 64, 128, 256, 512]
    drawn = world.film_frames(max(lengths), seed)
    film = Frames(drawn, np.arange(len(drawn), dtype=float), 1.0)
    needles = world.write_needles(work / "needles", 20, seed)
    ask = dict(seed=seed, progress=False)
    found = by_frames(run((model, processor), film, needles, lengths, [0, 0.25, 0.5, 0.75, 1], work / Path(folder).name, **ask))
    control = by_frames(run((model, processor), film, needles, [16, 32, 64, 128, 256, 512], [0], work / f"{Path(folder).name}-removed", Control(), **ask))
    return {str(n): list(k) for n, k in found.items()}, [sum(k for k, _ in control.values()), sum(n for _, n in control.values())]


def main():
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    ask.add_argument("--chains", type=Path, default=Path("runs/mini-seeds"), help="where the chains are trained")
    ask.add_argument("--film-seed", type=int, default=271828, help="of the evaluation")
    ask.add_argument("--json", type=Path)
    given = ask.parse_args()
    from rich.console import Console
    from rich.table import Table

    from longva.files import versions
    from longva.mini import NAMES
    from longva.mini.recipe import train_chain

    result, table = {"film_seed": given.film_seed, "versions": versions(), "seeds": {}}, Table("seed", "model", "16", "32", "64", "128", "256", "512", "no needle")
    for seed in given.seeds:
        folder = train_chain(seed, given.chains / str(seed))
        panels = {}
        for name in NAMES:
            found, control = rows(folder / name, given.film_seed, folder / "evaluation")
            panels[name] = {"by_frames": found, "removed": control}
            table.add_row(str(seed), name, *(f"{k / n:.2f}" for k, n in found.values()), f"{control[0] / control[1]:.3f}")
        result["seeds"][str(seed)] = {"panels": panels}
        if given.json: given.json.write_text(json.dumps(result, indent=1))
    Console().print(table)


if __name__ == "__main__":
    main()
