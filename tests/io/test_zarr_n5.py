"""Test that Zarr and N5 are read as written, or that the error says why not."""

import importlib
import json

import numpy as np
import pytest
from cloudfiles import interfaces

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.io.volume import Volume, iter_sections
from tests.zarrs import (
    chunks_of,
    in_axes,
    multiscales,
    put,
    write_n5,
    write_zarr2,
    write_zarr3,
)

SIZE = (70, 44, 5)  # x, y, z: no multiples of a chunk


def made(dtype, channels=1, size=SIZE):
    """Make an array (x, y, z, c) of numbers whose bytes all differ."""
    random = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return random.normal(0, 9, (*size, channels)).astype(dtype)
    most = np.iinfo(dtype).max
    return random.integers(1, most, (*size, channels)).astype(dtype)


def read_all(path, mip=0):
    """Read a whole mip of a volume: (x, y, z, c)."""
    volume = Volume(str(path))
    area, sections = volume.extent()
    whole = Grid(mip, area.x, area.y, area.rows >> mip, area.cols >> mip)
    return volume.read(whole, sections).transpose(2, 3, 0, 1)


def same(read, truth):
    np.testing.assert_array_equal(read, truth)
    assert read.dtype == truth.dtype.newbyteorder("=")


@pytest.mark.parametrize(
    ("axes", "order"),
    [("zyx", "F"), ("tczyx", "C"), ("czyx", "F"), ("xyz", "C"), ("zyxc", "C")]
    + [("zxy", "C"), ("yzx", "F")],
)
def test_axes_in_any_order_are_read_from_zarr_2(tmp_path, axes, order):
    truth = made("uint8", 2 if "c" in axes else 1)
    array = in_axes(truth, axes)
    write_zarr2(tmp_path / "em/0", array, chunks_of(axes), order=order)
    put(tmp_path / "em/.zattrs", {"multiscales": multiscales(["0"], axes)})
    same(read_all(f"zarr://file://{tmp_path}/em"), truth)


@pytest.mark.parametrize(
    ("dtype", "separator"),
    [("|u1", "/"), (">u2", "."), ("<u2", None), ("<f4", "."), (">f8", "/")],
)
def test_numbers_of_either_byte_order_are_read_from_zarr_2(tmp_path, dtype, separator):
    truth = made(dtype)
    array = in_axes(truth, "zyx")
    write_zarr2(tmp_path / "em", array, chunks_of("zyx"), separator=separator)
    same(read_all(f"zarr2://file://{tmp_path}/em"), truth)


@pytest.mark.parametrize("compressor", ["gzip", "zlib", "bz2", "zstd"])
def test_what_is_compressed_is_read_from_zarr_2(tmp_path, compressor):
    truth = made(">u2")
    array = in_axes(truth, "zyx")
    write_zarr2(tmp_path / "em", array, chunks_of("zyx"), compressor=compressor)
    same(read_all(f"zarr://{tmp_path}/em"), truth)


@pytest.mark.parametrize(
    ("codecs", "dtype"),
    [((), "uint8"), (("gzip",), ">u2"), (("zstd", "crc32c"), "<f4"), ((), ">f4")],
)
def test_codecs_and_byte_orders_are_read_from_zarr_3(tmp_path, codecs, dtype):
    truth = made(dtype)
    array = in_axes(truth, "zyx")
    write_zarr3(tmp_path / "em", array, chunks_of("zyx"), codecs=codecs)
    same(read_all(f"zarr3://file://{tmp_path}/em"), truth)


@pytest.mark.parametrize(
    ("order", "naming"),
    [
        ((2, 1, 0), ("default", ".")),
        ((1, 2, 0), ("v2", ".")),
        ((2, 0, 1), ("v2", "/")),
    ],
)
def test_transposed_chunks_of_any_name_are_read_from_zarr_3(tmp_path, order, naming):
    truth = made("uint16")
    write_zarr3(
        *(tmp_path / "em", in_axes(truth, "zyx"), chunks_of("zyx")),
        order=order,
        encoding=naming[0],
        separator=naming[1],
    )
    same(read_all(f"zarr://file://{tmp_path}/em"), truth)


