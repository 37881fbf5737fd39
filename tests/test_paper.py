"""The paper as a table: no row is empty, every command can be given, records and quoted means are true."""

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from longva.cli import app as cli_app
from longva.commands.base import grid, numbers
from longva.commands.lmms import lmms_app
from longva.needle.trials import wilson
from longva.study.paper import ROWS, as_dict, curves, maps, reading, recorded

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
PAPER = ROOT.parent / "shared" / "reference" / "paper.txt"
RECORDS = sorted((ROOT / "benchmarks/results/paper").glob("*.json"))
NUMBERED = [f"Table {n}" for n in range(1, 12)] + [f"Figure {n}" for n in range(1, 9)]
IDS = NUMBERED + [f"Section {n}" for n in ("3.1", "3.2", "4", "5.2")]


@pytest.fixture(scope="module")
def parts():
    "The names of the experiments that make the records."
    said = subprocess.run(
        [sys.executable, "benchmarks/paper.py", "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    return [p for p in said.stdout.split("{")[1].split("}")[0].split(",") if p.isalpha()]


def test_no_row_is_empty():
    assert [r.id for r in ROWS] == IDS and len(NUMBERED) == 19
    for r in map(as_dict, ROWS):
        assert r["measured"] or r["reason"], r["id"]
        assert all(r[k].strip() for k in ("shows", "claim", "published", "source", "verdict", "command")), r["id"]
        free = "no GPU" in r["reason"]
        assert all(math.isfinite(r["cost"][k]) for k in ("tokens", "flops", "gpu_hours")), r["id"]
        assert free == (r["cost"]["flops"] == 0) and "40%" in r["cost"]["assumed"], r["id"]
        assert (ROOT / r["notebook"]).is_file(), r["notebook"]
    assert sum(bool(r.measured()) for r in ROWS) >= 16


def figures(text):
    "The numbers of a text, as they are written, without zeros in front (the paper pads columns with them)."
    return {n.lstrip("0") for n in re.findall(r"\d+(?:[.,]\d+)*", text)}


def short_hash(content):
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.id)
def test_every_published_number_stands_in_a_quote(row):
    if "authors' repository" in row.source:
        return  # means of committed cells, which test_quoted_means_are_the_published_ones computes
    missing = figures(row.published) - figures(" ".join(row.quotes))
    assert not missing, f"{row.id}: {missing} stand in no quote"


def test_every_quote_stands_in_the_paper():
    """The paper's text is not shipped: the hashes of the quotes that were found in it are."""
    found = (DATA / "quotes.txt").read_text().split()
    text = PAPER.read_text() if PAPER.exists() else None
    for row in ROWS:
        for quote in row.quotes:
            assert text is None or quote in text, f"{row.id}: {quote}"
            assert short_hash(quote.encode()) in found, f"{row.id}: {quote}"


def test_the_rows_are_shipped_with_the_package():
    assert (ROOT / "longva/study/paper.json").is_file()
    assert '"study/*.json"' in (ROOT / "setup.py").read_text()


def test_without_the_checkout_each_row_says_what_is_missing(tmp_path):
    rows = [as_dict(r, tmp_path) for r in ROWS]
    assert all(r["measured"] or r["reason"] for r in rows)
    assert {r["id"] for r in rows if r["measured"]} == {
        "Table 1",
        "Table 4",
        "Table 5",
        "Figure 2",
        "Figure 8",
        "Section 3.1",
        "Section 4",
    }  # arithmetic needs no record


def parsed(words):
    "Let the real command read its words, and do nothing."
    if words[0] == "torchrun":
        words = words[words.index("--no-python") + 1 :]
    other = words[:3] == ["python", "-m", "longva.lmms"]
    assert other or words[0] == "longva"
    app, words = (lmms_app, words[2:]) if other else (cli_app, words)
    group = typer.main.get_command(app)
    above = group.make_context(words[0], words[1:])
    name, command, rest = group.resolve_command(above, words[1:])
    return name, command.make_context(name, rest, parent=above)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.id)
def test_every_command_can_be_given(row):
    if row.cost.flops == 0:  # a command of other tools, which looks at files
        assert shlex.split(row.command)[0] in ("ffprobe", "identify")
        return
    name, context = parsed(shlex.split(row.command))
    assert not context.args, f"{name} does not know {context.args}"
    if name in ("vniah", "niah"):
        lengths = numbers(context.params["frames" if name == "vniah" else "lengths"], int, "")
        assert grid(lengths, numbers(context.params["depths"], float, ""), "frames")


def test_a_wrong_command_would_be_noticed():
    with pytest.raises(Exception, match="No such option"):
        parsed(shlex.split("longva vniah --model m --haystack h --framse 8"))
    with pytest.raises(Exception, match="haystack"):
        parsed(["longva", "vniah", "--model", "m"])


def test_every_experiment_is_recorded(parts):
    assert {f.stem for f in RECORDS} == set(parts)


def pairs(value):
    "All [right, trials] in a record; two whole numbers, or the end of [length, depth, right, trials]."
    if isinstance(value, dict):
        return [p for v in value.values() for p in pairs(v)]
    if isinstance(value, list) and len(value) in (2, 4) and all(isinstance(v, int) for v in value[-2:]):
        return [value[-2:]]
    return [p for v in value for p in pairs(v)] if isinstance(value, list) else []


