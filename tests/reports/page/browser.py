"""A real browser, driven through its debugging protocol: what a page shows, asks for and complains of."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """Where Chromium is, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Seen(NamedTuple):
    """What was seen of a page.

    Attributes:
        complaints: What the console said, and exceptions.
        requests: Every address that was asked for, the page's own among them, and that was not refused by its policy.
        answers: Of the expressions.
        picture: A PNG of the whole page.
        pdf: The page as printed.
    """

    complaints: list[str]
    requests: list[str]
    answers: list[Any]
    picture: bytes
    pdf: bytes


def look(page: Path, folder: Path, *expressions: str, width: int = 375, height: int = 800, **media: str) -> Seen:
    """Open a page.

    Args:
        page: The file.
        folder: For the browser's own files.
        *expressions: JavaScript whose values are wanted; promises are waited for.
        width: Of the screen, in CSS pixels; below 600 it is a phone's.
        height: The same.
        **media: ``media="print"``, ``scheme="dark"``.
    """
    program = find()
    assert program is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars"]
    flags += ["--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"]
    with subprocess.Popen(
        [program, *flags, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            address = next(line.split()[-1] for line in process.stderr if "DevTools listening on" in line)
            return asyncio.run(_look(address, page, expressions, width, height, media))
        finally:
            process.kill()


async def _look(address: str, page: Path, expressions, width: int, height: int, media: dict[str, str]) -> Seen:
    numbers, answers = itertools.count(1), {}
    complaints: list[str] = []
    requests: dict[str, str] = {}
    loaded = asyncio.Event()
    port = address.split("/")[2]
    async with aiohttp.ClientSession() as http:
        async with http.get(f"http://{port}/json/list") as reply:
            target = next(each for each in await reply.json() if each["type"] == "page")
        async with http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:

            async def listen() -> None:
                async for message in socket:
                    told = message.json()
                    what, about = told.get("method"), told.get("params", {})
                    if "id" in told:
                        answers.pop(told["id"]).set_result(told.get("result", told.get("error")))
                    elif what == "Network.requestWillBeSent":
                        requests[about["requestId"]] = about["request"]["url"]
                    elif what == "Network.loadingFailed" and about.get("blockedReason") == "csp":
                        requests.pop(about["requestId"])
                    elif what == "Page.loadEventFired":
                        loaded.set()
                    elif what in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                        complaints.append(str(about))

            async def ask(method: str, **params: Any) -> Any:
                number = next(numbers)
                answers[number] = asyncio.get_running_loop().create_future()
                await socket.send_json({"id": number, "method": method, "params": params})
                return await asyncio.wait_for(answers[number] if number in answers else asyncio.sleep(0), 120)

            listener = asyncio.create_task(listen())
            for domain in ("Network", "Page", "Runtime", "Log"):
                await ask(f"{domain}.enable")
            await ask(
                "Emulation.setDeviceMetricsOverride",
                width=width, height=height, deviceScaleFactor=1.5, mobile=width < 600,
            )  # fmt: skip
            scheme = [{"name": "prefers-color-scheme", "value": media.get("scheme", "light")}]
            await ask("Emulation.setEmulatedMedia", media=media.get("media", ""), features=scheme)
            await ask("Page.navigate", url=page.absolute().as_uri())
            await asyncio.wait_for(loaded.wait(), 120)
            values = []
            for expression in expressions:
                told = await ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
                assert "exceptionDetails" not in told, told
                values.append(told["result"].get("value"))
            shot = await ask("Page.captureScreenshot", captureBeyondViewport=True)
            pdf = await ask("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
            listener.cancel()
    return Seen(complaints, [*requests.values()], values, base64.b64decode(shot["data"]), base64.b64decode(pdf["data"]))


if __name__ == "__main__":  # python tests/reports/page/browser.py report.html picture.png [width] [light|dark|print]
    source, target, *rest = sys.argv[1:]
    wanted, style = int(rest[0]) if rest else 1280, rest[1] if len(rest) > 1 else "light"
    chosen = {"media": "print"} if style == "print" else {"scheme": style}
    profile = Path(target).absolute().with_suffix(".profile")
    try:
        Path(target).write_bytes(look(Path(source), profile, width=wanted, height=900, **chosen).picture)
    finally:
        shutil.rmtree(profile, ignore_errors=True)
