"""What the apps' servers refuse: a script needs no browser, so nothing is bounded there alone."""

import hashlib
import http.client
import importlib.util
import json
import socket
import time
import uuid
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from app_toy import free_port, root


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


# A small page behind the same server as the apps


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "(port, folder of uploads) of a page with a slider, a file and a text."
    gr = pytest.importorskip("gradio", reason="gradio is not installed (make env)")
    from longva.web.serve import launch, server_options

    uploads = tmp_path_factory.mktemp("uploads")
    asked = server_options("A page.", free_port()).parse_args([])
    with pytest.MonkeyPatch.context() as patch, gr.Blocks() as page:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        patch.setenv("HF_HUB_OFFLINE", "1")
        given = [gr.Slider(0, 10), gr.File(), gr.Textbox()]
        shown = gr.Textbox()
        given[2].submit(lambda number, file, text: f"{number} {file and Path(file).name} {text}", given, shown)
        given[1].upload(lambda: time.sleep(1) or "at last", None, shown)
        patch.setattr(page, "block_thread", lambda: None, raising=False)
        launch(gr, page, asked)
        yield asked.port, uploads
        page.close()


def ask(port, method, path, body=None, **headers):
    "(status, text)"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"content-type": "application/json"} | headers)
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text


def event(port, data, number=0):
    "What the page would show, or the sentence of a refusal."
    session = uuid.uuid4().hex
    body = json.dumps(dict(data=data, fn_index=number, session_hash=session))
    status, text = ask(port, "POST", "/gradio_api/queue/join", body)
    if status != 200:
        return f"{status} {text}"
    _, stream = ask(port, "GET", f"/gradio_api/queue/data?session_hash={session}")
    messages = [json.loads(line.removeprefix("data:")) for line in stream.splitlines() if line.startswith("data:")]
    output = next(message["output"] for message in messages if message["msg"] == "process_completed")
    return output["error"] if "error" in output else output["data"][0]


def form(name, content):
    "(body, headers) of one file."
    body = b'--x\r\ncontent-disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n--x--\r\n'
    return body % (name.encode(), content), dict(content_type="multipart/form-data; boundary=x")


def give(port, name, content):
    "The path of an upload."
    body, headers = form(name, content)
    status, text = ask(port, "POST", "/gradio_api/upload", body, **headers)
    assert status == 200, text
    return json.loads(text)[0]


def test_a_page_works_behind_the_guard(server):
    port, _ = server
    assert ask(port, "GET", "/")[0] == 200
    path = give(port, "film.mp4", b"x" * 1000)
    file = dict(path=path, meta={"_type": "gradio.FileData"})
    assert event(port, [3, file, "heart"]) == "3 film.mp4 heart"
    assert ask(port, "GET", f"/gradio_api/file={path}")[0] == 200


@pytest.mark.parametrize(
    "method, path",
    [
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/stream/x"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:9/"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/monitoring"),
        ("GET", "/monitoring/summary"),
    ],
)
def test_routes_that_no_page_uses_are_closed(server, method, path):
    assert ask(server[0], method, path)[0] == 404


def test_other_hosts_and_origins_are_refused(server):
    "A name that was bent to 127.0.0.1 reads nothing, and a page elsewhere writes nothing."
    port, uploads = server
    before = sorted(uploads.rglob("*"))
    assert ask(port, "GET", "/config", host=f"evil.example:{port}")[0] == 400
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}"):
        body, headers = form("evil.mp4", b"evil")
        assert ask(port, "POST", "/gradio_api/upload", body, origin=origin, **headers)[0] == 403
    assert sorted(uploads.rglob("*")) == before


@pytest.mark.parametrize("place", ["event", "file="])
def test_addresses_are_refused_without_a_look_up(server, place, monkeypatch):
    "Nothing is resolved and nothing is connected, whatever a visitor names as a file."
    port, _ = server
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host))
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.sock = socket.socket()
    connection.sock.connect(("127.0.0.1", port))
    address = "http://files.example/film.mp4"
    if place == "event":
        body = json.dumps(dict(data=[3, dict(path=address), ""], fn_index=0, session_hash="a"))
        connection.request("POST", "/gradio_api/queue/join", body, {"content-type": "application/json"})
    else:
        connection.request("GET", f"/gradio_api/file={address}")
    assert connection.getresponse().status in (400, 403) and asked == []
    connection.close()


def test_a_refused_call_is_one_line_in_the_terminal(server, capsys):
    port, _ = server
    assert "greater than maximum value 10" in event(port, [11, None, ""])
    assert event(port, []).startswith("The page sent")
    assert event(port, [3, None, ""], number=999).startswith("500")
    said = capsys.readouterr()
    assert said.err == "" and len(said.out.splitlines()) == 3 and "Traceback" not in said.out


def test_an_upload_that_breaks_off_leaves_nothing(server):
    port, uploads = server
    before = set(uploads.rglob("*"))
    body, _ = form("long.mp4", bytes(1 << 20))
    with socket.create_connection(("127.0.0.1", port)) as sender:
        sender.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9000000\r\n")
        sender.sendall(b"content-type: multipart/form-data; boundary=x\r\n\r\n" + body[: 1 << 19])
        wait_until(lambda: set(uploads.rglob("*")) - before)
    wait_until(lambda: set(uploads.rglob("*")) <= before)


def wait_until(is_true, seconds=30):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_field_that_is_no_file_is_not_kept_in_memory(server):
    port, _ = server
    body = b'--x\r\ncontent-disposition: form-data; name="files"\r\n\r\n' + bytes(1 << 22)
    status, text = ask(port, "POST", "/gradio_api/upload", body, content_type="multipart/form-data; boundary=x")
    assert status == 400 and "field" in text


def test_an_event_and_an_upload_have_a_size(server):
    port, _ = server
    assert event(port, [3, None, "x" * (1 << 18)]).startswith("413")
    body, headers = form("film.mp4", b"")
    assert ask(port, "POST", "/gradio_api/upload", body, content_length=str(1 << 40), **headers)[0] == 507


def test_the_place_of_an_upload_does_not_follow_from_its_contents(server):
    "Else who knows a file could see whether somebody has it here."
    path = Path(give(server[0], "secret.png", b"secret"))
    assert hashlib.sha256(b"secret").hexdigest() not in str(path)


@pytest.mark.parametrize("name", ["chat", "needle"])
def test_every_event_of_the_apps_takes_the_route_that_is_open(name):
    "Gradio sends an event without a queue to a route of its own, which is closed."
    gr = pytest.importorskip("gradio", reason="gradio is not installed (make env)")
    app = app_module(name)
    given = (SimpleNamespace(), "", []) if name == "chat" else ("mini-longva", benches())
    page = app.build(gr, *given)
    asked = [fn for fn in page.fns.values() if fn.fn is not None]  # the others are scripts of the page alone
    assert len(asked) > 8 and all(fn.queue is not False for fn in asked)


def test_an_answer_outlives_the_stream_that_was_closed_before_it_came(server):
    "A page closes its stream when it knows of no event, and one may be on its way to the server."
    port, _ = server
    session = uuid.uuid4().hex
    body = json.dumps(dict(data=[], fn_index=1, session_hash=session))
    assert ask(port, "POST", "/gradio_api/queue/join", body)[0] == 200
    stream = f"/gradio_api/queue/data?session_hash={session}"
    with socket.create_connection(("127.0.0.1", port)) as page:
        page.sendall(f"GET {stream} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
        assert b"200" in page.recv(1000)
    time.sleep(0.3)
    status, text = ask(port, "GET", stream)
    assert status == 200 and "at last" in text, text
