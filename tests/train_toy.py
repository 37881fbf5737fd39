"""Small trainings of several ranks for tests. One server process imports torch once; ranks are forked from it, so that they start at once."""
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
from transformers import Qwen2Config, Qwen2ForCausalLM

from longva.train.loop import TrainError, train

folder = Path(__file__).resolve().parent
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["preloaded"])


def start(out, world=1, **settings):
    "Start all ranks. `settings` are those of a Recipe and, for mischief, `die`, `nan` and `broken` (a step), `slow` (seconds a row), `largest` (bytes of a file that the first rank may write); or what `body(out, settings)` takes, another training."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = os.environ.get("PYTHONPATH", "")
    if str(folder) not in path.split(os.pathsep):  # the server looks there for what it imports
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), str(folder.parent), path]))
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    ranks = []
    for r in range(world):
        said = Path(f"{out}.{time.time_ns()}.{r}.err")
        ranks.append(context.Process(target=rank, args=(str(out), settings, env | {"RANK": str(r), "LOCAL_RANK": str(r)}, str(said))))
        ranks[-1].said = said
        ranks[-1].start()
    return ranks


def wait(ranks, seconds=400):
    "(exit code, stderr) of every rank; a deadlock is killed and fails."
    end = time.time() + seconds
    try:
        for r in ranks:
            r.join(max(end - time.time(), 0.1))
        assert all(r.exitcode is not None for r in ranks), "deadlock: " + " | ".join(r.said.read_text()[-1500:] for r in ranks if r.said.exists())
    finally:
        for r in ranks:
            r.kill()
    return [(r.exitcode, r.said.read_text() if r.said.exists() else "") for r in ranks]


def run(out, world=1, **settings):
    "Train to the end; returns the losses."
    for code, error in wait(start(out, world, **settings)):
        assert code == 0, error[-3000:]
    return losses(out)


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(checkpoint):
    "All tensors of a checkpoint."
    from safetensors.torch import load_file
    return {k: v for f in sorted(Path(checkpoint).glob("*.safetensors")) for k, v in load_file(f).items()}


def tiny(seed=0):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        rope_parameters=dict(rope_type="default", rope_theta=1e4), max_position_embeddings=128))


def rank(out, settings, env, said):
    "One rank."
    os.environ.update(env)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    limit(settings.pop("largest", None))
    try:
        settings.pop("body", count)(out, settings)
    except (TrainError, OSError) as e:
        print(e, file=sys.stderr)
        sys.exit(1)


def limit(largest):
    "A full disk: the first rank can write so many bytes into a file, and no more."
    if largest and os.environ["RANK"] == "0":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def count(out, settings):
    "Rows that count upwards, and a small Qwen2."
    die, nan, slow, packed, broken = (settings.pop(k, None) for k in ("die", "nan", "slow", "packed", "broken"))
    length = settings.pop("length", 48)

    def batches(step, row):
        if die == step and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if broken == step and row == 1:
            raise OSError(5, "shard-1 cannot be read")
        time.sleep(slow or 0)
        sample = dict(input_ids=(torch.arange(length) * (1 + row % 3) + 7 * step + 3 * row) % 64, weights=torch.full((length,), float("nan") if nan == step else 1.0))
        if packed:  # two documents
            cut = 7 + 5 * row
            sample["position_ids"] = torch.cat([torch.arange(cut), torch.arange(length - cut)])
        return sample

    train(tiny(), batches, Path(out), **{"precision": "fp32", "lr": 1e-2, **settings})


def train_and_save(out, settings):
    "A step, and the model as transformers saves it; the device is left to the code, and DeepSpeed is as in a process that has not imported it."
    os.environ.pop("DS_ACCELERATOR")
    for name in [n for n in sys.modules if n.partition(".")[0] == "deepspeed"]:
        del sys.modules[name]
    os.dup2(2, 1)  # what is printed, too
    model = tiny()
    train(model, lambda step, row: dict(input_ids=torch.arange(9)), out, steps=1, precision="fp32")
    model.save_pretrained(Path(out) / "model")