@pytest.mark.parametrize("file", RECORDS, ids=lambda f: f.stem)
def test_records_say_where_they_come_from(file):
    found = json.loads(file.read_text())
    assert set(found["versions"]) == {"longva", "torch", "transformers", "python"} and {
        "processor",
        "cores",
        "threads",
        "system",
    } <= set(found["machine"])
    assert found["command"] == f"python benchmarks/paper.py {file.stem}" and found["seconds"] > 0
    counts = pairs(
        {k: v for k, v in found.items() if k not in ("versions", "machine", "frames", "depths", "text_frames")}
    )
    assert all(0 <= k <= n and n > 0 for k, n in counts)
    assert str(Path.home()) not in file.read_text() and "/tmp" not in file.read_text()


def test_quoted_means_are_the_published_ones():
    def mean(name, keep=lambda r: True):
        rows = [r for r in json.loads((ROOT / "nbs/paper/published" / f"{name}.json").read_text()) if keep(r)]
        return sum(r["Score"] for r in rows) / len(rows)

    text = {r.id: r.published for r in ROWS}
    assert (
        f"{mean('vniah-LongVA-7B'):.3f}" in text["Figure 4"]
        and f"{mean('vniah-LongVA-7B', lambda r: r['Num. Frame'] <= 2000):.3f}" in text["Figure 4"]
    )
    assert (
        " | ".join(f"{mean(f'niah-d{k}-Qwen2-7B-Instruct-extend-step_1000'):.3f}" for k in (0, 3, 5))
        in text["Figure 7"]
    )
    near, far = (
        mean("vniah-LongVA-7B", test) for test in (lambda r: r["Num. Frame"] <= 1400, lambda r: r["Num. Frame"] >= 1600)
    )
    assert f"{near:.2f} at 200 to 1400" in text["Figure 4"] and f"{far:.2f} at 1600 to 3000" in text["Figure 4"]


def test_published_files_are_the_originals():
    known = dict(line.split() for line in (DATA / "published.txt").read_text().splitlines())
    files = sorted((ROOT / "nbs/paper/published").glob("*.json"))
    assert {file.name for file in files} == set(known)
    for file in files:
        cells = json.dumps(json.loads(file.read_text()), sort_keys=True)
        assert short_hash(cells.encode()) == known[file.name], file.name


def test_presets_are_those_of_section_3_2():
    from longva.train.align import PRESETS

    one, two = PRESETS["paper-1"], PRESETS["paper-2"]
    assert one.rates == {"projector": 1e-3} and two.rates == {"language": 1e-5, "projector": 1e-5, "tower": 2e-6}
    assert [(p.recipe.rows, p.length, p.recipe.schedule, p.warm_up, p.epochs, p.pictures) for p in (one, two)] == [
        (128, 8192, "cosine", 0.03, 1, "square"),
        (32, 32768, "cosine", 0.03, 1, "model"),
    ]
    cells = json.loads((ROOT / "nbs/paper/section3_2.ipynb").read_text())["cells"]
    said = "".join(json.dumps(c["source"]) for c in cells)
    assert all(words in said for words in ("1e-3", "1e-5", "2e-6", "8,192", "32,768", "3% warm-up"))


def test_the_cost_of_the_whole_grid():
    "By its formula: weights of the layers, causal attention, 15 lengths, 6 depths, 5 needles."
    weights, total = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944), 0
    for n in range(200, 3001, 200):
        length = 144 * (n + 1) + 60
        total += 30 * (2 * weights * length + 28 * 4 * 3584 * length * length / 2)
    row = next(r for r in ROWS if r.id == "Figure 4")
    tower = reading([], 1, 3000).flops
    plain = reading([n + 1 for n in range(200, 3001, 200)], 30, 3000)  # each trial by itself
    assert plain.flops == pytest.approx(total + tower, rel=1e-9) and 3e11 < tower / 3000 < 5e11
    assert (
        "--naive" not in row.command
        and 2.40 < total / (row.cost.flops - tower) < 2.45
        and 3.29 < plain.tokens / row.cost.tokens < 3.31
    )  # what they share, once


def test_the_command_prints_all_and_writes_json(tmp_path):
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "from longva.cli import app; app()",
            "paper",
            "--json",
            str(tmp_path / "new/paper.json"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0 and not said.stderr, said.stderr
    rows = json.loads((tmp_path / "new/paper.json").read_text())
    assert [r["id"] for r in rows] == IDS and all(i in said.stdout for i in IDS) and "…" not in said.stdout
    assert rows == [as_dict(r) for r in ROWS]


def test_pictures_show_counts():
    figure = curves({"a": {"8": [9, 10], "512": [1, 10]}}, "frames", 32, "trained")
    low, high = wilson(9, 10)
    assert (
        list(figure.data[0].y) == [0.9, 0.1]
        and figure.data[0].error_y.array[0] == pytest.approx(high - 0.9)
        and figure.data[0].error_y.arrayminus[0] == pytest.approx(0.9 - low)
    )
    drawn = maps({"a": [[8, 0, 9, 10], [16, 1, 5, 10]], "b": [[8, 0, 1, 10]]}, "frames")
    assert [list(row) for row in drawn.data[0].z] == [[0.9, None], [None, 0.5]]
    assert [t.text[0] for t in drawn.layout.annotations] == ["a", "b"]
    assert recorded("nothing/such") is None
