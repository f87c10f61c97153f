import json

import numpy as np
import pytest
from cloudvolume import CloudVolume

import download_field
from metroem.errors import DatasetError, UsageError
from metroem.io import volume_write
from metroem.io.h5 import FieldSet
from tests.export.sets import (
    COLS,
    MIP,
    RESOLUTION,
    ROWS,
    export,
    image,
    make_sets,
    random_vectors,
)
from tests.volumes import make_volume

SECTIONS = range(5, 8)
# 0.01 px is where fields are rounded on disk, see test_h5.
ROUNDED = 0.01 + 1e-4


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def volume(tmp_path):
    return tmp_path / "field"


def open_at(path, mip=MIP):
    return CloudVolume(f"file://{path}", mip=mip, progress=False, fill_missing=True)


def read(path, *, x=64, y=-32, z=5, mip=MIP, shape=(ROWS, COLS)):
    """Read (C, H, W) of one section of a volume."""
    x, y = x >> mip, y >> mip
    stored = open_at(path, mip)[x : x + shape[0], y : y + shape[1], z]
    return np.asarray(stored)[:, :, 0].transpose(2, 0, 1)


def files(path):
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_fields_are_stored_as_corgie_stores_them(data, volume):
    fields = make_sets(data)
    export(data, volume)
    # Channel 0 is along the volume's y, and so along cols; pixels of the mip.
    for index, z in enumerate(SECTIONS):
        np.testing.assert_array_equal(read(volume, z=z), fields.read(index))
    made = open_at(volume)
    assert made.dtype == "float32" and made.num_channels == 2
    assert tuple(open_at(volume, 0).resolution) == RESOLUTION
    assert list(made.bounds.minpt) == [32, -16, 4]
    assert list(made.bounds.maxpt) == [32 + ROWS, -16 + COLS, 8]
    # Section 4 is tgt alone: its field is not known.
    assert not read(volume, z=4).any()


def test_info_and_provenance_say_what_the_values_are(data, volume):
    fields = make_sets(data)
    export(data, volume, "--dtype", "int16")
    said = json.loads((volume / "info").read_text())["metroem"]
    assert said == {
        "kind": "fields",
        "direction": "pull",
        "channel_order": "yx",
        "field_unit": "relative",
        "int16_scale": 0.25,
    }
    provenance = json.loads((volume / "provenance").read_text())
    assert provenance["sources"] == [str(fields.path)]
    (entry,) = provenance["processing"]
    assert entry["method"].items() >= said.items()
    # As cloud-volume reads it.
    assert open_at(volume).provenance.sources == [str(fields.path)]


@pytest.mark.parametrize(
    ("flags", "channels", "scale"),
    [
        (["--channel_order", "xy"], [1, 0], 1),
        (["--field_unit", "mip0"], [0, 1], 2),
        (["--channel_order", "xy", "--field_unit", "mip0"], [1, 0], 2),
    ],
)
def test_other_conventions_may_be_asked_for(data, volume, flags, channels, scale):
    fields = make_sets(data)
    export(data, volume, *flags)
    np.testing.assert_array_equal(read(volume), scale * fields.read(0)[channels])


def downloaded(volume, folder, flags, corner, size):
    area = ["--x_offset", corner[0], "--y_offset", corner[1], "--patch_size", size]
    area += ["--z_start", 5, "--z_end", 8, "--src_mip", MIP, "--dst_mip", MIP]
    said = ["--cv_path", volume, "--dst_folder", folder, *area, *flags]
    download_field.main([str(word) for word in said])
    (path,) = folder.glob("*.h5")
    return FieldSet(path)


def total(fields, index, side=0):
    """Whole displacements: (2, H, W), pixels of the mip, translation added again."""
    x, y = fields.offset(index, side)
    moved = np.array([y, x])[:, None, None] / 2**fields.mip
    return fields.read(index, side).astype(np.float64) + moved


def quarters(z):
    return np.rint(random_vectors(z) * 4) / 4


