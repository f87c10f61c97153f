"""Test that sharded volumes are read correctly, or an error names the shard."""

import json

import numpy as np
import pytest

import download_field
import download_image
from metroem.__main__ import main
from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.io.volume import Volume
from tests.sharded import SHAPE, WHOLE, make_sharded, tissue
from tests.volumes import make_volume

INDEX_BYTES = 2 * 16  # of two minishards


def read(path, grid=WHOLE, sections=range(SHAPE[0])):
    return Volume(path).read(grid, sections)


def refusal(path, grid=WHOLE, sections=range(SHAPE[0])):
    with pytest.raises(DatasetError) as told:
        read(path, grid, sections)
    assert "\n" not in str(told.value)
    return str(told.value)


def shards_of(folder):
    return sorted(folder.glob("4_4_40/*.shard"))


def number(path, at, value):
    """Replace the 8-byte number at an offset, from the end of the file if negative."""
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : at + 8] = np.uint64(value).tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize("hash_name", ["identity", "murmurhash3_x86_128"])
@pytest.mark.parametrize("packing", ["raw", "gzip"])
def test_any_window_is_read_as_it_was_written(tmp_path, packing, hash_name):
    data = tissue()
    absent = (1, 2, 0), (2, 3, 1)
    how = {"packing": packing, "hash_name": hash_name, "absent": absent}
    path = make_sharded(tmp_path / "v", [data, data[:, :, ::2, ::2]], **how)
    data[:2, :, 16:32, 32:48] = data[2:, :, 32:40, 48:56] = 0
    np.testing.assert_array_equal(read(path), data)
    window = read(path, Grid(0, 3, 20, 30, 33), range(1, 3))
    np.testing.assert_array_equal(window, data[1:3, :, 3:33, 20:53])
    voxel = read(path, Grid(0, 39, 7, 1, 1), range(3, 4))
    np.testing.assert_array_equal(voxel, data[3:4, :, 39:40, 7:8])
    coarse = read(path, Grid(1, 8, 6, 9, 20), range(4))
    expected = tissue()[:, :, ::2, ::2][:, :, 4:13, 3:23]
    expected[:2, :, 12:16, 29:] = 0  # nothing: the chunk is beyond this mip
    np.testing.assert_array_equal(coarse, expected)


def test_fields_of_two_channels_are_read_as_they_were_written(tmp_path):
    data = np.random.default_rng(0).normal(size=(3, 2, 40, 56)).astype(np.float32)
    path = make_sharded(tmp_path / "v", [data], packing="gzip", bits=(2, 0, 3))
    np.testing.assert_array_equal(read(path, sections=range(3)), data)


def test_a_shard_that_is_not_there_is_black(tmp_path):
    data = tissue()
    path = make_sharded(tmp_path / "v", [data], bits=(0, 0, 1))
    first, _ = shards_of(tmp_path / "v")
    first.unlink()
    found = read(path)
    # The last bit of a chunk's number says which: every other chunk along x.
    for start, is_there in ((0, False), (16, True), (32, False)):
        here = np.s_[:, :, start : start + 16]
        np.testing.assert_array_equal(found[here], data[here] * is_there)


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
@pytest.mark.parametrize("packing", ["raw", "gzip"])
@pytest.mark.parametrize("bits", [(1, 1, 1), (0, 2, 0)])
def test_a_shard_that_is_cut_short_anywhere_is_named(tmp_path, packing, codec, bits):
    how = {"packing": packing, "encoding": codec, "bits": bits}
    data = tissue((2, 1, 10, 14))
    path = make_sharded(tmp_path / "v", [data], chunk=(4, 4, 1), **how)
    whole = Grid(0, 0, 0, 10, 14)
    sound = read(path, whole, range(2))
    if codec == "raw":
        np.testing.assert_array_equal(sound, data)
    shard = shards_of(tmp_path / "v")[-1]
    content = shard.read_bytes()
    for size in [*range(0, len(content), 72), len(content) - 24, len(content) - 1]:
        shard.write_bytes(content[:size])
        said = refusal(path, whole, range(2))
        assert f"file://{shard}: is cut short: " in said
        assert "copy it again from where the volume was made" in said


@pytest.mark.parametrize("packing", ["raw", "gzip"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.9])
def test_a_shard_whose_end_is_zeros_is_named(tmp_path, packing, kept):
    path = make_sharded(tmp_path / "v", [tissue()], packing=packing)
    shard = shards_of(tmp_path / "v")[0]
    content = shard.read_bytes()
    num_kept = int(len(content) * kept)
    shard.write_bytes(content[:num_kept].ljust(len(content), b"\0"))
    assert f"file://{shard}: " in refusal(path)


