"""What a terminal does to the command: ctrl-c at any moment, tab, -h, and results for machines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from longva.mini.world import write_mini_video, write_needles

ROOT = Path(__file__).resolve().parents[1]
MAIN = "import sys; sys.argv[0] = 'longva'; print('begun', flush=True); from longva.cli import main; main()"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def hear_ctrl_c():
    """Undo what a shell does to its background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*words, cwd):
    """Start the command in a process group of its own, as a terminal does, and wait for its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *words],
        cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=hear_ctrl_c,
    )
    assert process.stdout.readline() == "begun\n"
    return process


def press_ctrl_c(process):
    """Send SIGINT to the process and its children, and give what is said, without progress bars."""
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    return process.returncode, [line for line in lines if "it/s]" not in line and "[00:" not in line]


@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.5, 1, 2, 4])
def test_ctrl_c_while_it_starts(tmp_path, seconds):
    process = start("mini", "train", "--out", "out", cwd=tmp_path)
    time.sleep(seconds)
    code, lines = press_ctrl_c(process)
    assert code == 130 and len(lines) == 1 and lines[0].startswith("Stopped."), lines


@pytest.mark.parametrize("words", ["mini train --out out", "demo --out out --workers 2"])
def test_ctrl_c_while_children_start(tmp_path, words):
    process = start(*words.split(), cwd=tmp_path)
    limit = time.time() + 200
    while len(psutil.Process(process.pid).children()) < 2:
        assert time.time() < limit and process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(1)
    code, lines = press_ctrl_c(process)
    assert code == 130 and len(lines) == 1 and "run the same command again to resume" in lines[0], lines


def longva(*words, cwd, **environment):
    code = MAIN.replace("print('begun', flush=True)", "sys.modules['torch'] = None")
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=cwd, env=ENV | environment, capture_output=True, text=True, timeout=300)


def completed(line, cwd):
    """What bash is given after tab."""
    words = line.split(" ")
    asked = dict(_LONGVA_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    return longva(cwd=cwd, **asked).stdout.split()


def test_completion_and_help_need_no_torch(tmp_path):
    assert completed("longva vn", tmp_path) == ["vniah"]
    assert completed("longva chat --model mini-s", tmp_path) == ["mini-short"]
    assert completed("longva align --preset paper-", tmp_path) == ["paper-1", "paper-2"]
    assert "--half-width" in completed("longva vniah --h", tmp_path)
    script = longva(cwd=tmp_path, _LONGVA_COMPLETE="source_bash").stdout
    assert "complete -o default -F _longva_completion longva" in script
    shown = longva("mini", "train", "-h", cwd=tmp_path)
    assert shown.returncode == 0 and shown.stdout == longva("help", "mini", "train", cwd=tmp_path).stdout
    assert longva("-V", cwd=tmp_path).stdout.startswith("longva ")


def test_json_on_standard_output_without_torch(tmp_path):
    """Standard output is one JSON value; what people read goes to standard error; a file leaves both as they were."""
    done = longva("mini", "list", "--json", "-", cwd=tmp_path)
    assert [model["name"] for model in json.loads(done.stdout)] == ["mini-longva", "mini-anyres", "mini-short"]
    assert done.stderr == longva("mini", "list", cwd=tmp_path).stdout
    done = longva("plan", "--model", "qwen2-7b", "--length", "9000", "--json", "-", cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert done.returncode == 1 and not plan["fits"] and plan["limit"] in done.stderr
    assert plan["gpu_bytes"]["weights"] == 2 * 7_615_616_512  # parameters of Qwen2-7B
    done = longva("paper", "table6", "--json", "new/rows.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert [row["id"] for row in rows] == ["Table 6"] and done.stdout.startswith("claim")
    assert json.loads(longva("paper", "table6", "--json", "-", cwd=tmp_path).stdout) == rows


def test_json_of_the_needle_tests_and_common_cells(tmp_path):
    """The numbers are those of the files; --common compares where both were asked."""
    write_mini_video(tmp_path / "film.mp4", 16, seed=3, side=56)
    write_needles(tmp_path / "needles", 2, seed=3)
    code = MAIN.replace("print('begun', flush=True); ", "")

    def run(*words):
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)

    found = {}
    for out, model, frames, depths in (("a", "mini-longva", "4,8", "0,1"), ("b", "mini-short", "8,16", "0,0.5")):
        given = ["--model", model, "--frames", frames, "--depths", depths, "--out", out]
        done = run("vniah", "--haystack", "film.mp4", "--json", "-", *given)
        assert done.returncode == 0 and "95% interval" in done.stderr, done.stderr
        found[out] = json.loads(done.stdout)
    trials = [json.loads(line) for line in (tmp_path / "a" / "trials.jsonl").read_text().splitlines()]
    for cell in found["a"]["cells"]:
        here = [t["correct"] for t in trials if (t["frames"], t["depth"]) == (cell["frames"], cell["depth"])]
        assert (cell["right"], cell["trials"]) == (sum(here), len(here)) and len(here) == 2
    assert [row["frames"] for row in found["b"]["lengths"]] == [8, 16]
    refused = run("compare", "a", "b")
    assert refused.returncode == 1 and "their lengths differ" in refused.stderr
    done = run("compare", "a", "b", "--common", "--json", "-")
    compared = json.loads(done.stdout)
    assert compared["left_out"] == {"lengths": [4, 16], "depths": [0.5, 1.0]}
    assert "Left out, as only one run has them: lengths 4, 16 and depths 0.5, 1." in done.stderr
    assert [(gap["frames"], gap["pairs"]) for gap in compared["gaps"]] == [(8, 2), (None, 2)]
    done = run("niah", "--model", "mini-longva", "--lengths", "64", "--depths", "0", "--numbers", "2", "--json", "-")
    (test,) = json.loads(done.stdout)["tests"]
    assert done.returncode == 0 and test["cells"][0]["tokens"] == 64 and test["cells"][0]["trials"] == 2
