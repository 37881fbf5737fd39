"""The lmms-eval plug-in: against oracles everywhere, and inside the real package where it is installed.

lmms-eval has pins of its own, and an environment of its own. The lines that make it are in nbs/790_lmms.ipynb. Then:

    LONGVA_LMMS_ENV=lmms_env pytest tests/test_lmms.py

With LONGVA_LMMS_ENV=build, those lines are run first, in a temporary folder (some minutes, and the network).
"""

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import longva.lmms
from longva.commands.lmms import lmms_app
from longva.lmms import Answerer, LmmsError, part_of, user_turn, write_vniah
from longva.lmms.curve import curve_table, last_error, point_command, read_point, run_curve
from longva.lmms.model import model_class
from longva.lmms.tasks import begins_with
from longva.lmms.visuals import read_video, splice_frames
from longva.mini.world import draw_frame, write_mini_video, write_needles
from longva.needle.haystack import Haystack
from longva.needle.needles import load_needles
from longva.needle.vniah import run
from longva.vision.unires import fit_frames
from longva.vision.video import write_video

root = Path(__file__).resolve().parents[1]
SCENES = [("star", "red", "checks"), ("fish", "cyan", "bars"), ("heart", "blue", "rows"), ("boat", "pink", "dots")]
OTHERS = [("ring", "green", "plain"), ("flag", "red", "spots"), ("bell", "orange", "rows"), ("eye", "blue", "checks")]


class Simple(Answerer):
    is_simple = True


def film_of(scenes, side=112):
    return np.stack([draw_frame(s, side, np.random.default_rng(k)) for k, s in enumerate(scenes)])


def picture_of(scenes):
    "Four scenes as a picture of 2 x 2 grids."
    return Image.fromarray(film_of(scenes, 28).reshape(2, 2, 28, 28, 3).transpose(0, 2, 1, 3, 4).reshape(56, 56, 3))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A film with needles, a short film, two pictures."
    place = tmp_path_factory.mktemp("world")
    write_mini_video(place / "film.mp4", 64, 3)
    write_needles(place / "needles", 4, 3)
    write_video(film_of(SCENES), place / "four.mp4", fps=1, crf=5)
    picture_of(SCENES).save(place / "four.png")
    picture_of(OTHERS).save(place / "others.png")
    return place


@pytest.fixture(scope="module")
def chat():
    return Answerer("mini-longva", frames=4, device="cpu")


@pytest.fixture(scope="module")
def simple():
    return Simple("mini-longva", frames=4, device="cpu")


def say(doc):
    "Messages of a document: its pictures and films, then its question."
    return [{"role": "user", "content": [*map(part_of, doc["see"]), {"type": "text", "text": doc["ask"]}]}]


def asked(lm, docs, settings=None, task="toy"):
    "The requests of lmms-eval for documents, in the form that the model's kind wants."
    lm.task_dict = {task: {"test": docs}}
    settings = dict(max_new_tokens=8) if settings is None else settings
    if lm.is_simple:
        return [
            SimpleNamespace(args=(d["ask"], settings, lambda doc: doc["see"], i, task, "test"))
            for i, d in enumerate(docs)
        ]
    return [SimpleNamespace(args=(d["ask"], say, settings, i, task, "test")) for i, d in enumerate(docs)]