@pytest.mark.parametrize("unit", ["relative", "mip0"])
@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0), ("int16", 1 / 8 + ROUNDED)]
)
def test_download_field_gives_the_fields_back(
    tmp_path, data, volume, unit, dtype, error
):
    offsets = {z: (2 * z - 30, 500 - 6 * z) for z in range(4, 8)}
    # Files round to 0.01 px from their least value on: quarters stay what they are.
    vectors = quarters if dtype == "float32" else random_vectors
    fields = make_sets(data, downloaded=True, offsets=offsets, vectors=vectors)
    export(data, volume, "--dtype", dtype, "--field_unit", unit)
    flags = ["--channel_order", "yx", "--field_unit", unit]
    # Patches are square at download; this one is in the other corner.
    back = downloaded(volume, tmp_path / "back", flags, (64, -32 + 2 * 16), ROWS)
    for index in range(3):
        for side in (0, 1):
            expected = total(fields, index, side)[:, :, 16:]
            assert np.abs(total(back, index, side) - expected).max() <= error


def test_the_section_that_is_tgt_alone_has_a_downloaded_field_too(data, volume):
    fields = make_sets(data, downloaded=True)
    export(data, volume)
    np.testing.assert_array_equal(read(volume, z=4), fields.read(0, 1))


def test_how_far_images_were_moved_is_added_to_what_training_wrote(data, volume):
    offsets = {4: (0, 0), 5: (6, -20), 6: (8, 4), 7: (2, 2)}
    fields = make_sets(data, offsets=offsets)
    export(data, volume)
    moved = np.array([-10, 3])[:, None, None]  # y and x, pixels of mip 1
    np.testing.assert_array_equal(read(volume), fields.read(0) + np.float32(moved))


def test_sets_of_several_places_share_a_volume(data, volume):
    # Neighbours that share chunks, and one at other sections.
    places = [{}, {"x": 64 + 2 * ROWS}, {"x": 10, "y": 200, "z": 40}]
    sets = [make_sets(data, **place) for place in places]
    export(data, volume)
    for fields, place in zip(sets, places, strict=True):
        where = {"x": 64, "y": -32, "z": 5} | place
        np.testing.assert_array_equal(read(volume, **where), fields.read(0))


def test_a_volume_may_be_filled_place_by_place(tmp_path, data, volume):
    em = np.ones((60, 1, 300, 301), np.uint8)
    like = make_volume(
        tmp_path / "em", [em], offset=(11, -33, 3), resolution=RESOLUTION
    )
    first = make_sets(data)
    export(data, volume, "--like", like)
    other = tmp_path / "other"
    second = make_sets(other, x=64 + 2 * ROWS, resolution=None)
    export(other, volume, "--like", like)
    np.testing.assert_array_equal(read(volume), first.read(0))
    np.testing.assert_array_equal(read(volume, x=64 + 2 * ROWS), second.read(0))
    made = open_at(volume, 0)
    assert list(made.bounds.minpt) == [11, -33, 3]
    assert list(made.bounds.maxpt) == [311, 268, 63]
    far = tmp_path / "far"
    make_sets(far, x=400)
    with pytest.raises(DatasetError, match=r"does not reach section 5, x 400\.\.\.480"):
        export(far, volume, "--like", like)


def test_what_is_there_is_left_and_other_values_are_refused(tmp_path, data, volume):
    make_sets(data)
    export(data, volume)
    before = files(volume)
    export(data, volume)
    assert files(volume) == before
    other = tmp_path / "other"
    make_sets(other, offsets=dict.fromkeys(range(4, 8), (2, 4)))
    with pytest.raises(DatasetError, match="section 5 holds other values.*--overwrite"):
        export(other, volume)
    assert files(volume) == before


