"""Test that a path without a readable volume is refused before any read."""

import io
import json

import numpy as np
import pytest
from cloudvolume import chunks
from PIL import Image

import download_field
import download_image
from metroem.__main__ import main
from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.io.volume import Volume
from metroem.io.volume_write import NewVolume, SectionWriter
from tests.volumes import ReadCount, make_volume

GREY = np.full((4, 1, 48, 40), 7, np.uint8)
IMAGES = "--mip 0 --patch_size 32 --z_start 1 --z_end 4".split()
FIELDS = "--src_mip 0 --dst_mip 0 --patch_size 32 --z_start 1 --z_end 4".split()


def changed(folder, data=GREY, *, scale=None, drop=(), **top):
    """Write a volume with a changed info; return its path."""
    path = make_volume(folder, [data])
    info = json.loads((folder / "info").read_text())
    info |= top
    info["scales"][0] |= scale or {}
    for key in drop:
        info["scales"][0].pop(key, None)
        info.pop(key, None)
    (folder / "info").write_text(json.dumps(info))
    return path


def refused(call, *args):
    """Return the one line of an error, which must not blame the storage."""
    with pytest.raises(DatasetError) as caught:
        call(*args)
    line = str(caught.value)
    assert "\n" not in line and "same command" not in line and "cut short" not in line
    return line


@pytest.mark.parametrize(
    ("encoding", "dtype", "package"),
    [
        ("png", "uint8", "pyspng-seunglab"),
        ("fpzip", "float32", "fpzip"),
        ("kempressed", "float32", "fpzip"),
        ("zfpc", "float32", "zfpc"),
        ("compresso", "uint32", "compresso"),
        ("crackle", "uint64", "crackle-codec"),
        ("jxl", "uint8", "imagecodecs"),
    ],
)
def test_the_package_of_an_encoding_is_said_before_any_read(
    tmp_path, monkeypatch, encoding, dtype, package
):
    needed = "fpzip" if encoding == "kempressed" else encoding
    monkeypatch.setitem(chunks.NEEDS_INSTALL, needed, package)
    data = GREY.astype(dtype)
    path = changed(tmp_path / "em", data, scale={"encoding": encoding})
    count = ReadCount(monkeypatch)
    said = refused(Volume, path)
    assert f"--cv_path {path}: " in said
    assert f"encoding {encoding}, " in said and f"pip install {package}" in said
    assert not count.times


@pytest.mark.parametrize("flag", ["--cv_path", "--reference_path", "--cv_path_defects"])
def test_every_flag_of_a_volume_of_images_says_it(tmp_path, monkeypatch, flag):
    monkeypatch.setitem(chunks.NEEDS_INSTALL, "png", "pyspng-seunglab")
    png = changed(tmp_path / "png", scale={"encoding": "png"})
    paths = {"--cv_path": make_volume(tmp_path / "em", [GREY])} | {flag: png}
    words = [word for pair in paths.items() for word in pair]
    words += [*IMAGES, "--normalize", "--dst_folder", str(tmp_path / "data")]
    said = refused(download_image.main, words)
    assert said.startswith(f"{flag} {png}: has encoding png")


@pytest.mark.parametrize("flag", ["--cv_path", "--cv_path_defects"])
def test_every_flag_of_a_volume_of_fields_says_it(tmp_path, monkeypatch, flag):
    monkeypatch.setitem(chunks.NEEDS_INSTALL, "fpzip", "fpzip")
    fields = np.ones((4, 2, 48, 40), np.float32)
    data = fields[:, :1] if flag == "--cv_path_defects" else fields
    fpzip = changed(tmp_path / "fpzip", data, scale={"encoding": "fpzip"})
    paths = {"--cv_path": make_volume(tmp_path / "em", [fields])} | {flag: fpzip}
    words = [word for pair in paths.items() for word in pair]
    words += [*FIELDS, "--dst_folder", str(tmp_path / "data")]
    said = refused(download_field.main, words)
    assert said.startswith(f"{flag} {fpzip}: has encoding fpzip")


