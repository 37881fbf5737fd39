"""Variants, generated needles and their files: what other code reads, what is refused, what the command does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longva import cli
from longva.files import FolderError
from longva.mini import load
from longva.mini.world import write_mini_video, write_needles
from longva.needle.features import cached_features, clear_features
from longva.needle.haystack import Haystack, list_videos
from longva.needle.names import VARIANT_HELP
from longva.needle.needles import load_needles, save_needles
from longva.needle.reader import Reader
from longva.needle.statistics import compare
from longva.needle.trials import NeedleError, key, read_trials
from longva.needle.variants import VARIANTS, Clock, named_variant
from longva.needle.vniah import Reading, Scene, Spot, run
from longva.study.variants import MINI_WORDING, mini_scene

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def longva(*words, cwd):
    return subprocess.run(
        [sys.executable, "-c", "from longva.cli import app; app()", *map(str, words)],
        cwd=cwd,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """The command in this process, which has loaded torch already."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(cli.app, [*map(str, words)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two variants of one small test."""
    out = tmp_path_factory.mktemp("runs")
    model, processor = load("mini-longva")
    film, needles, alike = mini_scene(24, 3, 5)

    def go(name):
        variant = named_variant(name, wording=MINI_WORDING, distance=6, distractors=alike)
        return run((model, processor), film, needles, [12, 24], [0, 0.5, 1], out / name, variant, progress=False)

    return out, go("vniah"), go("vniah-d")


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
    (out / "less" / "trials.jsonl").write_text(
        "".join((out / "vniah" / "trials.jsonl").read_text().splitlines(True)[:7])
    )
    done = longva("compare", out / "vniah", out / "less", cwd=out)
    assert (
        done.returncode == 1
        and done.stdout == ""
        and "can't be compared" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_look_alike_stands_at_its_distance(runs):
    for t in runs[2]:
        assert t.variant == "vniah-d" and (len(t.places) == 1 or abs(t.places[0] - t.places[1]) == 7)
    assert any(len(t.places) == 2 for t in runs[2])


def test_variant_on_the_command_line(tmp_path, inside):
    write_mini_video(tmp_path / "film.mp4", 24, seed=3, side=28)
    write_needles(tmp_path / "needles", 2, seed=3, side=28)
    words = [
        "vniah",
        "--model",
        "mini-longva",
        "--haystack",
        "film.mp4",
        "--frames",
        "12",
        "--depths",
        "0,1",
        "--out",
        "out",
    ]
    done = inside(*words, "--variant", "tenth")
    trials = read_trials(tmp_path / "out" / "trials.jsonl")
    assert (
        done.exit_code == 0
        and len({key(t) for t in trials}) == 4
        and all(t.variant == "tenth" and len(t.choices) == 10 for t in trials)
    ), done.stderr
    for more, word in [
        (["--variant", "vniah-x"], "'vniah-x' is not one of"),
        (["--variant", "vniah-d", "--out", "d"], "a distractor for each needle"),
        (["--variant", "order", "--out", "out"], "(different: variant (tenth, not order)): choose another folder"),
    ]:
        done = inside(*words, *more)
        assert done.exit_code in (1, 2) and word in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "d").exists()


def test_the_command_knows_all_variants():
    assert list(VARIANTS) == list(VARIANT_HELP)


def test_adaptive_runs_are_compared(inside, tmp_path):
    """Two models that stop at different trials are compared on the trials of both, each cell with the same weight."""
    write_mini_video(tmp_path / "film.mp4", 64, seed=3, side=28)
    write_needles(tmp_path / "needles", 20, seed=3, side=28)
    words = ["vniah", "--haystack", "film.mp4", "--frames", "16,64", "--depths", "0,1", "--half-width", "0.2"]
    for model in ("mini-longva", "mini-short"):
        done = inside(*words, "--model", model, "--out", model)
        assert done.exit_code == 0, done.output
    a, b = (read_trials(tmp_path / model / "trials.jsonl") for model in ("mini-longva", "mini-short"))
    both = {key(t) for t in a} & {key(t) for t in b}
    assert (
        len(both) < max(len(a), len(b)) and "in each accuracy all cells weigh the same" in done.output
    )  # the poor model was asked unequally
    shares = {
        n: [
            sum(t.correct for t in b if (t.frames, t.depth) == (n, d)) / sum((t.frames, t.depth) == (n, d) for t in b)
            for d in (0, 1)
        ]
        for n in (16, 64)
    }
    for n, cell in shares.items():
        assert any(
            line.split()[0] == str(n) and line.split()[2] == f"{sum(cell) / 2:.2f}"
            for line in done.output.splitlines()
            if line.strip()
        ), (n, cell, done.output)
    done = inside("compare", "mini-longva", "mini-short")
    assert (
        done.exit_code == 0
        and f"A holds {len(a)}, B {len(b)}. The {len(both)} that both hold are compared" in done.output
    ), done.output
    right = [{key(t): t.correct for t in run if key(t) in both} for run in (a, b)]

    def mean(found):
        return (
            sum(
                sum(v for k, v in found.items() if k[1:] == cell) / sum(k[1:] == cell for k in found)
                for cell in {k[1:] for k in both}
            )
            / 4
        )

    last = next(line for line in done.output.splitlines() if line.split()[:1] == ["all"]).split()
    assert last[1] == str(len(both)) and last[2:4] == [f"{mean(found):.2f}" for found in right]
    whole = inside("compare", "mini-longva", "mini-longva")
    assert whole.exit_code == 0 and "+0.00" in whole.output
    inside(*words[:-4], "--depths", "0,0.5", "--model", "mini-short", "--half-width", "0.2", "--out", "other")
    done = inside("compare", "mini-longva", "other")
    assert done.exit_code == 1 and "their depths differ" in done.stderr