@pytest.mark.parametrize(
    ("compression", "dtype"),
    [("raw", "uint16"), ("gzip", "float32"), ("bzip2", "uint8"), ("xz", "int16")]
    + [("zstd", "float64")],
)
def test_numbers_are_read_from_n5(tmp_path, compression, dtype):
    truth = made(dtype)
    array = in_axes(truth, "xyz")
    write_n5(tmp_path / "em/s0", array, chunks_of("xyz"), compression=compression)
    put(tmp_path / "em/attributes.json", {"n5": "2.5.0"})
    same(read_all(f"n5://file://{tmp_path}/em"), truth)


def test_channels_of_an_n5_are_its_fourth_dimension_or_the_one_named_so(tmp_path):
    truth = made("float32", 2)
    for name, axes in (("a", "xyzc"), ("b", "cxyz")):
        array = in_axes(truth, axes)
        write_n5(tmp_path / name / "s0", array, chunks_of(axes))
        put(
            tmp_path / name / "attributes.json",
            {"axes": list(axes)} if name == "b" else {},
        )
        same(read_all(f"n5://file://{tmp_path}/{name}"), truth)


@pytest.mark.parametrize("kind", ["zarr", "n5"])
def test_what_is_there_is_found_without_the_format(tmp_path, kind):
    truth = made("uint8")
    if kind == "zarr":
        write_zarr2(tmp_path / "em", in_axes(truth, "zyx"), chunks_of("zyx"))
    else:
        write_n5(tmp_path / "em", in_axes(truth, "xyz"), chunks_of("xyz"))
    same(read_all(tmp_path / "em"), truth)
    assert Volume(str(tmp_path / "em")).path == f"{kind}://file://{tmp_path}/em"


def test_a_format_may_stand_last_as_neuroglancer_writes_it(tmp_path):
    truth = made("uint8")
    write_zarr3(tmp_path / "em", in_axes(truth, "zyx"), chunks_of("zyx"))
    same(read_all(f"file://{tmp_path}/em/|zarr3:"), truth)


@pytest.mark.parametrize("version", ["zarr2", "zarr3"])
def test_mips_keep_their_own_shape_chunks_and_names(tmp_path, version):
    # Others than 0, 1 ..., a size rounded down, other chunks, a voxel in micrometers.
    fine = made("uint8", size=(70, 45, 5))
    coarse = made("uint8", size=(35, 22, 5))
    about = multiscales(["s0", "s1"], unit="micrometer", nm=1000)
    write = {"zarr2": write_zarr2, "zarr3": write_zarr3}[version]
    write(tmp_path / "em/s0", in_axes(fine, "zyx"), (2, 16, 32))
    write(tmp_path / "em/s1", in_axes(coarse, "zyx"), (1, 8, 20))
    if version == "zarr2":
        put(tmp_path / "em/.zattrs", {"multiscales": about})
    else:
        about[0].pop("version")
        group = {"zarr_format": 3, "node_type": "group"}
        ome = {"ome": {"version": "0.5", "multiscales": about}}
        put(tmp_path / "em/zarr.json", group | {"attributes": ome})
    path = f"{version}://file://{tmp_path}/em"
    same(read_all(path), fine)
    same(read_all(path, 1), coarse)
    volume = Volume(path)
    assert volume.resolution == (8, 8, 40)
    volume.check_mip("--mip", 1)
    assert volume.slabs(0, [0, 1, 2]) == [range(0, 2), range(2, 3)]
    assert volume.slabs(1, [0, 1, 2]) == [range(0, 1), range(1, 2), range(2, 3)]


