"""Videos of many kinds, whole and broken. Every frame carries its number as a bar code, so that a wrong frame shows."""
import json
import os
import subprocess
import sys
import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from longva.vision import video
from longva.vision.video import VideoError, pick_frames, read_frames, video_info, write_video

SHARED = Path(__file__).resolve().parents[2] / "shared"
JOBS = SHARED / "data" / "media" / "jobs.mp4"
N, H, W = 120, 96, 160


def bars(n=N):
    "Frames [n,H,W,3] with their number as ten bars, white for 1, over a slope of greys."
    frames = np.zeros((n, H, W, 3), np.uint8) + np.linspace(0, 190, W).astype(np.uint8)[None, None, :, None]
    for i in range(n):
        for bit in range(10): frames[i, :32, bit * 16:bit * 16 + 16] = 255 * (i >> bit & 1)
    return frames


def numbers(frames):
    "The numbers back from the pixels."
    return [sum(1 << bit for bit in range(10) if frame[8:24, bit * 16 + 4:bit * 16 + 12].mean() > 128) for frame in frames]


def encode(path, frames, format, codec="libx264", times=None, rate=30, **options):
    "Any container, any codec; `times` are pts in 1/600 s."
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=rate, options={"g": "40", "bf": "2"} | options if codec == "libx264" else options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if times is not None: stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None: picture.pts, picture.time_base = times[i], stream.time_base
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path


def remux(source, target, second=0, rotation=0, format="mp4"):
    "Copy packets, from `second` on, perhaps with a note to turn."
    with av.open(str(source)) as old, av.open(str(target), "w", format=format) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        if rotation: copy.set_display_rotation(rotation)
        zero = round(second / stream.time_base)
        if second: old.seek(zero, stream=stream)
        for packet in old.demux(stream):
            if packet.dts is None: continue
            packet.pts, packet.dts, packet.stream = packet.pts - zero, packet.dts - zero, copy
            new.mux(packet)
    return target


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    "A folder of films that all show frames 0 to 119."
    folder = tmp_path_factory.mktemp("films")
    frames = bars()
    encode(folder / "a.mp4", frames, "mp4")
    encode(folder / "a.mkv", frames, "matroska")
    encode(folder / "a.ts", frames, "mpegts")
    encode(folder / "a.avi", frames, "avi", "mpeg4")
    encode(folder / "b.avi", frames, "avi")
    encode(folder / "a.h264", frames, "h264")
    encode(folder / "a.webm", frames, "webm", "libvpx-vp9", cpu_used="8", deadline="realtime")
    encode(folder / "c.mov", frames, "mov", "mpeg4")
    with av.open(str(folder / "front.mp4"), "w", format="mp4", options={"movflags": "faststart"}) as new, av.open(str(folder / "a.mp4")) as old:
        copy = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None: packet.stream = copy; new.mux(packet)
    return folder


ORDINARY = ["a.mp4", "front.mp4", "a.mkv", "a.ts", "a.avi", "b.avi", "a.h264", "a.webm", "c.mov"]


@pytest.mark.parametrize("name", ORDINARY)
def test_every_frame_is_the_one_asked_for(films, name):
    path = films / name
    assert video_info(path)[0] == N and video_info(path)[3:] == (W, H)
    assert video_info(path).fps == pytest.approx(30, rel=0.001) and video_info(path).seconds == pytest.approx(4, abs=0.01)
    assert numbers(read_frames(path).array) == list(range(N))
    assert numbers(read_frames(path, n=16).array) == np.linspace(0, N - 1, 16, dtype=int).tolist()
    assert numbers(read_frames(path, n=3).array) == [0, 59, 119]          # far jumps, back to keyframes
    assert numbers(read_frames(path, fps=2).array) == [0, 15, 30, 45, 60, 75, 90, 105]
    assert numbers(read_frames(path, fps=30).array) == list(range(N))
    assert numbers(read_frames(path, n=4, start=1, end=2).array) == [30, 39, 49, 59]
    assert numbers(read_frames(path, start=3.5).array) == list(range(105, 120))
    assert numbers(read_frames(path, n=1, start=3).array) == [90]