def greedy(lm, inputs, most=8):
    "Three lines of oracle: the whole row again for each token."
    row, start, pixels = (
        inputs["input_ids"],
        inputs["input_ids"].shape[1],
        {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")},
    )
    while row.shape[1] < start + most and (row.shape[1] == start or row[0, -1] != lm.processor.tokenizer.eos_token_id):
        with torch.no_grad():
            row = torch.cat([row, lm.model(input_ids=row, **pixels).logits[:, -1:].argmax(-1)], 1)
    return lm.processor.tokenizer.decode(row[0, start:], skip_special_tokens=True)


def documents(world):
    return [
        dict(see=[str(world / "four.mp4")], ask="find heart", answer="blue rows"),
        dict(see=[film_of(SCENES)], ask="find boat", answer="pink dots"),
        dict(see=[picture_of(SCENES)], ask="find fish", answer="cyan bars"),
        dict(see=[str(world / "four.png")], ask="find star", answer="red checks"),
        dict(see=[picture_of(OTHERS), picture_of(SCENES)], ask="find flag", answer="red spots"),
        dict(see=[picture_of(OTHERS), str(world / "four.mp4")], ask="find bell", answer="orange rows"),
        dict(see=[], ask="see star red checks . find star", answer="red checks"),
    ]


def test_answers_are_the_models_own(world, chat, simple):
    docs = documents(world)
    said = chat.generate_until(asked(chat, docs))
    for doc, text in zip(docs, said):
        films = [
            str(world / "four.mp4") if isinstance(v, str) and v.endswith("mp4") else v
            for v in doc["see"]
            if isinstance(v, np.ndarray) or str(v).endswith("mp4")
        ]
        images = [v for v in doc["see"] if isinstance(v, Image.Image) or str(v).endswith("png")]
        words = "<image> " * len(images) + "<video> " * len(films) + doc["ask"]
        assert text == greedy(chat, chat.processor(text=words, images=images or None, videos=films or None)), doc["ask"]
    assert said == simple.generate_until(asked(simple, docs))
    assert [text for text in said] == [doc["answer"] for doc in docs]


def test_settings_until_beams_and_seed(world, chat):
    doc = documents(world)[:1]
    assert chat.generate_until(asked(chat, doc, dict(max_new_tokens=1))) == ["blue"]
    assert chat.generate_until(
        asked(chat, doc, dict(max_new_tokens=8, until=[" rows"], image_aspect_ratio="original"))
    ) == ["blue"]
    assert chat.generate_until(asked(chat, doc, dict(max_new_tokens=8, num_beams=3))) == ["blue rows"]
    hot = dict(max_new_tokens=8, temperature=30.0)

    def drawn(seed):
        torch.manual_seed(seed)
        return chat.generate_until(asked(chat, doc, hot))

    assert drawn(1) == drawn(1) and len({drawn(seed)[0] for seed in range(5)}) > 1

    def first():
        return asked(chat, doc, settings)

    settings = dict(max_new_tokens=8, until=["."])
    assert chat.generate_until(first()) == chat.generate_until(first()) and settings == dict(
        max_new_tokens=8, until=["."]
    )  # the task's own dictionary stays as it was


def test_words_between_pictures(simple):
    pair = [picture_of(SCENES), picture_of(OTHERS)]

    def kinds(turn):
        return [p.get("text", p["type"]) for p in turn[0]["content"]]

    assert kinds(user_turn(pair, "a <image> b <image> c")) == ["a ", "image", " b ", "image", " c"]
    assert kinds(user_turn(pair, "<image><image> c")) == ["image", "image", " c"]
    assert kinds(user_turn(pair, "c")) == ["image", "image", "c"]
    docs = [dict(see=pair, ask="<image> find star <image>"), dict(see=pair[:1], ask="<image> and <image> find star")]
    simple.generate_until(asked(simple, docs[:1]))
    with pytest.raises(
        LmmsError, match="document 1 of test .*3 <image> placeholders"
    ):  # more words for images than images: no guessing
        simple.generate_until(asked(simple, docs)[1:])


def test_likelihood(world, simple):
    docs = documents(world)[:6]
    simple.task_dict = {"toy": {"test": docs}}
    requests = [
        SimpleNamespace(args=(d["ask"], lambda doc: doc["answer"], lambda doc: doc["see"], i, "toy", "test"))
        for i, d in enumerate(docs)
    ]
    wrong = [
        SimpleNamespace(args=(d["ask"], lambda doc: "green dots", lambda doc: doc["see"], i, "toy", "test"))
        for i, d in enumerate(docs)
    ]
    for doc, good, bad in zip(docs, simple.loglikelihood(requests), simple.loglikelihood(wrong)):
        for answer, (score, is_greedy) in ((doc["answer"], good), ("green dots", bad)):
            inputs = simple.prepare(user_turn(doc["see"], doc["ask"]))
            ids = simple.processor.tokenizer(answer, return_tensors="pt")["input_ids"]
            row = torch.cat([inputs.pop("input_ids"), ids], 1)
            inputs.pop("attention_mask")
            with torch.no_grad():
                logits = simple.model.double()(input_ids=row, **inputs).logits[0, -3:-1]
            simple.model.float()
            assert score == pytest.approx(
                -torch.nn.functional.cross_entropy(logits, ids[0], reduction="sum").item(), abs=1e-3
            )
            assert is_greedy == (logits.argmax(-1) == ids[0]).all().item() == (answer == doc["answer"])
    choices = [
        SimpleNamespace(args=(docs[0]["ask"], f" {c}", lambda doc: doc["see"], 0, "toy", "test"))
        for c in ("green dots", "blue rows", "red rows")
    ]
    scores = [score for score, _ in simple.loglikelihood(choices)]
    assert int(np.argmin(scores)) == 1 and min(scores) > 0  # what lmms-eval's multiple choice takes
    assert (
        len(simple.loglikelihood([SimpleNamespace(args=("see star", "red checks"))])) == 1
    )  # without a document, for its mutual information
    with pytest.raises(LmmsError, match="the question is empty"):
        simple.loglikelihood([SimpleNamespace(args=("", "red checks"))])
    with pytest.raises(LmmsError, match="continuation is empty"):
        simple.loglikelihood([SimpleNamespace(args=("find star", " "))])


def broken(place):
    "Files that show nothing."
    whole = (place / "four.mp4").read_bytes()
    for name, content in dict(
        cut=whole[: len(whole) // 2], text=b"no film at all", empty=b"", noise=os.urandom(5000)
    ).items():
        (place / f"{name}.mp4").write_bytes(content)
    for name, content in dict(cut=(place / "four.png").read_bytes()[:200], text=b"no picture", empty=b"").items():
        (place / f"{name}.png").write_bytes(content)
    return ["gone.mp4", "cut.mp4", "text.mp4", "empty.mp4", "noise.mp4", "gone.png", "cut.png", "text.png", "empty.png"]


def test_never_an_answer_without_its_input(world, chat, simple, monkeypatch):
    bad = [[str(world / name)] for name in broken(world)] + [
        [None],
        [7],
        [{"array": [0.0], "sampling_rate": 16000}],
        [{"type": "audio", "url": "a.wav"}],
        [np.zeros((0, 8, 8, 3), np.uint8)],
    ]
    for lm in (chat, simple):
        monkeypatch.setattr(lm, "_reply", lambda *a: pytest.fail("it answered"))
        monkeypatch.setattr(lm, "score", lambda *a: pytest.fail("it answered"))
        for i, see in enumerate(bad):
            docs = [dict(see=["unused.mp4"], ask="find star")] * i + [dict(see=see, ask="find star")]
            with pytest.raises(
                LmmsError,
                match=f"^Task toy, document {i} of test can't be shown to the model, so it isn't answered: .+",
            ) as raised:
                lm.generate_until(asked(lm, docs)[-1:])
            assert "\n" not in str(raised.value), see
    with pytest.raises(LmmsError, match="document 0 of test"):
        simple.loglikelihood([SimpleNamespace(args=("find star", "red", lambda doc: bad[0], 0, "toy", "test"))])

    def torn(doc):
        raise KeyError("video_path")

    with pytest.raises(LmmsError, match="document 0 of test .*video_path"):
        chat.generate_until([SimpleNamespace(args=("", torn, {}, 0, "toy", "test"))])
    monkeypatch.setattr(chat, "_world_size", 2)  # lmms-eval swallows exceptions; another rank would wait for ever
    with pytest.raises(SystemExit, match="document 0 of test"):
        chat.generate_until(asked(chat, [dict(see=bad[0], ask="find star")]))


def test_frames_that_are_read(world):
    film = write_video(
        np.repeat(np.arange(0, 240, 6, dtype=np.uint8), 32 * 32 * 3).reshape(40, 32, 32, 3),
        world / "grey.mp4",
        fps=2,
        crf=1,
    )

    def seen(url=film, **ask):
        return (read_video({"url": url}, 28, **ask).seconds * 2).round().astype(int).tolist()

    assert seen(str(film), frames=5) == [0, 9, 19, 29, 39] == np.linspace(0, 39, 5).astype(int).tolist()
    assert len(seen()) == 32 and len(seen(frames=50)) == 50  # a short film repeats frames, as the original does
    assert (
        seen(fps=1) == list(range(0, 40, 2))
        and seen(fps=1, frames=20) == seen(fps=1)
        and seen(fps=1, frames=19) == seen(frames=19)
    )
    assert seen({"path": str(film), "video_start": 5, "video_end": 10}, fps=1) == [10, 12, 14, 16, 18]
    got = read_video({"url": film, "start_time": 5, "end_time": 10}, 28, fps=1)
    assert (got.seconds * 2).astype(int).tolist() == [10, 12, 14, 16, 18] and abs(
        got.array.mean((1, 2, 3)) - 6 * np.arange(10, 20, 2)
    ).max() < 3
    given = film_of(SCENES)
    assert read_video({"url": given}, 28, frames=2) is given  # given frames are all shown


def test_model_arguments():
    lm = Answerer(
        "mini-longva", frames="8", fps="0.5", frames_fit="pad", batch_size="1", device="cpu"
    )  # lmms-eval hands over text
    assert (lm.frames, lm.fps, lm.frames_fit, lm.model.dtype) == (8, 0.5, "pad", torch.float32)
    for wrong, sentence in [
        (dict(max_frames_num=32), "max_frames_num is called frames here: write frames=32"),
        (dict(conv_template="qwen_1_5"), "leave it out"),
        (dict(frame=3), "no model argument frame:"),
        (dict(frames=0), "whole number above 0"),
        (dict(frames="nan"), "whole number"),
        (dict(fps="inf"), "number above 0"),
        (dict(batch_size=2), "--batch_size 1"),
        (dict(frames_fit="zoom"), "crop, pad or resize"),
    ]:
        with pytest.raises(LmmsError, match=sentence):
            Answerer("mini-longva", device="cpu", **wrong)


def test_front_ends_differ(world):
    wide = np.zeros((2, 28, 84, 3), np.uint8)
    wide[:, :, :20] = 255
    pixels = {
        fit: (
            Answerer("mini-longva", frames_fit=fit, device="cpu").prepare(say(dict(see=[wide], ask="find star")))[
                "pixel_values_videos"
            ]
        )
        for fit in ("crop", "pad", "resize")
    }
    assert all(
        not torch.equal(pixels[a], pixels[b]) for a, b in [("crop", "pad"), ("pad", "resize"), ("crop", "resize")]
    )


def test_folders_and_the_originals_format(world, tmp_path):
    from longva.mini import load
    from longva.model.checkpoint import save_original

    model, processor = load("mini-longva")
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    save_original(model, tmp_path / "theirs")
    processor.tokenizer.save_pretrained(tmp_path / "theirs")
    docs = documents(world)[:1]
    for name in ("ours", "theirs"):
        lm = Answerer(str(tmp_path / name), frames=4, device="cpu")
        assert lm.generate_until(asked(lm, docs)) == ["blue rows"], name
    with pytest.raises((ValueError, OSError)):
        Answerer(str(tmp_path / "nothing"), device="cpu")


def test_import_needs_no_lmms_eval(monkeypatch):
    code = (
        "import sys, longva.lmms as m; assert not [n for n in sys.modules if n.startswith('lmms_eval')];"
        " print(m.Answerer.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "Answerer", done.stderr
    monkeypatch.setattr("longva.lmms.model.find_spec", lambda name: None)
    for call in (
        longva.lmms.manifest,
        lambda: longva.lmms.LongVAChat,
        lambda: model_class.__wrapped__(True),
        lambda: run_curve("mini-longva", "x", [1], "out"),
    ):
        with pytest.raises(
            LmmsError,
            match=r"^lmms-eval is not installed here: make an environment for it, as the notebook 790_lmms says\.$",
        ):
            call()


def test_the_entry_point_is_declared(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    points = configparser.ConfigParser()
    points.read(tmp_path / "longva.egg-info" / "entry_points.txt")
    module, _, name = points["lmms_eval.models"]["longva"].partition(":")
    assert (module, callable(getattr(longva.lmms, name))) == ("longva.lmms", True)


# ---- V-NIAH as a task


class Tags(yaml.SafeLoader):
    "YAML with lmms-eval's `!function`."


Tags.add_constructor("!function", lambda loader, node: "function " + loader.construct_scalar(node))


def test_the_task_folder(world, tmp_path):
    names = write_vniah(world / "film.mp4", world / "needles", [16, 8], [0, 0.5, 1], tmp_path / "täsks", fit="crop")
    assert names == ["vniah_8", "vniah_16", "vniah_8_forced", "vniah_16_forced"]
    task = yaml.load((tmp_path / "täsks" / "vniah_16_forced.yaml").read_text("utf-8"), Tags)
    assert (task["task"], task["output_type"], task["process_results"]) == (
        "vniah_16_forced",
        "loglikelihood",
        "function longva.lmms.vniah_forced_results",
    )
    assert yaml.load((tmp_path / "täsks" / "vniah.yaml").read_text("utf-8"), Tags)["task"] == ["vniah_8", "vniah_16"]
    rows = [json.loads(line) for line in open(task["dataset_kwargs"]["data_files"]["test"], encoding="utf-8")]
    assert (
        len(rows) == 12
        and {(r["depth"], r["insert"]) for r in rows} == {(0, 0), (0.5, 8), (1, 16)}
        and all(Path(r["film"]).is_file() and Path(r["needle"]).is_file() for r in rows)
    )
    pins = load_needles(world / "needles")
    assert [(r["question"], r["answer"]) for r in rows[:4]] == [(p.question, p.answer) for p in pins]
    for name in ("process_results", "doc_to_visual"):
        assert callable(getattr(longva.lmms, task[name].rpartition(".")[2]))
    one = longva.lmms.vniah_visual(rows[5])[0]["url"]
    shown, hay = splice_frames(one, 28), Haystack(world / "film.mp4", fit="crop").frames(16, grid=28).array
    assert np.array_equal(np.delete(shown, one.insert, 0), hay) and np.array_equal(
        shown[one.insert], fit_frames(np.asarray(pins[1].image)[None], 28, "crop")[0]
    )


def test_the_tasks_decide_as_the_bench(world, tmp_path):
    grid = dict(frames=[8, 48], depths=[0, 0.3, 1])
    lm = Simple("mini-short", device="cpu")
    bench = run(
        (lm.model, lm.processor), world / "film.mp4", world / "needles", **grid, out=tmp_path / "bench", progress=False
    )
    write_vniah(world / "film.mp4", world / "needles", **grid, out=tmp_path / "tasks")
    rows = [json.loads(line) for n in grid["frames"] for line in open(tmp_path / "tasks" / f"vniah_{n}.jsonl")]
    lm.task_dict = {"vniah": {"test": rows}}
    said = lm.generate_until(
        [
            SimpleNamespace(args=(r["question"], dict(max_new_tokens=16), longva.lmms.vniah_visual, i, "vniah", "test"))
            for i, r in enumerate(rows)
        ]
    )
    forced = lm.loglikelihood(
        [
            SimpleNamespace(
                args=(r["question"], lambda doc: doc["answer"], longva.lmms.vniah_visual, i, "vniah", "test")
            )
            for i, r in enumerate(rows)
        ]
    )
    right = {(t.frames, t.depth, t.needle): t.correct for t in bench}
    want = [right[r["frames"], r["depth"], r["name"]] for r in rows]
    assert [bool(longva.lmms.vniah_results(r, [text])["vniah"]) for r, text in zip(rows, said)] == want
    assert [bool(longva.lmms.vniah_forced_results(r, [pair])["vniah"]) for r, pair in zip(rows, forced)] == want
    assert 0 < sum(want) < len(want)


def test_begins_with():
    assert begins_with("B", "B") and begins_with("B. The panda", "B") and begins_with(" 200\n", "200")
    assert (
        not begins_with("Both", "B")
        and not begins_with("2000", "200")
        and not begins_with("", "B")
        and not begins_with("b", "B")
    )


# ---- accuracy against frames against seconds, with a stand-in for the package

FAKE = """
import json, pathlib, sys
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(pathlib.Path(args["--output_path"]).parent / "calls.txt", "a") as log:
    log.write(args["--model_args"] + " " + args["--tasks"] + "\\n")
frames = int(dict(a.split("=") for a in args["--model_args"].split(","))["frames"])
if frames == 99: print("Traceback"); print("ValueError: Task toy, document 3 of test can't be shown"); sys.exit(0)
out = pathlib.Path(args["--output_path"]) / "m"
out.mkdir(parents=True, exist_ok=True)
(out / "20260101_results.json").write_text(json.dumps({
    "results": {"toy": {"alias": "toy", "acc,none": frames / 100, "acc_stderr,none": 0.1, "note": "x"}},
    "n-samples": {"toy": {"original": 9, "effective": 7}},
    "throughput": {"avg_seconds_model": frames / 1000, "avg_seconds_reading": 0.5},
}))
"""


def test_curve(tmp_path, monkeypatch, capsys):
    (tmp_path / "path" / "lmms_eval").mkdir(parents=True)
    (tmp_path / "path" / "lmms_eval" / "__init__.py").touch()
    (tmp_path / "path" / "lmms_eval" / "__main__.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'path'}{os.pathsep}{root}")
    monkeypatch.setattr("longva.lmms.curve.need_lmms", lambda: None)
    out = tmp_path / "out"

    def go(frames, **more):
        return run_curve("some/model", "toy", frames, out, **more)

    rows = go([16, 8, 8])
    assert [
        (r["frames"], r["score"], r["stderr"], r["documents"], r["seconds_model"], r["seconds_reading"]) for r in rows
    ] == [(8, 0.08, 0.1, 7, 0.008, 0.5), (16, 0.16, 0.1, 7, 0.016, 0.5)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].split()[:4] == ["frames", "task", "metric", "score"] and lines[-1].split() == [
        "16",
        "toy",
        "acc",
        "0.1600",
        "0.1000",
        "7",
        "0.016",
        "0.500",
    ]
    record = json.loads((out / "curve.json").read_text())
    assert record["rows"] == rows and {"longva", "torch", "transformers", "lmms_eval", "python", "device"} <= set(
        record["versions"]
    )

    def calls():
        return (out / "calls.txt").read_text().splitlines()

    assert calls() == ["pretrained=some/model,frames=8 toy", "pretrained=some/model,frames=16 toy"]
    assert go([8, 16]) == rows and len(calls()) == 2  # what is there is not run again
    go([8], model_args="fps=1,frames={frames}")
    assert calls()[-1] == "pretrained=some/model,fps=1,frames=8 toy" and len(calls()) == 3  # unless something changed
    with pytest.raises(
        LmmsError, match="no results at 99 frames: ValueError: Task toy, document 3 of test can't be shown"
    ):
        go([99])
    assert (
        curve_table([]).split()
        == ["frames", "task", "metric", "score", "+-", "documents", "s", "model", "s", "reading"]
        and read_point(tmp_path / "nowhere", 3) == []
    )
    words = point_command("m", "vniah_{frames}", 8, "o", include_path="t", processes=2, more=["--limit", "2"])
    assert (
        words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        and "vniah_8" in words
        and "pretrained=m" in words
        and words[-2:] == ["--limit", "2"]
    )


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (["--frames", "0"], "--frames must be whole numbers from 1, and not 0."),
        (["--frames=-4,8"], "--frames must be whole numbers from 1, and not -4."),
        (["--frames", ""], "--frames takes whole numbers"),
        (["--tasks", " "], "--tasks is empty"),
        (["--processes", "0"], "--processes"),
        (["--include-path", "nowhere"], "There is no folder nowhere (--include-path)"),
        (["--out", "taken"], "taken"),
        (["--out", "taken/below"], "taken"),
    ],
)
def test_a_curve_that_cannot_be_is_one_sentence(wrong, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("longva.lmms.curve.need_lmms", lambda: None)
    monkeypatch.setattr("longva.lmms.curve.subprocess.run", lambda *a, **k: pytest.fail("it ran"))
    (tmp_path / "taken").write_text("a file")
    done = CliRunner().invoke(
        lmms_app, ["curve", "--pretrained", "mini-longva", "--tasks", "toy", "--frames", "4", "--out", "out", *wrong]
    )
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit) and sentence in done.output
    assert done.exit_code == 2 or len(done.stderr.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir() if p.name != "taken"] in ([], ["out"]) and not list(
        tmp_path.glob("out/*")
    )


def test_what_lmms_eval_said_is_cut_to_the_sentence():
    line = (
        "2026-11-29 13:51:45 | ERROR    | lmms_eval.__main__:cli_evaluate:614 - Error during evaluation: fps is -1.0,"
        " and must be a number above 0.. Please set `--verbosity=DEBUG` to get more information."
    )
    assert last_error(f"noise\n{line}\nmore") == "fps is -1.0, and must be a number above 0"
    assert (
        last_error("ValueError: no such thing.\n") == "ValueError: no such thing"
        and last_error("") == "it said nothing"
    )


def test_the_commands(world, tmp_path):
    def ask(frames, out):
        return [
            "vniah",
            "--film",
            str(world / "film.mp4"),
            "--needles",
            str(world / "needles"),
            "--frames",
            frames,
            "--out",
            str(tmp_path / out),
        ]

    done = CliRunner().invoke(lmms_app, ask("4,8", "tasks"))
    assert done.exit_code == 0 and (tmp_path / "tasks" / "vniah_8_forced.yaml").is_file(), done.output
    assert CliRunner().invoke(lmms_app, ask("4,many", "more")).exit_code == 2
    done = subprocess.run(
        [sys.executable, "-m", "longva.lmms", *ask("4,800", "more")], capture_output=True, text=True, timeout=300
    )
    assert (
        done.returncode == 1
        and "holds 64 frames" in done.stderr
        and "Traceback" not in done.stderr
        and not (tmp_path / "more").exists()
    )


# ---- inside the real package


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "Runs lmms-eval in its own environment: returns (output, results or None, samples by task)."
    named = os.environ.get("LONGVA_LMMS_ENV")
    if not named:
        pytest.skip(
            "lmms-eval is not run: make an environment for it by the lines of nbs/790_lmms.ipynb, and name it in"
            " LONGVA_LMMS_ENV; or LONGVA_LMMS_ENV=build"
        )
    place = tmp_path_factory.mktemp("real")
    if named == "build":
        named = build(place)
    python = Path(named).expanduser().absolute() / "bin" / "python"
    if not python.exists():
        pytest.fail(f"LONGVA_LMMS_ENV is {named}, and there is no bin/python in it.")
    env = os.environ | dict(
        PYTHONPATH=str(root),
        HF_HUB_OFFLINE="1",
        HF_HOME=str(place / "hf"),
        ACCELERATE_USE_CPU="true",
        OMP_NUM_THREADS="1",
    )

    def lmms(tasks, *more, launcher=(), **args):
        out = Path(tmp_path_factory.mktemp("out"))
        given = ",".join(f"{k}={v}" for k, v in args.items())
        start = [str(python), "-m", *launcher, "lmms_eval"] if launcher else [str(python.parent / "lmms-eval")]
        done = subprocess.run(
            [
                *start,
                "--model",
                "longva",
                "--model_args",
                given,
                "--tasks",
                tasks,
                "--output_path",
                str(out),
                "--log_samples",
                "--batch_size",
                "1",
                *map(str, more),
            ],
            env=env,
            capture_output=True,
            text=True,
            timeout=900,
            cwd=out,
        )
        results = [json.loads(p.read_text()) for p in out.rglob("*_results.json")]
        samples = {
            p.stem.split("_samples_")[1]: [json.loads(line) for line in p.open()]
            for p in out.rglob("*_samples_*.jsonl")
        }
        return done, results[0] if results else None, samples

    lmms.python, lmms.env = python, env
    return lmms


def install_lines():
    "What the notebook tells a newcomer to type."
    cells = json.loads((root / "nbs" / "790_lmms.ipynb").read_text("utf-8"))["cells"]
    return [
        line
        for line in "".join(cells[0]["source"]).splitlines()
        if "lmms_env" in line and line.startswith(("python3 ", "lmms_env/"))
    ]


def build(folder):
    "An environment with lmms-eval and this package, made by the notebook's own lines in a copy of the tree."
    source = folder / "source"
    subprocess.run(["git", "-C", str(root), "checkout-index", "-a", f"--prefix={source}/"], check=True)
    for line in install_lines():
        subprocess.run(line.replace("python3", sys.executable, 1), shell=True, cwd=source, check=True, timeout=3600)
    return source / "lmms_env"


UTILS = """
from PIL import Image
from longva.lmms import part_of

def messages(doc):
    parts = [*map(part_of, doc["see"]), {"type": "text", "text": doc["ask"]}]
    return [{"role": "user", "content": parts}]
def visual(doc): return [Image.open(v) if v.endswith("png") else v for v in doc["see"]]
def results(doc, said): return {"right": float(said[0] == doc["answer"])}
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function utils.visual
doc_to_text: ask
doc_to_target: {target}
{more}metadata: {{version: 1.0}}
"""
GENERATE = """output_type: generate_until
doc_to_messages: !function utils.messages
generation_kwargs: {max_new_tokens: 8, temperature: 0}
process_results: !function utils.results
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """output_type: multiple_choice
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(world, tmp_path_factory):
    "Images and a video, asked and chosen from; the same with a file that is missing; V-NIAH."
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "utils.py").write_text(UTILS)
    docs = [
        {
            **doc,
            "see": [
                str(world / {2: "four.png"}.get(i, "others.png")) if not isinstance(v, str) else v for v in doc["see"]
            ],
        }
        for i, doc in enumerate(documents(world))
        if i in (0, 2, 3, 5)
    ]
    for i, doc in enumerate(docs):
        others = [c for c in ("green dots", "yellow rows", "cyan spots", "red bars") if c != doc["answer"]][:3]
        doc |= dict(choices=[*others[: i % 4], doc["answer"], *others[i % 4 :]], gold=i % 4)
    for name, rows in (("toy", docs), ("torn", [*docs, docs[0] | dict(see=[str(world / "gone.mp4")])])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, data, target, more in (
        ("toy_ask", "toy", "answer", GENERATE),
        ("toy_choose", "toy", "gold", CHOOSE),
        ("torn_ask", "torn", "answer", GENERATE),
    ):
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name, data=json.dumps(str(folder / f"{data}.jsonl")), target=target, more=more)
        )
    write_vniah(world / "film.mp4", world / "needles", [8, 48], [0, 0.3, 1], folder)
    return folder, docs


