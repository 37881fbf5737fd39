"""Would the tests notice? Change one thing in an exported cell, run its notebook and the nearest tests, and count.

    python tools/mutate.py nbs/200_context.rope.ipynb --sample 40
    python tools/mutate.py nbs/2*_context.*.ipynb nbs/5*.ipynb --sample 20 --out runs/mutants.jsonl

Each change (a mutant) is one of: a comparison or an operator exchanged for its neighbour, a condition negated, a number
raised by one, True for False, min for max, a call left out. It is made in the notebook's cell and in the module, in
a copy of the tracked files. The notebook runs first, then every test file that names the module. A mutant that fails
neither is alive: a test is missing, or the change makes no difference. One line for each is written to --out, and
lines that are there already are not run again. This takes seconds per mutant and is not part of `make test`.
"""

import argparse
import ast
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
COMPARE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "in": "not in", "is": "is not"}
COMPARE |= {"not in": "in", "is not": "is"}
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "**": "*", "@": "+"}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor", "cos": "sin"}
CALLS |= {"sin": "cos", "sum": "len"}
SKIPPED_FLAGS = "slow gpu net"


def offsets(source):
    """Where each line of `source` starts, in characters; ast counts columns in UTF-8 bytes."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


class Mutants(ast.NodeVisitor):
    """The changes of one cell: `found` is a list of (start, end, new text, description)."""

    def __init__(self, source):
        self.source = source
        self.lines = source.splitlines(keepends=True)
        self.starts = offsets(source)
        self.found = []

    def at(self, line, column):
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def span(self, node):
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def text(self, node):
        start, end = self.span(node)
        return self.source[start:end]

    def change(self, start, end, new):
        old = self.source[start:end]
        line = self.source.count("\n", 0, start)
        self.found.append((start, end, new, f"{old.strip()} -> {new.strip()} in `{self.lines[line].strip()}`"))

    def between(self, left, right, table):
        """Exchange the operator that stands between two nodes."""
        start = self.span(left)[1]
        end = self.span(right)[0]
        gap = self.source[start:end]
        operator = gap.strip(" ()\n\\")
        if operator in table and gap.count(operator) == 1:
            self.change(start, end, gap.replace(operator, table[operator]))

    def visit_Compare(self, node):
        for left, right in zip([node.left, *node.comparators], node.comparators):
            self.between(left, right, COMPARE)
        self.generic_visit(node)

    def visit_BinOp(self, node):
        if not any(is_text(side) for side in (node.left, node.right)):
            self.between(node.left, node.right, ARITHMETIC)
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in zip(node.values, node.values[1:]):
            self.between(left, right, {"and": "or", "or": "and"})
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, (ast.Not, ast.USub)):
            start = self.span(node)[0]
            self.change(start, self.span(node.operand)[0], "")
        self.generic_visit(node)

    def visit_Constant(self, node):
        start, end = self.span(node)
        if node.value is True or node.value is False:
            self.change(start, end, str(not node.value))
        elif number(node) and not isinstance(node.value, complex):
            self.change(start, end, repr(node.value + 1))

    def visit_Call(self, node):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in CALLS:
            end = self.span(node.func)[1]
            self.change(end - len(name), end, CALLS[name])
        self.generic_visit(node)

    def visit_If(self, node):
        start, end = self.span(node.test)
        self.change(start, end, f"not ({self.source[start:end]})")
        self.generic_visit(node)

    def visit_While(self, node):
        self.generic_visit(node)

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call) and drawing(node.value):
            return
        if isinstance(node.value, ast.Call):
            start, end = self.span(node)
            self.change(start, end, "pass")
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_AugAssign(self, node):
        start = self.span(node.target)[1]
        end = self.span(node.value)[0]
        operator = self.source[start:end].strip()[:-1]
        if operator in ARITHMETIC:
            self.change(start, end, f" {ARITHMETIC[operator]}= ")
        self.generic_visit(node)

    def visit_Raise(self, node):
        """Messages are not mutated; that the error is raised is the condition's business."""

    def visit_JoinedStr(self, node):
        """What is shown to people is not mutated."""

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def visit_arguments(self, node):
        for default in (*node.defaults, *filter(None, node.kw_defaults)):
            self.visit(default)


def is_text(node):
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and not number(node))


def drawing(call):
    """Is this a call of print or of a matplotlib axis? What is shown to people is not mutated."""
    name = call.func
    while isinstance(name, (ast.Attribute, ast.Call, ast.Subscript)):
        name = name.func if isinstance(name, ast.Call) else name.value
    return isinstance(name, ast.Name) and name.id in ("print", "axis", "axes", "figure", "fig", "plt")


def number(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool)


def exported(cell):
    """The source of an exported cell without its directives, or None."""
    lines = "".join(cell["source"]).splitlines(keepends=True)
    directives = [line for line in lines if line.startswith("#|")]
    if cell["cell_type"] != "code" or not any("export" in line for line in directives):
        return None
    return "".join(line for line in lines if not line.startswith("#|")).strip("\n")


def mutants(notebook):
    """All mutants of a notebook's exported cells: (cell number, old source, new source, description)."""
    made = []
    for index, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        source = exported(cell)
        if source is None:
            continue
        visitor = Mutants(source)
        visitor.visit(ast.parse(source))
        for start, end, new, what in visitor.found:
            changed = source[:start] + new + source[end:]
            try:
                compile(changed, "mutant", "exec")
            except SyntaxError:
                continue
            made.append((index, source, changed, what))
    return made