def test_overwrite_replaces_the_sections_and_nothing_else(tmp_path, data, volume):
    kept = make_sets(data)
    export(data, volume)
    other = tmp_path / "other"
    offsets = {4: (2, 0), 5: (0, 2)}
    moved = make_sets(other, num_pairs=1, downloaded=True, offsets=offsets)
    with pytest.raises(DatasetError, match="section 5 holds other values"):
        export(other, volume)
    export(other, volume, "--overwrite")
    np.testing.assert_array_equal(read(volume, z=5), np.float32(total(moved, 0)))
    np.testing.assert_array_equal(read(volume, z=6), kept.read(1))


class _Killed(BaseException):
    """Stands for a kill between two chunks."""


def test_an_export_that_was_killed_goes_on(tmp_path, data, volume, monkeypatch):
    make_sets(data)
    export(data, tmp_path / "whole")
    replace = volume_write.os.replace
    moved = []

    def dying(source, target):
        moved.append(target)
        if len(moved) == 3:  # the info, one section, and then
            raise _Killed
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(volume_write.os, "replace", dying)
        patched.setattr(volume_write.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(_Killed):
            export(data, volume)
    assert list(volume.glob(".writing-*"))
    export(data, volume)
    assert not list(volume.glob(".writing-*"))
    for z in SECTIONS:
        np.testing.assert_array_equal(read(volume, z=z), read(tmp_path / "whole", z=z))


def test_chunks_that_others_compressed_are_replaced(tmp_path, data, volume):
    fields = make_sets(data)
    export(data, volume)
    stored = open_at(volume)
    compressed = CloudVolume(
        f"file://{volume}", mip=MIP, compress="gzip", progress=False
    )
    chunks = list(volume.rglob("*_5-6"))
    compressed[:, :, 5:6] = np.ones_like(stored[:, :, 5:6])
    for chunk in chunks:
        chunk.unlink()
    export(data, volume, "--overwrite")
    np.testing.assert_array_equal(read(volume), fields.read(0))
    assert not list(volume.rglob("*_5-6.gz"))


def test_images_before_and_after_are_volumes_too(tmp_path, data, volume):
    offsets = {4: (0, 0), 5: (0, 0), 6: (0, 0), 7: (10, -4)}
    shift = np.ones((2, ROWS, COLS), np.float32) * [[[3]], [[-5]]]
    make_sets(data, downloaded=True, offsets=offsets, vectors=lambda z: shift)
    export(data, volume, "--warped", tmp_path / "images")
    before, after = tmp_path / "images" / "before", tmp_path / "images" / "after"
    for z in range(4, 8):
        x, y = offsets[z]
        moved = {"x": 64 + x, "y": -32 + y, "z": z}
        np.testing.assert_array_equal(read(before, **moved)[0], image(z))
        # after[p] = image[p + field], rows -5 and cols +3.
        warped = read(after, z=z)[0]
        np.testing.assert_allclose(warped[5:, :-3], image(z)[:-5, 3:], atol=1e-5)
    # What the volumes show is what corgie makes of the field: x + channel 1.
    stored = read(volume, z=7)
    np.testing.assert_array_equal(stored[1], -5 + 10 / 2)
    np.testing.assert_array_equal(stored[0], 3 - 4 / 2)


def test_a_section_without_a_field_stays_as_it_is(tmp_path, data, volume):
    make_sets(data)
    export(data, volume, "--warped", tmp_path / "images")
    for name in ("before", "after"):
        stored = read(tmp_path / "images" / name, z=4)
        np.testing.assert_array_equal(stored[0], image(4))
    assert (read(tmp_path / "images" / "after", z=5)[0] != image(5)).any()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--checkpoint_name", "MIP3"], "--checkpoint_name"),
        (["--dst_path", "https://host/field"], "web servers take no files"),
        (["--warped", "precomputed://http://host/a"], "--warped.*web servers"),
        (["--resolution", 4, 0, 40], "must be > 0"),
        (["--format", "itk", "--dtype", "int16"], "leave out --dtype"),
        (["--format", "sofima", "--dst_path", "s3://a/b"], "a local folder"),
        (["--format", "itk", "--warped", "a"], "only goes with --format cloudvolume"),
    ],
)
def test_flags_that_cannot_work_are_refused(data, volume, flags, match):
    make_sets(data)
    with pytest.raises(UsageError, match=match):
        export(data, volume, *flags)