def test_mips_of_an_n5_are_as_coarse_as_their_shapes_say(tmp_path):
    fine, coarse = made("float32", 2), made("float32", 2, size=(35, 22, 5))
    for name, one in (("s0", fine), ("s1", coarse)):
        write_n5(tmp_path / "em" / name, in_axes(one, "cxyz"), chunks_of("cxyz"))
    about = {"axes": list("cxyz"), "resolution": [8, 8, 40], "units": ["nm"] * 3}
    put(tmp_path / "em/attributes.json", about)
    path = f"n5://file://{tmp_path}/em"
    same(read_all(path, 1), coarse)
    Volume(path).check_mip("--mip", 1)
    assert Volume(path).resolution == (8, 8, 40)


def test_mips_of_an_n5_are_as_coarse_as_it_says(tmp_path):
    fine, coarse = made("uint16"), made("uint16", size=(35, 22, 5))
    write_n5(tmp_path / "em/s0", in_axes(fine, "xyz"), (32, 16, 2))
    write_n5(tmp_path / "em/s1", in_axes(coarse, "xyz"), (8, 9, 1))
    nm = {"unit": "um", "dimensions": [0.008, 0.008, 0.04]}
    factors = [[1, 1, 1], [2, 2, 1]]
    put(
        tmp_path / "em/attributes.json",
        {"pixelResolution": nm, "downsamplingFactors": factors},
    )
    path = f"n5://file://{tmp_path}/em"
    same(read_all(path), fine)
    same(read_all(path, 1), coarse)
    Volume(path).check_mip("--mip", 1)
    assert Volume(path).resolution == (8, 8, 40)


@pytest.mark.parametrize("fill", [0, 7, None])
def test_a_chunk_that_is_not_stored_holds_the_fill_value(tmp_path, fill):
    truth = made("uint8")
    write_zarr2(*(tmp_path / "em", in_axes(truth, "zyx"), chunks_of("zyx")), fill=fill)
    (tmp_path / "em/1.0.1").unlink()
    truth[32:64, :16, 2:4] = fill or 0
    same(read_all(f"zarr://file://{tmp_path}/em"), truth)


def test_missing_chunks_of_zarr_3_and_n5(tmp_path):
    truth = made("float32")
    write_zarr3(*(tmp_path / "z", in_axes(truth, "zyx"), chunks_of("zyx")), fill="NaN")
    write_n5(tmp_path / "n", in_axes(truth, "xyz"), chunks_of("xyz"))
    (tmp_path / "z/c/2/2/2").unlink()
    (tmp_path / "n/2/2/2").unlink()
    truth[64:, 32:, 4:] = np.nan
    same(read_all(f"zarr3://file://{tmp_path}/z"), truth)
    same(read_all(f"n5://file://{tmp_path}/n"), np.nan_to_num(truth, nan=0))


@pytest.mark.parametrize("at", ["corner", "middle"])
def test_a_translation_is_where_the_volume_begins(tmp_path, at):
    # x 100, y 60, z 3 voxels; some writers give the middle of the first voxel.
    fine, coarse = made("uint8"), made("uint8", size=(35, 22, 5))
    write_zarr2(tmp_path / "em/0", in_axes(fine, "zyx"), (2, 16, 32))
    write_zarr2(tmp_path / "em/1", in_axes(coarse, "zyx"), (2, 16, 32))
    half = 4.0 if at == "middle" else 0.0
    start = [[120, 480, 800], [120, 480 + half, 800 + half]]
    about = multiscales(["0", "1"], start=start)
    put(tmp_path / "em/.zattrs", {"multiscales": about})
    volume = Volume(f"zarr://file://{tmp_path}/em")
    assert volume.extent() == (Grid(0, 100, 60, 70, 44), range(3, 8))
    part = volume.read(Grid(0, 110, 70, 40, 30), range(4, 6))
    np.testing.assert_array_equal(
        part[:, 0], fine[10:50, 10:40, 1:3, 0].transpose(2, 0, 1)
    )
    part = volume.read(Grid(1, 110, 70, 20, 15), range(4, 6))
    truth = coarse[5:25, 5:20, 1:3, 0].transpose(2, 0, 1)
    np.testing.assert_array_equal(part[:, 0], truth)


