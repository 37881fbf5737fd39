"""Fixtures for things that not every machine has. A test that needs one is skipped with a sentence where it is
absent."""

import os
import shutil

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


@pytest.fixture(scope="session")
def chromium():
    "Path of the system's Chromium; start it with args=['--no-sandbox'], for CI runs as root."
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this system, so the browser is not tested (Debian: apt-get install chromium)")
    return path
