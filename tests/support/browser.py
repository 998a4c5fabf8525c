"""A headless Chromium, driven over a pipe by the DevTools protocol, without a package."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60

# Moves the pipe to descriptors 3 and 4, where the browser expects it; preexec_fn would fork, of which JAX warns
_PIPE_TO_3_AND_4 = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Page:
    """A page that records its console messages and network requests."""

    def __init__(self, ask: int, answer: int):
        self._ask, self._answer, self._number, self._read = ask, answer, 0, b""
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: Any) -> dict:
        return self._send(method, self._session, **given)

    def open(self, path: Path, width: int, height: int, *, dark: bool = False, touch: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self._loaded = False
        self.call("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._next()
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str) -> Any:
        """Evaluates an expression, awaits it and returns its value."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def drag(self, path: list[list[float]], *, touch: bool = False) -> None:
        """Presses at the first point, moves along the others and releases; a path of one point is a click."""
        if touch:
            for kind, places in [("touchStart", path[:1]), *(("touchMove", [at]) for at in path[1:]), ("touchEnd", [])]:
                self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y} for x, y in places])
            return
        steps = [("mousePressed", path[0]), *(("mouseMoved", at) for at in path[1:]), ("mouseReleased", path[-1])]
        for kind, (x, y) in steps:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def click(self, script: str) -> None:
        """Clicks the middle of the element that an expression gives."""
        box = f"(box => [box.left + box.width / 2, box.top + box.height / 2])((e => (e.scrollIntoView({{ block: 'center' }}), e.getBoundingClientRect()))({script}))"
        self.drag([self.run(box)])

    def save_downloads(self, directory: Path) -> None:
        self._send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(directory))

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _send(self, method: str, session: str | None = None, **given: Any) -> dict:
        self._number += 1
        number = self._number
        asked = {"id": number, "method": method, "params": given} | ({"sessionId": session} if session else {})
        os.write(self._ask, json.dumps(asked).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self._read:
            if not (more := os.read(self._answer, 1 << 20)):
                raise AssertionError("the browser has exited")
            self._read += more
        first, self._read = self._read.split(b"\0", 1)
        answer = json.loads(first)
        method, given = answer.get("method"), answer.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(given["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            self.problems.append(str(given["args"])[:500])
        elif method == "Log.entryAdded":
            self.problems.append(given["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        return answer


@contextmanager
def browsing(directory: Path) -> Iterator[Page]:
    """Opens a page in a new Chromium, which must be installed (Debian: apt-get install chromium)."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    assert program is not None, f"none of {', '.join(NAMES)} is installed; apt-get install chromium"
    its_input, ask = os.pipe()
    answer, its_output = os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    # A frame in a sandbox stays in the process of its page, whose messages are recorded
    flags += ["--disable-features=IsolateSandboxedIframes"]
    flags += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={directory / 'profile'}"]

    given = [str(its_input), str(its_output), "timeout", str(SECONDS), program, *flags]
    chromium = subprocess.Popen(
        [sys.executable, "-c", _PIPE_TO_3_AND_4, *given],
        pass_fds=(its_input, its_output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_input)
    os.close(its_output)
    try:
        yield Page(ask, answer)
    finally:
        os.close(ask)
        chromium.terminate()
        chromium.wait(20)
        os.close(answer)
