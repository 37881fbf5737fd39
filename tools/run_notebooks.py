"""Run notebooks again, in place, each in a fresh process, and save what they print today.

    python tools/run_notebooks.py                      all of nbs/
    python tools/run_notebooks.py nbs/10_x.ipynb ...   these
    python tools/run_notebooks.py --flags "slow gpu"   also run cells marked #| slow or #| gpu; else they keep their
    output
    python tools/run_notebooks.py --check ...          save nothing; exit 1 if an output differs from the saved one

A notebook that fails stays as it was. What goes to stderr (warnings, progress bars) is printed here and not saved.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def skipped(cell, flags):
    """Is this cell to keep its saved output?"""
    directives = cell.directives_
    return (
        "nbdev_export(" in cell.source
        or directives.get("eval:", [""])[0].lower() == "false"
        or bool(flags & directives.keys())
    )


def execute(path, flags):
    """The notebook at `path`, run and cleaned."""
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from nbdev.process import extract_directives

    os.chdir(path.parent)
    sys.path.insert(0, str(root))
    nb, flags = read_nb(path.name), set(get_config().tst_flags.split()) - flags
    shell = CaptureShell(Path(path.name))
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        cell.directives_ = extract_directives(cell, remove=False)
        if skipped(cell, flags):
            continue
        cell.outputs = []
        shell.cell(cell)
        if shell.exc:
            sys.exit(
                f"{shell.prettytb(path.name)}\n"
                f"{path.relative_to(root)} fails in cell {cell.idx_} and was left as it was."
            )
        for out in cell.outputs:
            if out.get("name") == "stderr":
                sys.stderr.write("".join(out["text"]))
        cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    for cell in nb.cells:
        cell.pop("directives_", None)
    clean_nb(nb)
    return nb


def run_one(path, check, flags):
    """Run the notebook at `path`; save it, or compare it with what is saved."""
    from execnb.nbio import nb2dict, read_nb, write_nb

    nb = execute(path, flags)
    name = path.relative_to(root)
    if not check:
        write_nb(nb, path.name)
        return print(f"{name} {path.stat().st_size // 1024} KB")
    pairs = zip(nb2dict(read_nb(path.name))["cells"], nb2dict(nb)["cells"], strict=True)
    changed = [number for number, (old, new) in enumerate(pairs) if old.get("outputs") != new.get("outputs")]
    if changed:
        sys.exit(
            f"{name}: saved output is not what the code prints today in cells {changed}: "
            f"run `make notebooks NB={name}`."
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--flags", default="")
    parser.add_argument(
        "--alone", action="store_true", help=argparse.SUPPRESS
    )  # this process may run one notebook itself
    args = parser.parse_args()
    notebooks = [path.resolve() for path in args.notebooks]
    if args.alone:
        return run_one(notebooks[0], args.check, set(args.flags.split()))
    everything = (
        path
        for path in sorted((root / "nbs").glob("**/*.ipynb"))
        if not any(part[0] in "._" for part in path.relative_to(root).parts)
    )
    options = ["--alone", "--flags", args.flags] + ["--check"] * args.check
    env = os.environ | {"PLOTLY_RENDERER": "plotly_mimetype"}  # the default writes all of plotly.js into the notebook
    codes = [
        subprocess.run([sys.executable, __file__, *options, path], env=env).returncode
        for path in notebooks or everything
    ]
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
