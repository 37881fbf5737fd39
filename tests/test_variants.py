"""Variants, generated needles and their files: what other people's code reads, what is refused, what the command does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longva.lab.variants import MINI_WORDING, mini_scene
from longva.mini import load
from longva.mini.world import write_film, write_needles
from longva.needle.features import cached_features, clear_features
from longva.needle.haystack import films, load_needles, save_needles
from longva.needle.statistics import compare
from longva.needle.trials import NeedleError, key, read_trials
from longva.needle.variants import VARIANTS, run_variant

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def longva(*words, cwd):
    return subprocess.run([sys.executable, "-c", "from longva.cli import app; app()", *map(str, words)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two variants of one small test."
    out, (model, processor), (film, needles, alike) = tmp_path_factory.mktemp("runs"), load("mini-longva"), mini_scene(24, 3, 5)
    run = lambda variant, **more: run_variant(model, processor, film, needles, [12, 24], [0, 0.5, 1], out / variant, variant, wording=MINI_WORDING, distance=6, progress=False, **more)
    return out, run("vniah"), run("vniah-d", look_alikes=alike)


def test_accuracies_as_the_original_reads_them(runs):
    rows = json.loads((runs[0] / "vniah" / "all_accuracies.json").read_text())  # as the original's plotting code does
    grid = {(r["Num. Frame"], r["Frame Depth"]): r["Score"] for r in rows}
    assert grid.keys() == {(n, d) for n in (12, 24) for d in (0, 50, 100)} and all(0 <= s <= 1 for s in grid.values())


def test_compare_on_the_command_line(runs):
    out, plain, alike = runs
    assert compare(plain, alike)[-1].pairs == 18
    done = longva("compare", out / "vniah", out / "vniah-d", cwd=out)
    assert done.returncode == 0 and "variant" in done.stdout.splitlines()[0] and "all" in done.stdout
    (out / "less").mkdir(exist_ok=True)
    (out / "less" / "trials.jsonl").write_text("".join((out / "vniah" / "trials.jsonl").read_text().splitlines(True)[:7]))
    done = longva("compare", out / "vniah", out / "less", cwd=out)
    assert done.returncode == 1 and done.stdout == "" and "can't be compared" in done.stderr and len(done.stderr.splitlines()) == 1


def test_look_alike_stands_at_its_distance(runs):
    for t in runs[2]:
        assert t.variant == "vniah-d" and (len(t.places) == 1 or abs(t.places[0] - t.places[1]) == 7)
    assert any(len(t.places) == 2 for t in runs[2])


def test_variant_on_the_command_line(tmp_path):
    write_film(tmp_path / "film.mp4", 24, seed=3, side=28)
    write_needles(tmp_path / "needles", 2, seed=3, side=28)
    words = ["vniah", "--model", "mini-longva", "--haystack", "film.mp4", "--frames", "12", "--depths", "0,1", "--out", "out"]
    done = longva(*words, "--variant", "tenth", cwd=tmp_path)
    trials = read_trials(tmp_path / "out" / "trials.jsonl")
    assert done.returncode == 0 and len({key(t) for t in trials}) == 4 and all(t.variant == "tenth" and len(t.choices) == 10 for t in trials), done.stderr
    for more, word in [(["--variant", "vniah-x"], "--variant is one of"), (["--variant", "vniah-d", "--out", "d"], "look-alike"), (["--variant", "order", "--out", "out"], "another test")]:
        done = longva(*words, *more, cwd=tmp_path)
        assert done.returncode in (1, 2) and word in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "d").exists()


def test_the_command_knows_all_variants():
    from longva import cli
    assert tuple(VARIANTS) == cli.VARIANTS


def test_needles_keep_their_choices(tmp_path):
    needles = mini_scene(4, 2, 1)[1]
    save_needles(needles, tmp_path / "n")
    assert [n.locate for n in load_needles(tmp_path / "n")] == [n.locate for n in needles]
    rows = json.loads((tmp_path / "n" / "needles.json").read_text())
    (tmp_path / "n" / "needles.json").write_text(json.dumps([rows[0] | {"choices": "red"}]))
    with pytest.raises(NeedleError, match="choices a list"): load_needles(tmp_path / "n")


def test_cache_in_a_file_and_films_in_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NeedleError): cached_features(tmp_path / "file", {}, 1, lambda: None)
    (tmp_path / "mine.safetensors").write_text("not of the cache")
    assert clear_features(tmp_path) == 0 and (tmp_path / "mine.safetensors").exists()
    with pytest.raises(NeedleError): films([])
