"""Chromium without a window, steered by the DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

#: Where Chromium is; None if it is not there.
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Seconds to wait for what comes for sure.
_PATIENCE = 60.0
_END = b"\0"
# The browser reads from descriptor 3 and writes to 4, where the other pipe may still be.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3]]
for number, end in enumerate(ends, start=3):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """A page of a browser.

    Args:
        to, back: Descriptors of the pipes to the browser, and from it.
    """

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = os.fdopen(to, "wb", 0), os.fdopen(back, "rb")
        self._number, self._session = 0, ""
        self.errors: list[str] = []
        """What scripts have thrown, and what the console was told of errors."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Performance", "HeapProfiler"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        """Asks the browser for something, and returns what it answers."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + _END)
        while True:
            told = self._read()
            if told.get("id") == self._number:
                assert "error" not in told, told["error"]
                return told["result"]

    def _read(self) -> Any:
        data = bytearray()
        while (byte := self._back.read(1)) != _END:
            assert byte, "the browser has ended"
            data += byte
        told = json.loads(data)
        if told.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(told["params"]["exceptionDetails"]))
        if told.get("method") == "Log.entryAdded":
            entry = told["params"]["entry"]
            self.errors += [entry["text"]] if entry["level"] == "error" else []
        return told

    def run(self, script: str) -> Any:
        """Returns the value of an expression, once it is there if it is promised."""
        found = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"waited in vain for {script}"
            time.sleep(0.02)

    def open(self, url: str) -> None:
        """Opens an address."""
        self.send("Page.navigate", url=url)
        place = url.partition("#")[0]
        self.until(f"document.readyState === 'complete' && location.href.startsWith({place!r})")

    def look(self, width: int, height: int = 900, scheme: str = "light") -> None:
        """Has a window of so many pixels, on paper of a colour."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def press(self, key: str) -> None:
        """Presses a key, such as Tab."""
        codes = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "Escape": 27}
        for kind in ("keyDown", "keyUp"):
            known = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            self.send("Input.dispatchKeyEvent", type=kind, **known)

    def picture(self, path: Path, whole: bool = True) -> None:
        """Writes what there is to see as a PNG file."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser() -> Iterator[Page]:
    """Runs Chromium with one page."""
    assert CHROMIUM is not None
    (own_in, to), (back, own_out) = os.pipe(), os.pipe()
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += ["--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        command = [sys.executable, "-c", _START, str(own_in), str(own_out), CHROMIUM, *flags]
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, pass_fds=(own_in, own_out), **quiet)
        os.close(own_in)
        os.close(own_out)
        try:
            yield Page(to, back)
        finally:
            process.kill()
            process.wait()
