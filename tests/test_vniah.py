"""V-NIAH: against the original's recorded numbers, killed and resumed, and the same whatever the batching."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from original import PARITY, same_columns
from PIL import Image
from safetensors.torch import load_file

from longva.model.modeling import LongVA, LongVAConfig
from longva.needle.haystack import Haystack
from longva.needle.needles import Needle, save_needles
from longva.needle.reader import Prompt, Reader
from longva.needle.sweep import judge
from longva.needle.trials import NeedleError, Trial, cells, key, read_trials, save_accuracies
from longva.needle.vniah import Control, Reading, Spot, answer_logits, batches, decide, run
from longva.vision.video import VideoError, write_video

sys.path.insert(0, str(Path(__file__).parent))
from needle_toy import film, needles, toy

ROOT = Path(__file__).resolve().parents[1]


# --- the original's numbers


@pytest.fixture(scope="module")
def parity():
    data = json.loads((PARITY / "vniah" / "vniah_cases.json").read_text())
    tensors = load_file(PARITY / "vniah" / "vniah.safetensors")
    old = json.loads((PARITY / data["checkpoint"] / "config.json").read_text())
    tower = json.loads((PARITY / old["mm_vision_tower"] / "config.json").read_text())
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    text = {k: old[k] for k in names} | dict(rope_parameters=dict(rope_type="default", rope_theta=old["rope_theta"]))
    model = LongVA(LongVAConfig(text_config=text, vision_config=tower.get("vision_config", tower))).eval()
    weights = load_file(PARITY / data["checkpoint"] / "model.safetensors")
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    assert not missing and all("position_ids" in k for k in unexpected), (missing, unexpected)
    prompts = [
        Prompt(data["pre_ids"], q + data["post_ids"], a) for q, a in zip(data["question_ids"], data["answer_ids"])
    ]
    return model, data, tensors, prompts


def test_parity_every_trial(parity, tmp_path):
    model, data, tensors, prompts = parity
    reader = Reader(model).with_tokens(tensors["haystack"], tensors["needles"])
    rows = iter(tensors["answer_span_logits"])
    trials = []
    for cell in data["cells"]:
        for j, prompt in enumerate(prompts):
            spot = Spot(j, cell["num_frames"], cell["depth"])
            assert spot.insert == cell["insert_index"]
            logits = answer_logits(reader, prompts, [spot])[0]
            expected = torch.stack([next(rows) for _ in prompt.answer])
            assert (same_columns(logits, expected) - expected).abs().max() < 1e-4
            best, correct, margin = judge(logits, prompt.answer)
            assert best == cell["argmax_answer_span"][j] and correct == bool(cell["pass"][j])
            top = logits.topk(2).values
            assert abs((top[:, 0] - top[:, 1]).min().item() - cell["min_margin"][j]) < 2e-4
            assert correct == (margin > 0)
            if correct:  # then the answer is the best token, and both margins are one
                assert abs(margin - cell["min_margin"][j]) < 2e-4
            trials.append(
                Trial(
                    "parity", f"n{j}", spot.frames, spot.depth, spot.insert, prompt.answer, best, correct, margin, 0.0
                )
            )
    assert next(rows, None) is None and sum(t.correct for t in trials) == 36
    average = save_accuracies(trials, tmp_path)
    assert json.loads((tmp_path / "all_accuracies.json").read_text()) == data["all_accuracies"]
    assert math.isclose(average, data["average_accuracy"])


def test_parity_in_batches(parity):
    model, data, tensors, prompts = parity
    spots = [Spot(j, c["num_frames"], c["depth"]) for c in data["cells"] for j in range(len(prompts))]
    expected = {
        (c["num_frames"], c["depth"], j): c["argmax_answer_span"][j] for c in data["cells"] for j in range(len(prompts))
    }
    together = batches(prompts, spots, data["tokens_per_frame"])
    assert len(together) < 20 and sorted(s for b in together for s in map(repr, b)) == sorted(map(repr, spots))
    reader = Reader(model).with_tokens(tensors["haystack"], tensors["needles"])
    for batch in together:
        for s, (best, correct, _) in zip(batch, decide(reader, prompts, batch)):
            assert best == expected[s.frames, s.depth, s.needle] and correct == (best == prompts[s.needle].answer)


def test_parity_insert_indices_and_labels(parity, tmp_path):
    """Depths come close to each other where their rounded labels meet; the files then have the same rows."""
    for case in parity[1]["depth_rounding"]:
        trials = [Trial("", "n", 4, depth, 0, [1], [1], True, 1.0, 0.0) for depth in case["depths"]]
        save_accuracies(trials, tmp_path)
        rows = json.loads((tmp_path / "all_accuracies.json").read_text())
        assert [row["Frame Depth"] for row in rows] == case["labels"]
        for n in (100, 3000):
            assert [Spot(0, n, d).insert for d in case["depths"]] == case[f"insert_index_at_{n}_frames"]


def test_without_the_needle_frame(parity):
    model, data, tensors, prompts = parity
    with_dummy = answer_logits(Reader(model).with_tokens(tensors["haystack"]), prompts, [Spot(0, 8, 0.5)])
    needle_last = Reader(model).with_tokens(tensors["haystack"][:8], tensors["haystack"][7:8])
    by_hand = answer_logits(needle_last, prompts, [Spot(0, 7, 1.0)])
    assert (with_dummy - by_hand).abs().max() < 1e-5  # eight frames and nothing between them


# --- a whole sweep with a toy


def test_run_leaves_everything(tmp_path):
    model, processor = toy()
    model.train()
    seen = []
    reader = Reader(model, processor, name="toy")
    given = dict(haystack=film(12), needles=needles(), frames=[4, 8, 12], depths=[0, 0.5, 1], out=tmp_path, seed=5)
    trials = run(reader, **given, train_length=8, progress=False, on_trial=seen.append)
    assert len(trials) == 27 == len({key(t) for t in trials}) and sorted(map(key, seen)) == sorted(map(key, trials))
    assert model.training  # left as it was found
    names = {"trials.jsonl", "settings.json", "all_accuracies.json", "avg_accuracy.txt", "heatmap.html", "heatmap.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert read_trials(tmp_path / "trials.jsonl") == seen
    assert all(
        t.insert == int(t.depth * t.frames)
        and t.seed == 5
        and t.model == "toy"
        and t.seconds > 0
        and "torch" in t.versions
        for t in trials
    )
    assert len(json.loads((tmp_path / "all_accuracies.json").read_text())) == 9
    again = run(reader, **given, progress=False, on_trial=seen.append)
    assert again == trials and len(seen) == 27  # nothing was computed twice


def test_path_or_frames_or_one_by_one(tmp_path):
    model, processor = toy()
    frames = film(9)
    file = write_video(frames.array, tmp_path / "film.mp4", fps=1, scale=2, crf=1)
    folder = save_needles(needles(), tmp_path / "needles")
    same = dict(frames=[3, 9], depths=[0.0, 0.4, 1.0], progress=False)
    toys = (model, processor)
    a = run(toys, frames, needles(), out=tmp_path / "a", **same)
    b = run(toys, frames, folder, out=tmp_path / "b", reading=Reading(batch_tokens=1), **same)
    c = run(toys, str(file), str(folder), out=str(tmp_path / "c"), **same)
    assert [key(t) for t in a] == [key(t) for t in b] == [key(t) for t in c]
    assert [t.argmax_ids for t in a] == [t.argmax_ids for t in b] and max(
        abs(x.margin - y.margin) for x, y in zip(a, b)
    ) < 1e-3
    assert (
        sum(x.argmax_ids == y.argmax_ids for x, y in zip(a, c)) > len(a) / 2
    )  # the file is not lossless, and the toy is touchy


def test_grid_may_grow_in_the_same_folder(tmp_path):
    model, processor = toy()

    def go(frames, depths):
        return run((model, processor), film(8), needles(), frames, depths, tmp_path, progress=False)

    assert len(go([4], [0.5])) == 3
    assert len(go([8], [0.5])) == 3 and len(go([4, 8], [0, 0.5])) == 12
    assert (
        len(read_trials(tmp_path / "trials.jsonl"))
        == 12
        == len({key(t) for t in read_trials(tmp_path / "trials.jsonl")})
    )


@pytest.mark.parametrize("change", ["model", "weights", "rope", "haystack", "needles", "seed", "fit", "with_needle"])
def test_another_test_in_the_same_folder_is_refused(tmp_path, change):
    model, processor = toy()
    reader = Reader(model, processor, name="toy")
    given = dict(
        reader=reader, haystack=film(4), needles=needles(), frames=[4], depths=[0.5], out=tmp_path, progress=False
    )
    run(**given)
    before = (tmp_path / "trials.jsonl").read_bytes()
    if change == "weights":
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    elif change == "rope":
        model.model.rotary_emb.inv_freq.mul_(0.5)
    else:
        given |= {
            "model": dict(reader=Reader(model, processor, name="other")),
            "haystack": dict(haystack=film(4, seed=1)),
            "needles": dict(needles=needles()[:2]),
            "seed": dict(seed=1),
            "fit": dict(haystack=Haystack(film(4), fit="crop")),
            "with_needle": dict(variant=Control()),
        }[change]
    with pytest.raises(NeedleError, match="another test") as error:
        run(**given)
    word = {"rope": "weights"}.get(change, change)
    assert word in str(error.value), str(error.value)
    assert (tmp_path / "trials.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(frames=[4, 9]), "9"),
        (dict(frames=[]), "at least one"),
        (dict(depths=[1.5]), "1.5"),
        (dict(needles=[]), "no needle"),
        (dict(needles=needles() + needles()), "called"),
        (dict(needles="nowhere"), "no needle folder"),
        (dict(haystack="nowhere.mp4"), "nowhere.mp4"),
        (dict(needles=[Needle("x", Image.new("RGB", (28, 28)), "which colour ?", "octarine")]), "octarine"),
        (dict(needles=[Needle("x", Image.new("RGB", (28, 28)), "which octarine ?", "red")]), "octarine"),
        (dict(needles=[Needle("x", Image.new("RGB", (28, 28)), "which colour ?", " ")]), "answer"),
        (dict(needles=[Needle("x", Image.new("RGB", (28, 28)), "which <video> ?", "red")]), "<video>"),
        (dict(variant=Control(), depths=[0, 1]), "one depth"),
    ],
)
def test_refused_before_anything_is_computed(tmp_path, monkeypatch, change, word):
    model, processor = toy()
    monkeypatch.setattr(LongVA, "forward", lambda *a, **k: pytest.fail("the model was asked"))
    monkeypatch.setattr(LongVA, "encode_frames", lambda *a, **k: pytest.fail("the tower was asked"))
    given = dict(haystack=film(8), needles=needles(), frames=[4], depths=[0.5], out=tmp_path / "out", progress=False)
    with pytest.raises((NeedleError, VideoError)) as error:
        run((model, processor), **(given | change))
    assert word in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value), str(
        error.value
    )
    assert not (tmp_path / "out").exists()


def test_a_fit_that_there_is_not():
    with pytest.raises(NeedleError, match="stretch"):
        Haystack(film(8), fit="stretch")


def test_logits_that_overflow_are_refused(tmp_path):
    model, processor = toy()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(NeedleError, match="bfloat16"):
        run((model, processor), film(4), needles(), [4], [0], tmp_path, progress=False)
    assert read_trials(tmp_path / "trials.jsonl") == []


def test_a_model_in_bfloat16_stays_in_bfloat16(tmp_path):
    model, processor = toy()
    model.to(torch.bfloat16)
    assert Reader(model, processor).encode(film(3).array).dtype == torch.bfloat16
    assert len(run((model, processor), film(4), needles(), [4], [0], tmp_path, progress=False)) == 3
    assert json.loads((tmp_path / "settings.json").read_text())["dtype"] == "bfloat16"


# --- stopped and taken up again


def test_ctrl_c_keeps_what_is_done(tmp_path, caplog):
    model, processor = toy()
    decided = []

    def stop(trial):
        decided.append(trial)
        if len(decided) == 7:
            raise KeyboardInterrupt

    given = dict(haystack=film(8), needles=needles(), frames=[4, 8], depths=[0, 1], out=tmp_path, progress=False)
    with pytest.raises(KeyboardInterrupt):
        run((model, processor), on_trial=stop, **given)
    done = len(read_trials(tmp_path / "trials.jsonl"))
    assert done == 7 and "again to resume" in caplog.text and f"{done} of 12" in caplog.text
    assert len(run((model, processor), **given)) == 12
    assert Counter(map(key, read_trials(tmp_path / "trials.jsonl"))).most_common(1)[0][1] == 1


SWEEP = """
import sys, time
sys.path.insert(0, {tests!r})
from needle_toy import film, needles, toy
from longva.needle.vniah import Reading, run
model, processor = toy()
grid = dict(frames=range(1, 11), depths=[0, 0.5, 1])
shown = dict(progress=False, on_trial=lambda t: time.sleep({pause}))
trials = run((model, processor), film(10), needles(), **grid, out={out!r}, reading=Reading(batch_tokens=1), **shown)
print(len(trials))
"""


def sweep(out, pause):
    code = SWEEP.format(tests=str(Path(__file__).parent), out=str(out), pause=pause)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("signals", [[signal.SIGKILL, signal.SIGKILL], [signal.SIGINT]])
def test_stopped_and_finished(tmp_path, signals):
    log = tmp_path / "trials.jsonl"
    counts = [0]
    for signal_number in signals:
        process = sweep(tmp_path, pause=0.06)
        limit = time.time() + 120
        wanted = counts[-1] + 20
        while time.time() < limit and process.poll() is None:
            if log.exists() and log.read_bytes().count(b"\n") >= wanted:
                break
            time.sleep(0.01)
        process.send_signal(signal_number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        if signal_number == signal.SIGINT:
            assert "again to resume" in errors
        counts.append(log.read_bytes().count(b"\n"))
        assert wanted <= counts[-1] < 90 and not (tmp_path / "heatmap.html").exists()
    with open(log, "ab") as f:
        f.write(b'{"model": "to')  # as if the kill had come in the middle of a line
    process = sweep(tmp_path, pause=0)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and out.strip() == "90", errors
    assert "half a line" in errors
    trials = read_trials(log)
    assert len(trials) == 90 == len({key(t) for t in trials})
    assert len(cells(trials)) == 30 and all(n == 3 for _, n in cells(trials).values())
    assert (tmp_path / "heatmap.html").exists()
