"""Start storage servers on this machine: S3, web servers, and faulty ones."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3

KEYS = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret"}
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


class FolderHandler(SimpleHTTPRequestHandler):
    """Serves a folder as a web server does, and as S3 does a bucket.

    Attributes:
        bad: what it does instead, for paths with `bad_for` in them: "403", "drop"
            the connection, or "hang".
        ranges: what it does when a part of a file is asked for: "ignored" gives the
            whole file, as web servers may; "given", but to those who take gzip, as
            servers do that compress; "short" gives half of the part.
        keys: access keys that requests were signed with.
    """

    bad = ""
    bad_for = ""
    ranges = "ignored"
    released = threading.Event()
    keys: set[str] = set()

    def do_GET(self):
        if "Credential=" in (signed := self.headers.get("Authorization", "")):
            self.keys.add(signed.split("Credential=")[1].split("/")[0])
        if not self.bad or self.bad_for not in self.path:
            packs = "gzip" in self.headers.get("Accept-Encoding", "")
            if "Range" in self.headers and self.ranges != "ignored" and not packs:
                self._give_range()
            else:
                super().do_GET()
        elif self.bad == "403":
            self.send_error(403)
        elif self.bad == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.released.wait(60)
            self.close_connection = True

    do_PUT = do_GET

    def _give_range(self):
        path = Path(self.translate_path(self.path.split("?")[0]))
        if not path.is_file():
            self.send_error(404)
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = path.read_bytes()[int(first) : int(last) + 1]
        if not part:
            self.send_error(416)
            return
        if self.ranges == "short":
            part = part[: len(part) // 2]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def send_error(self, code, message=None, explain=None):
        names = {403: "AccessDenied", 404: "NoSuchKey", 416: "InvalidRange"}
        body = _ERROR.format(names.get(code, "Error"), message).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@contextmanager
def serving(
    folder: Path, bad: str = "", bad_for: str = "", ranges: str = "ignored"
) -> Iterator[type]:
    """A web server over a folder; its handler's class has `url` and `keys`."""
    attributes = {"bad": bad, "bad_for": bad_for, "keys": set(), "ranges": ranges}
    attributes["released"] = threading.Event()
    handler = type("Handler", (FolderHandler,), attributes)
    at = ("127.0.0.1", 0)
    with ThreadingHTTPServer(at, partial(handler, directory=str(folder))) as server:
        handler.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield handler
        finally:
            handler.released.set()
            server.shutdown()
            thread.join()


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's S3 server; its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


def s3_client(url: str):
    return boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )


def upload(url: str, folder: Path, bucket: str) -> None:
    """A new bucket with all files of a folder."""
    client = s3_client(url)
    client.create_bucket(Bucket=bucket)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        key = str(path.relative_to(folder))
        client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
