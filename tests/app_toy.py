"""Start an app as a user does, and hear what it says."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty, Queue

import pytest

root = Path(__file__).resolve().parents[1]
flags = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
patience = 180  # seconds; for a machine with other things to do


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(app, *options, **env):
    "`app` is the name of its folder."
    env = os.environ | {"NO_PROXY": "127.0.0.1,localhost", "PYTHONUNBUFFERED": "1"} | env
    file = root / "apps" / app / "app.py"
    return subprocess.Popen(
        [sys.executable, file, *map(str, options)],
        env=env,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process, word):
    "The first printed line with this word."
    lines, said = Queue(), []
    threading.Thread(
        target=lambda: ([lines.put(line) for line in process.stdout], lines.put(None)), daemon=True
    ).start()
    try:
        while (line := lines.get(timeout=patience)) is not None:
            said.append(line)
            if word in line:
                return line
    except Empty:
        pass
    pytest.fail(f"the app did not say {word}:\n{''.join(said)}")