def test_a_mip_that_can_be_decoded_is_read_beside_one_that_cannot(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(chunks.NEEDS_INSTALL, "jxl", "imagecodecs")
    path = make_volume(tmp_path / "em", [GREY, GREY[:, :, ::2, ::2]])
    info = json.loads((tmp_path / "em/info").read_text())
    info["scales"][0]["encoding"] = "jxl"
    (tmp_path / "em/info").write_text(json.dumps(info))
    volume = Volume(path)
    assert (volume.read(Grid(1, 0, 0, 24, 20), range(4)) == 7).all()
    volume.check_mip("--mip", 1)
    assert "mip 0 has encoding jxl" in refused(volume.check_mip, "--mip", 0)
    area = Grid(0, 0, 0, 48, 40)
    assert "mip 0 has encoding jxl" in refused(volume.read, area, range(4))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale": {"encoding": "webp"}}, "encoding 'webp', which cloud-volume does"),
        ({"scale": {"encoding": "jpeg"}, "data_type": "uint16"}, "reads uint8 of it"),
        ({"scale": {"encoding": "png"}, "data_type": "uint16"}, "(png|pyspng)"),
        (
            {"scale": {"encoding": "compressed_segmentation"}, "data_type": "uint32"},
            "lacks compressed_segmentation_block_size",
        ),
        ({"data_type": "uint7"}, "data_type 'uint7', which is not known"),
        ({"data_type": "S8"}, "data_type 'S8', which is not known"),
        ({"drop": ["data_type"]}, "lacks data_type;"),
        ({"drop": ["num_channels", "type"]}, "lacks type, num_channels;"),
        ({"drop": ["scales"]}, "lacks scales;"),
        ({"drop": ["chunk_sizes"]}, "lacks chunk_sizes of scale 0"),
        ({"drop": ["size", "key"]}, "lacks key, size of scale 0"),
        ({"scale": {"size": [48, 40]}}, r"size \[48, 40\] of scale 0"),
        ({"scale": {"chunk_sizes": []}}, r"chunk_sizes \[\] of scale 0"),
        ({"scale": {"resolution": None}}, "resolution None of scale 0"),
        (
            {"scale": {"chunk_sizes": [[0, 8, 1]]}},
            r"chunk_sizes \[0, 8, 1\] of scale 0",
        ),
        ({"num_channels": None}, "num_channels None;"),
        ({"data_type": None}, "data_type None, which is not known"),
        ({"scale": {"sharding": {}}}, "has a sharding that is not known"),
        (
            {"scale": {"sharding": {"@type": "neuroglancer_uint64_sharded_v2"}}},
            "has a sharding that is not known",
        ),
        ({"@type": "neuroglancer_annotations_v1"}, "is a layer of annotations_v1;"),
        ({"@type": "neuroglancer_multilod_draco"}, "is a layer of multilod_draco;"),
        ({"@type": "neuroglancer_skeletons"}, "is a layer of skeletons;"),
        ({"type": "mesh"}, "is a layer of type 'mesh'"),
    ],
)
def test_an_info_that_cannot_be_used_says_what_is_wrong_with_it(tmp_path, change, said):
    path = changed(tmp_path / "em", **change)
    with pytest.raises(DatasetError, match=f"^--cv_path {path}: .*{said}"):
        Volume(path)
    refused(Volume, path)


@pytest.mark.parametrize("content", ["[]", "3", '{"scales": []}', '{"scales": [4]}'])
def test_an_info_of_another_form_is_refused(tmp_path, content):
    (tmp_path / "info").write_text(content)
    assert "info file" in refused(Volume, str(tmp_path))


def png(array, mode=None):
    content = io.BytesIO()
    Image.fromarray(array).convert(mode).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (png(np.full((40, 32), 999, np.uint16)), "16 bits and colour type 0"),
        (png(np.full((40, 32), 9, np.uint8), "RGB"), "8 bits and colour type 2"),
        (png(np.full((40, 32), 9, np.uint8), "P"), "8 bits and colour type 3"),
        (png(np.full((40, 32), True)), "1 bits and colour type 0"),
    ],
)
def test_a_png_of_another_kind_than_the_info_says_is_not_a_broken_one(
    tmp_path, monkeypatch, content, said
):
    monkeypatch.delitem(chunks.NEEDS_INSTALL, "png", raising=False)
    path = changed(tmp_path / "em", scale={"encoding": "png"})
    for chunk in (tmp_path / "em/4_4_40").iterdir():
        chunk.write_bytes(content)
    area = Grid(0, 0, 0, 8, 9)
    assert said in refused(Volume(path).read, area, range(4))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("graphene://https://host/segmentation/table/em", "for proofreading"),
        ("boss://https://host/em", "boss:// is not read; expected .*precomputed, zarr"),
        ("dvid://https://host/em", "dvid:// is not read"),
        ("ftp://host/em", "ftp:// is not known; expected one of gs, file, s3"),
        ("zarr://ftp://host/em", "ftp:// is not known"),
    ],
)
def test_a_path_of_another_kind_is_refused_by_name(path, said):
    with pytest.raises(DatasetError, match=f"^--cv_path {path}: .*{said}"):
        Volume(path)
    refused(Volume, path)


