"""Load: several people at one app at once.

Is every request answered, how long does it take, and does the server's memory stay flat?

    .venv/bin/python benchmarks/load.py --app needle --users 8 --seconds 300 --json benchmarks/results/load-needle.json

Each user is a browser context with a page of its own. In the needle app a user moves the needle to a drawn place
and waits for that answer, and now and then fills the heat map; in the chat app a user asks about the example video
and image. An error is a page error, an answer of the server with status 400 or more, an alert, or an answer that
does not come in time.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
PATIENCE = 120  # seconds for one answer
REST = 12  # seconds before memory is read; the apps give back what was freed every 10


def memory(pid):
    """Read the resident MiB of a process; nan where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return float("nan")
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return kib / 1024


def rested(pid):
    """Read the resident MiB after all users have left."""
    time.sleep(REST)
    return memory(pid)


async def needle_user(page, number, rng, end, note):
    frames = int(await page.locator("#verdict .card").get_attribute("data-frames"))
    if number % 4 == 0:
        await page.click("#fill")
    now = None
    while time.time() < end:
        depth = int(rng.integers(0, 401)) / 400  # the steps of a click
        if (insert := int(depth * frames)) == now:
            continue
        now = insert
        strip = await page.locator("#strip .attention").bounding_box()
        x = strip["x"] + strip["width"] * (0.5 + 20 * depth) / 21  # 21 pictures
        await note(
            page.mouse.click(x, strip["y"] + 20),
            page.wait_for_selector(f'#verdict .card[data-insert="{insert}"]'),
        )
        await page.wait_for_timeout(int(rng.integers(100, 900)))  # people look before they move on


async def chat_user(page, number, rng, end, note):
    """Ask by the buttons and by hand; begin anew after six questions, sometimes before the last one is answered."""
    buttons = await page.locator("#examples button").all_inner_texts()
    asked = 0
    while time.time() < end:
        answer = f"document.querySelectorAll('#history [data-testid=bot]')[{asked}]"
        is_answered = f"/^[a-z]+ [a-z]+(\\s|$)/.test({answer}?.innerText.trim())"  # a note may stand below
        if asked % 2 == 0:
            ask = page.click(f"#example-{asked // 2}")
        else:
            await page.fill("#box textarea", buttons[asked // 2].split(": ")[1])
            ask = page.press("#box textarea", "Enter")
        asked += 1
        if asked == 6 and rng.random() < 0.3:
            await ask
            await page.wait_for_function("document.querySelectorAll('#history [data-testid=user]').length === 6")
        else:
            await note(ask, page.wait_for_function(is_answered))
        await page.wait_for_timeout(int(rng.integers(100, 900)) if asked < 6 else 0)
        if asked == 6:
            await page.click("#fresh")
            await page.wait_for_function("document.querySelectorAll('#history [data-testid=bot]').length === 0")
            asked = 0


async def visit(browser, address, app, number, end, seconds, errors):
    import numpy as np

    page = await (await browser.new_context(viewport=dict(width=1280, height=900))).new_page()
    page.set_default_timeout(PATIENCE * 1000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("response", lambda response: response.status >= 400 and errors.append(f"{response.status} {response.url}"))

    async def note(ask, answered):
        begin = time.time()
        await asyncio.gather(ask, answered)
        seconds.append(time.time() - begin)
        for toast in await page.locator("[data-testid=toast-body], [role=alert]").all_inner_texts():
            errors.append(toast)

    try:
        await page.goto(address)
        await page.wait_for_selector("#verdict .card" if app == "needle" else "#box textarea")
        await (needle_user if app == "needle" else chat_user)(page, number, np.random.default_rng(number), end(), note)
    except Exception as error:
        there = await page.locator("#history, #verdict").all_inner_texts()
        errors.append(f"{type(error).__name__}: {str(error).splitlines()[0]} User {number} sees {there}.")
    finally:
        await page.context.close()


async def crowd(address, app, users, length, browser_path):
    from app_toy import flags
    from playwright.async_api import async_playwright

    seconds, errors, began = [], [], []

    def end():  # the clock starts when the first page is there
        if not began:
            began.append(time.time())
        return began[0] + length

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=browser_path, args=flags)
        await asyncio.gather(*(visit(browser, address, app, number, end, seconds, errors) for number in range(users)))
        await browser.close()
    return seconds, errors


def measure(app, users, length, browser):
    "A flat dict of what happened."
    import numpy as np
    from app_toy import free_port, start, wait_for

    process = start(app, "--port", free_port())
    try:
        address = wait_for(process, "http://").split()[1]
        asyncio.run(
            crowd(address, app, 1, min(5, length), browser)
        )  # warm, so that what is loaded once does not count as growth
        before = rested(process.pid)
        halves = []
        for _ in range(2):
            halves.append((*asyncio.run(crowd(address, app, users, length / 2, browser)), rested(process.pid)))
        seconds, errors, middle = halves[0][0] + halves[1][0], halves[0][1] + halves[1][1], halves[0][2]
        return dict(
            app=app,
            users=users,
            seconds=length,
            requests=len(seconds),
            errors=len(errors),
            first_errors=errors[:5],
            p50=round(float(np.percentile(seconds, 50)), 3) if seconds else None,
            p95=round(float(np.percentile(seconds, 95)), 3) if seconds else None,
            slowest=round(max(seconds), 3) if seconds else None,
            mib_before=round(before),
            mib_middle=round(middle),
            mib_after=round(halves[1][2]),
        )
    finally:
        process.terminate()
        process.wait(30)


def main():
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--app", choices=["needle", "chat"], default="needle")
    ask.add_argument("--users", type=int, default=8)
    ask.add_argument("--seconds", type=float, default=300)
    ask.add_argument("--json", type=Path)
    given = ask.parse_args()
    from rich.console import Console
    from rich.table import Table

    from longva.files import versions

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit(
            "There is no Chromium here, and the users are its pages: install it (Debian: apt-get install chromium)."
        )
    load, result = os.getloadavg()[0], measure(given.app, given.users, given.seconds, browser)
    table = Table("", given.app)
    for name, value in result.items():
        table.add_row(name, str(value))
    Console().print(table)
    result |= dict(
        cores=len(os.sched_getaffinity(0)), machine=platform.machine(), load_before=round(load, 1), **versions()
    )
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    if result["errors"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