def test_a_shard_that_lists_nothing_is_black(tmp_path):
    path = make_sharded(tmp_path / "v", [tissue()], bits=(2, 1, 0))
    (shard,) = shards_of(tmp_path / "v")
    shard.write_bytes(bytes(INDEX_BYTES))
    assert not read(path).any()


def test_a_shard_under_the_name_of_another_is_named(tmp_path):
    path = make_sharded(tmp_path / "v", [tissue()])
    one, other = shards_of(tmp_path / "v")
    one.write_bytes(other.read_bytes())
    assert f"file://{one}: lists chunks that belong to other shards" in refusal(path)


# Raw minishard indices are rows of numbers, gaps and sizes, at the end of the shard.
LAST_SIZE, LAST_GAP = -8, -8 - 6 * 8


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (8, 2**62, "is cut short: "),  # end of the first minishard's index
        (0, 2**62, "its index is broken"),  # its start
        (0, 2**64 - 8, "its index is broken"),
        (LAST_GAP, 2**62, "is cut short: "),
        (LAST_SIZE, 2**40, "is cut short: "),
        (LAST_SIZE, 2**64 - 8, "the index of minishard 1 is broken"),
        (LAST_SIZE, 0, "the index of minishard 1 is broken"),
        (LAST_SIZE, 511, "cannot reshape"),  # a chunk has 512 bytes
        (LAST_SIZE, 256, "cannot reshape"),
        (LAST_GAP - 6 * 8, 0, "the index of minishard 1 is broken"),  # its number
    ],
)
def test_an_index_that_points_elsewhere_is_named(tmp_path, at, value, said):
    path = make_sharded(tmp_path / "v", [tissue((4, 1, 48, 64))])
    shard = shards_of(tmp_path / "v")[-1]
    number(shard, at, value)
    found = refusal(path, Grid(0, 0, 0, 48, 64))
    assert f"file://{shard}: " in found and said in found


def test_a_chunk_of_no_bytes_once_unpacked_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("tests.sharded.chunks.encode", lambda *_: b"")
        path = make_sharded(tmp_path / "v", [tissue()], packing="gzip")
    assert "4_4_40/0.shard: " in refusal(path)


def test_a_shard_that_is_compressed_as_a_whole_is_named(tmp_path):
    path = make_sharded(tmp_path / "v", [tissue()])
    shard = shards_of(tmp_path / "v")[0]
    shard.rename(f"{shard}.gz")
    said = refusal(path)
    assert f"file://{shard}: is compressed as a whole (gzip)" in said


@pytest.fixture
def cut(tmp_path):
    """Image and field volumes with a shard cut short, and an intact image volume."""
    data = tissue((4, 1, 64, 80))
    make_sharded(tmp_path / "em", [data])
    make_sharded(tmp_path / "field", [tissue((4, 2, 64, 80), np.float32)])
    make_volume(tmp_path / "sound", [data])
    for name in ("em", "field"):
        shard = shards_of(tmp_path / name)[-1]
        shard.write_bytes(shard.read_bytes()[:-24])
    return tmp_path


PLACE = "--x_offset 0 --y_offset 0 --z_start 1 --z_end 4 --patch_size 64 --dst_folder d"
IMAGE = ["--mip", "0", "--cv_path"]
SPEC = {"max_mip": 0, "dst_mip": 0, "x_size": 64, "y_size": 64}
SPEC["pairs"] = [[{"x": 32, "y": 40, "z": z} for z in (2, 1)]]
USES = {
    "images": [*IMAGE, "em"],
    "masks": [*IMAGE, "sound", "--cv_path_defects", "em"],
    "references": [
        *(*IMAGE, "sound", "--normalize", "--reference_path", "em"),
        *("--reference_size", "64", "--reference_mip", "0"),
    ],
    "fields": ["--src_mip", "0", "--dst_mip", "0", "--cv_path", "field"],
    "image of a spec": {"image": {"path": "em", "src_mip": 0}, "masks": []},
    "mask of a spec": {
        "image": {"path": "sound", "src_mip": 0},
        "masks": [{"path": "em", "src_mip": 0, "threshold": 1}],
    },
    "field of a spec": {
        "image": {"path": "sound", "src_mip": 0},
        "masks": [],
        "field": {"path": "field", "src_mip": 0},
    },
}


@pytest.mark.parametrize("use", USES)
def test_every_command_names_the_shard(cut, monkeypatch, use):
    monkeypatch.chdir(cut)
    how = USES[use]
    name = "field" if "field" in use else "em"
    with pytest.raises(DatasetError, match=f"{cut}/{name}/4_4_40/1.shard: is cut shor"):
        if isinstance(how, dict):
            (cut / "spec.json").write_text(json.dumps(SPEC | how))
            main("make-dataset --spec_path spec.json --dst_path d".split())
        else:
            command = download_field if use == "fields" else download_image
            command.main([*PLACE.split(), *how])
    assert not list(cut.glob("d/*.h5"))