def test_a_mip_that_begins_elsewhere_is_refused_alone(tmp_path):
    array = in_axes(made("uint8"), "zyx")
    for name in "01":
        write_zarr2(tmp_path / "em" / name, array, (2, 16, 32))
    about = multiscales(["0", "1"], start=[[0, 0, 0], [0, 0, 160]])
    put(tmp_path / "em/.zattrs", {"multiscales": about})
    volume = Volume(f"zarr://file://{tmp_path}/em")
    volume.check_mip("--mip", 0)
    with pytest.raises(DatasetError, match="mip 1 begins at x 20, mip 0 at 0"):
        volume.check_mip("--mip", 1)
    with pytest.raises(DatasetError, match="mip 1 begins at x 20"):
        volume.read(Grid(1, 0, 0, 4, 5), range(1))


def test_a_mip_between_the_voxels_of_the_others_is_refused(tmp_path):
    array = in_axes(made("uint8"), "zyx")
    for name in "01":
        write_zarr2(tmp_path / "em" / name, array, (2, 16, 32))
    about = multiscales(["0", "1"], start=[[0, 0, 8], [0, 0, 8]])
    put(tmp_path / "em/.zattrs", {"multiscales": about})
    with pytest.raises(DatasetError, match="mip 1 begins at x 1,"):
        Volume(f"zarr://file://{tmp_path}/em").check_mip("--mip", 1)


def zarr2(**more):
    return lambda folder: write_zarr2(
        *(folder, in_axes(made("uint8"), "zyx"), (2, 16, 32)), **more
    )


def zarr3(**more):
    return lambda folder: write_zarr3(
        *(folder, in_axes(made("uint8"), "zyx"), (2, 16, 32)), **more
    )


def with_codecs(*names):
    def write(folder):
        zarr3()(folder)
        about = json.loads((folder / "zarr.json").read_text())
        put(folder / "zarr.json", about | {"codecs": [{"name": n} for n in names]})

    return write


def two_times(folder):
    write_zarr2(folder, np.ones((2, 1, 5, 44, 70), "u1"), (1, 1, 2, 16, 32))


def of_ome(**about):
    def write(folder):
        zarr2()(folder / "0")
        (scale,) = multiscales(["0"])
        put(folder / ".zattrs", {"multiscales": [scale | about]})

    return write


def no_array(folder):
    put(folder / ".zattrs", {"bioformats2raw.layout": 3})
    zarr2()(folder / "0/0")


def broken_json(folder):
    put(folder / "zarr.json", b"{")


def lost_mip(folder):
    zarr2()(folder / "0")
    put(folder / ".zattrs", {"multiscales": multiscales(["0", "1"])})


def no_scale(folder):
    put(folder / "attributes.json", {"n5": "2.5.0"})


UNITS = [{"name": name, "type": "space", "unit": "parsec"} for name in "zyx"]


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (two_times, "has 2 times"),
        (zarr2(dtype="|S4"), "expected numbers"),
        (zarr2(order="A"), "has order 'A'"),
        (zarr2(fill="AAAA"), "fill_value 'AAAA'"),
        (zarr3(codecs=(), data_type="r24"), "holds 'r24'"),
        (zarr3(storage_transformers=[{}]), "storage_transformers"),
        (zarr3(chunk_grid={"name": "rectilinear"}), "chunk_grid 'rectilinear'"),
        (with_codecs("sharding_indexed"), "is sharded"),
        (with_codecs("bytes", "made_up"), "made_up"),
        (with_codecs("scale_offset", "bytes"), "the codec scale_offset"),
        (with_codecs(), "without the codec bytes"),
        (of_ome(axes=["z", "y", "u"]), "has axes z, y, u"),
        (of_ome(axes=["y", "x"]), "has axes y, x"),
        (of_ome(axes=["z", "row", "col"]), "has an axis 'row'"),
        (of_ome(axes=["z", "z", "x"]), "has axes z, z, x"),
        (of_ome(axes=UNITS), "has sizes in 'parsec'"),
        (zarr2(fill=-1), "fill_value -1, which uint8 does not hold"),
        (
            of_ome(coordinateTransformations=[{"type": "affine"}]),
            "coordinateTransformation 'affine'",
        ),
        (no_array, "it may be 0"),
        (broken_json, "its zarr.json is not JSON"),
        (lost_mip, "its 1/.zarray does not exist"),
        (no_scale, "holds no s0"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, write, said):
    write(tmp_path / "em")
    with pytest.raises(DatasetError, match=f"--cv_path .*em: .*{said}") as caught:
        Volume(str(tmp_path / "em"))
    assert "\n" not in str(caught.value)


