"""Test that commands treat Zarr and N5 like a CloudVolume of the same values."""

import logging
import shutil

import h5py
import numpy as np
import pytest

import download_field
import download_image
from metroem.__main__ import main
from metroem.errors import DatasetError, UsageError
from tests.cloud.servers import KEYS, s3_server, serving, upload
from tests.export.sets import make_sets
from tests.volumes import make_volume
from tests.zarrs import (
    chunks_of,
    in_axes,
    multiscales,
    put,
    write_n5,
    write_zarr2,
    write_zarr3,
)

AREA = "--x_offset 8 --y_offset 16 --z_start 1 --z_end 4 --parallel 4".split()
IMAGES = [*AREA, *"--mip 1 0 --patch_size 20 40 --normalize".split()]
FIELDS = [*AREA, *"--src_mip 1 --dst_mip 0 --patch_size 24".split()]


@pytest.fixture(scope="module")
def values():
    """Values by name of the volume, (x, y, z, c) at mips 0 and 1."""
    random = np.random.default_rng(0)
    grey = random.integers(1, 255, (100, 140, 5, 1)).astype(np.uint16)
    field = random.uniform(3, 9, (100, 140, 5, 2)).astype(np.float32)
    mask = (random.random((100, 140, 5, 1)) < 0.1).astype(np.uint8)
    finest = {"em": grey, "field": field, "mask": mask, "reference": grey * 3}
    return {name: (one, one[::2, ::2]) for name, one in finest.items()}


def cloud_volume(folder, mips):
    make_volume(
        folder, [one.transpose(2, 3, 0, 1) for one in mips], resolution=(8, 8, 40)
    )


def ome_zarr_4(folder, mips):
    """Write a Zarr: big-endian, zstd, channels first, one folder per chunk."""
    for mip, one in enumerate(mips):
        array = in_axes(one, "tczyx")
        write_zarr2(
            *(folder / f"{mip}", array.astype(array.dtype.newbyteorder(">"))),
            chunks_of("tczyx", {"c": 2}),
            compressor="zstd",
            separator="/",
        )
    names = [f"{mip}" for mip in range(len(mips))]
    put(folder / ".zattrs", {"multiscales": multiscales(names, "tczyx")})


def ome_zarr_5(folder, mips):
    """Write an N5: big-endian, gzip, the scale in micrometers, channels last."""
    for mip, one in enumerate(mips):
        array = in_axes(one, "zyxc")
        write_zarr3(
            *(folder / f"s{mip}", array.astype(array.dtype.newbyteorder(">"))),
            chunks_of("zyxc"),
            codecs=("gzip",),
        )
    names = [f"s{mip}" for mip in range(len(mips))]
    about = multiscales(names, "zyxc", unit="micrometer", nm=1000)
    ome = {"version": "0.5", "multiscales": about}
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}}
    put(folder / "zarr.json", group)


def n5(folder, mips):
    for mip, one in enumerate(mips):
        axes = "xyzc" if one.shape[3] > 1 else "xyz"
        array = in_axes(one, axes)
        write_n5(folder / f"s{mip}", array, chunks_of(axes), compression="gzip")
    factors = [[2**mip, 2**mip, 1] for mip in range(len(mips))]
    about = {"downsamplingFactors": factors, "resolution": [8, 8, 40]}
    put(folder / "attributes.json", about)


FORMATS = {
    "zarr2": ome_zarr_4,
    "zarr3": ome_zarr_5,
    "n5": n5,
}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory, values):
    """A folder with each volume in each format: <format>/<name>."""
    folder = tmp_path_factory.mktemp("volumes")
    for form, write in ({"precomputed": cloud_volume} | FORMATS).items():
        for name, mips in values.items():
            write(folder / form / name, mips)
    return folder


@pytest.fixture(params=FORMATS)
def form(request):
    return request.param


def arrays(folder):
    """Read all arrays of a folder's files."""
    found = {}
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path, "r") as file:
            found |= {(path.name, key): np.asarray(file[key]) for key in file}
            for key in ("box", "offset", "resolution"):
                if key in file.attrs:
                    found[path.name, "attribute", key] = file.attrs[key]
    assert found
    return found


def assert_same(tmp_path):
    np.testing.assert_equal(arrays(tmp_path / "a"), arrays(tmp_path / "b"))


def images(paths, dst):
    words = [word for flag, path in paths.items() for word in (flag, str(path))]
    download_image.main([*words, "--dst_folder", str(dst), *IMAGES])


def test_images_are_those_of_a_cloud_volume(tmp_path, volumes, form):
    images({"--cv_path": volumes / "precomputed/em"}, tmp_path / "a")
    images({"--cv_path": f"{form}://file://{volumes}/{form}/em"}, tmp_path / "b")
    assert_same(tmp_path)


@pytest.mark.parametrize("flag", ["--reference_path", "--cv_path_defects"])
def test_a_reference_and_a_mask_are_those_of_a_cloud_volume(
    tmp_path, volumes, form, flag
):
    name = {"--reference_path": "reference", "--cv_path_defects": "mask"}[flag]
    em = {"--cv_path": volumes / "precomputed/em"}
    images(em | {flag: volumes / "precomputed" / name}, tmp_path / "a")
    images(em | {flag: f"{form}://{volumes}/{form}/{name}"}, tmp_path / "b")
    assert_same(tmp_path)


