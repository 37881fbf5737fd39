"""Videos of many kinds, whole and broken. Every frame carries its number as a bar code, so that a wrong frame shows."""

import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from original import PARITY, WHOLE

from longva.vision import image, video
from longva.vision import index as video_index
from longva.vision.video import FrameRequest, VideoError, pick_frames, read_frames, video_info, write_video

JOBS = WHOLE.parent / "data" / "media" / "jobs.mp4"
N, H, W = 120, 96, 160


def bars(n=N):
    "Frames [n,H,W,3] with their number as ten bars, white for 1, over a slope of greys."
    frames = np.zeros((n, H, W, 3), np.uint8) + np.linspace(0, 190, W).astype(np.uint8)[None, None, :, None]
    for i in range(n):
        for bit in range(10):
            frames[i, :32, bit * 16 : bit * 16 + 16] = 255 * (i >> bit & 1)
    return frames


def numbers(frames):
    "The numbers back from the pixels."
    return [
        sum(1 << bit for bit in range(10) if frame[8:24, bit * 16 + 4 : bit * 16 + 12].mean() > 128) for frame in frames
    ]


def encode(path, frames, format, codec="libx264", times=None, rate=30, **options):
    "Any container, any codec; `times` are pts in 1/600 s."
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(
            codec, rate=rate, options={"g": "40", "bf": "2"} | options if codec == "libx264" else options
        )
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = times[i], stream.time_base
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path


def remux(source, target, second=0, rotation=0, format="mp4"):
    "Copy packets, from `second` on, perhaps with a note to turn."
    with av.open(str(source)) as old, av.open(str(target), "w", format=format) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        if rotation:
            copy.set_display_rotation(rotation)
        zero = round(second / stream.time_base)
        if second:
            old.seek(zero, stream=stream)
        for packet in old.demux(stream):
            if packet.dts is None:
                continue
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
    with (
        av.open(str(folder / "front.mp4"), "w", format="mp4", options={"movflags": "faststart"}) as new,
        av.open(str(folder / "a.mp4")) as old,
    ):
        copy = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                new.mux(packet)
    return folder


ORDINARY = ["a.mp4", "front.mp4", "a.mkv", "a.ts", "a.avi", "b.avi", "a.h264", "a.webm", "c.mov"]


@pytest.mark.parametrize("name", ORDINARY)
def test_every_frame_is_the_one_asked_for(films, name):
    path = films / name
    assert video_info(path)[0] == N and video_info(path)[3:] == (W, H)
    assert video_info(path).fps == pytest.approx(30, rel=0.001) and video_info(path).seconds == pytest.approx(
        4, abs=0.01
    )
    assert numbers(read_frames(path).array) == list(range(N))
    assert numbers(read_frames(path, n=16).array) == np.linspace(0, N - 1, 16, dtype=int).tolist()
    assert numbers(read_frames(path, n=3).array) == [0, 59, 119]  # far jumps, back to keyframes
    assert numbers(read_frames(path, fps=2).array) == [0, 15, 30, 45, 60, 75, 90, 105]
    assert numbers(read_frames(path, fps=30).array) == list(range(N))
    assert numbers(read_frames(path, n=4, start=1, end=2).array) == [30, 39, 49, 59]
    assert numbers(read_frames(path, start=3.5).array) == list(range(105, 120))
    assert numbers(read_frames(path, n=1, start=3).array) == [90]


@pytest.mark.parametrize("name", ["a.mp4", "front.mp4", "a.mkv", "a.webm", "c.mov"])
def test_decord_gives_the_same_frames(films, name):
    pytest.importorskip("decord", reason="decord is not installed")
    one, other = read_frames(films / name, n=17), read_frames(films / name, n=17, backend="decord")
    assert (
        np.array_equal(one.array, other.array) and np.array_equal(one.seconds, other.seconds) and one.fps == other.fps
    )


@pytest.mark.parametrize("name", ["a.ts", "a.avi", "b.avi", "a.h264"])
def test_decord_is_refused_where_it_would_miscount(films, name):
    with pytest.raises(VideoError, match="decord.*pyav"):
        read_frames(films / name, n=4, backend="decord")


def test_the_contents_of_an_mp4_are_what_its_packets_say(films, tmp_path):
    from longva.vision.index import _table, open_video, read_packets

    encode(tmp_path / "open.mp4", bars(), "mp4", g="30", bf="3", **{"x264-params": "open-gop=1"})
    encode(tmp_path / "uneven.mp4", bars(10), "mp4", times=[0, 20, 40, 60, 600, 620, 1200, 3000, 3020, 3600])
    with (
        av.open(str(films / "a.mp4")) as old,
        av.open(
            str(tmp_path / "parts.mp4"), "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}
        ) as new,
    ):
        copy = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                new.mux(packet)
    cut = [remux(films / "a.mp4", tmp_path / f"cut{i}.mp4", at / 30) for i, at in enumerate((0, 50, 80))]
    listed = {}
    for path in [
        films / "a.mp4",
        films / "front.mp4",
        films / "c.mov",
        films / "a.mkv",
        *sorted(tmp_path.glob("*.mp4")),
    ]:
        found = _table(path)
        with open_video(path) as (container, stream):
            packets = read_packets(container, stream, path.stat().st_size)
        listed[path.name] = found is not None
        if found:
            assert all(np.array_equal(x, y) for x, y in zip(found, packets)), path
    assert {name for name, was in listed.items() if was} >= {"a.mp4", "front.mp4", "uneven.mp4"}, listed
    assert (
        not listed["parts.mp4"]
        and not listed["a.mkv"]
        and not listed["c.mov"]
        and not listed["cut1.mp4"]
        and len(cut) == 3
    )