def tracked_copy(folder):
    """The tracked files, as they are on disk, in `folder`."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout
    subprocess.run(["tar", "--null", "-T", "-", "-cf", folder / "tree.tar"], cwd=root, input=names, check=True)
    subprocess.run(["tar", "-xf", "tree.tar"], cwd=folder, check=True)


def module_of(notebook):
    parts = notebook.stem.split("_", 1)[1].split(".")
    package = Path("longva", *parts)
    return package / "__init__.py" if (root / package).is_dir() else package.with_suffix(".py")


def nearest_tests(notebook):
    """Test files that import the module, or that import names from it."""
    module = ".".join(module_of(notebook).with_suffix("").parts).removesuffix(".__init__")
    found = []
    for file in sorted((root / "tests").glob("test_*.py")):
        if f"{module} " in file.read_text() or f"{module}." in file.read_text() or f'"{module}"' in file.read_text():
            found.append(f"tests/{file.name}")
    return found


def in_child(work, timeout):
    """Run `work` in a forked session; its exit code, or None when it did not end in time."""
    child = os.fork()
    if not child:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        code = 1
        try:
            code = work()
        finally:
            os._exit(int(code))
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run_notebook(copy, notebook):
    def work():
        from nbdev.test import test_nb

        os.environ["PYTHONPATH"] = str(copy)
        sys.path.insert(0, str(copy))
        os.chdir(copy / "nbs")
        ok, _ = test_nb(Path(notebook.relative_to(root / "nbs")), skip_flags=SKIPPED_FLAGS.split(), basepath=copy)
        return not ok

    return work


def run_tests(copy, tests):
    def work():
        import pytest

        os.environ["PYTHONPATH"] = str(copy)
        sys.path.insert(0, str(copy))
        os.chdir(copy)
        return pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])

    return work


def write_mutant(copy, notebook, cell, old, new):
    """Put one mutant into the copy's notebook and module."""
    copied = copy / notebook.relative_to(root)
    nb = json.loads(notebook.read_text())
    source = "".join(nb["cells"][cell]["source"])
    nb["cells"][cell]["source"] = source.replace(old, new)
    copied.write_text(json.dumps(nb))
    module = module_of(notebook)
    text = (root / module).read_text()
    (copy / module).write_text(text.replace(old, new, 1))
    return old in source and old in text


def judge(copy, notebook, tests, limit):
    """Who notices: "notebook", a test file, or "" when nobody does."""
    if in_child(run_notebook(copy, notebook), limit) != 0:
        return "notebook"
    for test in tests:
        if in_child(run_tests(copy, [test]), limit) != 0:
            return test
    return ""


def usable_tests(copy, notebook, asked):
    """The nearest tests that pass in the copy as it is within the limit, the quickest first."""
    if not asked.tests:
        return []
    usable = []
    for test in nearest_tests(notebook):
        start = time.monotonic()
        code = in_child(run_tests(copy, [test]), asked.limit)
        if code == 0:
            usable.append((time.monotonic() - start, test))
        else:
            print(f"{test} {'fails' if code else 'takes too long'} in the copy and is left out", flush=True)
    return [test for _, test in sorted(usable)]


def preload():
    """Import what most children need, once; nothing of longva, which is mutated."""
    import nbdev.test  # noqa: F401
    import plotly.graph_objects  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from transformers import AutoTokenizer, CLIPVisionModel, Qwen2ForCausalLM  # noqa: F401

    torch.set_num_threads(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--sample", type=int, default=0, help="mutants per notebook, drawn at random; 0 for all")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="run the notebooks alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=90, help="seconds for a notebook or a test file")
    parser.add_argument("--out", type=Path, default=root / "runs" / "mutants.jsonl")
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if asked.out.exists():
        for line in asked.out.read_text().splitlines():
            row = json.loads(line)
            done[row["notebook"], row["cell"], row["new"]] = row
    preload()
    with tempfile.TemporaryDirectory() as folder, asked.out.open("a") as out:
        copy = Path(folder)
        tracked_copy(copy)
        for notebook in asked.notebooks:
            examine(notebook.resolve(), copy, asked, done, out)


def examine(notebook, copy, asked, done, out):
    """Run the mutants of one notebook and print its line."""
    made = mutants(notebook)
    drawn = random.Random(f"{asked.seed} {notebook.name}").sample(made, min(asked.sample or len(made), len(made)))
    if in_child(run_notebook(copy, notebook), asked.limit) != 0:
        print(f"{notebook.name}: fails as it is, so its mutants say nothing", flush=True)
        return
    tests = usable_tests(copy, notebook, asked)
    alive = []
    for cell, old, new, what in drawn:
        row = done.get((notebook.name, cell, new))
        if row is None:
            if not write_mutant(copy, notebook, cell, old, new):
                continue
            killer = judge(copy, notebook, tests, asked.limit)
            row = {"notebook": notebook.name, "cell": cell, "what": what, "killed_by": killer, "new": new}
            print(json.dumps(row), file=out, flush=True)
        if not row["killed_by"]:
            alive.append(row)
    for file in (notebook.relative_to(root), module_of(notebook)):
        (copy / file).write_bytes((root / file).read_bytes())
    print(f"{notebook.name}: {len(drawn)} of {len(made)} mutants, {len(alive)} alive", flush=True)
    for row in alive:
        print(f"    cell {row['cell']}: {row['what']}", flush=True)


if __name__ == "__main__":
    main()