def test_real_chat(real, tasks, chat):
    folder, docs = tasks
    done, results, samples = real("toy_ask,vniah", "--include_path", folder, pretrained="mini-longva", frames=4)
    assert results, done.stdout + done.stderr
    own = chat.generate_until(asked(chat, docs))
    assert own == [doc["answer"] for doc in docs]
    assert [s["filtered_resps"] for s in sorted(samples["toy_ask"], key=lambda s: s["doc_id"])] == own
    assert results["results"]["toy_ask"]["right,none"] == 1.0 and results["n-samples"]["toy_ask"]["effective"] == len(
        docs
    )
    assert (
        results["config"]["model_backend"] == "longva.lmms.LongVAChat (chat)"
        and results["throughput"]["avg_seconds_model"] > 0
    )
    assert 0 < results["results"]["vniah_48"]["vniah,none"] <= results["results"]["vniah_8"]["vniah,none"] == 1.0


def test_real_likelihood(real, tasks, world, tmp_path):
    folder, docs = tasks
    done, results, samples = real(
        "toy_choose,vniah_forced",
        "--include_path",
        folder,
        "--force_simple",
        pretrained="mini-short",
        frames=4,
        fps=1,
        frames_fit="pad",
    )
    assert results, done.stdout + done.stderr
    assert results["config"]["model_backend"] == "longva.lmms.LongVASimple (simple)"
    lm = Simple("mini-short", device="cpu", frames=4, fps=1, frames_fit="pad")
    lm.task_dict = {"toy": {"test": docs}}
    pick = [
        int(np.argmax([lm.score(lm.prepare(user_turn(d["see"], d["ask"])), c)[0] for c in d["choices"]])) for d in docs
    ]
    assert results["results"]["toy_choose"]["acc,none"] == np.mean([p == d["gold"] for p, d in zip(pick, docs)])
    bench = run(
        (lm.model, lm.processor),
        world / "film.mp4",
        world / "needles",
        frames=[8, 48],
        depths=[0, 0.3, 1],
        out=tmp_path,
        progress=False,
    )
    for n in (8, 48):
        assert results["results"][f"vniah_{n}_forced"]["vniah,none"] == pytest.approx(
            np.mean([t.correct for t in bench if t.frames == n])
        )


