"""Storage that fails by a seeded pattern: whole and equal in the end, or a name.

The table at the end is of these: python -m pytest tests/cloud/test_patterns.py -m ""
"""

import re
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cloudfiles import reset_connection_pools
from cloudvolume import CloudVolume

import download_field
import download_image
from metroem.errors import DatasetError, PyramidError
from metroem.io import cloud_retry, volume
from metroem.models.module_folders import fetch, init_pyramid
from tests.cloud import flaky
from tests.cloud.flaky import (
    CUTS,
    ENDED,
    STALLS,
    WRITE_FAULTS,
    Pattern,
    flaky_server,
    timed,
)
from tests.cloud.servers import KEYS
from tests.cloud.test_contents import assert_same
from tests.export.sets import export, make_sets
from tests.volumes import make_volume

# A run takes a few times this limit. A busy machine may be silent for as long: then a
# sound file is named, which the resumed run, with the usual limit, reads.
TIMEOUT_S, LONGEST_S = 0.3, 60
PLACE = "--x_offset 8 --y_offset 16 --z_start 1 --z_end 3".split()
IMAGE = "--mip 0 --patch_size 48".split()
FIELD = "--src_mip 1 --dst_mip 0 --patch_size 40".split()
COMMANDS = {
    "images, http": (download_image, "raw", IMAGE),
    "images, http, gzip": (download_image, "gzip", IMAGE),
    "images, http, jpeg": (download_image, "jpeg", IMAGE),
    "fields, http": (download_field, "field", FIELD),
    "images, s3": (download_image, "raw", IMAGE),
    "fields, s3": (download_field, "field", FIELD),
}
NUM_SEEDS = {"downloads": 4, "exports": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Image volumes, each with one chunk missing, and a field volume."""
    folder = tmp_path_factory.mktemp("bucket") / "vols"
    chance = np.random.default_rng(0)
    grey = chance.integers(1, 255, (4, 1, 64, 96), dtype=np.uint8)
    for name, how in (
        ("raw", {}),
        ("gzip", {"compress": "gzip"}),
        ("jpeg", {"encoding": "jpeg"}),
    ):
        write_images(folder / name, grey, **how)
        (gone,) = (folder / name).glob("*/0-32_32-64_1-2*")
        gone.unlink()
    fields = chance.uniform(3, 9, (4, 2, 64, 96)).astype(np.float32)
    make_volume(folder / "field", [fields, fields[:, :, ::2, ::2]], chunk=(32, 32, 1))
    return folder


def write_images(folder, grey, compress=False, encoding="raw"):
    info = CloudVolume.create_new_info(
        **{"num_channels": 1, "layer_type": "image", "data_type": "uint8"},
        **{"encoding": encoding, "resolution": (4, 4, 40), "voxel_offset": (0, 0, 0)},
        **{"chunk_size": (32, 32, 1), "volume_size": (*grey.shape[2:], len(grey))},
    )
    made = CloudVolume(f"file://{folder}", info=info, compress=compress, progress=False)
    made.commit_info()
    made[:, :, :] = grey.transpose(2, 3, 0, 1)


@pytest.fixture(scope="module")
def server(folder):
    """A server over the folder; clients have a short time limit."""
    with flaky_server(folder.parent) as server, pytest.MonkeyPatch.context() as patched:
        patched.delenv("AWS_SESSION_TOKEN", raising=False)
        for name, value in {**KEYS, "AWS_ENDPOINT_URL_S3": server.url}.items():
            patched.setenv(name, value)
        with impatient():  # boto3 keeps its own for each client
            cloud_retry.set_boto_timeouts()
        reset_connection_pools()
        yield server
    cloud_retry.set_boto_timeouts()
    reset_connection_pools()


@contextmanager
def impatient(seconds=TIMEOUT_S):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cloud_retry, "TIMEOUT_S", seconds)
        yield


def download(server, what, dst):
    """Run a download of `COMMANDS` as its script does."""
    script, name, flags = COMMANDS[what]
    root = "s3://vols" if "s3" in what else f"precomputed://{server.url}/vols"
    path = f"{root}/{name}"
    script.main(["--cv_path", path, "--dst_folder", str(dst), *flags, *PLACE])


def names_the_place(message, pattern, root):
    """Whether an error names a requested path, and the last status it got."""
    for path in {key.split(" ")[1] for key in pattern.asked}:
        if re.search(re.escape(root + path) + r"(?![\w./-])", message):
            status = pattern.last_fault.get(path, "")[:3]
            told = not status.isdigit() or status in message
            return told or "imed out" in message or "imeout" in message
    return False


def ends(what, pattern, call, root):
    """How a run ends under a pattern: complete, or failed with a name.

    Raises:
        Whatever else it raises.
    """
    ended = "other"
    try:
        with timed(LONGEST_S), impatient():
            try:
                call()
                ended = "complete"
            except DatasetError as error:
                assert names_the_place(str(error), pattern, root), (
                    error,
                    pattern.last_fault,
                )
                ended = "failed, named"
    finally:
        ENDED[what, ended] += 1
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("what", COMMANDS)
def test_downloads_end_whole_and_equal_or_name_what_failed(tmp_path, server, what):
    root = "s3:/" if "s3" in what else server.url
    download(server, what, tmp_path / "clean")
    for seed in range(NUM_SEEDS["downloads"]):
        dst = tmp_path / str(seed)
        with server.failing(Pattern(f"{what} {seed}")) as pattern:
            ended = ends(what, pattern, partial(download, server, what, dst), root)
        if ended != "complete":
            assert not [*dst.glob("*.h5")]
            download(server, what, dst)
        assert_same(tmp_path / "clean", dst)


@pytest.mark.slow
def test_exports_are_written_whole_or_name_what_failed(tmp_path, server, folder):
    make_sets(tmp_path / "sets", num_pairs=2)
    export(tmp_path / "sets", tmp_path / "local")
    for seed in range(NUM_SEEDS["exports"]):
        dst = f"s3://vols/out{seed}"
        with server.failing(Pattern(seed, WRITE_FAULTS)) as pattern:
            call = partial(export, tmp_path / "sets", dst)
            ended = ends("exports, s3", pattern, call, "s3:/")
        if ended != "complete":
            export(tmp_path / "sets", dst)
        assert written(folder / f"out{seed}") == written(tmp_path / "local")


def written(folder):
    """Read all files by path, except the provenance, which contains the command."""
    files = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    assert Path("provenance") in files
    return {k: p.read_bytes() for k, p in files.items() if k.name != "provenance"}


class Always(Pattern):
    """Pattern with one fault for all requests of some paths."""

    def __init__(self, kind, paths, times=1000):
        super().__init__(None)
        self._kind, self._paths, self._left = kind, paths, times

    def fault(self, method, path):
        self.asked[f"{method} {path}"] += 1
        if self._paths not in path or self._left == 0:
            return ""
        self._left -= 1
        self.last_fault[path] = self._kind
        return self._kind


def failure(server, what, dst, pattern):
    """Run a download that fails; return its message, which must name the file."""
    root = "s3:/" if "s3" in what else server.url
    with server.failing(pattern), timed(LONGEST_S), pytest.raises(DatasetError) as told:
        download(server, what, dst)
    assert names_the_place(str(told.value), pattern, root)
    return str(told.value)


@pytest.mark.parametrize("what", ["images, http", "fields, http", "images, s3"])
def test_a_chunk_that_may_not_be_read_is_not_black(tmp_path, server, what):
    message = failure(server, what, tmp_path, Always("403", "_1-2"))
    assert "403" in message and "your credentials are right" in message


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("what", [what for what in COMMANDS if "http" in what])
def test_a_chunk_that_was_cut_short_is_not_read(tmp_path, server, what, kind):
    with impatient():
        failure(server, what, tmp_path, Always(kind, "_1-2"))


@pytest.mark.parametrize("kind", STALLS)
@pytest.mark.parametrize("what", ["images, http", "images, s3"])
def test_what_stalls_is_given_up(tmp_path, server, what, kind):
    with impatient():
        message = failure(server, what, tmp_path, Always(kind, "_1-2"))
    assert "imed out" in message or "timeout" in message


def test_what_is_slow_but_comes_is_waited_for(tmp_path, server, monkeypatch):
    # 1024 bytes take 2.5 s or more: the limit is for each wait, not for all.
    monkeypatch.setattr(flaky, "BYTE_EVERY_S", 0.0025)
    pattern = Always("bytes now and then", "_1-2", times=1)
    with impatient(1.0), server.failing(pattern):
        download(server, "images, http", tmp_path)
    assert max(pattern.asked.values()) == 1


def test_a_server_is_asked_again_when_it_says(tmp_path, server, monkeypatch):
    monkeypatch.setitem(flaky.LATER, "429 later", "1")
    started = time.monotonic()
    with server.failing(Always("429 later", "_1-2", times=1)):
        download(server, "images, http", tmp_path)
    assert time.monotonic() - started > 1


def test_a_server_that_says_much_later_is_not_waited_for(tmp_path, server):
    message = failure(server, "images, http", tmp_path, Always("429 later", "_1-2"))
    assert "give the same command again in 3600 s, as it asks" in message


def test_a_chunk_that_is_not_there_is_black_only_where_that_is_asked_for(
    tmp_path, server, monkeypatch
):
    download(server, "images, http", tmp_path / "black")
    monkeypatch.setitem(volume._OPTIONS, "fill_missing", False)
    missing = f"{server.url}.*/0-32_32-64_1-2: this chunk was written and is missing"
    with pytest.raises(DatasetError, match=missing):
        download(server, "images, http", tmp_path / "refused")


@pytest.mark.parametrize("kind", ["cut, length too", "empty", "403"])
def test_an_info_file_that_does_not_come_whole_is_named(tmp_path, server, kind):
    assert "info" in failure(server, "images, http", tmp_path, Always(kind, "info"))


@pytest.mark.parametrize("kind", ["silent", "403", "cut, length too"])
def test_a_pyramid_that_does_not_come_whole_is_not_kept(tmp_path, server, folder, kind):
    if not (folder / "pyramid").exists():
        init_pyramid(folder / "pyramid", [1])
    with (
        impatient(),
        server.failing(Always(kind, "model_spec")),
        timed(LONGEST_S),
        pytest.raises(PyramidError, match="s3://vols/pyramid: cannot be read"),
    ):
        fetch("s3://vols/pyramid", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    fetch("s3://vols/pyramid", tmp_path / "fetched")
    name = "0_mip1in_correlation/model/model_spec.json"
    there, here = folder / "pyramid" / name, tmp_path / "fetched" / name
    assert here.read_bytes() == there.read_bytes()