def test_a_damaged_table_is_no_traceback_and_no_other_film(films, tmp_path):
    "Bytes of the table are changed: what it says then is what the packets say, or there is no answer, or a sentence."
    from longva.vision.index import _table, open_video, read_packets

    whole, rng, seen = (films / "a.mp4").read_bytes(), np.random.default_rng(0), []
    path, table = tmp_path / "damaged.mp4", whole.index(b"moov") - 4
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(table, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            found = _table(path)
        except VideoError:
            continue
        seen.append(found is not None)
        if found is None:
            continue
        with open_video(path) as (container, stream):
            packets = read_packets(container, stream, len(data))
        assert (
            np.array_equal(found.pts, packets.pts)
            and np.array_equal(found.dts, packets.dts)
            and found.closed
            and not packets.torn
        )
        assert not (found.keys & ~packets.keys).any()  # a keyframe that is not listed costs time alone
    assert any(seen) and not all(seen)
    for size in (8, 9, 14, 17):  # a box that ends in the middle of a number, or before its table
        file = io.BytesIO(size.to_bytes(4, "big") + b"stts" + bytes(size - 8))
        assert len(video_index.mp4_runs(file, 8, size)) == 0


def test_a_lying_table_is_not_believed(films, tmp_path):
    "The first delays are changed behind FFmpeg's back: what the packets say is right."
    delays = video_index._mp4_delays
    with av.open(str(films / "a.mp4")) as container:
        video_index._mp4_delays = lambda *given: (lambda steps, wait: (steps, wait + (np.arange(len(wait)) == 10)))(
            *delays(*given)
        )
        try:
            assert video_index.mp4_packets(films / "a.mp4", container, container.streams.video[0]) is None
        finally:
            video_index._mp4_delays = delays


def test_film_cut_without_encoding(films, tmp_path):
    cut = remux(films / "a.mp4", tmp_path / "cut.mp4", 50 / 30)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 80  # what it declares
    assert video_info(cut).frames == 70 and numbers(read_frames(cut).array) == list(range(50, 120))
    assert numbers(read_frames(cut, n=5).array) == [50, 67, 84, 101, 119] and read_frames(cut, n=2).seconds[0] == 0
    with pytest.raises(VideoError, match="decord"):
        read_frames(cut, n=5, backend="decord")


@pytest.mark.parametrize(
    "options",
    [
        {"g": "40", "bf": "2"},
        {"g": "30", "bf": "3", "x264-params": "open-gop=1"},
        {"g": "250", "bf": "8", "x264-params": "b-pyramid=normal"},
    ],
)
def test_cuts_anywhere(tmp_path, options):
    "At keyframes and between, in films whose groups refer to each other and in others."
    film = encode(tmp_path / "film.mp4", bars(), "mp4", **options)
    for begin in (1, 17, 39, 40, 41, 61, 80, 100, 115):
        cut, want = remux(film, tmp_path / "cut.mp4", begin / 30), list(range(begin, N))
        assert numbers(read_frames(cut).array) == want, begin
        for threads in (1, 3):
            assert numbers(read_frames(cut, n=5, threads=threads).array) == [
                want[i] for i in np.linspace(0, len(want) - 1, 5, dtype=int)
            ], begin


def test_the_first_jump_is_right(tmp_path, monkeypatch):
    "Right frames at the first attempt: trying again from earlier keyframes works, too, and is slow."
    attempts, true = [], video.decode_frames
    monkeypatch.setattr(
        video,
        "decode_frames",
        lambda path, index, wanted, attempt=0: attempts.append(attempt) or true(path, index, wanted, attempt),
    )
    for name in ("open.mkv", "open.ts", "refresh.ts", "hevc.ts", "pyramid.mp4", "fragments.mp4", "no length.mkv"):
        try:
            path = odd_film(tmp_path / name, *ODD[name], bars())
        except pytest.skip.Exception:
            continue
        assert numbers(read_frames(path, n=9, threads=1).array) == np.linspace(0, N - 1, 9, dtype=int).tolist()
    assert len(attempts) >= 4 and set(attempts) == {0}, attempts


@pytest.mark.parametrize("angle, turns", [(90, 1), (-90, -1), (180, 2)])
def test_turned_pictures_are_turned_back(films, tmp_path, angle, turns):
    turned = remux(films / "a.mp4", tmp_path / "turned.mp4", rotation=angle)
    want = np.rot90(read_frames(films / "a.mp4", n=3).array, turns, (1, 2))
    assert np.array_equal(read_frames(turned, n=3).array, want)
    assert video_info(turned)[3:] == (want.shape[2], want.shape[1])
    assert np.array_equal(read_frames(turned, n=3, backend="decord").array, want)


@pytest.mark.parametrize("format", ["mp4", "matroska"])
def test_changing_frame_rate(tmp_path, format):
    times = [
        0,
        20,
        40,
        60,
        600,
        620,
        1200,
        3000,
        3020,
        3600,
    ]  # in 1/600 s: 0, 0.03, 0.07, 0.1, 1, 1.03, 2, 5, 5.03, 6 s
    path = encode(tmp_path / "vfr", bars(len(times)), format, times=times, rate=30)
    everything = read_frames(path)
    assert numbers(everything.array) == list(range(10)) and everything.seconds == pytest.approx(
        np.array(times) / 600, abs=1e-3
    )
    assert numbers(read_frames(path, fps=1).array)[:7] == [0, 4, 6, 6, 6, 7, 9]
    assert numbers(read_frames(path, start=1, end=5).array) == [4, 5, 6]


def test_one_frame(tmp_path):
    path = write_video(bars(1), tmp_path / "one.mp4")
    assert (
        video_info(path).frames == 1
        and len(read_frames(path)) == len(read_frames(path, n=1)) == len(read_frames(path, fps=1)) == 1
    )
    with pytest.raises(VideoError, match="1 frame,"):
        read_frames(path, n=2)
    assert numbers(read_frames(path, n=3, repeat=True).array) == [0, 0, 0]


def test_rates_and_parts_meet_without_gap(films):
    for name in ("a.mp4", "a.mkv"):
        parts = [read_frames(films / name, start=a, end=a + 0.5) for a in np.arange(0, 4, 0.5)]
        assert [len(p) for p in parts] == [15] * 8 and sum((numbers(p.array) for p in parts), []) == list(range(N))


def test_count_rule_equals_the_original():
    cases = json.loads((PARITY / "video_cases.json").read_text())["uniform_sampling"]
    assert len(cases) >= 5
    for case in cases:
        assert pick_frames(np.arange(case["total_frames"]) / 25, n=case["n"]).tolist() == case["indices"]


@pytest.mark.parametrize("rate", [1.9999, 2, 23.976, 30])
def test_a_request_counts_what_is_read(tmp_path, rate):
    "By hand: a tick at 0 and at each step before the end, less a millisecond; 20 frames at 1.9999 fps last 10.0005 s."
    path = write_video(bars(20), tmp_path / "a.mp4", fps=rate)
    info = video_info(path)
    for fps in (0.3 * info.fps, 0.5 * info.fps, info.fps, 1.0 if rate < 3 else 7.0):
        ticks = next(n for n in itertools.count(1) if n / fps >= info.seconds - 1e-3)
        request = FrameRequest(fps=fps)
        assert request.count(info) == ticks == math.ceil((info.seconds - 1e-3) * fps)
        got = read_frames(path, **request.kwargs(info))
        assert len(got) == ticks and got.seconds == pytest.approx(request.times(info), abs=2e-3)
    assert rate != 1.9999 or FrameRequest(fps=1).count(info) == 10


@pytest.mark.parametrize(
    "request_, count",
    [
        (FrameRequest(), N),
        (FrameRequest(n=7), 7),
        (FrameRequest(n=200, repeat=True), 200),
        (FrameRequest(most=7), 7),
        (FrameRequest(most=500), N),
        (FrameRequest(fps=3), 12),
        (FrameRequest(fps=3, most=12), 12),
        (FrameRequest(fps=3, most=11), 11),
        (FrameRequest(fps=60, most=500), N),
        (FrameRequest(fps=60, repeat=True), 2 * N),
        (FrameRequest(fps=60, most=200, repeat=True), 200),
    ],
)
def test_requests_with_a_limit(films, request_, count):
    info = video_info(films / "a.mp4")
    got = read_frames(films / "a.mp4", **request_.kwargs(info))
    assert len(got) == request_.count(info) == count and got.seconds == pytest.approx(request_.times(info), abs=1e-3)
    part = read_frames(films / "a.mp4", **request_.kwargs(info, 1, 3))
    assert len(part) == request_.count(info, 1, 3) and part.seconds[0] >= 1 - 1e-3 and part.seconds[-1] < 3


@pytest.mark.parametrize(
    "request_, word",
    [
        (dict(n=0), "n=0"),
        (dict(n=2, fps=1), "both n and fps"),
        (dict(n=2, most=1), "both n and most"),
        (dict(most=0), "most=0"),
        (dict(most=1.5), "most=1.5"),
        (dict(fps=0), "fps=0"),
        (dict(fps="1"), "fps='1'"),
    ],
)
def test_requests_without_sense(request_, word):
    with pytest.raises(VideoError, match=word):
        FrameRequest(**request_)


def broken(films, folder):
    "Name -> a word that the sentence must hold."
    whole, matroska, front = ((films / name).read_bytes() for name in ("a.mp4", "a.mkv", "front.mp4"))
    (folder / "empty.mp4").touch()
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "notes.txt").write_text("a line of text\n" * 60)
    (folder / "notes.mp4").write_text("a line of text\n" * 60)
    (folder / "data.json").write_text('{"frames": [1, 2, 3]}')
    (folder / "index.mp4").write_bytes(
        whole[: -len(whole) // 3]
    )  # the table of contents is gone or points behind the end
    (folder / "front.mp4").write_bytes(front[: -len(front) // 3])
    (folder / "half.mkv").write_bytes(matroska[: len(matroska) // 2])
    (folder / "zero.mp4").write_bytes(front[: len(front) // 2] + bytes(len(front) // 2))
    with wave.open(str(folder / "song.wav"), "wb") as song:
        song.setparams((1, 2, 8000, 0, "NONE", ""))
        song.writeframes(bytes(16000))
    with av.open(str(folder / "song.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.rate = 16000
        out.mux(stream.encode(sound))
        out.mux(stream.encode())
    (folder / "folder.mp4").mkdir()
    return {
        "empty.mp4": "empty",
        "noise.mp4": "cannot be read",
        "notes.txt": "text",
        "notes.mp4": "",
        "data.json": "",
        "index.mp4": "",
        "front.mp4": "truncated",
        "half.mkv": "truncated",
        "zero.mp4": "",
        "song.wav": "audio",
        "song.mp4": "audio",
        "folder.mp4": "folder",
        "nowhere.mp4": "no file",
        "nul\0.mp4": "no file",
    }


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_unreadable_files_are_one_sentence(films, tmp_path, backend):
    for name, word in broken(films, tmp_path).items():
        for call in (
            lambda: read_frames(tmp_path / name, n=4, backend=backend),
            lambda: read_frames(str(tmp_path / name), backend=backend),
        ):
            with pytest.raises(VideoError) as error:
                call()
            text = str(error.value)
            assert name in text and word in text and text.endswith(".") and "\n" not in text, (name, text)
            assert len(text) < 250 + 2 * len(str(tmp_path)), text


def test_truncated_at_any_place(films, tmp_path):
    "Whatever the cut, it is a VideoError, or (a stream without any length, or a cut in padding) whole frames."
    for name in ("a.mp4", "front.mp4", "a.mkv", "a.ts", "a.avi", "a.webm"):
        data = (films / name).read_bytes()
        for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
            path = tmp_path / f"{share}-{name}"
            path.write_bytes(data[: int(len(data) * share)])
            try:
                got = numbers(read_frames(path, n=2).array)
            except VideoError:
                continue
            assert name in ("a.ts", "a.avi", "a.mkv", "a.webm") and (share >= 0.9 or name in ("a.ts", "a.avi")), (
                name,
                share,
                got,
            )


def test_bit_errors_never_raise_anything_else(films, tmp_path):
    rng, data = np.random.default_rng(0), (films / "front.mp4").read_bytes()
    for k in range(12):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 6):
            damaged[at] ^= int(rng.integers(1, 256))
        path = tmp_path / f"{k}.mp4"
        path.write_bytes(damaged)
        try:
            assert read_frames(path, n=4).array.shape[0] == 4
        except VideoError as error:
            assert str(error).endswith(".")


@pytest.mark.parametrize(
    "request_, word",
    [
        (dict(n=0), "n=0"),
        (dict(n=-3), "n=-3"),
        (dict(n=2.5), "n=2.5"),
        (dict(fps=0), "fps=0"),
        (dict(fps=-1), "fps=-1"),
        (dict(n=2, fps=1), "both"),
        (dict(start=-1), "start"),
        (dict(start=2, end=2), "end"),
        (dict(start=100), "lasts 4 s"),
        (dict(n=121), "120"),
        (dict(n=31, start=1, end=2), "30 frames"),
        (dict(backend="cv2"), "cv2"),
        (dict(fps=float("inf")), "fps"),
        (dict(n=float("nan")), "n=nan"),
        (dict(n=float("inf")), "n=inf"),
        (dict(n="2"), "n='2'"),
        (dict(n=True), "n=True"),
        (dict(n=2.0), "whole"),
        (dict(n=10**30), "120"),
        (dict(fps="2"), "fps='2'"),
        (dict(fps=float("nan")), "fps=nan"),
        (dict(fps=10**400), "fps=1000"),
        (dict(start="0"), "start='0'"),
        (dict(start=None), "start=None"),
        (dict(start=float("nan")), "start=nan"),
        (dict(end="2"), "end='2'"),
        (dict(end=float("nan")), "end=nan"),
        (dict(fps=1e9), "30 frames per second"),
        (dict(fps=30.1), "30 frames per second"),
        (dict(fps=1, start=3.9999), "lasts 4 s"),
        (dict(fps=60, start=1, end=2), "repeat=True"),
        (dict(fps=1e9, repeat=True), "at most"),
        (dict(n=10**12, repeat=True), "at most"),
    ],
)
def test_bad_requests_are_one_sentence(films, request_, word):
    with pytest.raises(VideoError, match=word) as error:
        read_frames(films / "a.mp4", **request_)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("path", [None, 5, b"film.mp4", ["film.mp4"]])
def test_a_path_that_is_none(path):
    for call in (read_frames, video_info, lambda path: write_video(bars(1), path)):
        with pytest.raises(VideoError, match="path"):
            call(path)


def test_frames_that_do_not_fit_are_a_sentence(films, monkeypatch):
    empty = np.empty

    def full(shape, *args, **kwargs):
        if np.size(shape) == 4:
            raise MemoryError
        return empty(shape, *args, **kwargs)

    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(VideoError, match="memory.*fewer"):
        read_frames(films / "a.mp4", n=4)


def test_rates_above_the_films_own(films, tmp_path):
    "Refused like a count above what is there, unless repeating is wanted; its own rate, as files round it, is allowed."
    assert numbers(read_frames(films / "a.mp4", fps=60, repeat=True).array) == [i // 2 for i in range(2 * N)]
    for rate in (29.97, 23.976, 12.5, 1):
        for format in ("mp4", "matroska"):
            path = encode(tmp_path / "rate", bars(40), format, rate=Fraction(rate).limit_denominator(1001))
            assert (
                numbers(read_frames(path, fps=video_info(path).fps).array)
                == numbers(read_frames(path, fps=rate).array)
                == list(range(40))
            )
    path = encode(tmp_path / "ntsc.mp4", bars(40), "mp4", rate=Fraction(30000, 1001))
    with pytest.raises(VideoError, match="29.97 frames per second.*fps=30 "):
        read_frames(path, fps=30)


def test_jumps_that_land_late_are_mended(films, monkeypatch):
    "A container whose index is wrong: the keyframes we are told of are none."
    true = video_index.file_index(films / "a.mp4")
    lying = true._replace(keys=np.stack([true.places, true.places], 1))  # "decoding can begin anywhere"
    got = list(video.decode_frames(films / "a.mp4", lying, [5, 47, 99, 119]))
    assert numbers(got) == [5, 47, 99, 119]


def test_memory_is_that_of_the_frames_asked_for(tmp_path):
    path = write_video(
        (np.full((240, 320, 3), i % 256, np.uint8) for i in range(400)), tmp_path / "long.mp4", fps=30, crf=40
    )
    tracemalloc.start()
    try:
        frames = read_frames(path, n=10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * frames.array.nbytes + 500_000


# ---- odd files ----

X264 = {"g": "40", "bf": "2"}
OPEN, REFRESH = (
    {"g": "30", "bf": "3", "x264-params": "open-gop=1"},
    {"g": "30", "x264-params": "intra-refresh=1:bframes=0"},
)
X265 = {"preset": "ultrafast", "x265-params": "keyint=40:bframes=3:log-level=none"}
FAST_VP = {"cpu-used": "8", "deadline": "realtime"}
ODD = {  # name: (container, encoder, its options, the muxer's options, pixels)
    "av1.mp4": ("mp4", "libsvtav1", {"preset": "12", "svtav1-params": "keyint=40"}, {}, "yuv420p"),
    "av1.webm": ("webm", "libsvtav1", {"preset": "12"}, {}, "yuv420p"),
    "hevc.mp4": ("mp4", "libx265", X265, {}, "yuv420p"),
    "hevc.ts": ("mpegts", "libx265", X265, {}, "yuv420p"),
    "no length.webm": (
        "webm",
        "libvpx",
        FAST_VP,
        {"live": "1"},
        "yuv420p",
    ),  # as a browser records: no length, no index
    "no length.mkv": ("matroska", "libx264", X264, {"live": "1"}, "yuv420p"),
    "fragments.mp4": ("mp4", "libx264", X264, {"movflags": "frag_keyframe+empty_moov"}, "yuv420p"),
    "webcam.avi": ("avi", "mjpeg", {}, {}, "yuvj420p"),
    "webcam.mkv": ("matroska", "mjpeg", {}, {}, "yuvj420p"),
    "b-frames.avi": ("avi", "mpeg4", {"bf": "2"}, {}, "yuv420p"),
    "open.mkv": ("matroska", "libx264", OPEN, {}, "yuv420p"),
    "open.ts": ("mpegts", "libx264", OPEN, {}, "yuv420p"),
    "refresh.ts": ("mpegts", "libx264", REFRESH, {}, "yuv420p"),
    "refresh.mp4": ("mp4", "libx264", REFRESH, {}, "yuv420p"),
    "pyramid.mp4": ("mp4", "libx264", {"g": "250", "bf": "8", "x264-params": "b-pyramid=normal:ref=6"}, {}, "yuv420p"),
    "interlaced.mp4": ("mp4", "libx264", X264 | {"x264-params": "tff=1"}, {}, "yuv420p"),
    "mpeg2.ts": ("mpegts", "mpeg2video", {"g": "15", "bf": "2"}, {}, "yuv420p"),
    "flash.flv": ("flv", "libx264", X264, {}, "yuv420p"),
    "anim.gif": ("gif", "gif", {}, {}, "rgb8"),
    "anim.png": ("apng", "apng", {}, {}, "rgb24"),
    "12:30.mp4": ("mp4", "libx264", X264, {}, "yuv420p"),  # no protocol of FFmpeg's
}


def odd_film(path, format, codec, options, mux, pixels, frames):
    "Any encoder that this PyAV has, or the test is skipped."
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    try:
        av.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    with av.open(f"file:{path}", "w", format=format, options=mux) as out:
        stream = out.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ODD)
def test_odd_files_give_right_frames(tmp_path, name):
    path = odd_film(tmp_path / name, *ODD[name], bars())
    everything = read_frames(path, threads=1)
    assert numbers(everything.array) == list(range(N)) and everything.seconds == pytest.approx(
        np.arange(N) / 30, abs=0.011
    )
    for n in (2, 3, 7, 16):
        asked = np.linspace(0, N - 1, n, dtype=int)
        for threads in (1, 3):
            assert np.array_equal(read_frames(path, n=n, threads=threads).array, everything.array[asked]), (n, threads)
    for k in (29, 33, 39, 41, 71, 118):  # one frame alone, near keyframes: as if all had been decoded
        assert np.array_equal(
            next(video.decode_frames(path, video_index.file_index(path), np.array([k]))), everything.array[k]
        ), k
    assert numbers(read_frames(path, fps=2, end=3.99).array) == list(range(0, N, 15)) and numbers(
        read_frames(path, n=4, start=1, end=2).array
    ) == [30, 39, 49, 59]
    assert (
        sum((numbers(part.array) for part in video.iter_frames(path, n=50, batch=16)), [])
        == np.linspace(0, N - 1, 50, dtype=int).tolist()
    )


def stamped(path, format, codec, stamps, tick, pixels="yuv420p"):
    "Frames 0, 1, 2, ... with the time stamps that a bad clock wrote."
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=30, options={"g": "40", "bf": "0"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt, stream.time_base = H, W, pixels, tick
        pictures = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in bars(len(stamps))]
        packets = [packet for picture in [*pictures, None] for packet in stream.encode(picture)]
        for packet, stamp in zip(packets, stamps):
            packet.time_base, packet.pts, packet.dts = tick, stamp, stamp
            out.mux(packet)
    return path


def test_clocks_that_cannot_be_trusted(tmp_path):
    i, ms = np.arange(N), Fraction(1, 1000)
    twins = stamped(tmp_path / "twins.mkv", "matroska", "libx264", (33 * i - 33 * (i % 7 == 3)).tolist(), ms)
    still = stamped(tmp_path / "still.mkv", "matroska", "libx264", [0] * N, ms)
    late = stamped(tmp_path / "late.mkv", "matroska", "libx264", (5_000_000 + 33 * i).tolist(), ms)
    leap = stamped(tmp_path / "leap.ts", "mpegts", "libx264", (33 * i + 90_000 * (i > 50)).tolist(), ms)
    wait = stamped(tmp_path / "wait.mkv", "matroska", "libx264", (33 * i + 90_000 * (i > 50)).tolist(), ms)
    for path in (twins, still, late, leap, wait):
        assert numbers(read_frames(path).array) == list(range(N)), path
        assert numbers(read_frames(path, n=7).array) == np.linspace(0, N - 1, 7, dtype=int).tolist(), path
        assert (np.diff(video_index.file_index(path).seconds) >= 0).all() and video_index.file_index(path).seconds[
            0
        ] == 0
    assert read_frames(twins, end=0.19).seconds == pytest.approx([0, 0.033, 0.066, 0.066, 0.132, 0.165])
    assert video_info(still).seconds == pytest.approx(4, abs=0.01)  # its declared rate, for its stamps say nothing
    assert (
        video_info(leap).seconds == pytest.approx(4, abs=0.1) and video_info(wait).seconds > 90
    )  # broadcast clocks leap; a Matroska file means what it says


def test_webcam_that_drops_frames(tmp_path):
    "AVI counts its frames, dropped ones too: so do its seconds."
    clock = [k + k // 10 for k in range(N)]
    for codec, pixels in [("mjpeg", "yuvj420p"), ("libx264", "yuv420p")]:
        path = stamped(tmp_path / f"{codec}.avi", "avi", codec, clock, Fraction(1, 30), pixels)
        got = read_frames(path)
        assert numbers(got.array) == list(range(N)) and got.seconds == pytest.approx(np.array(clock) / 30)
        assert numbers(read_frames(path, fps=30 / 11).array)[:5] == [0, 10, 20, 30, 40]


def test_recordings_glued_together(films, tmp_path):
    parts = [encode(tmp_path / f"{k}.ts", bars()[60 * k : 60 * k + 60], "mpegts").read_bytes() for k in (0, 1)]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    got = read_frames(tmp_path / "both.ts")
    assert numbers(got.array) == list(range(N)) and got.seconds == pytest.approx(np.arange(N) / 30, abs=0.001)
    stream = (films / "a.ts").read_bytes()
    (tmp_path / "tuned in late.ts").write_bytes(stream[len(stream) // 4 // 188 * 188 :])
    assert numbers(read_frames(tmp_path / "tuned in late.ts").array) == list(range(40, N))  # from the first keyframe on


def test_mirrored_pictures_are_mirrored_back(films, tmp_path):
    "The matrix of an mp4's track header maps pixel (x, y) to (a x + c y, b x + d y)."
    plain, data = read_frames(films / "a.mp4", n=3).array, (films / "a.mp4").read_bytes()
    at = data.index(b"tkhd") + 4 + 40  # version and flags, times, id, ..., then nine numbers
    for a, b, c, d, want in [
        (-1, 0, 0, 1, plain[:, :, ::-1]),
        (1, 0, 0, -1, plain[:, ::-1]),
        (0, 1, 1, 0, plain.transpose(0, 2, 1, 3)),
        (0, -1, -1, 0, plain[:, ::-1, ::-1].transpose(0, 2, 1, 3)),
        (0, 1, -1, 0, np.rot90(plain, -1, (1, 2))),
        (-1, 0, 0, -1, plain[:, ::-1, ::-1]),
    ]:
        numbers_ = np.array([a, b, 0, c, d, 0], np.int64) * 65536
        (tmp_path / "m.mp4").write_bytes(data[:at] + numbers_.astype(">i4").tobytes() + data[at + 24 :])
        assert np.array_equal(read_frames(tmp_path / "m.mp4", n=3).array, want), (a, b, c, d)


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = write_video(bars(5), tmp_path / "x.mp4")
    assert len(read_frames(path)) == 5
    write_video(bars(8), path)
    assert len(read_frames(path)) == 8
    path.unlink()
    with pytest.raises(VideoError, match="no file"):
        read_frames(path)


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, path):
    from PIL import Image

    for k in range(3):
        Image.fromarray(bars(1)[0]).save(tmp_path / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match="path of a video is empty"):
        read_frames(path, n=1)
    assert len(read_frames(".", n=3)) == 3  # a name that was given


def test_moving_webp_is_a_sentence(tmp_path):
    from PIL import Image

    first, *more = [Image.fromarray(frame) for frame in bars(3)]
    first.save(tmp_path / "moving.webp", save_all=True, append_images=more)
    with pytest.raises(VideoError, match="WebP.*GIF"):
        read_frames(tmp_path / "moving.webp")


def test_truncated_gif_flash_and_fragments(tmp_path):
    for name in ("anim.gif", "flash.flv", "fragments.mp4", "webcam.avi"):
        data = odd_film(tmp_path / name, *ODD[name], bars()).read_bytes()
        for share in (0.3, 0.6, 0.9):
            (tmp_path / f"torn-{name}").write_bytes(data[: int(len(data) * share)])
            with pytest.raises(VideoError, match="truncated|cannot be read"):
                read_frames(tmp_path / f"torn-{name}", n=2)


def test_damaged_pictures_are_not_guessed(tmp_path):
    "Two wrong bytes somewhere in the pictures: right frames, or a sentence, but for what the codec cannot notice."
    rng, told, wrong = np.random.default_rng(1), 0, 0
    for name in ("pyramid.mp4", "flash.flv"):
        path = odd_film(tmp_path / name, *ODD[name], bars())
        right, data = read_frames(path).array.astype(int), path.read_bytes()
        for k in range(12):
            damaged = bytearray(data)
            for at in rng.integers(len(data) // 10, len(data) * 8 // 10, 2):
                damaged[at] ^= int(rng.integers(1, 256))
            (tmp_path / f"{k}-{name}").write_bytes(damaged)
            try:
                got = read_frames(tmp_path / f"{k}-{name}", n=N).array
            except VideoError:
                told += 1
            else:
                wrong += bool(np.abs(got - right).max() > 40)
    assert told >= 12 and wrong <= 4, (told, wrong)


# ---- folders, parts, back ends ----


@pytest.fixture
def stills(tmp_path):
    from PIL import Image

    folder = tmp_path / "stills"
    folder.mkdir()
    for i, frame in enumerate(bars(12)):
        Image.fromarray(frame).save(folder / f"frame {i}.PNG")
    (folder / "labels.json").write_text("{}")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def test_folders_of_pictures(stills):
    assert numbers(read_frames(stills).array) == list(range(12))  # 2 before 10
    assert np.array_equal(read_frames(stills).array, bars(12))
    got = read_frames(str(stills), n=4, folder_fps=2)
    assert numbers(got.array) == [0, 3, 7, 11] and got.seconds.tolist() == [0, 1.5, 3.5, 5.5] and got.fps == 2
    assert numbers(read_frames(stills, fps=1, start=2, end=4, folder_fps=2).array) == [4, 6]
    assert video_info(stills) == (12, 1, 12, W, H) and video.backends(stills)["pillow"] == ""
    assert (
        numbers(read_frames(stills, n=15, repeat=True, threads=3).array) == np.linspace(0, 11, 15, dtype=int).tolist()
    )


def test_turned_stills(stills):
    from PIL import Image

    note = Image.Exif()
    note[0x0112] = 6  # turn by 90 degrees to the right
    for file in stills.glob("*.PNG"):
        file.unlink()
    Image.fromarray(bars(1)[0]).save(stills / "1.png", exif=note)
    assert np.array_equal(read_frames(stills).array[0], np.rot90(bars(1)[0], -1))


def test_folders_that_cannot_be_read(stills, tmp_path):
    from PIL import Image

    def told(word, **request):
        with pytest.raises(VideoError, match=word) as error:
            read_frames(stills, **request)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)

    told("12 frames", n=13)
    told("folder_fps=0", folder_fps=0)
    told("folder_fps=nan", folder_fps=float("nan"))
    told("decord reads files", backend="decord")
    told("pyav reads files", backend="pyav")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(stills / "frame 12.tif")
    told("frame 12.tif holds 32-bit numbers")
    (stills / "frame 12.tif").unlink()
    Image.fromarray(bars(1)[0][:50]).save(stills / "frame 12.png")
    told("picture size")
    (stills / "frame 12.png").write_bytes((stills / "frame 1.PNG").read_bytes()[:200])
    told("frame 12.png cannot be read as an image")
    (stills / "frame 12.png").write_bytes(b"no picture")
    told("frame 12.png cannot be read as an image")
    assert len(read_frames(stills, end=12)) == 12  # nobody asked for the broken one
    (tmp_path / "nothing").mkdir()
    for call in (read_frames, video_info, video.backends):
        with pytest.raises(VideoError, match="folder without pictures"):
            call(tmp_path / "nothing")
    assert np.array_equal(read_frames(stills / "frame 1.PNG", backend="pillow").array, bars(2)[1:])
    assert list(video.backends(stills / "frame 1.PNG").items())[0] == ("pillow", "")
    path = write_video(bars(1), tmp_path / "one.mp4")
    with pytest.raises(VideoError, match="pillow reads pictures"):
        read_frames(path, backend="pillow")


def test_parts_are_the_same_frames(films):
    for name in ("a.mp4", "a.avi"):
        for request in (dict(n=50), dict(fps=10), dict(start=1, end=3), dict(n=130, repeat=True), {}):
            whole, parts = (
                read_frames(films / name, **request),
                list(video.iter_frames(films / name, **request, batch=16)),
            )
            assert max(map(len, parts)) <= 16 and np.array_equal(np.concatenate([p.array for p in parts]), whole.array)
            assert (
                np.array_equal(np.concatenate([p.seconds for p in parts]), whole.seconds) and parts[0].fps == whole.fps
            )
    for batch in (0, 1.5, None):
        with pytest.raises(VideoError, match="batch"):
            video.iter_frames(films / "a.mp4", batch=batch)  # at once, not at the first part
    with pytest.raises(VideoError, match="121"):
        video.iter_frames(films / "a.mp4", n=121)


def test_parts_decode_once(films, monkeypatch):
    opened = []
    true = video._decode
    monkeypatch.setattr(video, "_decode", lambda *given, **more: opened.append(1) or true(*given, **more))
    assert len(list(video.iter_frames(films / "a.avi", batch=4))) == 30 and len(opened) == 1


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_threads_that_make_no_sense(films, threads):
    with pytest.raises(VideoError, match="threads="):
        read_frames(films / "a.mp4", n=2, threads=threads)


def test_threads_share_the_work(films):
    index = video_index.file_index(films / "a.mp4")
    for wanted in (np.arange(N), np.array([0, 50, 119]), np.array([5]), np.array([3, 4, 110])):
        for most in (1, 2, 3, 16):
            parts = video.split_work(index, wanted, most)
            assert np.array_equal(np.concatenate(parts), wanted) and len(parts) <= min(most, 3)
    assert [len(part) for part in video.split_work(index, np.arange(N), 3)] == [40, 40, 40]


def test_a_failure_in_one_thread_is_the_failure(tmp_path):
    path = encode(tmp_path / "x.mp4", bars(), "mp4")
    data, index = bytearray(path.read_bytes()), video_index.file_index(path)
    with av.open(str(path)) as container:
        entry = [e for e in container.streams.video[0].index_entries][45]
    data[entry.pos + 4 : entry.pos + entry.size] = bytes(entry.size - 4)
    path.write_bytes(data)
    with pytest.raises(VideoError) as error:
        read_frames(path, threads=3)
    assert str(error.value).endswith(".") and len(index.keys) == 3
    assert numbers(read_frames(path, end=1, threads=3).array) == list(
        range(30)
    )  # what lies before the damage is as good as ever


def test_which_back_end_is_right(films, tmp_path):
    pytest.importorskip("decord", reason="decord is not installed")
    right = {name: video.backends(films / name)["decord"] for name in ORDINARY}
    assert {name for name, why in right.items() if not why} == {"a.mp4", "front.mp4", "a.mkv", "a.webm", "c.mov"}
    cut = video.backends(remux(films / "a.mp4", tmp_path / "cut.mp4", 50 / 30))
    assert list(cut) == ["pyav", "decord", "pillow"] and cut["pyav"] == "" and "70 frames" in cut["decord"]


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
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.codec_context.profile) == (
            "h264",
            "yuv420p",
            "High",
        )


def test_colours_survive_enlarged(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (40, 28, 28, 3), dtype=np.uint8)  # the hardest picture there is
    for scale, mean, most in [(2, 2, 14), (4, 2, 10)]:
        back = (
            read_frames(write_video(frames, tmp_path / "c.mp4", scale=scale))
            .array.reshape(40, 28, scale, 28, scale, 3)
            .mean((2, 4))
        )
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
    with pytest.raises(KeyboardInterrupt):
        write_video(failing(), tmp_path / "x.mp4")
    assert old.read_bytes() == before and os.listdir(tmp_path) == ["x.mp4"]


@pytest.mark.parametrize(
    "frames, options, word",
    [
        (bars(2)[:, :95], {}, "even"),
        (bars(2)[:, :, :159], {}, "even"),
        ([], {}, "no frames"),
        (bars(2).astype(float), {}, "uint8"),
        (bars(2)[..., 0], {}, "shape"),
        ([bars(1)[0], bars(1)[0, :64]], {}, "one size"),
        (bars(2), {"fps": 0}, "fps"),
        (bars(2), {"fps": float("inf")}, "fps"),
        (bars(2), {"fps": "2"}, "fps"),
        (bars(2), {"fps": 1e-9}, "fps"),
        (bars(2), {"fps": 1e9}, "fps"),
        (bars(2), {"scale": None}, "scale"),
        (bars(2), {"scale": float("nan")}, "scale"),
        (bars(2), {"crf": None}, "crf"),
        (5, {}, "frames"),
        (None, {}, "frames"),
        (bars(2), {"scale": 0}, "scale"),
        (bars(2), {"scale": 1.5}, "scale"),
        (bars(2), {"crf": 0}, "crf"),
    ],
)
def test_what_cannot_be_written(tmp_path, frames, options, word):
    with pytest.raises(VideoError, match=word) as error:
        write_video(frames, tmp_path / "x.mp4", **options)
    assert str(error.value).endswith(".") and not os.listdir(tmp_path)


def test_no_place_to_write(tmp_path):
    (tmp_path / "taken.mp4").mkdir()
    for path in (tmp_path / "nowhere" / "x.mp4", tmp_path / "taken.mp4"):
        with pytest.raises(VideoError, match="cannot be written"):
            write_video(bars(2), path)
    assert os.listdir(tmp_path) == ["taken.mp4"]
    assert write_video(bars(2)[:, :95], tmp_path / "odd.mp4", scale=2).exists()


# ---- the rest ----


def test_a_clip_with_both_back_ends(tmp_path):
    """A real one where it lies beside the repository, or else one of as many frames."""
    clip = JOBS if JOBS.exists() else write_video(bars(524), tmp_path / "clip.mp4", fps=30)
    width, height = (576, 1024) if JOBS.exists() else (W, H)
    info = video_info(clip)
    assert (info.frames, info.fps, info.width, info.height) == (524, 30, width, height)
    assert info.seconds == pytest.approx(524 / 30)
    one, other = read_frames(clip, n=8), read_frames(clip, n=8, backend="decord")
    assert one.array.shape == (8, height, width, 3) and np.array_equal(one.array, other.array)
    assert len(read_frames(clip, fps=1)) == 18 and len(read_frames(clip, fps=1, start=2, end=5)) == 3


def test_decord_is_loaded_only_when_asked_for():
    code = "import sys, longva.vision.video; assert 'decord' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])


def test_decord_missing_is_a_sentence(films, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(VideoError, match="decord is not installed"):
        read_frames(films / "a.mp4", n=2, backend="decord")


# ---- files from strangers ----

ELSEWHERE = {  # name: what is in it, {film} being a good file beside it, {me} the file itself
    "absolute.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4,\n{film}\n#EXT-X-ENDLIST\n",
    "address.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4,\nfile://{film}\n#EXT-X-ENDLIST\n",
    "endless.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4,\n{film}\n",
    "itself.m3u8": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{me}\n",
    "list.mp4": "ffconcat version 1.0\nfile a.ts\n",
    "itself.mp4": "ffconcat version 1.0\nfile itself.mp4\n",
    "plain.mkv": "\n#EXTM3U\n{film}\n",
    "marked.avi": "\ufeff#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4,\n{film}\n#EXT-X-ENDLIST\n",
    "dash.mp4": '<?xml version="1.0"?>\n<!-- x -->\n<MPD type="static"><BaseURL>{film}</BaseURL></MPD>\n',
    "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("backend", ["auto", "decord"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_files_that_name_files_are_never_followed(films, tmp_path, name, backend):
    path = tmp_path / name
    (tmp_path / "a.ts").write_bytes((films / "a.ts").read_bytes())
    path.write_text(ELSEWHERE[name].format(film=films / "a.ts", me=path), encoding="utf-8")
    began = time.monotonic()
    with pytest.raises(VideoError, match="is a playlist.*never opened") as error:
        read_frames(path, n=2, backend=backend)
    with pytest.raises(VideoError, match="is a playlist"):
        video_info(path)
    assert name in str(error.value) and str(error.value).endswith(".") and time.monotonic() - began < 1


def test_formats_that_name_files_are_not_opened_by_ffmpeg(films, tmp_path, monkeypatch):
    "The list of formats alone holds, should the look at the first bytes miss one."
    (tmp_path / "a.ts").write_bytes((films / "a.ts").read_bytes())
    monkeypatch.setattr(video_index, "_PLAYLIST", re.compile(b"no such text"))
    for name in ("absolute.m3u8", "endless.m3u8", "itself.m3u8", "list.mp4", "itself.mp4", "dash.mp4", "session.mp4"):
        path = tmp_path / name
        path.write_text(ELSEWHERE[name].format(film=films / "a.ts", me=path), encoding="utf-8")
        with pytest.raises(VideoError, match="cannot be read as a video"):
            read_frames(path, n=1)


MORE = {  # containers that are read: (container, encoder, pixels, size)
    "x.mxf": ("mxf", "mpeg2video", "yuv420p", (W, H)),
    "x.nut": ("nut", "ffv1", "yuv420p", (W, H)),
    "x.y4m": ("yuv4mpegpipe", "wrapped_avframe", "yuv420p", (W, H)),
    "x.dv": ("dv", "dvvideo", "yuv420p", (720, 576)),
    "x.wmv": ("asf", "wmv2", "yuv420p", (W, H)),
    "x.ogv": ("ogg", "libtheora", "yuv420p", (W, H)),
    "x.3gp": ("3gp", "mpeg4", "yuv420p", (W, H)),
    "x.mpg": ("mpeg", "mpeg2video", "yuv420p", (W, H)),
    "x.m2v": ("mpeg2video", "mpeg2video", "yuv420p", (W, H)),
    "x.mjpeg": ("mjpeg", "mjpeg", "yuvj420p", (W, H)),
    "x.ivf": ("ivf", "libvpx", "yuv420p", (W, H)),
    "x.m4v": ("m4v", "mpeg4", "yuv420p", (W, H)),
}


@pytest.mark.parametrize("name", MORE)
def test_containers_that_are_read(tmp_path, name):
    format, codec, pixels, (width, height) = MORE[name]
    if codec not in av.codecs_available or format not in av.formats_available:
        pytest.skip(f"this PyAV cannot write {format} with {codec}")
    frames = np.zeros((25, height, width, 3), np.uint8) + np.linspace(0, 240, 25).astype(np.uint8)[:, None, None, None]
    with av.open(str(tmp_path / name), "w", format=format) as out:
        try:
            stream = out.add_stream(codec, rate=25)
        except ValueError:
            pytest.skip(f"this PyAV has no encoder {codec}")
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    got = read_frames(tmp_path / name).array
    assert len(got) >= 24 and (np.diff(got[:, 8, 8, 0].astype(int)) >= 0).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "tiff"])
def test_one_picture_as_a_video(tmp_path, suffix):
    from PIL import Image

    for name in (f"photo.{suffix}", f"100%d.{suffix}"):
        Image.fromarray(bars(1)[0]).save(tmp_path / name, quality=95)
        assert read_frames(tmp_path / name).array.shape[1:] == (H, W, 3)
    if suffix == "png":
        (tmp_path / "1001.png").write_bytes(b"no picture")  # what the name would mean as a pattern
        assert len(read_frames(tmp_path / "100%d.png")) == 1


def gif(path, width, height, frames):
    "A GIF of few bytes: a large canvas, frames of one pixel."
    picture = b"!\xf9\x04\0\x0a\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0"
    head = b"GIF89a" + width.to_bytes(2, "little") + height.to_bytes(2, "little") + b"\x80\0\0\0\0\0\xff\xff\xff"
    path.write_bytes(head + picture * frames + b";")
    return path


@pytest.mark.parametrize("size", [(8000, 8000), (16000, 16000), (50_001, 1000)])
def test_canvases_are_bounded_before_decoding(tmp_path, size):
    path = gif(tmp_path / "large.gif", *size, 12)
    code = (
        "import resource, sys, longva.vision.video as video\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for call in (video.video_info, video.read_frames, lambda path: next(video.iter_frames(path))):\n"
        "    try: call(sys.argv[1])\n"
        "    except video.VideoError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=60)
    *sentences, grown = done.stdout.splitlines()
    assert len(sentences) == 3 and all("50 million" in text and f"{size[0]} x {size[1]}" in text for text in sentences)
    assert int(grown) < 100 << 10  # KiB
    assert read_frames(gif(tmp_path / "small.gif", 400, 300, 12)).array.shape == (12, 300, 400, 3)


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
def test_photos_with_exif_are_upright(tmp_path, turn):
    "FFmpeg hands EXIF on with each frame, as a kind of side data for which PyAV has no name."
    from PIL import Image, ImageOps

    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 255
    picture[24:, :32, 0] = 255
    picture[24:, 32:, 2] = 255
    note = Image.Exif()
    note[0x0112] = turn
    Image.fromarray(picture).save(tmp_path / "p.jpg", exif=note, quality=95, subsampling=0)
    with Image.open(tmp_path / "p.jpg") as photo:
        want = np.asarray(ImageOps.exif_transpose(photo)).astype(int)
    got = read_frames(tmp_path / "p.jpg").array
    assert got.shape[1:] == want.shape and np.abs(got[0] - want).max() < 12
    assert video_info(tmp_path / "p.jpg")[3:] == want.shape[1::-1]
    with av.open(str(tmp_path / "lapse.mov"), "w") as out, av.open(str(tmp_path / "p.jpg")) as source:
        stream = out.add_stream_from_template(source.streams.video[0])
        packet = next(p for p in source.demux(video=0) if p.size)
        for k in range(3):
            again = av.Packet(bytes(packet))
            again.stream, again.time_base, again.is_keyframe = stream, Fraction(1, 5), True
            again.pts, again.dts, again.duration = k, k, 1
            out.mux(again)
    lapse = read_frames(tmp_path / "lapse.mov").array
    assert lapse.shape[1:] == want.shape and np.abs(lapse - want).max() < 12


@pytest.mark.parametrize("aspect, width", [(Fraction(64, 45), 228), (Fraction(8, 9), 142), (Fraction(1), W)])
def test_frames_have_square_pixels(tmp_path, aspect, width):
    path = tmp_path / "dvd.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for frame in bars(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    got = read_frames(path, n=3).array
    assert got.shape == (3, H, width, 3) and video_info(path)[3:] == (width, H)
    places = (np.arange(10) * 16 + 8) * width // W
    assert [sum(int(f[12, x, 0] > 128) << bit for bit, x in enumerate(places)) for f in got] == [0, 2, 4]
    if width != W:
        with pytest.raises(VideoError, match="pixels are not square.*pyav|decord is not installed"):
            read_frames(path, n=3, backend="decord")


def test_addresses_and_bytes(films, tmp_path):
    from PIL import Image

    odd = tmp_path / "ein film %41.mp4"
    odd.write_bytes((films / "a.mp4").read_bytes())
    for name in (f"file://{odd}", f"file://localhost{odd}", f"file:{odd}", odd.as_uri(), Path(f"file://{odd}")):
        assert video_info(name).frames == N and numbers(read_frames(name, n=3).array) == [0, 59, 119]
    for name in ("https://example.invalid/x.mp4", "http://127.0.0.1:9/x.mp4", "rtsp://example.invalid/x", "s3://b/x.mp4"):
        for path in (name, Path(name)):
            with pytest.raises(VideoError, match="is an address, and nothing is fetched"):
                read_frames(path, n=1)
    with pytest.raises(VideoError, match="no file /nowhere/clip.mp4"):
        read_frames("file:///nowhere/clip.mp4", n=1)
    for data in (b"\0" * 5000, bytearray(9), memoryview(b"abc"), io.BytesIO(b"abc")):
        with pytest.raises(VideoError, match="not bytes or an open file: save"):
            read_frames(data, n=1)
    Image.fromarray(bars(1)[0]).save(tmp_path / "0.png")
    assert len(read_frames(tmp_path.as_uri(), n=1)) == 1  # a folder


def test_what_does_not_fit_into_memory_is_a_sentence(films, monkeypatch):
    class Little:
        available = 50 * H * W * 3

    monkeypatch.setattr(video.psutil, "virtual_memory", lambda: Little)
    with pytest.raises(VideoError, match="120 frames of 160 x 96 .*iter_frames"):
        read_frames(films / "a.mp4")
    assert len(read_frames(films / "a.mp4", n=50)) == 50


def test_parts_of_large_pictures_hold_fewer(films, monkeypatch):
    monkeypatch.setattr(video, "PART_BYTES", 5 * H * W * 3)
    parts = list(video.iter_frames(films / "a.mp4", n=12))
    assert [len(part) for part in parts] == [5, 5, 2]
    assert sum((numbers(part.array) for part in parts), []) == np.linspace(0, N - 1, 12, dtype=int).tolist()


def cut_out():
    "A picture [H,W,4]: on the left hidden red, on the right half transparent green, in the middle blue."
    from PIL import Image

    pixels = np.zeros((H, W, 4), np.uint8)
    pixels[:, :40, 0] = 255
    pixels[:, 40:120] = (0, 0, 255, 255)
    pixels[:, 120:] = (0, 255, 0, 128)
    return Image.fromarray(pixels)


def test_transparent_frames_lie_on_white_as_images_do(tmp_path):
    from longva.vision.image import open_image

    stills = tmp_path / "stills"
    stills.mkdir()
    for k in range(3):
        cut_out().save(stills / f"{k}.png")
    want = np.asarray(open_image(stills / "0.png")).astype(int)
    assert want[0, 0].tolist() == [255, 255, 255] and want[0, -1].tolist() == [127, 255, 127]
    assert np.array_equal(read_frames(stills).array, np.stack([want] * 3))
    for name, codec, pixels in (("a.mov", "png", "rgba"), ("b.mov", "qtrle", "argb"), ("c.png", "apng", "rgba")):
        with av.open(str(tmp_path / name), "w", format="apng" if codec == "apng" else "mov") as out:
            stream = out.add_stream(codec, rate=5)
            stream.height, stream.width, stream.pix_fmt = H, W, pixels
            for _ in range(3):
                frame = av.VideoFrame.from_ndarray(np.asarray(cut_out()), format="rgba")
                out.mux(stream.encode(frame.reformat(format=pixels)))
            out.mux(stream.encode())
        got = read_frames(tmp_path / name).array
        assert np.abs(got - want).max() <= 1, name
    for backend in ("decord",):
        with pytest.raises(VideoError, match="transparent frames|decord"):
            read_frames(tmp_path / "a.mov", backend=backend)


def test_large_pictures_of_a_folder_are_not_unpacked(tmp_path, monkeypatch):
    cut_out().save(tmp_path / "0.png")
    monkeypatch.setattr(image, "MOST_PIXELS", H * W - 1)
    with pytest.raises(VideoError, match="0.png has 160 x 96 pixels, and at most"):
        read_frames(tmp_path)


def test_images_by_address_and_as_bytes(tmp_path, monkeypatch):
    import socket

    from PIL import Image

    from longva.vision.image import data_url, open_image

    monkeypatch.setattr(socket, "getaddrinfo", lambda *given: pytest.fail("looked up"))
    path = tmp_path / "ein bild.png"
    Image.fromarray(bars(1)[0]).save(path)
    url = data_url(Image.fromarray(bars(1)[0]), "PNG")
    sources = [f"file://{path}", path.as_uri(), path.read_bytes(), bytearray(path.read_bytes()), path.open("rb"), url]
    for source in [*sources, url.partition(",")[2]]:
        assert np.array_equal(np.asarray(open_image(source)), bars(1)[0])
    for name in ("https://example.invalid/x.png", "http://127.0.0.1:9/x.png", "s3://bucket/x.png"):
        with pytest.raises(ValueError, match="is an address, and nothing is fetched"):
            open_image(name)
    for broken in (b"no picture", io.BytesIO(b""), "data:image/png;base64,AAAA", "data:image/png;base64,A", "nope.png"):
        with pytest.raises(ValueError, match="cannot be read as an image|no file nope.png"):
            open_image(broken)
