"""Headless Chromium for tests of the report page, driven over its debugging pipe.

No driver and no client library: Chromium reads commands of the DevTools protocol from
file descriptor 3 and writes answers and events to 4, each a line of JSON that ends with
a zero byte.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 120  # a machine may be busy
# Events that say that something is wrong with the page.
_COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded")


def find_chromium():
    """The path of a Chromium; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in a Chromium of its own; to be used in a `with`."""

    def __init__(self, width=1280, height=800, dark=False):
        self._profile = tempfile.TemporaryDirectory(
            prefix="metroem-chromium-", ignore_cleanup_errors=True
        )
        flags = [
            *("--headless=new", "--no-sandbox", "--disable-gpu"),
            *("--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"),
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}",
            "--disable-background-networking",
            f"--window-size={width},{height}",
        ]
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        self._process = subprocess.Popen(
            # The shell gives the pipes the numbers that Chromium expects; bash,
            # since sh knows no descriptor above 9.
            [
                *("bash", "-c", f'exec "$0" "$@" 3<&{commands} 4>&{answers}'),
                *(find_chromium(), *flags, "about:blank"),
            ],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands)
        os.close(answers)
        self._number, self._buffer, self._session = 0, b"", None
        self.console, self.requests, self._loaded = [], [], 0
        try:
            self._attach(width, height, dark)
        except BaseException:
            self.close()
            raise

    def _attach(self, width, height, dark):
        targets = self._send("Target.getTargets")["targetInfos"]
        (target,) = (t["targetId"] for t in targets if t["type"] == "page")
        attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self._send(f"{domain}.enable")
        self._send(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1},
            mobile=False,
        )
        self._send("Emulation.setFocusEmulationEnabled", enabled=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End Chromium and all processes that it started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def load(self, path: Path):
        """Open a file anew and wait until it is loaded; forget what was before."""
        # Another page first, else a file that is open already only loses its hash.
        for url in ("about:blank", path.absolute().as_uri()):
            self.console.clear()
            self.requests.clear()
            before = self._loaded
            self._send("Page.navigate", url=url)
            self._wait_for(lambda before=before: self._loaded > before, url)

    def run(self, expression):
        """The value of an expression in the page; an error there is raised here."""
        answer = self._send(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression):
        """Wait until an expression holds."""
        self._wait_for(lambda: self.run(f"Boolean({expression})"), expression)

    def press(self, key):
        """Press and release a key, as the page sees it."""
        for kind in ("keyDown", "keyUp"):
            self._send("Input.dispatchKeyEvent", type=kind, key=key)

    def mouse(self, kind, x, y, **more):
        """Send the page an event of the mouse, such as mousePressed."""
        self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def screenshot(self, path: Path):
        """Save what the window shows."""
        data = self._send("Page.captureScreenshot")["data"]
        path.write_bytes(base64.b64decode(data))

    def _wait_for(self, condition, what):
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < end, f"waited {TIMEOUT_S} s for {what}"
            time.sleep(0.01)
            self._read(0)

    def _send(self, method, **parameters):
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            for answer in self._read(1):
                if answer.get("id") == number:
                    assert "error" not in answer, (method, answer["error"])
                    return answer["result"]
        raise AssertionError(f"no answer to {method} in {TIMEOUT_S} s")

    def _read(self, seconds):
        """Messages that came; events among them are noted."""
        if select.select([self._from], [], [], seconds)[0]:
            self._buffer += os.read(self._from, 1 << 20)
        *whole, self._buffer = self._buffer.split(b"\0")
        messages = [json.loads(text) for text in whole]
        for message in messages:
            self._note(message)
        return messages

    def _note(self, message):
        method, parameters = message.get("method"), message.get("params")
        if method == "Page.loadEventFired":
            self._loaded += 1
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method in _COMPLAINTS or (
            method == "Runtime.consoleAPICalled"
            and parameters["type"] in ("error", "warning", "assert")
        ):
            self.console.append(parameters)
