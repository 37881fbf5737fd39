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
flags = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync".split()
)
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


# Pairs of a text and its background that are hard to read; of what people see, not of what is hidden.
PALE = r"""() => {
    const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const parse = colour => {
        pen.clearRect(0, 0, 1, 1); pen.fillStyle = '#000'; pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
    const linear = v => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b) + .05;
    const pale = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const text = walk.currentNode.textContent.trim(), element = walk.currentNode.parentElement;
        const box = element.getBoundingClientRect(), style = getComputedStyle(element);
        const unseen = box.width < 2 || !box.height || style.visibility === 'hidden';
        if (!text || unseen || ['SCRIPT', 'STYLE'].includes(element.tagName)) continue;
        const fills = [];
        for (let e = element; e; e = e.parentElement) fills.unshift(parse(getComputedStyle(e).backgroundColor));
        const back = fills.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
        const [a, b] = [light(over(parse(style.color), back)), light(back)];
        const contrast = Math.max(a, b) / Math.min(a, b);
        if (contrast < 4.5) pale.push(`${contrast.toFixed(2)}: ${text.slice(0, 40)}`);
    }
    return pale;
}"""


def tab_stops(page, most=60):
    "What the tab key reaches, from the top of the page: (id of the block, role or tag, name)."
    page.evaluate("""() => {
        const top = document.createElement('span');
        top.tabIndex = -1;
        document.body.prepend(top);
        top.focus();
    }""")
    stops = []
    for _ in range(most):
        page.keyboard.press("Tab")
        stop = page.evaluate("""() => {
            const e = document.activeElement, block = e.closest('.block[id], fieldset[id], button[id]') || {};
            return [block.id, e.getAttribute('role') || e.type || e.tagName, e.ariaLabel || e.innerText || e.value];
        }""")
        if stop[1] == "BODY":
            break
        stops.append(tuple(stop))
    return stops