@pytest.mark.parametrize(
    ("sets", "flags", "match"),
    [
        ([{}], ["--checkpoint_name", "other"], "'other', only of checkp"),
        ([{}], ["--stage", 1], r"stages \[0\]"),
        ([{}, {"mip": 2}], [], r"at mips \[1, 2\]; choose"),
        ([{"resolution": None}], [], "--resolution X Y Z"),
        ([{}, {"x": 400, "resolution": (8, 8, 40)}], [], "its sets state"),
        ([{"x": 63}], [], "between the pixels of mip 1"),
    ],
)
def test_sets_that_cannot_be_exported_are_refused(data, volume, sets, flags, match):
    for one in sets:
        make_sets(data, **one)
    with pytest.raises(DatasetError, match=match):
        export(data, volume, *flags)
    assert not volume.exists()


def test_the_mip_may_be_chosen(data, volume):
    make_sets(data)
    fields = make_sets(data, mip=2)
    export(data, volume, "--mip", 2)
    np.testing.assert_array_equal(read(volume, mip=2), fields.read(0))


def test_a_resolution_may_be_given(data, volume):
    make_sets(data, resolution=None)
    export(data, volume, "--resolution", 5, 7, 30.5)
    assert list(open_at(volume, 0).resolution) == [5, 7, 30.5]


def test_fields_beyond_int16_are_refused(data, volume):
    make_sets(data, downloaded=True, offsets=dict.fromkeys(range(4, 8), (0, 40000)))
    with pytest.raises(DatasetError, match="int16 holds up to 8192; give --dtype fl"):
        export(data, volume, "--dtype", "int16")


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--dtype", "int16"], "already exists as float32"),
        (["--channel_order", "xy"], "channel_order 'yx' .asked for: 'xy'"),
        (["--resolution", 8, 8, 40], "mip-0 voxels of 4x6x40 nm"),
    ],
)
def test_a_volume_of_another_kind_is_left_alone(data, volume, flags, match):
    make_sets(data)
    export(data, volume)
    before = files(volume)
    with pytest.raises(DatasetError, match=match):
        export(data, volume, *flags, "--overwrite")
    assert files(volume) == before


def test_a_volume_with_other_channels_is_left_alone(tmp_path, data):
    make_sets(data)
    em = make_volume(tmp_path / "em", [np.ones((9, 1, 200, 201), np.float32)])
    with pytest.raises(DatasetError, match="has 1 channels"):
        export(data, em)


def test_images_that_are_not_there_are_asked_for(tmp_path, data, volume, caplog):
    fields = make_sets(data)
    (data / "x64_y-32_z5_MIP1.h5").unlink()
    with pytest.raises(DatasetError, match="--warped.*no image set"):
        export(data, volume, "--warped", tmp_path / "images")
    export(data, volume, "--resolution", 4, 6, 40)
    assert "taken as not moved" in caplog.text
    np.testing.assert_array_equal(read(volume), fields.read(0))


def test_images_with_other_pairs_are_refused(data, volume):
    make_sets(data, num_pairs=2)
    fields = make_sets(data)
    images = data / "x64_y-32_z5_MIP1.h5"
    images.unlink()
    other = data.parent / "short"
    make_sets(other, num_pairs=2)
    (other / images.name).rename(images)
    with pytest.raises(DatasetError, match="3 pairs, its images .* have 2"):
        export(data, volume)
    assert fields.num_pairs == 3


def test_a_download_without_a_suffix_may_be_exported(data, volume):
    named = make_sets(data, downloaded=True).path
    named.rename(named.with_name(named.name.replace("_checkpoint", "")))
    export(data, volume, "--checkpoint_name", "")
    assert read(volume).any()
