"""The real command in fresh processes: what it refuses, what it keeps when it is stopped, and that it is quick
to say no."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from longva.mini import folder as mini_folder
from longva.mini.world import needle_objects, scene_words, video_seed, write_mini_video, write_needles
from longva.needle.needles import load_needles
from longva.needle.trials import key, read_trials
from longva.vision.video import write_video

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "from longva.cli import app; app()"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def longva(*words, cwd, **more):
    return subprocess.run(
        [*COMMAND, *map(str, words)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300, **more
    )


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    "A film of 300 frames, two needles, and things that are neither."
    folder = tmp_path_factory.mktemp("things")
    film = write_mini_video(folder / "film.mp4", 300, seed=3, side=56)
    write_needles(folder / "needles", 2, seed=3)
    (folder / "empty.mp4").touch()
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    (folder / "torn.mp4").write_bytes(film.read_bytes()[:9000])
    write_video(np.zeros((9, 16, 16, 3), np.uint8), folder / "short.mp4")
    shutil.copytree(folder / "needles", folder / "lost")
    next((folder / "lost").glob("01*.png")).unlink()
    (folder / "a file").write_text("not a folder")
    (folder / "original").mkdir()
    (folder / "original" / "config.json").write_text('{"model_type": "llava_qwen"}')
    (folder / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(mini_folder("mini-longva") / name, folder / "bare")
    rotten = bytearray(film.read_bytes())
    rotten[len(rotten) // 2 : -1000] = bytes(
        len(rotten) - 1000 - len(rotten) // 2
    )  # the table of packets stands in front and stays whole
    (folder / "rotten.mp4").write_bytes(rotten)
    return folder


def test_it_is_installed_and_quick_to_help(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = longva("--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "vniah" in done.stdout and "demo" in done.stdout
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    )  # processor time: other work on the machine doesn't count
    script = Path(sys.executable).with_name("longva")
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout.startswith("longva ")


@pytest.mark.parametrize(
    "change, code, words",
    [
        (dict(haystack="nowhere.mp4"), 1, "no file nowhere.mp4"),
        (dict(haystack="empty.mp4"), 1, "empty.mp4 is empty"),
        (dict(haystack="noise.mp4"), 1, "noise.mp4 cannot be read as a video"),
        (dict(haystack="torn.mp4"), 1, "torn.mp4"),
        (
            dict(haystack="needles"),
            1,
            "needles holds 2 frames at 1 per second, and 16 are wanted",
        ),  # a folder of pictures is a film
        (dict(haystack="short.mp4"), 1, "holds 9 frames at 1 per second, and 16 are wanted"),
        (dict(fps="0"), 2, "--fps must be a number above 0"),
        (dict(fps="inf"), 2, "--fps must be a number above 0"),
        (dict(fps="2"), 1, "shows 1 frames per second, and 2 are wanted"),
        (dict(fps="1e9"), 1, "shows 1 frames per second"),
        (dict(frames="0"), 2, "--frames: A length must be a whole number"),
        (dict(needles="lost"), 1, "its picture 01_"),
        (dict(needles="original"), 1, "no needles.json"),
        (dict(needles="nowhere"), 1, "no needle folder nowhere"),
        (
            dict(model="mini-lonva"),
            2,
            (
                "no miniature called mini-lonva: choose one of mini-longva, mini-anyres, mini-short, or name a folder"
                " with a model"
            ),
        ),
        (dict(model=""), 2, "--model is empty: choose one of mini-longva"),
        (dict(model="bare"), 2, "The folder bare holds no processor"),
        (dict(model="original"), 2, "original holds no tokenizer"),
        (dict(model="needles"), 2, "no config.json"),
        (dict(frames="4,eight"), 2, "--frames takes whole numbers"),
        (dict(depths="0;1"), 2, "--depths takes numbers"),
        (dict(depths="0,1.5"), 2, "not at 1.5"),
        ({"rope-base": "0.5"}, 2, "--rope-base must be"),
        ({"rope-base": "inf"}, 2, "--rope-base must be"),
        ({"rope-base": "1e30"}, 2, "--rope-base must be"),
        (dict(out="a file"), 1, "a file is a file, and the results need a folder"),
        (dict(out="a file/results"), 1, "a file is a file, and the results need a folder"),
    ],
    ids=lambda x: " ".join(f"{k} {v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_one_sentence_and_nothing_written(things, change, code, words):
    given = (
        dict(model="mini-longva", haystack="film.mp4", needles="needles", frames="4,16", depths="0,1", out="out")
        | change
    )
    before = sorted(p for p in things.rglob("*"))
    done = longva("vniah", *(w for k, v in given.items() for w in (f"--{k}", v)), cwd=things)
    lines = done.stderr.splitlines()
    assert done.returncode == code and done.stdout == "", (done.returncode, done.stdout, done.stderr)
    assert len(lines) == 1 and words in lines[0] and lines[0].endswith("."), done.stderr
    assert sorted(p for p in things.rglob("*")) == before


def test_a_film_damaged_in_the_middle_leaves_nothing(things):
    before = sorted(things.rglob("*"))
    done = longva(
        "vniah",
        "--model",
        "mini-longva",
        "--haystack",
        "rotten.mp4",
        "--needles",
        "needles",
        "--frames",
        "300",
        "--out",
        "deep/out",
        cwd=things,
    )
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1].startswith("rotten.mp4 is damaged, frame")
        and "Traceback" not in done.stderr
    ), done.stderr
    assert sorted(things.rglob("*")) == before


@pytest.mark.parametrize("file", ["nowhere.mp4", "empty.mp4", "noise.mp4", "torn.mp4", "rotten.mp4"])
def test_a_broken_film_is_one_exit_code(things, tmp_path, file):
    "The command line can be meant; what it names can't be had. So 1, whichever command is asked."
    for words in (
        [
            "vniah",
            "--model",
            "mini-longva",
            "--haystack",
            things / file,
            "--needles",
            things / "needles",
            "--frames",
            "300",
            "--out",
            "out",
        ],
        ["chat", "--video", things / file, "find moon"],
    ):
        done = longva(*words, cwd=tmp_path)
        assert (
            done.returncode == 1
            and "Traceback" not in done.stderr
            and file in done.stderr.splitlines()[-1]
            and not list(tmp_path.iterdir())
        ), done
    if file == "empty.mp4":
        assert longva("chat", "--image", things / file, "find moon", cwd=tmp_path).returncode == 1
    if file == "empty.mp4":
        assert longva("chat", "find the wizard", cwd=tmp_path).returncode == 2


def test_missing_option(things):
    done = longva("vniah", "--model", "mini-longva", cwd=things)
    assert done.returncode == 2 and "'--haystack'" in done.stderr and "Traceback" not in done.stderr


def test_a_video_of_any_size(things, tmp_path):
    """As a phone writes them: upright, and no multiple of the model's side."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (45, 64, 36, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    write_video(frames, tmp_path / "phone.mp4", fps=5)
    done = longva(
        "vniah",
        "--model",
        "mini-longva",
        "--haystack",
        tmp_path / "phone.mp4",
        "--needles",
        things / "needles",
        "--frames",
        "4,8",
        "--depths",
        "0,1",
        "--fps",
        "1",
        "--out",
        "results",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    names = {"trials.jsonl", "settings.json", "all_accuracies.json", "avg_accuracy.txt", "heatmap.html", "heatmap.png"}
    assert {p.name for p in (tmp_path / "results").iterdir()} == names
    assert len(read_trials(tmp_path / "results" / "trials.jsonl")) == 8
    assert "4/4" in done.stdout or "/4 " in done.stdout, done.stdout
    assert "Loading weights" not in done.stderr and "results/heatmap.html" in done.stdout


def start(*words, cwd):
    "A command that is meant to be stopped, in a process group of its own, as a terminal would start it."
    return subprocess.Popen(
        [*COMMAND, *map(str, words)],
        cwd=cwd,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process, log, lines):
    limit = time.time() + 200
    while time.time() < limit and process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.01)
    pytest.fail(f"it ended before it could be stopped: {process.communicate()}")


