"""Headless Chromium by way of chromedriver, in the words of the WebDriver protocol.

Source: https://www.w3.org/TR/webdriver2/ and chromedriver's ``goog/cdp/execute`` and ``se/log``.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.waiting import PATIENCE_S, wait_for

CHROMIUM = (
    shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
)
DRIVER = shutil.which("chromedriver")
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
_LOGS = {"browser": "ALL", "performance": "ALL"}


class Browser:
    """One window of a browser session."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, page: Path) -> None:
        """Load a file."""
        self._post("url", url=page.as_uri())

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the view in CSS pixels, and the reader's colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, script: str) -> Any:
        """Return what a function body returns; it runs beside the page's own policy."""
        return self._post("execute/sync", script=script, args=[])

    def press(self, *keys: str) -> None:
        """Press and release keys one after the other."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def screenshot(self, *, whole: bool = False) -> bytes:
        """Return a PNG of the view, or of the whole page."""
        found = self.devtools("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Return the entries of ``browser`` (the console) or ``performance`` since the last
        call.
        """
        found: list[dict[str, Any]] = self._post("se/log", type=kind)
        return found

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self._post("goog/cdp/execute", cmd=command, params=parameters)

    def _post(self, path: str, **body: Any) -> Any:
        return _ask(f"{self._session}/{path}", body)


@contextmanager
def browser() -> Iterator[Browser]:
    """Start chromedriver and one headless window; end both."""
    assert CHROMIUM, "there is no Chromium"
    assert DRIVER, "there is no chromedriver"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    root = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _is_up(f"{root}/status"), "the browser's driver", driver)
        options = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": _ARGUMENTS},
            "goog:loggingPrefs": _LOGS,
        }
        session = _ask(f"{root}/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]
        yield Browser(f"{root}/session/{session}")
        _send("DELETE", f"{root}/session/{session}", None)
    finally:
        driver.terminate()
        driver.wait()


def _is_up(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=PATIENCE_S).close()
    except OSError:
        return False
    return True


def _ask(url: str, body: dict[str, Any]) -> Any:
    return _send("POST", url, json.dumps(body).encode())


def _send(method: str, url: str, body: bytes | None) -> Any:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.read().decode()[:500]}") from error
