"""Is the tree what its notebooks say? One sentence for each thing that is not, and exit 1.

    python tools/check_tree.py

Finds modules edited by hand, modules that no notebook exports any more, exports that were forgotten, notebooks that
are unclean, too big or show a path of a machine, imports that go up or in a circle, exported code that no call shows
(tools/house.py), a stale map and a README out of step. It works on a copy in a temporary folder
and never writes into the tree.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import house

root = Path(__file__).resolve().parents[1]
max_kb = 300
rebuild = "; ".join(
    [
        "from nbdev.doclinks import nbdev_export",
        "nbdev_export()",
        "from nbdev.clean import nbdev_clean",
        "nbdev_clean()",
    ]
)
not_source = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "weights", ".last_checked")
machine_path = re.compile(
    r"(?:(?<![\w:/.~-])/(?:home|Users|root|tmp|work|workspace|mnt|srv|var/folders)/|[A-Z]:\\+Users\\+|site-packages/)"
    r"[^\s\"'<>]+"
)


def sources(folder):
    """Modules and notebooks below `folder`: relative path -> bytes."""
    found = {}
    for file in (*folder.glob("longva/**/*.py"), *folder.glob("nbs/**/*.ipynb")):
        if ".ipynb_checkpoints" not in file.parts:
            found[file.relative_to(folder).as_posix()] = file.read_bytes()
    return found


def rebuilt(folder):
    """What `sources` should be: everything exported anew from the notebooks alone, and the notebooks cleaned."""
    for name in ("longva", "nbs"):
        shutil.copytree(root / name, folder / name, ignore=not_source)
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(root / name, folder / name)
    by_hand = folder / "longva" / "__init__.py"
    for module in folder.glob("longva/**/*.py"):
        if module != by_hand:
            module.unlink()
    env = {
        key: value for key, value in os.environ.items() if key != "IN_TEST"
    }  # under IN_TEST nbdev_export does nothing
    done = subprocess.run([sys.executable, "-c", rebuild], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"nbdev_export fails ({done.stderr.strip().splitlines()[-1]}): run `make export` to see where.")
    return sources(folder)


def differences():
    """Sentences about files that are not what the notebooks make of them."""
    with tempfile.TemporaryDirectory() as folder:
        have, want = sources(root), rebuilt(Path(folder).resolve())
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) == want.get(name):
            continue
        notebook = re.search(rb"File to edit: [./]*(nbs/.*)\.\n", want.get(name, b""))
        if name not in want:
            yield f"{name} is stale, no notebook exports it: delete it, or write it as a notebook."
        elif name not in have:
            yield f"{name} is missing, a notebook exports it: run `make export`."
        elif name.endswith(".ipynb"):
            yield f"{name} is not clean: run `make export`."
        elif notebook:
            yield (
                f"{name} is not what {notebook[1].decode()} exports: "
                "edit the notebook, not the module, and run `make export`."
            )
        else:
            yield f"{name} is out of step with settings.ini or the notebooks: run `make export`."


def notebook_faults():
    """Sentences about notebooks that are too big or show paths of the machine they ran on."""
    for file in sorted((root / "nbs").glob("**/*.ipynb")):
        name, kb = file.relative_to(root).as_posix(), file.stat().st_size / 1024
        if ".ipynb_checkpoints" in file.parts:
            continue
        if kb > max_kb:
            yield (
                f"{name} has {kb:.0f} KB, more than {max_kb}: "
                f"make its pictures smaller and run `make notebooks NB={name}`."
            )
        for number, cell in enumerate(json.loads(file.read_text(encoding="utf-8"))["cells"]):
            text = shown_text(cell.get("outputs", []))
            if found := machine_path.search(text) or re.search(re.escape(str(root)) + r"/\S+", text):
                yield (
                    f"{name} shows a path of this machine in the output of cell {number} ({found[0][:60]}): "
                    f"print only the name and run `make notebooks NB={name}`."
                )


def shown_text(value):
    """All strings inside a saved output, joined; pictures in base64 are left out."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ("" if all(isinstance(v, str) for v in value) else "\n").join(map(shown_text, value))
    if isinstance(value, dict):
        return "\n".join(shown_text(v) for key, v in value.items() if not key.startswith("image/"))
    return ""


def main():
    if faults := [*differences(), *notebook_faults()]:
        sys.exit("\n".join(faults))
    if faults := list(house.faults(root)):
        sys.exit("\n".join(faults))
    # Last, because README.md is built by running index.ipynb on the modules.
    readme = subprocess.run([sys.executable, root / "tools" / "readme.py", "--check"], capture_output=True, text=True)
    if readme.returncode:
        sys.exit(readme.stderr.strip().splitlines()[-1])
    print("The tree is what its notebooks say.")


if __name__ == "__main__":
    main()
