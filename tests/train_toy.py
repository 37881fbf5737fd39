"""Small trainings of several ranks for tests. One server process imports torch once; ranks are forked from it."""

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from longva.testing import small_qwen2
from longva.train.loop import TrainError, train

folder = Path(__file__).resolve().parent
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["preloaded"])


def tell_server():
    """Name the folders in which the server that forks ranks looks for what it imports."""
    path = os.environ.get("PYTHONPATH", "")
    if str(folder) not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), str(folder.parent), path]))


def start(out, world=1, **settings):
    """Start all ranks.

    `settings` are those of a Recipe and, for mischief, `die`, `nan` and `broken` (a step), `slow` (seconds a row),
    `largest` (bytes of a file that the rank `full`, by default the first, may write); or what `body(out, settings)`
    takes, another training.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    tell_server()
    env = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    ranks = []
    for r in range(world):
        stderr = Path(f"{out}.{time.time_ns()}.{r}.err")
        own = env | {"RANK": str(r), "LOCAL_RANK": str(r)}
        process = context.Process(target=rank, args=(str(out), settings, own, str(stderr)))
        process.stderr = stderr
        process.start()
        ranks.append(process)
    return ranks


def stderr_of(process):
    return process.stderr.read_text() if process.stderr.exists() else ""


def wait(ranks, seconds=400):
    """Give (exit code, stderr) of every rank; a deadlock is killed and fails."""
    end = time.time() + seconds
    try:
        for r in ranks:
            r.join(max(end - time.time(), 0.1))
        stuck = any(r.exitcode is None for r in ranks)
        assert not stuck, "deadlock: " + " | ".join(stderr_of(r)[-1500:] for r in ranks)
    finally:
        for r in ranks:
            r.kill()
    return [(r.exitcode, stderr_of(r)) for r in ranks]


def run(out, world=1, **settings):
    """Train to the end, and give the losses."""
    for code, error in wait(start(out, world, **settings)):
        assert code == 0, error[-3000:]
    return losses(out)


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(checkpoint):
    """Read all tensors of a checkpoint."""
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def tiny(seed=0, **changes):
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return small_qwen2(seed=seed, **{"rope_parameters": rope, "max_position_embeddings": 128, **changes})


def rank(out, settings, env, stderr):
    """Be one rank."""
    os.environ.update(env)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    limit(settings.pop("largest", None), settings.pop("full", 0))
    try:
        settings.pop("body", count)(out, settings)
    except (TrainError, OSError) as e:
        print(e, file=sys.stderr)
        sys.exit(1)


def limit(largest, full):
    """Imitate a full disk: one rank can write so many bytes into a file, and no more."""
    if largest and os.environ["RANK"] == str(full):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


class Mischief:
    """Rows that count upwards, until something goes wrong."""

    def __init__(self, settings):
        self.die = settings.pop("die", None)  # the last rank is killed in this step
        self.nan = settings.pop("nan", None)  # a loss that isn't a number
        self.slow = settings.pop("slow", 0)  # seconds a row
        self.packed = settings.pop("packed", False)  # two documents in every row
        self.broken = settings.pop("broken", None)  # a row that can't be read
        self.tokens = settings.pop("length", 48)

    def __call__(self, step, row):
        if self.die == step and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.broken == step and row == 1:
            raise OSError(5, "shard-1 cannot be read")
        time.sleep(self.slow)
        ids = (torch.arange(self.tokens) * (1 + row % 3) + 7 * step + 3 * row) % 64
        weight = float("nan") if self.nan == step else 1.0
        sample = {"input_ids": ids, "weights": torch.full((self.tokens,), weight)}
        if self.packed:
            cut = 7 + 5 * row
            sample["position_ids"] = torch.cat([torch.arange(cut), torch.arange(self.tokens - cut)])
        return sample


def count(out, settings):
    """Train a small Qwen2 to count upwards."""
    batches = Mischief(settings)
    train(tiny(), batches, Path(out), **{"precision": "fp32", "lr": 1e-2, **settings})


def count_until_killed(out, settings):
    """Count upwards; the last rank is killed when it has written half a file of the checkpoint `half`."""
    from longva.train import run as room

    half = settings.pop("half")
    save = room.save_file

    def write(tensors, file):
        save(tensors, file)
        if half in str(file) and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            file.write_bytes(file.read_bytes()[:-99])
            os.kill(os.getpid(), signal.SIGKILL)

    room.save_file = write
    count(out, settings)


def train_and_save(out, settings):
    """Train a step and save the model as transformers does, as a process that has not imported DeepSpeed."""
    os.environ.pop("DS_ACCELERATOR")  # the device is left to the code
    for name in [n for n in sys.modules if n.partition(".")[0] == "deepspeed"]:
        del sys.modules[name]
    os.dup2(2, 1)  # what is printed, too
    model = tiny()
    train(model, lambda step, row: {"input_ids": torch.arange(9)}, out, steps=1, precision="fp32")
    model.save_pretrained(Path(out) / "model")
