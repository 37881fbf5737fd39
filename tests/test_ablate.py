"""An ablation killed and resumed, in one process and in two; each run is the needle test with its settings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longva.context.rope import extend_rope
from longva.files import versions
from longva.mini import load
from longva.mini.world import write_mini_video, write_needles
from longva.needle.statistics import newcombe
from longva.needle.trials import NeedleError, Trial, key, read_trials
from longva.needle.vniah import run
from longva.study.ablate import AblationRun, ablate, compare, named, product

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = product(model="mini-short", theta=[None, 1e4], pool_mode="max")
SCRIPT = """
from longva.study.ablate import ablate, product
if __name__ == "__main__":
    ablate(product(model="mini-short", theta=[None, 1e4], pool_mode="max"), "broken", workers=2, progress=False,
           haystack="film.mp4", needles="needles", frames=(8, 64), depths=(0, 1), seed=3)
"""


def plain(runs):
    return {r.name: sorted((key(t), t.insert, t.argmax_ids, t.correct, t.seed) for t in r.trials) for r in runs}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    write_mini_video(folder / "film.mp4", 64, seed=3, side=56)
    write_needles(folder / "needles", 3, seed=3)
    (folder / "ablation.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def common(things):
    return dict(
        haystack=things / "film.mp4", needles=things / "needles", frames=(8, 64), depths=(0, 1), seed=3, progress=False
    )


@pytest.fixture(scope="module")
def whole(things, common):
    "Done at once, in one process."
    return ablate(SETTINGS, things / "whole", **common)


def test_a_run_is_the_needle_test(whole, things, tmp_path):
    "Against the test called by hand on a model that was changed by hand."
    model, processor = load("mini-short")
    extend_rope(model, theta=1e4)
    model.config.pool_mode = "max"
    by_hand = run(
        (model, processor),
        things / "film.mp4",
        things / "needles",
        [8, 64],
        [0, 1],
        tmp_path / "hand",
        seed=3,
        progress=False,
    )
    ours = next(r for r in whole if r.name == "mini-short theta 10000")
    assert sorted((key(t), t.argmax_ids) for t in ours.trials) == sorted((key(t), t.argmax_ids) for t in by_hand)
    assert all(abs(a.margin - b.margin) < 1e-3 for a, b in zip(sorted(ours.trials, key=key), sorted(by_hand, key=key)))
    assert len({json.dumps([t.margin for t in r.trials]) for r in whole}) == 2  # every setting changes something


def test_each_folder_says_what_it_is(whole, things):
    for r in whole:
        result = json.loads((things / "whole" / r.name / "result.json").read_text())
        assert (
            result["setting"] == r.setting
            and result["versions"] == versions()
            and result["machine"]["cores"] == os.cpu_count()
        )
        assert sum(n for _, n in result["by_frames"].values()) == r.wanted == len(r.trials) == 12
        assert str(things) not in json.dumps(result)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups are a thing of POSIX")
def test_killed_and_finished_by_two(whole, things, common):
    def log():
        return [trial for file in (things / "broken").glob("*/trials.jsonl") for trial in read_trials(file)]

    for _ in range(5):  # until the blow is faster than the machine
        shutil.rmtree(things / "broken", ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "ablation.py"],
            cwd=things,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        limit = time.time() + 400
        while not log() and process.poll() is None and time.time() < limit:
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # all of them at once
        _, errors = process.communicate(timeout=60)
        if process.returncode:
            break
    assert process.returncode == -signal.SIGKILL, errors
    assert 0 < len(log()) < 24 and "Traceback" not in errors, errors
    seen = []
    again = ablate(SETTINGS, things / "broken", workers=2, watch=seen.append, **common)
    assert plain(again) == plain(whole) and seen and all(r.done for r in seen[-1])
    assert len(log()) == 24  # none twice


def test_a_folder_of_other_settings_is_refused_and_left(whole, things, common, tmp_path):
    before = {p: p.read_bytes() for p in (things / "whole").rglob("*") if p.is_file()}
    for changes, words in [(dict(fit="crop"), "other settings"), (dict(seed=4), "other settings")]:
        with pytest.raises(NeedleError, match=words):
            ablate(SETTINGS, things / "whole", **common | changes)
    write_needles(tmp_path / "needles", 3, seed=4)  # another content under the same name
    for r in whole:
        (things / "whole" / r.name / "result.json").unlink()
    with pytest.raises(NeedleError, match="different: needles"):
        ablate(SETTINGS, things / "whole", **common | dict(needles=tmp_path / "needles"))
    for p, content in before.items():
        if p.name == "result.json":
            p.write_bytes(content)
    before.pop(things / "whole" / "ablation.json")
    assert all(p.read_bytes() == content for p, content in before.items())
    with pytest.raises(NeedleError, match="no ablation.json"):
        ablate(SETTINGS, things, **common)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "ablation.json").write_text('{"runs": [')
    with pytest.raises(NeedleError, match="is not readable"):
        ablate(SETTINGS, tmp_path / "torn", **common)


@pytest.mark.parametrize(
    "setting, words",
    [
        (dict(encoding="anyres"), "name a model"),
        (dict(bases=3), "There is no setting bases"),
        (dict(frames=(8, 2.5)), "whole number of frames"),
        (dict(depths=(2,)), "A depth must lie between 0"),
        (dict(needles="nowhere"), "nowhere"),
    ],
)
def test_nonsense_is_refused_before_anything_is_made(setting, words, common, tmp_path):
    with pytest.raises(NeedleError, match=words):
        ablate(product(model="mini-short"), tmp_path / "new", **common | setting)
    assert not (tmp_path / "new").exists()


def test_names_are_folders():
    settings = product(model="runs/a/model.v2", method="yarn", factor=[2.0, 4.0], haystack=Path("x/film.mp4"))
    assert list(named(settings)) == ["model factor 2", "model factor 4"]
    settings = product(model=["a/b", "c"], haystack=[Path("/x/y.mp4"), Path("z/w.mp4")])
    assert all("/" not in name for name in named(settings))
    with pytest.raises(NeedleError, match="would be called m haystack y"):
        named(product(model="m", haystack=[Path("/x/y.mp4"), Path("z/y.mp4")]))


def test_compare_counts_pairs():
    def trial(j, n, right):
        return Trial("m", str(j), n, 0.5, 0, [1], [int(right)], right, 0.0, 0.0)

    a = AblationRun("a", {}, [trial(j, n, j < 6) for n in (8, 16) for j in range(10)], 20)
    b = AblationRun("b", {}, [trial(j, n, j < 4 or j == 9) for n in (8, 16) for j in range(10)], 20)
    gap = compare(a, b)
    assert (gap["difference"], *gap["interval"]) == newcombe(8, 4, 2, 6)
    eight = gap["by_frames"][8]
    assert (eight["difference"], *eight["interval"]) == newcombe(4, 2, 1, 3)
    assert (
        gap["of"] == "a minus b"
        and gap["trials"] == 20
        and torch.isclose(torch.tensor(gap["difference"]), torch.tensor(0.1))
    )