@pytest.mark.parametrize("name", ["em.npy", "em.png", "em.tif", "em.h5"])
def test_a_file_is_no_volume(tmp_path, name):
    (tmp_path / name).write_bytes(b"whatever")
    said = refused(Volume, str(tmp_path / name))
    assert f"{name}: is a file" in said and "metroem import SECTIONS" in said


def test_a_folder_of_images_is_no_volume(tmp_path):
    for z in range(3):
        (tmp_path / f"z{z}.TIF").write_bytes(b"whatever")
    said = refused(Volume, str(tmp_path))
    assert "but images (z0.TIF ...); make a volume of them" in said
    assert "no such folder" in refused(Volume, str(tmp_path / "nothing"))


def test_a_volume_that_moved_is_read_where_it_is(tmp_path):
    path = make_volume(tmp_path / "new", [GREY])
    (tmp_path / "old").mkdir()
    (tmp_path / "old/info").write_text(json.dumps({"redirect": path}))
    read = Volume(str(tmp_path / "old")).read(Grid(0, 0, 0, 48, 40), range(4))
    assert (read == 7).all()


def test_a_volume_that_moved_is_not_written_to_where_it_was(tmp_path):
    wanted = NewVolume(
        *(1, "uint8", 0, Grid(0, 0, 0, 48, 40), range(4), (4.0, 4.0, 40.0))
    )
    path = make_volume(tmp_path / "new", [GREY])
    (tmp_path / "old").mkdir()
    (tmp_path / "old/info").write_text(json.dumps({"redirect": path}))
    said = refused(lambda: SectionWriter(f"{tmp_path}/old", wanted, flag="--dst_path"))
    assert said.startswith("--dst_path") and f"{path}; give that path" in said
    assert [file.name for file in (tmp_path / "old").iterdir()] == ["info"]


@pytest.mark.parametrize("kind", ["image", "reference", "masks", "field"])
def test_every_volume_of_a_spec_says_it(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(chunks.NEEDS_INSTALL, "png", "pyspng-seunglab")
    em, field = GREY, np.ones((4, 2, 48, 40), np.uint8)
    paths = {
        name: make_volume(tmp_path / name, [field if name == "field" else em])
        for name in ("image", "reference", "masks", "field")
    }
    data = field if kind == "field" else em
    paths[kind] = changed(tmp_path / "png", data, scale={"encoding": "png"})
    area = {"src_mip": 0, "dst_mip": 0, "x_size": 16, "y_size": 12}
    side = {"x": 20, "y": 20}
    spec = {
        "image": {"path": paths["image"], "src_mip": 0}
        | {"reference": {"path": paths["reference"], **area}},
        "masks": [{"path": paths["masks"], "src_mip": 0, "threshold": 9}],
        "field": {"path": paths["field"], "src_mip": 0},
        **{"max_mip": 0, "dst_mip": 0, "x_size": 16, "y_size": 12},
        "pairs": [[side | {"z": 2}, side | {"z": 1}]],
    }
    if kind != "field":
        del spec["field"]
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    words = ["--spec_path", str(tmp_path / "spec.json")]
    said = refused(main, ["make-dataset", *words, "--dst_path", str(tmp_path / "d")])
    assert said.startswith(kind if kind != "reference" else "image: reference")
    assert f"{paths[kind]}: has encoding png" in said
    assert not (tmp_path / "d").exists()


def test_only_the_bounds_of_a_volume_need_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(chunks.NEEDS_INSTALL, "png", "pyspng-seunglab")
    path = changed(tmp_path / "png", scale={"encoding": "png"})
    volume = Volume(path, flag="--like", is_read=False)
    assert volume.extent() == (Grid(0, 0, 0, 48, 40), range(4))
    assert "has encoding png" in refused(volume.read, Grid(0, 0, 0, 4, 5), range(1))