@pytest.mark.parametrize("name", ["a.mp4", "front.mp4", "a.mkv", "a.webm", "c.mov"])
def test_decord_gives_the_same_frames(films, name):
    pytest.importorskip("decord", reason="decord is not installed")
    one, other = read_frames(films / name, n=17), read_frames(films / name, n=17, backend="decord")
    assert np.array_equal(one.array, other.array) and np.array_equal(one.seconds, other.seconds) and one.fps == other.fps


@pytest.mark.parametrize("name", ["a.ts", "a.avi", "b.avi", "a.h264"])
def test_decord_is_refused_where_it_would_miscount(films, name):
    with pytest.raises(VideoError, match="decord.*pyav"): read_frames(films / name, n=4, backend="decord")


def test_film_cut_without_encoding(films, tmp_path):
    cut = remux(films / "a.mp4", tmp_path / "cut.mp4", 50 / 30)
    with av.open(str(cut)) as container: assert container.streams.video[0].frames == 80      # what it declares
    assert video_info(cut).frames == 70 and numbers(read_frames(cut).array) == list(range(50, 120))
    assert numbers(read_frames(cut, n=5).array) == [50, 67, 84, 101, 119] and read_frames(cut, n=2).seconds[0] == 0
    with pytest.raises(VideoError, match="decord"): read_frames(cut, n=5, backend="decord")


@pytest.mark.parametrize("angle, turns", [(90, 1), (-90, -1), (180, 2)])
def test_turned_pictures_are_turned_back(films, tmp_path, angle, turns):
    turned = remux(films / "a.mp4", tmp_path / "turned.mp4", rotation=angle)
    want = np.rot90(read_frames(films / "a.mp4", n=3).array, turns, (1, 2))
    assert np.array_equal(read_frames(turned, n=3).array, want)
    assert video_info(turned)[3:] == (want.shape[2], want.shape[1])
    assert np.array_equal(read_frames(turned, n=3, backend="decord").array, want)


@pytest.mark.parametrize("format", ["mp4", "matroska"])
def test_changing_frame_rate(tmp_path, format):
    times = [0, 20, 40, 60, 600, 620, 1200, 3000, 3020, 3600]          # in 1/600 s: 0, 0.03, 0.07, 0.1, 1, 1.03, 2, 5, 5.03, 6 s
    path = encode(tmp_path / "vfr", bars(len(times)), format, times=times, rate=30)
    everything = read_frames(path)
    assert numbers(everything.array) == list(range(10)) and everything.seconds == pytest.approx(np.array(times) / 600, abs=1e-3)
    assert numbers(read_frames(path, fps=1).array)[:7] == [0, 4, 6, 6, 6, 7, 9]
    assert numbers(read_frames(path, start=1, end=5).array) == [4, 5, 6]


def test_one_frame(tmp_path):
    path = write_video(bars(1), tmp_path / "one.mp4")
    assert video_info(path).frames == 1 and len(read_frames(path)) == len(read_frames(path, n=1)) == len(read_frames(path, fps=1)) == 1
    with pytest.raises(VideoError, match="1 frame,"): read_frames(path, n=2)
    assert numbers(read_frames(path, n=3, repeat=True).array) == [0, 0, 0]


def test_rates_and_parts_meet_without_gap(films):
    for name in ("a.mp4", "a.mkv"):
        parts = [read_frames(films / name, start=a, end=a + 0.5) for a in np.arange(0, 4, 0.5)]
        assert [len(p) for p in parts] == [15] * 8 and sum((numbers(p.array) for p in parts), []) == list(range(N))


def test_count_rule_equals_the_original():
    stored = SHARED / "parity" / "video_cases.json"
    if not stored.exists(): pytest.skip("the recorded values of the original are not beside this repository (../shared/parity)")
    cases = json.loads(stored.read_text())["uniform_sampling"]
    assert len(cases) >= 5
    for case in cases: assert pick_frames(np.arange(case["total_frames"]) / 25, n=case["n"]).tolist() == case["indices"]


