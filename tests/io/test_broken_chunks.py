"""Test that chunks cut short, empty or of another size give an error naming them."""

import numpy as np
import pytest
from cloudfiles import compression
from cloudvolume import chunks

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.io.cloud_retry import prepare_storage
from metroem.io.volume import Volume
from tests.sharded import tissue
from tests.volumes import make_volume

SHAPE = (2, 1, 20, 28)
ENDINGS = {"": "", "gzip": ".gz", "br": ".br", "zstd": ".zstd", "xz": ".xz"}
ENDINGS["bz2"] = ".bz2"


def read(folder):
    return Volume(str(folder)).read(Grid(0, 0, 0, *SHAPE[2:]), range(SHAPE[0]))


def refusal(folder):
    with pytest.raises(DatasetError) as told:
        read(folder)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a volume and returns the path of one chunk."""

    def write(packing="", encoding="raw", dtype=np.uint8):
        make_volume(tmp_path, [tissue(SHAPE, dtype)], chunk=(16, 16, 1))
        info = tmp_path / "info"
        info.write_text(info.read_text().replace('"raw"', f'"{encoding}"'))
        paths = sorted(tmp_path.glob("4_4_40/*"))
        for path in paths:
            content = path.read_bytes()
            x, y, _ = (
                stop - start
                for start, stop in (
                    map(int, part.split("-")) for part in path.name.split("_")
                )
            )
            if encoding != "raw":
                array = np.frombuffer(content, dtype).reshape((x, y, 1, 1), order="F")
                content = chunks.encode(array, encoding, block_size=(8, 8, 8))
            content = compression.compress(content, packing)
            path.unlink()
            path.with_name(path.name + ENDINGS[packing]).write_bytes(content)
        return paths[0].with_name(paths[0].name + ENDINGS[packing])

    return write


@pytest.mark.parametrize(
    ("packing", "encoding"),
    [*((packing, "raw") for packing in ENDINGS), ("", "jpeg"), ("gzip", "jpeg")],
)
def test_a_chunk_that_is_cut_short_is_named(tmp_path, written, packing, encoding):
    chunk = written(packing, encoding)
    sound = read(tmp_path)
    if encoding == "raw":
        np.testing.assert_array_equal(sound, tissue(SHAPE))
    content = chunk.read_bytes()
    ends = 1, 2, 7, 8, 9, 18, len(content) // 2
    for size in (0, *ends, *(len(content) - end for end in ends)):
        chunk.write_bytes(content[:size])
        assert f"4_4_40/{chunk.name.removesuffix(ENDINGS[packing])}: " in refusal(
            tmp_path
        )


@pytest.mark.parametrize("packing", ENDINGS)
def test_a_chunk_of_another_size_is_named(tmp_path, written, packing):
    chunk = written(packing)
    for size in (0, 1, 128, 512):
        chunk.write_bytes(compression.compress(bytes(size), packing))
        assert "4_4_40/0-16_0-16_0-1: " in refusal(tmp_path)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (16, 1, 1, 1), (20, 16, 1, 1)])
def test_a_chunk_that_states_another_shape_is_neither_repeated_nor_cropped(shape):
    prepare_storage()
    content = chunks.encode(np.ones(shape, np.uint8), "npz")
    with pytest.raises(ValueError, match=r"voxels, expected \(16, 16, 1, 1\)"):
        chunks.decode(content, "npz", shape=(16, 16, 1, 1), dtype=np.uint8)
    same = chunks.decode(content, "npz", shape=shape, dtype=np.uint8)
    assert same.shape == shape and same.all()


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("num_labels", [1, 3, 40, 3000])
def test_a_segmentation_that_is_cut_short_is_neither_other_labels_nor_a_crash(
    dtype, num_labels
):
    prepare_storage()
    shape, how = (20, 28, 9, 1), {"block_size": (8, 8, 8)}
    chance = np.random.default_rng(0)
    labels = chance.integers(0, num_labels, shape).astype(dtype, order="F")
    content = chunks.encode(labels, "compressed_segmentation", **how)
    how |= {"shape": shape, "dtype": dtype}
    found = chunks.decode(content, "compressed_segmentation", **how)
    np.testing.assert_array_equal(found, labels)
    half = len(content) // 2
    for size in (1, 3, 4, 8, 60, half, half + 1, *range(-16, 0)):
        with pytest.raises(ValueError, match="bytes, .* are needed"):
            chunks.decode(content[:size], "compressed_segmentation", **how)
