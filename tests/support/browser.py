"""A headless Chromium, driven over a pipe by its own protocol, with no package between."""

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

# Where the browser looks for its pipe. Not by preexec_fn, which forks, and JAX warns of that
_ONTO_3_AND_4 = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One page; keeps what it logs and what it asks of the network."""

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
        """The value of an expression, awaited."""
        told = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise AssertionError(told["exceptionDetails"])
        return told["result"].get("value")

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        told = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(told["data"]))

    def _send(self, method: str, session: str | None = None, **given: Any) -> dict:
        self._number += 1
        number = self._number
        asked = {"id": number, "method": method, "params": given} | ({"sessionId": session} if session else {})
        os.write(self._ask, json.dumps(asked).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == number:
                if "error" in told:
                    raise AssertionError(f"{method}: {told['error']}")
                return told["result"]

    def _next(self) -> dict:
        while b"\0" not in self._read:
            if not (more := os.read(self._answer, 1 << 20)):
                raise AssertionError("the browser has ended")
            self._read += more
        first, self._read = self._read.split(b"\0", 1)
        told = json.loads(first)
        method, given = told.get("method"), told.get("params", {})
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
        return told


@contextmanager
def browsing(directory: Path) -> Iterator[Page]:
    """A page of a fresh Chromium, which must be installed (Debian: apt-get install chromium)."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    assert program is not None, f"none of {', '.join(NAMES)} is installed; apt-get install chromium"
    read_by_it, ask = os.pipe()
    answer, written_by_it = os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    flags += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={directory / 'profile'}"]

    given = [str(read_by_it), str(written_by_it), "timeout", str(SECONDS), program, *flags]
    chromium = subprocess.Popen(
        [sys.executable, "-c", _ONTO_3_AND_4, *given],
        pass_fds=(read_by_it, written_by_it),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_by_it)
    os.close(written_by_it)
    try:
        yield Page(ask, answer)
    finally:
        os.close(ask)
        chromium.terminate()
        chromium.wait(20)
        os.close(answer)
