"""A headless Chromium over its DevTools protocol, by the pipe that it offers: no driver, no port, no package.

https://chromedevtools.github.io/devtools-protocol: messages are JSON, each ended by a zero byte, which the browser
reads from its file descriptor 3 and writes to 4.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LIMIT = 120.0  # seconds for one answer


def chromium() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One tab. ``problems``: what it has complained of so far: errors on the console, exceptions, requests."""

    def __init__(self, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()  # to it, from it
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        words += [f"--user-data-dir={profile}", "--disable-background-networking", "--force-device-scale-factor=1"]
        command = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", command, "-", str(ours[0]), str(theirs[1]), str(chromium()), *words, "about:blank"],
            pass_fds=(ours[0], theirs[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.to, self.of, self.rest, self.count, self.session = ours[1], theirs[0], b"", 0, ""
        self.problems: list[str] = []
        self.requests: list[str] = []

    def __enter__(self) -> "Browser":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.to)
        os.close(self.of)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        os.write(self.to, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        for answer in self.messages():
            if answer.get("id") == self.count:
                assert "error" not in answer, answer["error"]
                return answer["result"]
        raise AssertionError(f"no answer to {method} within {LIMIT:.0f} s")

    def messages(self) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline and select.select([self.of], [], [], LIMIT)[0]:
            read = os.read(self.of, 1 << 20)
            assert read, "the browser has ended"
            *whole, self.rest = (self.rest + read).split(b"\0")
            for text in whole:
                message = json.loads(text)
                self.note(message)
                yield message

    def note(self, message: dict[str, Any]) -> None:
        seen = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(str(seen["exceptionDetails"].get("exception", seen))[:500])
            case "Runtime.consoleAPICalled" if seen["type"] in ("error", "warning", "assert"):
                self.problems.append(str([each.get("value", each) for each in seen["args"]])[:500])
            case "Log.entryAdded" if seen["entry"]["level"] in ("error", "warning"):
                self.problems.append(seen["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(seen["request"]["url"][:100])

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.size(width, height)
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait_for("document.readyState === 'complete' && !!document.querySelector('.plot .main-svg')")

    def size(self, width: int, height: int) -> None:
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression; that of a promise once it is there."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not self.ask(expression):
            assert time.monotonic() < deadline, f"still not so after {seconds} s: {expression}"
            time.sleep(0.05)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def picture(self, file: Path, *, whole: bool = True, scale: float = 1) -> None:
        """A screenshot: of the whole page, or of what is seen of it."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"clip": {**size, "scale": scale}} if whole else {}
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **clip)
        file.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    with Browser(profile) as opened:
        yield opened