def test_needles_keep_their_choices(tmp_path):
    needles = mini_scene(4, 2, 1)[1]
    save_needles(needles, tmp_path / "n")
    assert [n.locate for n in load_needles(tmp_path / "n")] == [n.locate for n in needles]
    rows = json.loads((tmp_path / "n" / "needles.json").read_text())
    (tmp_path / "n" / "needles.json").write_text(json.dumps([rows[0] | {"choices": "red"}]))
    with pytest.raises(NeedleError, match="choices a list"):
        load_needles(tmp_path / "n")


def test_cache_in_a_file_and_films_in_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FolderError):
        cached_features(tmp_path / "file", {}, 1, lambda: None)
    (tmp_path / "mine.safetensors").write_text("not of the cache")
    assert clear_features(tmp_path) == 0 and (tmp_path / "mine.safetensors").exists()
    with pytest.raises(NeedleError):
        list_videos([])


def decided(trials):
    return [(key(t), t.argmax_ids, t.correct, t.margin) for t in trials]


@pytest.mark.parametrize("name", ["vniah", "tenth"])
def test_a_second_sweep_encodes_nothing(tmp_path, name, monkeypatch):
    model, processor = load("mini-longva")
    film, needles, _ = mini_scene(12, 2, 5)
    calls = []
    see = type(model).encode_frames
    monkeypatch.setattr(
        type(model), "encode_frames", lambda self, pixels: calls.append(len(pixels)) or see(self, pixels)
    )
    variant = named_variant(name, wording=MINI_WORDING)

    def go(out, lengths=(6, 12), features=None, fit="pad"):
        haystack = Haystack(film, fit=fit)
        return run(
            (model, processor),
            haystack,
            needles,
            list(lengths),
            [0, 1],
            tmp_path / out,
            variant,
            Reading(features=features),
            progress=False,
        )

    plain = go("plain")
    first = None
    calls.clear()
    first = go("first", features=tmp_path / "tokens")
    assert sum(calls) == 12 + 2
    assert decided(go("second", features=tmp_path / "tokens")) == decided(first) == decided(plain) and sum(calls) == 14
    assert (
        decided(go("short", [6], features=tmp_path / "tokens")) == [d for d in decided(first) if d[0][1] == 6]
        and sum(calls) == 14
    )
    go("crop", features=tmp_path / "tokens", fit="crop")
    assert sum(calls) == 28  # another front end is another key
    with pytest.raises(FolderError, match="is a file"):
        go("none", features=tmp_path / "plain" / "trials.jsonl")
    assert not (tmp_path / "none").exists()


def test_a_short_haystack_starts_again(tmp_path):
    model, processor = load("mini-longva")
    film, needles, _ = mini_scene(6, 1, 5)

    def go(film, out, repeat=False):
        return run(
            (model, processor), Haystack(film, repeat=repeat), needles, [4, 14], [0.5], tmp_path / out, progress=False
        )

    with pytest.raises(NeedleError, match="holds 6 frames, and 14 are wanted"):
        go(film, "refused")
    assert not (tmp_path / "refused").exists()
    long = type(film)(film.array[[k % 6 for k in range(14)]], film.seconds, film.fps)
    long.seconds = [float(k) for k in range(14)]
    assert decided(go(film, "looped", repeat=True)) == decided(go(long, "written out"))
    assert json.loads((tmp_path / "looped" / "settings.json").read_text())["repeat"] is True