def broken(films, folder):
    "Name -> a word that the sentence must hold."
    whole, matroska, front = ((films / name).read_bytes() for name in ("a.mp4", "a.mkv", "front.mp4"))
    (folder / "empty.mp4").touch()
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "notes.txt").write_text("a line of text\n" * 60)
    (folder / "notes.mp4").write_text("a line of text\n" * 60)
    (folder / "data.json").write_text('{"frames": [1, 2, 3]}')
    (folder / "index.mp4").write_bytes(whole[:-len(whole) // 3])              # the table of contents is gone or points behind the end
    (folder / "front.mp4").write_bytes(front[:-len(front) // 3])
    (folder / "half.mkv").write_bytes(matroska[:len(matroska) // 2])
    (folder / "zero.mp4").write_bytes(front[:len(front) // 2] + bytes(len(front) // 2))
    with wave.open(str(folder / "song.wav"), "wb") as song: song.setparams((1, 2, 8000, 0, "NONE", "")); song.writeframes(bytes(16000))
    with av.open(str(folder / "song.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono"); sound.rate = 16000
        out.mux(stream.encode(sound)); out.mux(stream.encode())
    (folder / "folder.mp4").mkdir()
    return {"empty.mp4": "empty", "noise.mp4": "cannot be read", "notes.txt": "text", "notes.mp4": "", "data.json": "", "index.mp4": "", "front.mp4": "truncated",
            "half.mkv": "truncated", "zero.mp4": "", "song.wav": "audio", "song.mp4": "audio", "folder.mp4": "folder", "nowhere.mp4": "no file", "nul\0.mp4": "no file"}


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_unreadable_files_are_one_sentence(films, tmp_path, backend):
    for name, word in broken(films, tmp_path).items():
        for call in (lambda: read_frames(tmp_path / name, n=4, backend=backend), lambda: read_frames(str(tmp_path / name), backend=backend)):
            with pytest.raises(VideoError) as error: call()
            text = str(error.value)
            assert name in text and word in text and text.endswith(".") and "\n" not in text, (name, text)
            assert len(text) < 250 + 2 * len(str(tmp_path)), text


def test_truncated_at_any_place(films, tmp_path):
    "Whatever the cut, it is a VideoError, or (a stream without any length, or a cut in padding) whole frames."
    for name in ("a.mp4", "front.mp4", "a.mkv", "a.ts", "a.avi", "a.webm"):
        data = (films / name).read_bytes()
        for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
            path = tmp_path / f"{share}-{name}"
            path.write_bytes(data[:int(len(data) * share)])
            try: got = numbers(read_frames(path, n=2).array)
            except VideoError: continue
            assert name in ("a.ts", "a.avi", "a.mkv", "a.webm") and (share >= 0.9 or name in ("a.ts", "a.avi")), (name, share, got)


def test_bit_errors_never_raise_anything_else(films, tmp_path):
    rng, data = np.random.default_rng(0), (films / "front.mp4").read_bytes()
    for k in range(12):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 6): damaged[at] ^= int(rng.integers(1, 256))
        path = tmp_path / f"{k}.mp4"
        path.write_bytes(damaged)
        try: assert read_frames(path, n=4).array.shape[0] == 4
        except VideoError as error: assert str(error).endswith(".")


@pytest.mark.parametrize("request_, word", [
    (dict(n=0), "n=0"), (dict(n=-3), "n=-3"), (dict(n=2.5), "n=2.5"), (dict(fps=0), "fps=0"), (dict(fps=-1), "fps=-1"), (dict(n=2, fps=1), "both"), (dict(start=-1), "start"),
    (dict(start=2, end=2), "end"), (dict(start=100), "lasts 4 s"), (dict(n=121), "120"), (dict(n=31, start=1, end=2), "30 frames"), (dict(backend="cv2"), "cv2"), (dict(fps=float("inf")), "fps"),
    (dict(n=float("nan")), "n=nan"), (dict(n=float("inf")), "n=inf"), (dict(n="2"), "n='2'"), (dict(n=True), "n=True"), (dict(n=2.0), "whole"), (dict(n=10**30), "120"),
    (dict(fps="2"), "fps='2'"), (dict(fps=float("nan")), "fps=nan"), (dict(fps=10**400), "fps=1000"), (dict(start="0"), "start='0'"), (dict(start=None), "start=None"),
    (dict(start=float("nan")), "start=nan"), (dict(end="2"), "end='2'"), (dict(end=float("nan")), "end=nan"), (dict(fps=1e9), "30 frames per second"), (dict(fps=30.1), "30 frames per second"),
    (dict(fps=1, start=3.9999), "lasts 4 s"), (dict(fps=60, start=1, end=2), "repeat=True"), (dict(fps=1e9, repeat=True), "at most"), (dict(n=10**12, repeat=True), "at most")])
def test_bad_requests_are_one_sentence(films, request_, word):
    with pytest.raises(VideoError, match=word) as error: read_frames(films / "a.mp4", **request_)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("path", [None, 5, b"film.mp4", ["film.mp4"]])
def test_a_path_that_is_none(path):
    for call in (read_frames, video_info, lambda path: write_video(bars(1), path)):
        with pytest.raises(VideoError, match="path"): call(path)


def test_frames_that_do_not_fit_are_a_sentence(films, monkeypatch):
    empty = np.empty
    def full(shape, *args, **kwargs):
        if np.size(shape) == 4: raise MemoryError
        return empty(shape, *args, **kwargs)
    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(VideoError, match="memory.*fewer"): read_frames(films / "a.mp4", n=4)


def test_rates_above_the_films_own(films, tmp_path):
    "Refused like a count above what is there, unless repeating is wanted; its own rate, as files round it, is not above it."
    assert numbers(read_frames(films / "a.mp4", fps=60, repeat=True).array) == [i // 2 for i in range(2 * N)]
    for rate in (29.97, 23.976, 12.5, 1):
        for format in ("mp4", "matroska"):
            path = encode(tmp_path / "rate", bars(40), format, rate=Fraction(rate).limit_denominator(1001))
            assert numbers(read_frames(path, fps=video_info(path).fps).array) == numbers(read_frames(path, fps=rate).array) == list(range(40))
    path = encode(tmp_path / "ntsc.mp4", bars(40), "mp4", rate=Fraction(30000, 1001))
    with pytest.raises(VideoError, match="29.97 frames per second.*fps=30 "): read_frames(path, fps=30)


def test_jumps_that_land_late_are_mended(films, monkeypatch):
    "A container whose index is wrong: the keyframes we are told of are none."
    true = video._index(films / "a.mp4")
    lying = true._replace(keys=true.places)                     # "decoding can begin anywhere"
    got = list(video._pick_pyav(films / "a.mp4", lying, [5, 47, 99, 119]))
    assert numbers(got) == [5, 47, 99, 119]


def test_memory_is_that_of_the_frames_asked_for(tmp_path):
    path = write_video((np.full((240, 320, 3), i % 256, np.uint8) for i in range(400)), tmp_path / "long.mp4", fps=30, crf=40)
    tracemalloc.start()
    try:
        frames = read_frames(path, n=10)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 1.5 * frames.array.nbytes + 500_000


# ---- writing ----

def test_what_is_written_is_what_is_read(tmp_path):
    frames = bars(60)
    for fps in (1, 0.5, 29.97, 30, 12.5):
        path = write_video(frames, tmp_path / f"{fps}.mp4", fps=fps)
        back = read_frames(path)
        assert numbers(back.array) == list(range(60)) and back.fps == pytest.approx(fps, rel=1e-4)
        assert back.seconds == pytest.approx(np.arange(60) / fps, rel=1e-3)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.codec_context.profile) == ("h264", "yuv420p", "High")


def test_colours_survive_enlarged(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (40, 28, 28, 3), dtype=np.uint8)                # the hardest picture there is
    for scale, mean, most in [(2, 2, 14), (4, 2, 10)]:
        back = read_frames(write_video(frames, tmp_path / "c.mp4", scale=scale)).array.reshape(40, 28, scale, 28, scale, 3).mean((2, 4))
        error = np.abs(back - frames)
        assert error.mean() < mean and error.max() <= most, (scale, error.mean(), error.max())


def test_same_frames_same_file(tmp_path):
    a, b = (write_video(bars(30), tmp_path / name, fps=2, scale=2) for name in ("a.mp4", "b.mp4"))
    assert a.read_bytes() == b.read_bytes()


def test_writing_is_whole_or_not_at_all(tmp_path):
    def failing():
        yield from bars(10)
        raise KeyboardInterrupt
    old = write_video(bars(3), tmp_path / "x.mp4")
    before = old.read_bytes()
    with pytest.raises(KeyboardInterrupt): write_video(failing(), tmp_path / "x.mp4")
    assert old.read_bytes() == before and os.listdir(tmp_path) == ["x.mp4"]


@pytest.mark.parametrize("frames, options, word", [
    (bars(2)[:, :95], {}, "even"), (bars(2)[:, :, :159], {}, "even"), ([], {}, "no frames"), (bars(2).astype(float), {}, "uint8"), (bars(2)[..., 0], {}, "shape"),
    ([bars(1)[0], bars(1)[0, :64]], {}, "one size"), (bars(2), {"fps": 0}, "fps"), (bars(2), {"fps": float("inf")}, "fps"), (bars(2), {"fps": "2"}, "fps"), (bars(2), {"fps": 1e-9}, "fps"), (bars(2), {"fps": 1e9}, "fps"),
    (bars(2), {"scale": None}, "scale"), (bars(2), {"scale": float("nan")}, "scale"), (bars(2), {"crf": None}, "crf"), (5, {}, "frames"), (None, {}, "frames"), (bars(2), {"scale": 0}, "scale"), (bars(2), {"scale": 1.5}, "scale"), (bars(2), {"crf": 0}, "crf")])
def test_what_cannot_be_written(tmp_path, frames, options, word):
    with pytest.raises(VideoError, match=word) as error: write_video(frames, tmp_path / "x.mp4", **options)
    assert str(error.value).endswith(".") and not os.listdir(tmp_path)


def test_no_place_to_write(tmp_path):
    (tmp_path / "taken.mp4").mkdir()
    for path in (tmp_path / "nowhere" / "x.mp4", tmp_path / "taken.mp4"):
        with pytest.raises(VideoError, match="cannot be written"): write_video(bars(2), path)
    assert os.listdir(tmp_path) == ["taken.mp4"]
    assert write_video(bars(2)[:, :95], tmp_path / "odd.mp4", scale=2).exists()


# ---- the rest ----

def test_real_clip_with_both_back_ends():
    if not JOBS.exists(): pytest.skip("the real clip is not beside this repository (../shared/data/media/jobs.mp4)")
    info = video_info(JOBS)
    assert (info.frames, info.fps, info.width, info.height) == (524, 30, 576, 1024) and info.seconds == pytest.approx(524 / 30)
    one, other = read_frames(JOBS, n=8), read_frames(JOBS, n=8, backend="decord")
    assert one.array.shape == (8, 1024, 576, 3) and np.array_equal(one.array, other.array)
    assert len(read_frames(JOBS, fps=1)) == 18 and len(read_frames(JOBS, fps=1, start=2, end=5)) == 3


def test_decord_is_loaded_only_when_asked_for():
    code = "import sys, longva.vision.video; assert 'decord' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])


def test_decord_missing_is_a_sentence(films, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(VideoError, match="decord is not installed"): read_frames(films / "a.mp4", n=2, backend="decord")
