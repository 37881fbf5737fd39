"""Needle folders, haystack files and result folders that are broken, busy or belong to another test."""

import json
import sys
from dataclasses import asdict
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from longva.files import FolderError
from longva.needle.haystack import Haystack
from longva.needle.heatmap import figure4, heat_map, save_figure4, save_html, save_png
from longva.needle.needles import Needle, load_needles, save_needles
from longva.needle.sweep import same_settings, sweep
from longva.needle.trials import (
    NeedleError,
    Trial,
    TrialLog,
    by_frames,
    cells,
    check_grid,
    key,
    parse_trials,
    read_trials,
    save_accuracies,
    wilson,
)
from longva.vision.video import VideoError, write_video


def trial(**changes):
    base = dict(model="m", needle="a", frames=8, depth=0.5, insert=4, answer_ids=[1], argmax_ids=[1])
    return Trial(**(base | dict(correct=True, margin=1.0, seconds=0.1) | changes))


def is_one_sentence(error):
    text = str(error.value)
    return text.endswith(".") and "\n" not in text and "Traceback" not in text


def red_needle():
    return Needle("a", Image.new("RGB", (20, 10), "red"), "Which colour?", "Red")


# --- needle folders


@pytest.fixture
def folder(tmp_path):
    return save_needles([red_needle()], tmp_path / "needles")


def refused(folder, text=None, word=""):
    if text is not None:
        (folder / "needles.json").write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(NeedleError) as error:
        load_needles(folder)
    assert is_one_sentence(error) and word in str(error.value), str(error.value)


ROW = dict(image="a.png", question="Which colour?", answer="Red")


@pytest.mark.parametrize(
    "text, word",
    [
        ('[{"image": "a.png",\n"question": }]', "line 2"),
        ("", "line 1"),
        ("[]", "at least one"),
        ("{}", "at least one"),
        ("[" * 100_000, "nested too deeply"),
        ("7", "at least one"),
        (["a.png"], "no image"),
        ([{k: v for k, v in ROW.items() if k != "question"}], "no question"),
        ([ROW, ROW | {"answer": 200}], "Needle 2"),
        ([ROW | {"answer": "  "}], "no answer"),
        ([ROW | {"image": "gone.png"}], "gone.png is not there"),
        ([ROW | {"image": "."}], "not there"),
    ],
)
def test_bad_lists(folder, text, word):
    refused(folder, text, word)


def test_bad_pictures(folder):
    whole = (folder / "a.png").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        (folder / "a.png").write_bytes(content)
        refused(folder, [ROW], "a.png cannot be read as an image")


def test_list_that_is_not_text(folder):
    (folder / "needles.json").write_bytes(b"\xff\xfe\x00[")
    refused(folder, word="UTF-8")


def test_list_with_a_byte_order_mark(folder):
    (folder / "needles.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([ROW]).encode())
    assert [n.answer for n in load_needles(folder)] == ["Red"]


def test_names_never_collide(folder):
    names = ["a.png", "a 3.png", "a.png", "sub/a.png", "a 3.png"]
    (folder / "sub").mkdir()
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "needles.json").write_text(json.dumps([ROW | dict(image=name) for name in names]))
    found = [n.name for n in load_needles(folder)]
    assert len(set(found)) == 5 and found[:2] == ["a", "a 3"]
    assert all(name.startswith("a") for name in found)


def test_missing_folder_and_list(folder, tmp_path):
    refused(tmp_path / "nowhere", word="no needle folder")
    (folder / "needles.json").unlink()
    refused(folder, word="no needles.json")


def test_pictures_of_every_mode_become_rgb(folder):
    for mode in ("1", "L", "P", "RGBA", "LA", "I;16"):
        Image.new(mode, (9, 7)).save(folder / "a.png")
        assert load_needles(folder)[0].image.mode == "RGB"


# --- needles of the hub: the layout of lmms-lab/v_niah_needles, in a snapshot that the test wrote

HUB = "lmms-lab/v_niah_needles"
BALLOON = "\nIn side of the ballon,  which colour?\n"


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    "write(rows) -> the folder that the hub would give."
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    import pyarrow

    asked = []

    def write(rows, name="data/test-00000-of-00001.parquet"):
        file = tmp_path / "snapshot" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return asked

    def download(repo_id, *, repo_type, allow_patterns):
        asked.append((repo_id, repo_type, allow_patterns))
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return write


