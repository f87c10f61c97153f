"""Serve files with faults by a seeded pattern, and count how runs ended."""

import hashlib
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from tests.cloud.servers import FolderHandler

# (command, how it ended) -> number of runs; and fault -> number of occurrences.
ENDED: Counter[tuple[str, str]] = Counter()
MET: Counter[str] = Counter()

STATUSES = ("403", "429", "429 now", "429 later", "500", "503")
CUTS = ("cut", "cut, length too", "empty")
STALLS = ("silent", "headers only")
DROPS = ("drop", "drop in body")
FAULTS = (*STATUSES, *CUTS, *STALLS, *DROPS)
WRITE_FAULTS = ("403", "429", "500", "503", "silent", "drop", "drop after")
LATER = {"429 now": "0", "429 later": "3600"}
BYTE_EVERY_S = 0.05


class Pattern:
    """Which requests fail, and how: a function of seed, path and how often asked.

    Some paths are bad, a few times or for ever; all others are well. None is bad
    without a seed.
    """

    def __init__(
        self, seed: int | str | None, faults: tuple[str, ...] = FAULTS
    ) -> None:
        self._seed, chance = seed, random.Random(seed)
        self._share = 0 if seed is None else chance.choice([0.05, 0.2, 0.5])
        self._lasting = chance.choice([0, 0, 0.3])
        self._kinds = chance.sample(faults, chance.randint(1, 4))
        self._lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.last_fault: dict[str, str] = {}  # by path
        self.over = threading.Event()  # ends stalled answers

    def fault(self, method: str, path: str) -> str:
        """Return the fault for a request, "" for none; count it."""
        key = f"{method} {path}"
        with self._lock:
            self.asked[key] += 1
            times = self.asked[key]
        chance = random.Random(f"{self._seed} {key}")
        if chance.random() >= self._share:
            return ""
        lasts = chance.random() < self._lasting
        if times > (math.inf if lasts else chance.randint(1, 3)):
            return ""
        kind = random.Random(f"{self._seed} {key} {times}").choice(self._kinds)
        with self._lock:
            MET[kind] += 1
            self.last_fault[path] = kind
        return kind


class FlakyHandler(FolderHandler):
    """Serves a folder, gzipped files under their plain names; fails by a pattern.

    What is PUT is kept there, so that it stands for a bucket.
    """

    protocol_version = "HTTP/1.1"
    pattern = Pattern(None)

    def do_GET(self):
        self._fail_or("GET", self._give)

    def do_PUT(self):
        self._fail_or("PUT", self._take)

    def _fail_or(self, method, well):
        pattern = self.pattern
        path = self.path.split("?")[0]
        kind = pattern.fault(method, path)
        if not kind:
            well("")
        elif kind in STATUSES:
            self._refuse(kind)
        elif kind == "silent":
            pattern.over.wait(60)
        elif kind != "drop":
            well(kind)
        self.close_connection |= bool(kind)

    def _refuse(self, kind):
        self.send_response(int(kind[:3]))
        if kind in LATER:
            self.send_header("Retry-After", LATER[kind])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _give(self, kind):
        if "list-type=2" in self.path:
            self._list()
            return
        path = Path(self.translate_path(self.path))
        zipped = path.with_name(path.name + ".gz")
        found = next((p for p in (path, zipped) if p.is_file()), None)
        if found is None:
            self.send_error(404)
            return
        whole = found.read_bytes()
        body = b"" if kind == "empty" else whole
        if kind.startswith("cut") or kind == "drop in body":
            body = whole[: len(whole) * 2 // 3]
        told = len(body) if kind in ("empty", "cut, length too") else len(whole)
        self.send_response(200)
        if found == zipped:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("ETag", f'"{hashlib.md5(whole).hexdigest()}"')
        self.send_header("Content-Length", str(told))
        self.end_headers()
        if kind == "headers only":
            self.pattern.over.wait(60)
        elif kind == "bytes now and then":
            self._now_and_then(whole)
        else:
            self.wfile.write(body)

    def _list(self):
        """List all files of the bucket below a prefix, as S3 does."""
        bucket, _, query = self.path.partition("?")
        (prefix,) = parse_qs(query).get("prefix", [""])
        root = Path(self.translate_path(bucket))
        files = [p for p in sorted(root.rglob("*")) if p.is_file()]
        keys = [
            key for p in files if (key := str(p.relative_to(root))).startswith(prefix)
        ]
        found = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in keys)
        body = f"<L><IsTruncated>false</IsTruncated>{found}</L>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _take(self, kind):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = Path(self.translate_path(self.path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        if kind != "drop after":
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _now_and_then(self, content):
        pattern = self.pattern
        for at in range(len(content)):
            if pattern.over.wait(BYTE_EVERY_S):
                return
            try:
                self.wfile.write(content[at : at + 1])
            except OSError:  # given up
                return


class Server:
    """The server's address, and its pattern."""

    def __init__(self, url: str, handler: type[FlakyHandler]) -> None:
        self.url, self._handler = url, handler

    @contextmanager
    def failing(self, pattern: Pattern) -> Iterator[Pattern]:
        """Fail by a pattern; nothing fails before and after."""
        self._handler.pattern = pattern
        try:
            yield pattern
        finally:
            self._handler.pattern = Pattern(None)
            pattern.over.set()


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Print nothing about connections that clients closed."""


@contextmanager
def flaky_server(folder: Path) -> Iterator[Server]:
    """A server over a folder, in which nothing fails yet."""
    handler = type("Handler", (FlakyHandler,), {})
    made = partial(handler, directory=str(folder))
    with _QuietServer(("127.0.0.1", 0), made) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{server.server_port}", handler)
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def timed(limit_s: float) -> Iterator[None]:
    """Fail if the `with` block takes longer than a limit."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < limit_s