def test_fields_are_those_of_a_cloud_volume(tmp_path, volumes, form):
    for path, to in (("precomputed", "a"), (form, "b")):
        words = ["--cv_path", f"{path}://file://{volumes}/{path}/field"]
        words += ["--cv_path_defects", f"{path}://file://{volumes}/{path}/mask"]
        download_field.main([*words, "--dst_folder", str(tmp_path / to), *FIELDS])
    assert_same(tmp_path)


def spec(volumes, form):
    """Make a spec whose volumes all have one format."""
    paths = {
        n: f"{form}://file://{volumes}/{form}/{n}" for n in ("em", "field", "mask")
    }
    size = {"x_size": 32, "y_size": 24}
    area = {"path": paths["em"], "src_mip": 1, "dst_mip": 0, **size}
    side = {"x": 40, "y": 64}
    return {
        "image": {"path": paths["em"], "src_mip": 0, "reference": area},
        "field": {"path": paths["field"], "src_mip": 1},
        "masks": [{"path": paths["mask"], "src_mip": 0, "threshold": 1}],
        "max_mip": 1,
        "dst_mip": 0,
        **size,
        "pairs": [
            [side | {"z": 2}, side | {"z": 1}],
            [side | {"z": 4}, side | {"z": 2}],
        ],
    }


def test_make_dataset_takes_them_too(tmp_path, volumes):
    for path, to in (("precomputed", "a"), ("zarr3", "b")):
        put(tmp_path / f"{to}.json", spec(volumes, path))
        words = ["--spec_path", str(tmp_path / f"{to}.json"), "--parallel", "3"]
        main(["make-dataset", *words, "--dst_path", str(tmp_path / to)])
    assert_same(tmp_path)


@pytest.mark.parametrize(("storage", "form"), [("http", "zarr3"), ("s3", "zarr2")])
def test_they_are_read_from_afar(tmp_path, volumes, form, storage, monkeypatch):
    images({"--cv_path": volumes / "precomputed/em"}, tmp_path / "a")
    if storage == "http":
        with serving(volumes) as server:
            images({"--cv_path": f"{form}://{server.url}/{form}/em"}, tmp_path / "b")
    else:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        with s3_server() as url:
            shutil.copytree(volumes / form / "em", tmp_path / "bucket/em")
            upload(url, tmp_path / "bucket", form)
            for name, value in {**KEYS, "AWS_ENDPOINT_URL_S3": url}.items():
                monkeypatch.setenv(name, value)
            images({"--cv_path": f"{form}://s3://{form}/em"}, tmp_path / "b")
    assert_same(tmp_path)


@pytest.mark.parametrize(
    "path",
    ["zarr://file://{}/out", "zarr2://{}/out", "zarr3://gs://b/out", "n5://{}/out"]
    + ["file://{}/out|zarr2:", "graphene://https://host/out", "boss://{}/out"],
)
@pytest.mark.parametrize("flag", ["--dst_path", "--warped"])
def test_what_is_not_precomputed_is_not_exported_to(tmp_path, path, flag):
    make_sets(tmp_path / "data")
    path = path.format(tmp_path)
    paths = {"--dst_path": str(tmp_path / "field")} | {flag: path}
    words = [word for pair in paths.items() for word in pair]
    with pytest.raises(UsageError, match=f"^{flag} .*is not written, only read"):
        main(["export-fields", "--dataset_path", str(tmp_path / "data"), *words])
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("path", ["zarr://file://{}/out", "n5://{}/out", "{}/o|zarr3:"])
def test_what_is_not_precomputed_gets_no_data_set(tmp_path, volumes, path):
    put(tmp_path / "spec.json", spec(volumes, "precomputed"))
    words = ["--spec_path", str(tmp_path / "spec.json")]
    words += ["--dst_path", path.format(tmp_path)]
    with pytest.raises(UsageError, match="^--dst_path .*is not written, only read"):
        main(["make-dataset", *words])
    assert [file.name for file in tmp_path.iterdir()] == ["spec.json"]


def test_a_zarr_that_is_there_is_not_exported_to(tmp_path, values):
    make_sets(tmp_path / "data")
    ome_zarr_4(tmp_path / "em", values["em"])
    before = sorted((tmp_path / "em").rglob("*"))
    words = ["--dataset_path", str(tmp_path / "data"), "--dst_path"]
    with pytest.raises(DatasetError, match="em: is a zarr volume, which is only read"):
        main(["export-fields", *words, str(tmp_path / "em")])
    assert sorted((tmp_path / "em").rglob("*")) == before


def test_chunks_that_may_not_be_read_are_named(tmp_path, volumes):
    with serving(volumes, "403", "/zarr3/em/s0/c/") as server:
        path = f"zarr3://{server.url}/zarr3/em"
        with pytest.raises(DatasetError, match="em/s0/c/.*403.*check that your cred"):
            images({"--cv_path": path}, tmp_path / "a")