def test_killed_then_stopped_then_finished(things, tmp_path):
    film = shutil.copy(things / "film.mp4", tmp_path)  # away from the needles beside it
    words = [
        "vniah",
        "--model",
        "mini-longva",
        "--haystack",
        film,
        "--frames",
        "256,300",
        "--depths",
        "0,0.5,1",
        "--out",
        tmp_path / "out",
    ]
    log = tmp_path / "out" / "trials.jsonl"
    process = start(*words, cwd=tmp_path)
    wait_for(process, log, 3)
    process.kill()
    process.communicate()
    process = start(*words, cwd=tmp_path)
    wait_for(process, log, 20)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        errors.count("Stopped") == 1 and "run the same command again to resume." in errors and "Traceback" not in errors
    ), errors
    assert 20 <= len(read_trials(log)) < 120
    done = longva(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(read_trials(log)) == 120 and set(Counter(map(key, read_trials(log))).values()) == {1}
    assert len(json.loads((tmp_path / "out" / "all_accuracies.json").read_text())) == 6
    assert len(list((tmp_path / "out" / "needles").glob("*.png"))) == 20


def test_whose_needles(things, tmp_path):
    """Without --needles: those beside the video; otherwise the ones that this video doesn't show; never those of
    another seed."""
    film = shutil.copy(things / "film.mp4", tmp_path / "alone.mp4")
    assert video_seed(film) == 3

    def go(film, out, *more):
        return longva(
            "vniah",
            "--model",
            "mini-longva",
            "--haystack",
            film,
            "--frames",
            "4",
            "--depths",
            "0",
            "--out",
            out,
            *more,
            cwd=tmp_path,
        )

    beside = go(things / "film.mp4", "beside")
    assert (
        beside.returncode == 0 and f"Needles: those beside the video, in {things / 'needles'}." in beside.stdout
    ), beside
    assert (
        len(read_trials(tmp_path / "beside" / "trials.jsonl")) == 2 and not (tmp_path / "beside" / "needles").exists()
    )
    own = go(film, "own")
    assert own.returncode == 0 and "Needles: the miniature's own, of seed 3 as the video." in own.stdout, own
    objects = {scene_words((i, 0, 0))[0] for i in needle_objects(3)}
    assert {n.question.removeprefix("find ") for n in load_needles(tmp_path / "own" / "needles")} == objects
    assert go(film, "own").returncode == 0  # and again
    write_needles(tmp_path / "strange" / "needles", 3, seed=0)
    (tmp_path / "stray" / "needles").mkdir(parents=True)
    (tmp_path / "stray" / "needles" / "a.txt").touch()
    for out in ("strange", "stray"):
        before = sorted(tmp_path.rglob("*"))
        done = go(film, out)
        assert (
            done.returncode == 1 and f"{out}/needles holds something else than this video's needles" in done.stderr
        ), done
        assert len(done.stderr.splitlines()) == 1 and sorted(tmp_path.rglob("*")) == before
    before = sorted(tmp_path.rglob("*"))
    done = go(film, "beside")  # begun with other needles
    assert done.returncode == 1 and "different: needles" in done.stderr and sorted(tmp_path.rglob("*")) == before, done
    foreign = write_video(np.random.default_rng(0).integers(0, 256, (9, 56, 56, 3), np.uint8), tmp_path / "foreign.mp4")
    done = go(foreign, "foreign")
    assert (
        video_seed(foreign) is None
        and done.returncode == 0
        and "drawn with seed 0" in done.stdout
        and "does not say" in done.stdout
    ), done


def test_an_out_that_is_a_file(things, tmp_path):
    for command in (
        ["demo"],
        ["mini", "train"],
        ["extend", "--preset", "mini"],
        ["niah", "--model", "x", "--haystack", "x"],
    ):
        done = longva(*command, "--out", things / "a file", cwd=tmp_path)
        assert (
            done.returncode == 1
            and done.stderr == f"{things / 'a file'} is a file, and the results need a folder: choose another.\n"
        ), done


def test_full_disk(things, tmp_path):
    def small():
        return resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # no file may grow beyond 12 kB

    words = [
        "vniah",
        "--model",
        "mini-longva",
        "--haystack",
        things / "film.mp4",
        "--needles",
        things / "needles",
        "--frames",
        "4,8,16,32",
        "--depths",
        "0,.2,.4,.6,.8",
    ]
    done = longva(*words, "--out", "out", cwd=tmp_path, preexec_fn=small)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    kept = len(read_trials(tmp_path / "out" / "trials.jsonl"))
    assert (
        0 < kept < 40
        and done.stderr.splitlines()[-1]
        == f"out/trials.jsonl can't be written (file too large): its {kept} finished trials are kept; make room and run"
        " the same again."
    )
    assert longva(*words, "--out", "out", cwd=tmp_path).returncode == 0  # when there is room again
    assert len(read_trials(tmp_path / "out" / "trials.jsonl")) == 40


def test_mini_list(tmp_path):
    done = longva("mini", "list", cwd=tmp_path)
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == [
        "mini-longva",
        "mini-anyres",
        "mini-short",
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["vniah", "--model", "mini-longva", "--haystack", ""],
        ["extend", "--preset", "mini", "--out", ""],
        ["extend", "--preset", "mini", "--text", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_current_folder(tmp_path, command):
    done = longva(*command, cwd=tmp_path)
    assert (
        done.returncode == 2
        and ("it is empty" in done.stderr or "Say with --text" in done.stderr)
        and not list(tmp_path.iterdir())
    )


def test_addresses_of_videos(things):
    """A file:// address is read; another one is refused by its own sentence, before a model is loaded for nothing."""
    film = (things / "film.mp4").resolve()
    read = longva("chat", "--video", film.as_uri(), "--frames", "4", "find star", cwd=things)
    assert read.returncode == 0, read
    refused = longva("chat", "--video", "https://a.b/c.mp4", "find star", cwd=things)
    assert refused.returncode == 1 and "nothing is fetched from the network" in refused.stderr, refused
    assert "Traceback" not in refused.stderr