def test_haystacks_on_the_command_line(tmp_path, inside):
    """Several films, a folder, a looped one, and the free one, which a kept sweep doesn't draw again."""
    (tmp_path / "films").mkdir()
    for name, n in (("a", 8), ("b", 6)):
        write_mini_video(tmp_path / "films" / f"{name}.mp4", n, seed=3, side=28)
    base = ["--model", "mini-longva", "--depths", "0,1", "--naive"]

    def settings(out):
        return json.loads((tmp_path / "runs" / "vniah" / out / "settings.json").read_text())

    cases = [
        ("mini-longva_a_and_1_more", ["--haystack", "films/a.mp4", "--haystack", "films/b.mp4", "--frames", "14"]),
        ("mini-longva_scenery_7", ["--haystack", "scenery:7", "--frames", "5", "--features", "tokens"]),
    ]
    for out, words in cases:
        done = inside("vniah", *base, *words)
        assert (
            done.exit_code == 0 and len(read_trials(tmp_path / "runs" / "vniah" / out / "trials.jsonl")) == 40
        ), done.stderr
    assert [f["file"] for f in settings(cases[0][0])["haystack"]["films"]] == ["a.mp4", "b.mp4"] and settings(
        cases[1][0]
    )["haystack"]["scenery"] == 7
    assert len(list((tmp_path / "tokens").iterdir())) == 2


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["films", "--frames", "15"], 1, "14 frames at 1 per second, and 15 are wanted"),
        (["films", "--frames", "15", "--repeat"], 0, None),
        (["scenery", "--haystack", "films", "--frames", "4"], 2, "give it alone"),
        (["scenery:x", "--frames", "4"], 1, "has no seed"),
        (["scenery", "--frames", "4", "--fps", "2"], 1, "one frame a second"),
        (["", "--frames", "4"], 2, "empty"),
    ],
)
def test_which_haystack(tmp_path, inside, words, code, said):
    (tmp_path / "films").mkdir()
    for name, n in (("a", 8), ("b", 6)):
        write_mini_video(tmp_path / "films" / f"{name}.mp4", n, seed=3, side=28)
    done = inside("vniah", "--model", "mini-longva", "--depths", "1", "--haystack", *words)
    assert (
        done.exit_code == code and (said is None or said in done.output) and "Traceback" not in done.output
    ), done.output
    if code:
        assert not (tmp_path / "runs").exists()
    else:
        assert (tmp_path / "runs" / "vniah" / "mini-longva_films" / "heatmap.html").exists()


def test_clock_times_are_those_of_the_film(tmp_path):
    """Eight seconds into a film of four frames a second, or of those that fps leaves of it, it is eight seconds."""
    import numpy as np

    from longva.vision.video import write_video

    model, processor = load("mini-longva")
    _, needles, _ = mini_scene(24, 3, 5)
    film = tmp_path / "four.mp4"
    write_video([np.full((32, 32, 3), i, np.uint8) for i in range(80)], film, fps=4)
    for fps, n in ((None, 64), (2.0, 32), (1.0, 16)):
        scene = Scene(Reader(model, processor), needles, fps=Haystack(film, fps).rate)
        one = Clock(MINI_WORDING).ask(scene, Spot(0, n, 0.5))
        assert one.seconds == pytest.approx(8) and processor.tokenizer.decode(one.answer) == "0 0 0 8"
    run((model, processor), film, needles[:1], [32], [0.5], tmp_path / "clock", Clock(MINI_WORDING), progress=False)
    told = read_trials(tmp_path / "clock" / "trials.jsonl")[0]
    assert processor.tokenizer.decode(told.answer_ids) == "0 0 0 4"


def test_what_the_command_says_of_variants(inside, tmp_path):
    film = write_mini_video(tmp_path / "film.mp4", 16, 3, side=28)
    needles = write_needles(tmp_path / "needles", 2, 3)
    given = ["vniah", "--model", "mini-longva", "--haystack", film, "--needles", needles, "--frames", "8"]
    done = inside(*given, "--variant", "absent", "--out", "absent")
    assert done.exit_code == 0 and "said so" in done.output and "an accuracy of 0 is best" in done.output, done.output
    for more, words in (
        (["--variant", "absent", "--depths", "0,1"], "give one depth"),
        (["--variant", "vniah-d"], "needs --distractors"),
        (["--half-width", "2"], "between 0 and 0.5"),
    ):
        done = inside(*given, *more, "--out", "never")
        assert done.exit_code == 2 and words in done.output and not (tmp_path / "never").exists(), done.output


def test_families_are_for_the_needle_test(inside, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    done = inside("chat", "--model", tmp_path / "other", "find moon")
    assert done.exit_code == 2 and "longva vniah takes the other families" in done.output, done.output