def hub_row(colour, path, **changes):
    picture = BytesIO()
    Image.new("RGB", (9, 7), colour).save(picture, "PNG")
    image = dict(bytes=picture.getvalue(), path=path)
    return dict(image=image, question=BALLOON, answer="Yellow") | changes


def test_needles_of_the_hub(snapshot):
    rows = [
        hub_row("red", "sora_balloon.png"),
        hub_row("green", None),
        hub_row("blue", "sora_balloon.png", answer="200"),
    ]
    asked = snapshot(rows)
    snapshot([hub_row("pink", "no_test.png")], "data/train-00000-of-00001.parquet")
    found = load_needles(HUB)
    assert [n.name for n in found] == ["sora_balloon", "needle 2", "sora_balloon 3"]
    assert [n.answer for n in found] == ["Yellow", "Yellow", "200"]
    assert all(n.question == BALLOON for n in found)
    assert found[2].image.getpixel((3, 3)) == (0, 0, 255) and asked == [(HUB, "dataset", ["*.parquet"])]


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(answer=" "), "Needle 2 of lmms-lab/v_niah_needles has no answer"),
        (dict(image=dict(bytes=b"", path="a.png")), "Needle 2 of lmms-lab/v_niah_needles has no image"),
        (dict(image=dict(bytes=b"nothing", path="a.png")), "a.png cannot be read as an image"),
    ],
)
def test_bad_needles_of_the_hub(snapshot, change, word):
    snapshot([hub_row("red", "a.png"), hub_row("red", "b.png", **change)])
    refused(HUB, word=word)


