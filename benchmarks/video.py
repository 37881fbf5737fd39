"""64 frames of a 60-minute video: read_frames beside decord's get_batch, time, wrong frames and memory.

    .venv/bin/python benchmarks/video.py --json video.json

The video is made first, in a temporary folder: 320x180 at 30 frames per second, H.264 (x264's ultrafast, 2 B-frames),
a keyframe every 250 frames, each frame's number burnt into the picture as 20 bars, so that a wrong frame shows. Then
the readers take turns. Every turn opens the file anew, and nothing is remembered from the turn before. A ratio is the
median over the turns. In the file:

speedup_vs_decord     wall time of decord (open and get_batch, its own choice of threads) over read_frames's
speedup_one_thread    the same for read_frames with one decoder
speedup_remembered    the same for a second look at the same file, whose index of frames is remembered
wrong_frames          frames of read_frames, over all turns, that carry another number than the one asked for
memory_*_mb           what a fresh process holds at most, above what it holds before reading: 64 frames;
                      the whole video at one frame per second, in parts

processor_time_vs_decord  the same ratio in processor time of all threads, which other work on the machine hardly
                          changes

The speedups are wall time, because both readers use several threads. On a busy machine, look at `load` too.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import numpy as np

from longva.vision import index, video

N, FPS, WIDTH, HEIGHT, BITS = 64, 30, 320, 180, 20


def make_film(path, minutes, bframes):
    "A texture that wanders about, and the number of the frame in bars along the upper edge."
    texture = (
        np.random.default_rng(0)
        .integers(30, 220, (HEIGHT // 4 + 2, WIDTH // 4 + 2), dtype=np.uint8)
        .repeat(8, 0)
        .repeat(8, 1)
    )
    picture = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)  # Y, then U and V: no colour
    options = {
        "preset": "ultrafast",
        "g": "250",
        "keyint_min": "250",
        "sc_threshold": "0",
        "bf": str(bframes),
        "crf": "30",
    }
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(minutes * 60 * FPS):
            down, right = int(HEIGHT / 2 * (1 + np.sin(i / 70))), int(WIDTH / 2 * (1 + np.cos(i / 110)))
            picture[:HEIGHT] = texture[down : down + HEIGHT, right : right + WIDTH]
            picture[:16] = (np.array([i >> bit & 1 for bit in range(BITS)], np.uint8) * 255).repeat(WIDTH // BITS)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        out.mux(stream.encode())


def numbers(frames):
    "The numbers back from the pixels."
    bars = frames[:, 4:12].reshape(len(frames), 8, BITS, WIDTH // BITS, 3)[:, :, :, 4:12].mean((1, 3, 4)) > 128
    return bars @ (1 << np.arange(BITS))


def with_decord(path):
    import decord

    reader = decord.VideoReader(str(path))
    return reader.get_batch(np.linspace(0, len(reader) - 1, N, dtype=int).tolist()).asnumpy()


def ours(path):
    index._index_of_state.cache_clear()
    return video.read_frames(path, n=N).array


def one_thread(path):
    index._index_of_state.cache_clear()
    return video.read_frames(path, n=N, threads=1).array


def remembered(path):
    return video.read_frames(path, n=N).array


def memory(path, call):
    "MB that a fresh process needs on top of what its imports take (Linux)."
    if not Path("/proc/self/status").exists():
        return float("nan")
    code = (
        "import re, sys; from longva.vision.video import read_frames, iter_frames; path = sys.argv[1]\n"
        "status = lambda name: int(re.search(name + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        f"before = status('VmRSS'); {call}; print(status('VmHWM') - before)"
    )
    return float(
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True).stdout
    )


def machine():
    "What it was measured on."
    import decord

    model = (
        next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return {
        "processor": model,
        "cores": video._cores(),
        "system": platform.system(),
        "python": platform.python_version(),
        "av": av.__version__,
        "libavcodec": codec,
        "decord": decord.__version__,
        "numpy": np.__version__,
    }


def main():
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--minutes", type=int, default=60)
    ask.add_argument("--bframes", type=int, default=2, help="B-frames between two others; 0 is the hardest case for us")
    ask.add_argument("--turns", type=int, default=5)
    ask.add_argument("--json", type=Path)
    given = ask.parse_args()
    from rich.console import Console
    from rich.table import Table

    methods = {"decord": with_decord, "read_frames": ours, "one thread": one_thread, "index remembered": remembered}
    seconds, wrong = {name: [] for name in methods}, dict.fromkeys(methods, 0)
    work_done, loads = {name: [] for name in methods}, []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        start, work = perf_counter(), process_time()
        make_film(path, given.minutes, given.bframes)
        made, size = perf_counter() - start, path.stat().st_size / 1e6
        print(
            f"a video of {given.minutes} min, {WIDTH}x{HEIGHT}, {size:.0f} MB, made in {made:.0f} s "
            f"({process_time() - work:.0f} s of processor time)"
        )
        asked = np.linspace(0, given.minutes * 60 * FPS - 1, N, dtype=int)
        for _ in range(given.turns):
            for name, read in methods.items():
                start, work = perf_counter(), process_time()
                frames = read(path)
                seconds[name].append(perf_counter() - start)
                work_done[name].append(process_time() - work)
                wrong[name] += int((numbers(frames) != asked).sum())
            loads.append(os.getloadavg()[0] if hasattr(os, "getloadavg") else 0)
        held = (
            memory(path, f"read_frames(path, n={N})"),
            memory(path, "[len(part) for part in iter_frames(path, fps=1)]"),
        )

    ratio = {name: median(d / s for d, s in zip(seconds["decord"], seconds[name])) for name in methods}
    ratio_work = {name: median(d / s for d, s in zip(work_done["decord"], work_done[name])) for name in methods}
    table = Table("reader", "seconds", "times faster", "processor s", "times less", "wrong")
    for name in methods:
        table.add_row(
            name,
            f"{median(seconds[name]):.2f}",
            f"{ratio[name]:.2f}",
            f"{median(work_done[name]):.2f}",
            f"{ratio_work[name]:.2f}",
            f"{wrong[name]}/{N * given.turns}",
        )
    Console().print(table)
    print(
        f"memory: {held[0]:.0f} MB for {N} frames, {held[1]:.0f} MB for the whole video at one frame per second, "
        f"in parts; load {min(loads):.1f} to {max(loads):.1f}"
    )
    result = {
        "speedup_vs_decord": ratio["read_frames"],
        "wrong_frames": wrong["read_frames"],
        "speedup_one_thread": ratio["one thread"],
        "speedup_remembered": ratio["index remembered"],
        "processor_time_vs_decord": ratio_work["read_frames"],
        "seconds": median(seconds["read_frames"]),
        "seconds_decord": median(seconds["decord"]),
        "wrong_frames_decord": wrong["decord"],
        "memory_64_frames_mb": held[0],
        "memory_whole_film_in_parts_mb": held[1],
        "film": (
            f"{given.minutes} min, {WIDTH}x{HEIGHT}, {FPS} fps, H.264 ultrafast, GOP 250, "
            f"{given.bframes} B-frames, {size:.0f} MB"
        ),
        "seconds_to_make_the_film": made,
        "turns": given.turns,
        "load": max(loads),
        **machine(),
    }
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
