"""A headless Chromium driven over WebDriver's plain HTTP: Debian's chromium and chromium-driver, nothing from pip."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Browser:
    """One window."""

    def __init__(self, address: str, session: str) -> None:
        self._base = f"{address}/session/{session}"

    def go(self, page: Path, after: str = "") -> None:
        """Open a file and wait until the page says that it is ready."""
        _call(f"{self._base}/url", {"url": page.resolve().as_uri() + after})
        self.wait("document.body.dataset.ready !== undefined")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until the JavaScript `condition` holds; AssertionError after `seconds`."""
        end = time.monotonic() + seconds
        while not self.run(f"return !!({condition})"):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.05)

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a JavaScript function returns."""
        return _call(f"{self._base}/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, *keys: str) -> None:
        """Type keys, one after another."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        _call(f"{self._base}/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def size(self, width: int, height: int) -> None:
        """Make the window this large."""
        _call(f"{self._base}/window/rect", {"width": width, "height": height})

    def screenshot(self) -> bytes:
        """PNG of what is seen."""
        return base64.b64decode(_call(f"{self._base}/screenshot"))

    def complaints(self) -> list[str]:
        """Errors of the console since the last call, missing pictures apart."""
        found = _call(f"{self._base}/se/log", {"type": "browser"})
        return [
            line["message"]
            for line in found
            if line["level"] == "SEVERE" and "ERR_FILE_NOT_FOUND" not in line["message"]
        ]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A window with the empty `profile` folder; the driver and the browser end with the block."""
    driver = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert driver.stdout is not None
    try:
        port = next(line.split()[-1].rstrip(".") for line in driver.stdout if "successfully on port" in line)
        address = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        # The driver itself gives up after a minute on a busy machine, and takes the half-started browser with it.
        session = _call(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}}, seconds=150)["sessionId"]
        try:
            yield Browser(address, session)
        finally:
            _call(f"{address}/session/{session}", method="DELETE", seconds=150)
    finally:
        driver.terminate()
        driver.wait(10)
        driver.stdout.close()


def _call(url: str, body: dict[str, Any] | None = None, method: str | None = None, seconds: float = 60) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=seconds) as reply:
            return json.load(reply)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.read().decode()[:500]}") from None