def test_what_a_package_is_missing_for_is_refused_with_its_name(tmp_path, monkeypatch):
    real = importlib.import_module

    def missing(name, *args):
        if name in ("numcodecs", "blosc"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    zarr2(compressor=None)(tmp_path / "em")
    about = json.loads((tmp_path / "em/.zarray").read_text())
    put(tmp_path / "em/.zarray", about | {"compressor": {"id": "blosc"}})
    with pytest.raises(DatasetError, match=r"blosc.*pip install metroem\[zarr\]"):
        Volume(str(tmp_path / "em"))


@pytest.mark.parametrize("version", ["zarr2", "zarr3", "n5"])
def test_blosc_is_read(tmp_path, version):
    blosc = pytest.importorskip("numcodecs.blosc", reason="the extra zarr brings it")
    truth = made("uint16")
    axes = "xyz" if version == "n5" else "zyx"
    array = in_axes(truth, axes)
    write = {"zarr2": write_zarr2, "zarr3": write_zarr3, "n5": write_n5}[version]
    write(tmp_path / "em", array, chunks_of(axes))
    about = {
        "zarr2": {"compressor": {"id": "blosc", "cname": "lz4"}},
        "zarr3": {"codecs": [{"name": "bytes"}, {"name": "blosc"}]},
        "n5": {"compression": {"type": "blosc"}},
    }[version]
    names = {"zarr2": ".zarray", "zarr3": "zarr.json", "n5": "attributes.json"}
    described = tmp_path / "em" / names[version]
    put(described, json.loads(described.read_text()) | about)
    head = 16 if version == "n5" else 0  # shape of a chunk, not compressed
    for path in (tmp_path / "em").rglob("*"):
        if path.is_file() and path != described:
            raw = path.read_bytes()
            path.write_bytes(raw[:head] + blosc.compress(raw[head:], b"lz4", 5, 1))
    same(read_all(f"{version}://file://{tmp_path}/em"), truth)


def test_filters_are_undone(tmp_path):
    numcodecs = pytest.importorskip("numcodecs", reason="the extra zarr brings it")
    truth = made("<i4")
    delta = {"id": "delta", "dtype": "<i4"}
    filters = [delta]
    write_zarr2(
        *(tmp_path / "em", in_axes(truth, "zyx"), chunks_of("zyx")), filters=filters
    )
    encode = numcodecs.get_codec(delta).encode
    for path in (tmp_path / "em").glob("[0-9]*"):
        values = np.frombuffer(path.read_bytes(), "<i4")
        path.write_bytes(encode(values).tobytes())
    same(read_all(f"zarr://file://{tmp_path}/em"), truth)


@pytest.mark.parametrize("content", [b"", b"cut short"])
def test_a_chunk_that_is_cut_short_is_named(tmp_path, content):
    zarr2()(tmp_path / "em")
    (tmp_path / "em/1.0.1").write_bytes(content)
    with pytest.raises(DatasetError, match="em/1.0.1: .*cut short or broken"):
        read_all(tmp_path / "em")


def test_the_metadata_that_are_not_needed_are_not_asked_for(tmp_path, monkeypatch):
    # Some stores answer 403 for files that do not exist.
    truth = made("uint8")
    write_zarr2(tmp_path / "em/0", in_axes(truth, "zyx"), chunks_of("zyx"))
    put(tmp_path / "em/.zattrs", {"multiscales": multiscales(["0"])})
    write_n5(tmp_path / "n5/s0", in_axes(truth, "xyz"), chunks_of("xyz"))
    put(tmp_path / "n5/attributes.json", {"downsamplingFactors": [[1, 1, 1]]})
    missing = []
    real = interfaces.FileInterface.get_file

    def get_file(self, path, *args, **kwargs):
        found = real(self, path, *args, **kwargs)
        missing.extend([path] * (found[0] is None))
        return found

    monkeypatch.setattr(interfaces.FileInterface, "get_file", get_file)
    same(read_all(f"zarr2://file://{tmp_path}/em"), truth)
    same(read_all(f"n5://file://{tmp_path}/n5"), truth)
    assert not missing


def test_several_threads_read_at_a_time(tmp_path):
    truth = made("uint16")
    write_zarr2(tmp_path / "em", in_axes(truth, "zyx"), chunks_of("zyx"))
    sections = iter_sections(
        Volume(f"zarr://file://{tmp_path}/em"),
        {z: Grid(0, 3, 5, 60, 30) for z in range(5)},
        parallel=4,
    )
    arrived = {z: layers.copy() for z, layers in sections}
    for z in range(5):
        np.testing.assert_array_equal(arrived[z][0], truth[3:63, 5:35, z, 0])


def test_a_cellmap_n5_says_its_place_in_a_transform(tmp_path):
    truth = made("uint8")
    transform = {"axes": ["z", "y", "x"], "units": ["nm"] * 3}
    transform |= {"scale": [40, 8, 8], "translate": [120, 480, 800]}
    write_n5(
        *(tmp_path / "em/s0", in_axes(truth, "xyz"), chunks_of("xyz")),
        transform=transform,
    )
    put(tmp_path / "em/attributes.json", {})
    same(read_all(f"n5://file://{tmp_path}/em"), truth)
    volume = Volume(f"n5://file://{tmp_path}/em")
    assert volume.extent() == (Grid(0, 100, 60, 70, 44), range(3, 8))
    assert volume.resolution == (8, 8, 40)


def test_a_group_that_repeats_its_first_array_is_no_array(tmp_path):
    # cloud-volume writes them so.
    truth = made("uint8")
    write_zarr3(tmp_path / "em/0", in_axes(truth, "zyx"), chunks_of("zyx"))
    array = json.loads((tmp_path / "em/0/zarr.json").read_text())
    ome = {"version": "0.5", "multiscales": multiscales(["0"])}
    group = {"node_type": "group", "attributes": {"ome": ome}}
    put(tmp_path / "em/zarr.json", array | group)
    same(read_all(f"zarr3://file://{tmp_path}/em"), truth)


def test_an_array_that_says_no_sizes_warns(tmp_path, caplog):
    zarr2()(tmp_path / "em")
    assert Volume(str(tmp_path / "em")).resolution == (1, 1, 1)
    assert "states no voxel size" in caplog.text
    caplog.clear()
    zarr2()(tmp_path / "ome/0")
    put(tmp_path / "ome/.zattrs", {"multiscales": multiscales(["0"])})
    assert Volume(str(tmp_path / "ome")).resolution == (8, 8, 40)
    assert not caplog.text


@pytest.mark.parametrize("axes", [list("zyx"), None])
def test_the_mips_of_an_old_ome_zarr_are_as_coarse_as_their_shapes_say(tmp_path, axes):
    # Up to 0.3 it states no sizes, and up to 0.2 no axes: they are tczyx.
    order = "".join(axes or "tczyx")
    fine, coarse = made("uint8", size=(70, 45, 5)), made("uint8", size=(35, 22, 5))
    for name, one in (("0", fine), ("1", coarse)):
        write_zarr2(tmp_path / "em" / name, in_axes(one, order), chunks_of(order))
    scales = {"version": "0.2", "datasets": [{"path": "0"}, {"path": "1"}]}
    scales |= {"axes": axes} if axes else {}
    put(tmp_path / "em/.zattrs", {"multiscales": [scales]})
    path = f"zarr://file://{tmp_path}/em"
    same(read_all(path), fine)
    same(read_all(path, 1), coarse)
    Volume(path).check_mip("--mip", 1)
