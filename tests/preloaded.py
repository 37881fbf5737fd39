"""What the server that forks ranks has imported before: all that a rank of any test may need, once instead of once
a rank."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says what it found

import contextlib
import importlib

for name in ("train_toy", "longva.cli", "longva.mini.reader", "longva.train.align", "longva.train.dpo", "deepspeed"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
