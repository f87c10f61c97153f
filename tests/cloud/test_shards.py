"""Test shards and compressed chunks on web servers and S3: read right, or named."""

import socket

import numpy as np
import pytest
from cloudfiles import compression, reset_connection_pools

from metroem.errors import DatasetError
from metroem.io.volume import Volume
from tests.cloud.servers import KEYS, FolderHandler, serving
from tests.sharded import SHAPE, WHOLE, make_sharded, tissue
from tests.volumes import make_volume


@pytest.fixture(params=["http", "s3"])
def opened(request, tmp_path, monkeypatch):
    """Return a function that opens a volume of tmp_path/bucket behind a server."""
    servers = []

    def volume(name, **how):
        server = serving(tmp_path, **how)
        servers.append(server)
        url = server.__enter__().url
        if request.param == "http":
            return Volume(f"precomputed://{url}/bucket/{name}")
        for key, value in {**KEYS, "AWS_ENDPOINT_URL_S3": url}.items():
            monkeypatch.setenv(key, value)
        reset_connection_pools()  # which keep the address
        return Volume(f"s3://bucket/{name}")

    yield volume
    for server in servers:
        server.__exit__(None, None, None)
    if request.param == "s3":
        reset_connection_pools()


def read(volume):
    return volume.read(WHOLE, range(SHAPE[0]))


def refusal(volume):
    with pytest.raises(DatasetError) as told:
        read(volume)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("packing", ["raw", "gzip"])
def test_shards_are_read_as_they_were_written(tmp_path, opened, packing):
    data = tissue()
    absent = ((1, 2, 0),)
    folder = tmp_path / "bucket" / "em"
    make_sharded(folder, [data], packing=packing, absent=absent, bits=(0, 0, 1))
    data[:2, :, 16:32, 32:48] = 0
    (folder / "4_4_40" / "0.shard").unlink()
    data[:, :, :16] = data[:, :, 32:] = 0  # every other chunk along x
    np.testing.assert_array_equal(read(opened("em", ranges="given")), data)


@pytest.mark.parametrize("packing", ["raw", "gzip"])
def test_a_shard_that_is_cut_short_is_named(tmp_path, opened, packing):
    make_sharded(tmp_path / "bucket" / "em", [tissue()], packing=packing)
    shard = tmp_path / "bucket" / "em" / "4_4_40" / "1.shard"
    content = shard.read_bytes()
    volume = opened("em", ranges="given")
    for lost in (1, 24, 3000, len(content)):
        shard.write_bytes(content[:-lost])
        said = refusal(volume)
        assert "bucket/em/4_4_40/1.shard: " in said
        assert "is cut short" in said or "is shorter than its index says, or" in said


def test_an_answer_that_is_short_is_named(tmp_path, opened):
    make_sharded(tmp_path / "bucket" / "em", [tissue()], bits=(2, 1, 0))
    said = refusal(opened("em", ranges="short"))
    assert "0.shard: is cut short: 32 bytes from byte 0 on are needed, 16 are" in said


def test_a_shard_of_zeros_is_named(tmp_path, opened):
    make_sharded(tmp_path / "bucket" / "em", [tissue()], bits=(2, 1, 0))
    shard = tmp_path / "bucket" / "em" / "4_4_40" / "0.shard"
    shard.write_bytes(bytes(shard.stat().st_size))
    said = refusal(opened("em", ranges="given"))
    assert "0.shard: its index is all zeros, but more follows" in said


def test_a_server_that_ignores_ranges_is_named(tmp_path, opened):
    make_sharded(tmp_path / "bucket" / "em", [tissue()])
    said = refusal(opened("em"))
    assert "bucket/em/4_4_40/" in said and "the server ignores Range" in said
    assert "use one of them, or copy the volume to local disk" in said


@pytest.mark.parametrize("kind", ["gzip", "br"])
def test_chunks_that_lie_there_compressed_are_named(tmp_path, opened, kind):
    folder = tmp_path / "bucket" / "em"
    make_volume(folder, [tissue()])
    ending = {"gzip": ".gz", "br": ".br"}[kind]
    for path in folder.glob("4_4_40/*"):
        packed = compression.compress(path.read_bytes(), kind)
        path.with_name(path.name + ending).write_bytes(packed)
        path.unlink()
    # On local disk they are found.
    np.testing.assert_array_equal(read(Volume(str(folder))), tissue())
    said = refusal(opened("em"))
    assert f"is stored only compressed, with {ending} at the end of its" in said
    assert "decompress all such files there" in said


def test_a_shard_that_lies_there_compressed_is_named(tmp_path, opened):
    make_sharded(tmp_path / "bucket" / "em", [tissue()])
    shard = tmp_path / "bucket" / "em" / "4_4_40" / "1.shard"
    shard.rename(f"{shard}.gz")
    said = refusal(opened("em", ranges="given"))
    assert "1.shard: is stored only compressed, with .gz" in said


def test_chunks_that_are_not_there_are_black(tmp_path, opened):
    data = tissue()
    make_volume(tmp_path / "bucket" / "em", [data])
    (gone,) = (tmp_path / "bucket" / "em").glob("4_4_40/0-32_32-56_1-2")
    gone.unlink()
    data[1, :, :32, 32:] = 0
    np.testing.assert_array_equal(read(opened("em")), data)


def test_asking_for_a_compressed_chunk_is_tried_again(tmp_path, monkeypatch, opened):
    data = tissue()
    make_volume(tmp_path / "bucket" / "em", [data])
    (gone,) = (tmp_path / "bucket" / "em").glob("4_4_40/0-32_32-56_1-2")
    gone.unlink()
    data[1, :, :32, 32:] = 0
    dropped = []

    def drop_once(answer):
        def answer_or_drop(self):
            if self.path.endswith(".gz") and not dropped:
                dropped.append(self.path)
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                answer(self)

        return answer_or_drop

    for name in ("do_GET", "do_HEAD"):
        answer = getattr(FolderHandler, name)
        monkeypatch.setattr(FolderHandler, name, drop_once(answer))
    np.testing.assert_array_equal(read(opened("em")), data)
    assert dropped == [f"/bucket/em/4_4_40/{gone.name}.gz"]