def test_real_missing_file(real, tasks):
    folder, _ = tasks
    done, results, _ = real("torn_ask", "--include_path", folder, pretrained="mini-longva", frames=4)
    assert (
        results is None
        and "Task torn_ask, document 4 of test can't be shown to the model, so it isn't answered"
        in done.stdout + done.stderr
    )
    two = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    done, results, _ = real("torn_ask", "--include_path", folder, launcher=two, pretrained="mini-longva", frames=4)
    assert results is None and done.returncode != 0 and "document 4 of test can't be shown" in done.stdout + done.stderr


def test_real_two_ranks(real, tasks):
    folder, docs = tasks
    two = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    done, results, samples = real(
        "toy_ask,vniah_48", "--include_path", folder, "--limit", 3, launcher=two, pretrained="mini-longva", frames=4
    )
    assert results, done.stdout + done.stderr
    assert sorted(s["filtered_resps"] for s in samples["toy_ask"]) == sorted(d["answer"] for d in docs[:3])
    assert results["n-samples"]["toy_ask"]["effective"] == 3 and len(samples["vniah_48"]) == 3


def test_real_curve(real, tasks, tmp_path):
    folder, docs = tasks

    def go():
        return subprocess.run(
            [
                str(real.python),
                "-m",
                "longva.lmms",
                "curve",
                "--pretrained",
                "mini-longva",
                "--tasks",
                "toy_ask",
                "--frames",
                "2,4",
                "--include-path",
                str(folder),
                "--out",
                str(tmp_path),
            ],
            env=real.env,
            capture_output=True,
            text=True,
            timeout=900,
        )

    done = go()
    record = json.loads((tmp_path / "curve.json").read_text())
    assert (
        done.returncode == 0 and [r["frames"] for r in record["rows"]] == [2, 4] and record["rows"][1]["score"] == 1.0
    ), done.stderr
    assert (
        record["versions"]["lmms_eval"]
        and record["versions"]["transformers"]
        and all(r["seconds_model"] > 0 and r["documents"] == len(docs) for r in record["rows"])
    )
    assert "toy_ask" in done.stdout.splitlines()[-1] and go().stdout.count("lmms-eval runs") == 0
