"""The demo in several processes: the same as in one, stopped by ctrl-c, and with its starter killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from longva.files import FolderError
from longva.needle.trials import NeedleError, key, read_trials
from longva.study.demo import BEST, PANELS, TASKS, DemoPlan, demo, task_folder

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(frames=(8, 16), depths=(0, 1), needles=2, control=10, progress=False)
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def logs(folder):
    return {task: read_trials(task_folder(DemoPlan(folder), task) / "trials.jsonl") for task in TASKS}


def decisions(folder):
    found = {}
    for task, trials in logs(folder).items():
        found[task] = sorted((key(t), t.argmax_ids, t.correct) for t in trials)
    return found


def family(pid):
    "Living processes that `pid` started, and theirs (Linux only)."
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = children.get(pid, [])
    for p in found:
        found.extend(children.get(p, []))
    return found


def gone(pids):
    "Have all these ended?"

    def alive(pid):
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    limit = time.time() + 30
    while any(map(alive, pids)) and time.time() < limit:
        time.sleep(0.1)
    return not any(map(alive, pids))


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="processes are followed through /proc, which only Linux has"
)
def test_stopped_killed_and_finished(tmp_path):
    folder = tmp_path / "demo"
    options = ["--out", str(folder), "--workers", "2"]
    command = [sys.executable, "-c", "from longva.cli import app; app()", "demo", *options]
    for number, blow in enumerate([signal.SIGINT, signal.SIGKILL]):
        process = subprocess.Popen(
            command,
            env=ENV,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        limit = time.time() + 200
        before = sum(map(len, logs(folder).values()))
        while sum(map(len, logs(folder).values())) < before + 20 and time.time() < limit and process.poll() is None:
            time.sleep(0.05)
        started = family(process.pid)
        assert len(started) >= 2 and process.poll() is None
        if blow == signal.SIGINT:
            os.killpg(process.pid, blow)  # as a terminal: to all of them
        else:
            process.kill()  # only the one that started the others
        _, errors = process.communicate(timeout=60)
        assert gone(started)
        if blow == signal.SIGINT:
            assert process.returncode == 130 and "Traceback" not in errors, errors
            assert (
                errors.splitlines()[-1]
                == f"Stopped. What is done is kept in {folder}: run the same command again to resume."
            )
            assert not [p for p in folder.rglob(".*")] and "seconds" in json.loads((folder / "demo.json").read_text())
    for trials in logs(folder).values():
        assert set(Counter(map(key, trials)).values()) <= {1}
    about = json.loads((folder / "demo.json").read_text())
    with pytest.raises(NeedleError, match="another seed: choose another folder"):
        demo(folder, seed=5, progress=False)
    assert json.loads((folder / "demo.json").read_text()) == about


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "haystack.mp4").write_bytes(b"a stranger's film")
    with pytest.raises(NeedleError, match="holds files but no demo.json: choose another folder"):
        demo(tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["haystack.mp4"] and (
        tmp_path / "haystack.mp4"
    ).read_bytes() == b"a stranger's film"
    for out in ("haystack.mp4", "haystack.mp4/below"):
        with pytest.raises(FolderError, match="haystack.mp4 is a file, and the results need a folder"):
            demo(tmp_path / out, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A small demo, done in one process."
    folder = tmp_path_factory.mktemp("demos") / "one"
    demo(folder, workers=1, **SMALL)
    return folder


def test_two_processes_decide_as_one(finished, tmp_path):
    one = demo(finished, **SMALL)
    two = demo(tmp_path / "two", workers=2, **SMALL)
    assert decisions(finished) == decisions(tmp_path / "two")
    assert list(one["panels"]) == list(PANELS)
    assert one["panels"] == two["panels"] and one["best_base"] == two["best_base"]
    log = tmp_path / "two" / "mini-longva" / "trials.jsonl"
    stamp = log.stat().st_mtime_ns
    start = time.process_time()
    assert demo(tmp_path / "two", **SMALL) == two  # from the logs
    assert time.process_time() - start < 5
    assert log.stat().st_mtime_ns == stamp


def test_an_error_in_a_worker_is_raised_here(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for task in TASKS[:2]:
        where = task_folder(DemoPlan(tmp_path), task)
        file = where / "settings.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"weights": "others"}))
        (where / "heatmap.png").unlink()
    with pytest.raises(NeedleError, match="different: weights"):
        demo(tmp_path, workers=2, **SMALL)


def test_folders_have_no_blanks_and_old_ones_are_read(finished, tmp_path):
    assert {p.name for p in finished.iterdir() if p.is_dir()} == {"mini-short-best-base", "needles", *TASKS} - {BEST}
    old = Path(shutil.copytree(finished, tmp_path / "old"))
    (old / "mini-short-best-base").rename(old / BEST)
    assert demo(old, **SMALL)["panels"][BEST]["log"] == f"{BEST}/trials.jsonl"
    assert not (old / "mini-short-best-base").exists()


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (820, "dark"), (390, "light")])
def test_the_page_of_figure_4(finished, tmp_path, chromium, width, scheme):
    """A title and a caption; no sideways scrolling, no panel over another; a cell's trials hide no other cell."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    page = finished / "figure4.html"
    assert page.stat().st_size < 200_000
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab.goto(page.as_uri())
        assert tab.title() == "The paper's Figure 4 in miniature"
        assert "dotted line" in tab.inner_text("body") and "Best base: mini-short" in tab.inner_text("body")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [section.bounding_box() for section in tab.locator("section").all()]
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                beside = b["x"] + b["width"] <= a["x"] or a["x"] + a["width"] <= b["x"]
                assert beside or b["y"] + b["height"] <= a["y"]
        ink = tab.evaluate("getComputedStyle(document.body).color")
        assert (ink == "rgb(238, 238, 238)") == (scheme == "dark")
        tab.locator("td").first.focus()
        assert "2 of 2 right, 95% interval" in tab.inner_text("#cell") and "margin" in tab.inner_text("#cell")
        assert "http" not in page.read_text()
        browser.close()
