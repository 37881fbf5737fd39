"""What the apps' servers refuse: a script needs no browser, so nothing is bounded there alone."""

import importlib.util
from functools import cache
from types import SimpleNamespace

import pytest
from app_toy import root


@cache
def app_module(name):
    "The file of an app as a module."
    spec = importlib.util.spec_from_file_location(f"{name}_app", root / "apps" / name / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


@cache
def benches():
    "The needle app's benches, without a demo."
    from longva.web.visit import SharedBenches

    return SharedBenches("no-demo")


@pytest.mark.parametrize(
    "handler, event",
    [
        ("drag", dict(depth="nan")),
        ("drag", dict(depth=7)),
        ("drag", dict(depth=-0.1)),
        ("drag", dict()),
        ("drag", dict(depth=0.5)),
        ("drag", dict(depth=0.5, places=30000)),
        ("click_needle", dict(index=-1)),
        ("click_needle", dict(index=999)),
        ("click_needle", dict(index="one")),
        ("click_trial", dict(needle="drop", frames=30000, depth=0.5)),
        ("click_trial", dict(needle="drop", frames=0, depth=0.5)),
        ("click_trial", dict(needle="drop", frames=16, depth="nan")),
        ("click_cell", dict(frames="inf", depth=0.5)),
    ],
)
def test_a_bad_event_leaves_the_visit_as_it_was(handler, event):
    gr = pytest.importorskip("gradio", reason="gradio is not installed (make env)")
    from longva.web.visit import Visit

    app = app_module("needle")
    visit = Visit("mini-longva")
    before = (visit.needle, visit.frames, visit.depth, visit.places, visit.opened)
    view = SimpleNamespace(shown=lambda *_: (), slider=lambda *_: ())
    given = (visit, "field") if handler == "click_cell" else (visit, "field", app.MEAN)
    with pytest.raises(gr.Error) as refused:
        getattr(app.click_handlers(gr, view, benches()), handler)(*given, gr.EventData(None, event))
    assert (visit.needle, visit.frames, visit.depth, visit.places, visit.opened) == before
    assert str(refused.value.message).endswith(".") and not refused.value.print_exception