def test_the_hub_gives_nothing(snapshot, tmp_path, monkeypatch):
    refused(HUB, word="no parquet files")
    (tmp_path / "snapshot" / "test.parquet").write_text("no parquet")
    refused(HUB, word="not readable")
    import huggingface_hub

    def offline(*words, **more):
        raise FileNotFoundError("two\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused(HUB, word="no needle folder lmms-lab/v_niah_needles")
    save_needles([red_needle()], HUB)  # a folder of that name goes before the hub
    assert [n.name for n in load_needles(HUB)] == ["a"]


def test_the_hub_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(HUB, word="pyarrow, which is not installed")


# --- haystack files


@pytest.fixture
def video(tmp_path):
    frames = np.repeat(np.arange(0, 240, 20, dtype=np.uint8), 16 * 16 * 3).reshape(12, 16, 16, 3)
    return write_video(frames, tmp_path / "video.mp4", fps=2, scale=2)


def test_haystack_is_a_prefix(video):
    long = Haystack(video).frames(12)
    short = Haystack(video).frames(5)
    assert len(long.array) == 12 and (long.array[:5] == short.array).all()
    assert len(Haystack(video, fps=1).frames(6).array) == 6


@pytest.mark.parametrize("n, fps", [(13, None), (7, 1), (500, 1)])
def test_haystack_too_short(video, n, fps):
    with pytest.raises(NeedleError) as error:
        Haystack(video, fps).frames(n)
    message = str(error.value)
    assert is_one_sentence(error) and "video.mp4" in message and str(n) in message, message


@pytest.mark.parametrize(
    "fps, word",
    [
        (4, "shows 2 frames per second, and 4 are wanted"),
        (1e9, "shows 2 frames per second"),
        (float("inf"), "above 0"),
        (float("nan"), "above 0"),
        (0, "above 0"),
    ],
)
def test_a_rate_that_the_video_does_not_have(video, fps, word):
    for call in (Haystack(video, fps).check, Haystack(video, fps).frames):
        with pytest.raises(NeedleError, match=word) as error:
            call(1)
        assert is_one_sentence(error)
    assert Haystack(video, 2).length == 12


def test_haystack_unreadable(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"not a video" * 50)
    for name in ("x.mp4", "missing.mp4", "."):
        with pytest.raises((NeedleError, VideoError)) as error:
            Haystack(tmp_path / name).frames(4)
        assert is_one_sentence(error)


# --- the log


def test_log_cut_at_every_byte(tmp_path):
    trials = [trial(needle=n) for n in "äbc"]
    with TrialLog(tmp_path / "full.jsonl") as log:
        log.append(*trials)
    data = (tmp_path / "full.jsonl").read_bytes()
    for cut in range(len(data) + 1):
        path = tmp_path / "t.jsonl"
        path.write_bytes(data[:cut])
        before = read_trials(path)
        with TrialLog(path) as log:
            assert log.trials == before == trials[: data[:cut].count(b"\n")]
            log.append(*trials[len(log) :])
        assert path.read_bytes() == data


def test_log_damaged_in_the_middle(tmp_path):
    line = json.dumps(asdict(trial())).encode() + b"\n"
    for bad in (b"{\n", b"[" * 100_000 + b"\n", b"[1]\n", b'{"model": 1}\n', b"\n"):
        (tmp_path / "t.jsonl").write_bytes(line + bad + line)
        with pytest.raises(NeedleError, match="Line 2 of t.jsonl") as error:
            TrialLog(tmp_path / "t.jsonl")
        assert is_one_sentence(error)
        assert (tmp_path / "t.jsonl").read_bytes() == line + bad + line  # left as it was
    assert parse_trials(b"", "t") == ([], 0)


def test_log_note_on_a_torn_line(tmp_path, caplog):
    (tmp_path / "t.jsonl").write_bytes(b'{"model"')
    with TrialLog(tmp_path / "t.jsonl"):
        pass
    assert "half a line" in caplog.text and (tmp_path / "t.jsonl").read_bytes() == b""


def test_log_has_one_writer(tmp_path):
    with TrialLog(tmp_path / "t.jsonl") as log:
        with pytest.raises(NeedleError, match="Another run"):
            TrialLog(tmp_path / "t.jsonl")
        log.append(trial())
        assert read_trials(tmp_path / "t.jsonl") == [trial()]  # readers are welcome
    TrialLog(tmp_path / "t.jsonl").close()


def test_log_in_a_file(tmp_path):
    (tmp_path / "x").write_text("")
    for log in ("x/trials.jsonl", "x/below/trials.jsonl", "x/far/below/trials.jsonl"):
        with pytest.raises(FolderError, match="/x is a file, and the results need a folder") as error:
            TrialLog(tmp_path / log)
        assert is_one_sentence(error)


# --- settings and grids


def test_settings_of_another_test(tmp_path):
    same_settings(tmp_path, dict(model="a", seed=0), started=False)
    same_settings(tmp_path, dict(model="a", seed=0), started=True)
    same_settings(tmp_path, dict(model="b", seed=0), started=False)  # nothing was tested yet: free to change
    with pytest.raises(NeedleError, match=r"different: model \(b, not a\), fit\)") as error:
        same_settings(tmp_path, dict(model="a", seed=0, fit="pad"), started=True)
    assert is_one_sentence(error)
    for broken in ("{", "[]", "null", "7", "[" * 100_000):
        (tmp_path / "settings.json").write_text(broken)
        with pytest.raises(NeedleError, match="settings.json"):
            same_settings(tmp_path, dict(model="b", seed=0), started=True)


def test_settings_do_not_hang_on_a_file_name(tmp_path):
    one = dict(haystack=dict(file="a.mp4", digest="1"))
    same_settings(tmp_path, one, started=False)
    same_settings(tmp_path, dict(haystack=dict(file="b.mp4", digest="1")), started=True)
    with pytest.raises(NeedleError, match="different: haystack"):
        same_settings(tmp_path, dict(haystack=dict(file="a.mp4", digest="2")), started=True)


def test_a_sweep_that_fails_at_once_leaves_nothing(tmp_path):
    def fail(spots):
        raise VideoError("x.mp4 is damaged.")
        yield

    def fail_later(spots):
        yield [trial()]
        raise VideoError("x.mp4 is damaged.")

    wanted = {key(t): t for t in (trial(), trial(needle="b"))}
    given = dict(model=torch.nn.Linear(1, 1), settings=dict(model="m"), progress=False, trials=wanted)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine.txt").touch()
    for out in (tmp_path / "new" / "out", tmp_path / "old"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(VideoError):
            sweep(out=out, decide=fail, **given)
        assert sorted(tmp_path.rglob("*")) == before
    for decide in (fail_later, fail):  # a trial that is done stays
        with pytest.raises(VideoError):
            sweep(out=tmp_path / "new", decide=decide, **given)
        assert len(read_trials(tmp_path / "new" / "trials.jsonl")) == 1
        assert (tmp_path / "new" / "settings.json").exists()


NAN = float("nan")


@pytest.mark.parametrize(
    "frames, depths",
    [
        ([], [0]),
        ([4], []),
        ([0], [0]),
        ([-3], [0]),
        ([2.5], [0]),
        ([4], [-0.1]),
        ([4], [1.01]),
        ([4], [NAN]),
        ([NAN], [0]),
        (["x"], [0]),
        ([4], ["x"]),
    ],
)
def test_bad_grids(frames, depths):
    with pytest.raises(NeedleError) as error:
        check_grid(frames, depths)
    assert is_one_sentence(error)


PLAIN = dict(model="a", seed=0, with_needle=True)
TENTH = PLAIN | dict(variant="tenth", wording=["In which part?"], locate=["the moon"])
BLIND = TENTH | dict(variant="blind", with_needle=False, choices=[["a"]])


@pytest.mark.parametrize(
    "old, new, words",
    [
        (PLAIN, TENTH, r"different: variant \(vniah, not tenth\)\)"),
        (TENTH, BLIND, r"different: variant \(tenth, not blind\)\)"),
        (PLAIN, TENTH | dict(seed=1), r"different: variant \(vniah, not tenth\), seed \(0, not 1\)\)"),
        (TENTH, TENTH | dict(wording=["Where?"]), r"different: wording\)"),
    ],
)
def test_another_variant_is_one_difference(tmp_path, old, new, words):
    "What comes with a variant (its sentence, whether something is hidden) is no second difference; another seed is."
    same_settings(tmp_path, old, started=False)
    with pytest.raises(NeedleError, match=words) as error:
        same_settings(tmp_path, new, started=True)
    assert is_one_sentence(error)
    same_settings(tmp_path, old | dict(half_width=0.1), started=True)  # how much is asked doesn't make another test


# --- counts and pictures


def test_wilson_against_its_definition():
    for k, n in [(0, 10), (1, 10), (5, 10), (99, 100), (3, 3)]:
        for p in wilson(k, n):  # the ends are where the accuracy lies exactly z standard errors away
            if 0 < p < 1:
                assert abs((k / n - p) ** 2 - 1.96**2 * p * (1 - p) / n) < 1e-12


def test_counts_and_originals_files(tmp_path):
    decided = [(0.25, "a", True), (0.25, "b", False), (0.75, "a", True), (0, "a", True)]
    trials = [trial(depth=d, needle=n, correct=c) for d, n, c in decided]
    assert cells(trials) == {(8, 0): (1, 1), (8, 0.25): (1, 2), (8, 0.75): (1, 1)}
    assert by_frames(trials) == {8: (3, 4)}
    assert save_accuracies(trials, tmp_path) == pytest.approx(2.5 / 3)
    rows = json.loads((tmp_path / "all_accuracies.json").read_text())
    assert [r["Frame Depth"] for r in rows] == [0, 20, 80] and [r["Score"] for r in rows] == [1, 0.5, 1]
    assert (tmp_path / "avg_accuracy.txt").read_text().startswith("Average Accuracy: 0.83333")


def test_pictures_of_odd_tables(tmp_path):
    one = [trial()]
    uneven = [trial(), trial(frames=16, depth=1.0), trial(frames=2048, depth=0.0, needle="<b>&")]
    for trials in (one, uneven):
        assert Image.open(save_png(trials, tmp_path / "x.png", train_frames=9)).size[0] > 300
        assert "<script src" not in save_html(heat_map(trials, train_frames=9), tmp_path / "x.html").read_text()
    names = {"one": one, "nothing yet": [], "uneven": uneven}
    assert len(figure4(names, train_frames={"one": 8}).data) == 3
    Image.open(save_figure4(names, tmp_path / "f.png", palette="cividis"))
    assert not list(tmp_path.glob(".*"))


def test_heat_map_opens_without_a_network(tmp_path):
    import shutil

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium on this machine: the heat map page was not opened")
    why = "playwright is not installed: the heat map page was not opened"
    sync_api = pytest.importorskip("playwright.sync_api", reason=why)
    trials = [trial(frames=n, depth=d, correct=n < 16, margin=16.0 - n) for n in (8, 16, 32) for d in (0, 0.5, 1)]
    page_file = save_html(heat_map(trials, "a model", train_frames=16), tmp_path / "heatmap.html")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=900, height=480))
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        page.wait_for_selector(".heatmaplayer image, .hm image")
        box = page.locator(".plotly .bglayer .bg, .nsewdrag").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_selector(".hoverlayer text")
        text = page.locator(".hoverlayer").text_content()
        page.screenshot(path=tmp_path / "heatmap.png")
        browser.close()
    assert [u for u in asked if not u.startswith(("file:", "data:", "blob:"))] == []
    assert "16 frames, depth 50%" in text and "0 of 1 right" in text and "a: margin" in text
