"""A short form of the load test: three people for a few seconds at each app, and every request is answered."""

import importlib.util

import pytest
from app_toy import root


@pytest.mark.parametrize("app", ["needle", "chat"])
def test_three_users(chromium, app):
    for module in ("gradio", "playwright"):
        pytest.importorskip(module, reason=f"{module} is not installed, so the apps are not tested (make env)")
    spec = importlib.util.spec_from_file_location("load", root / "benchmarks" / "load.py")
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    found = load.measure(app, users=3, length=8, browser=chromium)
    assert found["requests"] >= 3 and found["errors"] == 0, found
