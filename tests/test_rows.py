"""The sample of training rows, and README's commands on it."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longva import LongVA
from longva.cli import app
from longva.mini.rows import write_rows

README = Path(__file__).parents[1] / "README.md"


def commands():
    "README's commands for a laptop that make rows or train on them."
    lines = re.findall(r"^longva (mini rows|align .*|dpo .*)$", README.read_text(), re.M)
    assert len(lines) == 4
    return [shlex.split(line) for line in lines]


def test_readmes_commands_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in commands():
        few = [] if words[0] == "mini" else ["--steps", "2"]
        done = CliRunner().invoke(app, [*words, *few])
        assert done.exit_code == 0, (words, done.output, done.exception)
        assert done.stdout.strip().splitlines()[-1].startswith("Done. "), done.output
    for folder in ("runs/align/mini-1", "runs/align/mini-2", "runs/dpo/mini"):
        LongVA.from_pretrained(Path(folder) / "model")
        assert len((Path(folder) / "metrics.jsonl").read_text().splitlines()) == 2
        bad = Path(folder) / "bad_rows.jsonl"
        assert not bad.exists() or not bad.read_text()


def test_the_sample_is_small_and_the_same_each_time(tmp_path):
    one, two = (write_rows(tmp_path / name) for name in ("one", "two"))
    files = sorted(file.name for file in one.iterdir())
    assert len(files) == 16 and sum((one / name).stat().st_size for name in files) < 50_000
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)


@pytest.mark.parametrize("command", ["align --preset mini-1 --model mini-longva", "dpo --preset mini"])
def test_a_missing_data_file_points_to_the_sample(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*command.split(), "--data", "captions.json"])
    wanted = (
        "There is no file captions.json (--data): check the name and the folder, or write a small sample with: "
        "longva mini rows."
    )
    assert done.exit_code == 1 and done.stderr.strip() == wanted


def test_the_sample_writes_over_nothing(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("mine")
    done = CliRunner().invoke(app, ["mini", "rows", "--out", str(tmp_path)])
    wanted = f"{tmp_path / 'pairs.jsonl'} is there already and is another file: choose another folder."
    assert done.exit_code == 1 and done.stderr.strip() == wanted
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]
