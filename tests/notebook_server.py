"""Imports once what most notebooks import, then forks a fresh process for every notebook that a line of its input
names: folder, name, log.

It answers with two lines: the process (which leads a session of its own, so that its children can be killed with
it), and its exit status.
"""

import os
import sys
from pathlib import Path

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what an import prints is no answer

import plotly.graph_objects  # noqa: F401
import torch  # noqa: F401
from nbdev.test import test_nb
from transformers import AutoTokenizer, CLIPVisionModel, Qwen2ForCausalLM  # noqa: F401


def one(folder, name, log):
    "Run it beside its folder and name it by its name alone, so that the path of the checkout may be anything."
    os.setsid()
    with open(log, "wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.chdir(folder)
    ok, _ = test_nb(Path(name), skip_flags=sys.argv[2:], basepath=sys.argv[1])
    sys.exit(not ok)


for line in sys.stdin:
    process = os.fork()
    if not process:
        one(*line.rstrip("\n").split("\t"))
    print(process, file=answers, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers, flush=True)
