"""Check the values that make-dataset writes."""

import argparse
import dataclasses
import json

import numpy as np
import pytest

import train
from metroem.__main__ import build_parser, main
from metroem.errors import DatasetError, UsageError
from metroem.geometry.grid import Grid
from metroem.io.h5 import FieldSet, ImageSet, verify
from metroem.models.module_folders import init_pyramid
from metroem.prepare.requests import DatasetRequest
from tests.pairs import texture
from tests.prepare.make_dataset.conftest import (
    OFFSET,
    PAIRS,
    SHAPE,
    grid_of,
    stored,
    with_field,
    with_mask,
    with_reference,
)
from tests.volumes import make_volume


def test_each_flag_is_a_field_of_the_request():
    commands = next(
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    dests = {action.dest for action in commands.choices["make-dataset"]._actions}
    assert dests - {"help"} == {f.name for f in dataclasses.fields(DatasetRequest)}


def test_each_pair_lies_at_its_own_place(make, spec, sections):
    (path,) = make(spec)
    images = ImageSet(path)
    assert path.name == "x144_y32_z12_MIP0.h5"
    for index, (src, tgt) in enumerate(PAIRS):
        grid = grid_of(*src[:2])
        assert images.grid(index) == grid
        assert images.sections(index) == (src[2], tgt[2])
        for side, (x, y, z) in enumerate((src, tgt)):
            there = grid_of(x, y)
            expected = stored(sections, z, there)
            np.testing.assert_array_equal(images.read(index)[side], expected)
            box = (there.x, there.y, z, *there.end, z + 1)
            assert images.box(index, side) == box
    assert images.offset(2, 1) == (-16, 4)
    assert verify(path) == []
    assert images.normalization == {"kind": "raw"}


def test_the_area_around_normalises_and_what_is_masked_does_not_count(
    tmp_path, make, spec, sections, volume
):
    spec = with_mask(with_reference(spec, volume), tmp_path)
    (path,) = make(spec)
    images = ImageSet(path)
    # 32 x 28 px of mip 1 are 64 x 56 of mip 0 around (144, 32).
    area = stored(sections, 12, Grid(0, 112, 4, 64, 56)).astype(float)
    counts = np.ones(area.shape, bool)
    counts[32:34, 28:30] = False
    mean, std = area[counts].mean(), area[counts].std()
    raw = stored(sections, 12, grid_of(144, 32))
    expected = (raw - mean) / std
    expected[24:26, 16:18] = 0
    np.testing.assert_allclose(images.read(0).src, expected, atol=1e-5)
    masks = images.read_defects(0)
    assert masks is not None
    assert np.argwhere(masks.src).tolist() == [[24, 16], [24, 17], [25, 16], [25, 17]]


def test_images_are_averaged_to_dst_mip_and_finer_masks_mark_any_pixel(
    tmp_path, make, spec, sections
):
    spec |= {"dst_mip": 1, "x_size": 24, "y_size": 16}
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, :, 81, 65] = 9  # x 145, y 33
    path = make_volume(tmp_path / "mask", [mask], offset=OFFSET)
    spec["masks"] = [{"path": path, "src_mip": 0, "threshold": 9}]
    (path,) = make(spec)
    image = ImageSet(path).read(0).src
    raw = stored(sections, 12, grid_of(144, 32)).astype(float)
    expected = raw.reshape(24, 2, 16, 2).mean((1, 3))
    expected[12, 8] = 0
    np.testing.assert_allclose(image, expected, atol=1e-4)


def test_the_translation_of_a_field_moves_the_images_and_is_taken_out(
    tmp_path, make, spec, sections
):
    fields_path, images_path = make(with_field(spec, tmp_path))
    assert fields_path.name == "field_0_x144_y32_z12_MIP0_precomputed.h5"
    fields, images = FieldSet(fields_path), ImageSet(images_path)
    assert fields.num_sides == 2
    for index, pair in enumerate(PAIRS):
        for side, (x, y, z) in enumerate(pair):
            apart = x - pair[0][0], y - pair[0][1]
            # Down to whole pixels of max_mip 2.
            moved = (20 + z - 10) // 4 * 4, -8
            offset = moved[0] + apart[0], moved[1] + apart[1]
            assert fields.offset(index, side) == images.offset(index, side) == offset
            rest = 20 + z - 10 - moved[0]
            np.testing.assert_allclose(fields.read(index, side)[0], 1.5, atol=0.01)
            np.testing.assert_allclose(fields.read(index, side)[1], rest, atol=0.01)
            expected = stored(sections, z, grid_of(x, y), moved)
            np.testing.assert_array_equal(images.read(index)[side], expected)


def test_translations_are_whole_pixels_of_the_reference(tmp_path, make, spec):
    spec = with_field(spec, tmp_path)
    area = {"path": spec["field"]["path"], "src_mip": 1, "dst_mip": 2}
    spec["field"]["reference"] = area | {"x_size": 10, "y_size": 8}
    fields_path, _ = make(spec, "--checkpoint_name", "second")
    assert fields_path.name.endswith("_second.h5")
    # 22 along x, -6.5 along y, down to multiples of 4.
    assert FieldSet(fields_path).offset(0, 0) == (20, -8)


def test_vectors_under_a_mask_are_not_profiled(tmp_path, make, spec):
    masked = (2, slice(40, 41), slice(32, 33), 1e6)
    spec = with_mask(with_field(spec, tmp_path, changed=masked), tmp_path)
    fields_path, _ = make(spec)
    assert FieldSet(fields_path).offset(0, 0) == (20, -8)


def test_a_section_without_any_vector_is_not_moved(tmp_path, make, spec, caplog):
    spec = with_field(spec, tmp_path, changed=(2, slice(None), slice(None), np.nan))
    fields_path, _ = make(spec)
    assert FieldSet(fields_path).offset(0, 0) == (0, 0)
    assert "section 12 has no vector to take a mean displacement from" in caplog.text


def test_pairs_beyond_the_volume_are_blank_there_and_named(make, spec, caplog):
    spec["pairs"][0][0] |= {"x": 72}
    (path,) = make(spec)
    image = ImageSet(path).read(0).src
    # x 48 is 16 before the volume's first.
    assert not image[:16].any() and image[16:].all()
    assert "1 pairs reach beyond the volume, and are blank there: [0]" in caplog.text


@pytest.mark.parametrize(
    ("side", "match"),
    [
        ({"z": 16}, r"pairs 0: section 16 is needed, image .* holds 10\.\.\.15"),
        ({"x": 900}, "pairs 0: its patch .* lies outside of image"),
    ],
)
def test_places_that_the_volume_does_not_hold_are_refused(
    tmp_path, make, spec, side, match
):
    spec["pairs"][0][0] |= side
    with pytest.raises(DatasetError, match=match):
        make(spec)
    assert not (tmp_path / "data").exists()


def test_volumes_that_cannot_serve_are_refused(tmp_path, make, spec, volume):
    spec["masks"] = [{"path": volume, "src_mip": 2, "threshold": 1}]
    with pytest.raises(DatasetError, match="masks: src_mip 2.*available: 0, 1"):
        make(spec)
    spec["masks"] = []
    spec["field"] = {"path": volume, "src_mip": 0}
    with pytest.raises(DatasetError, match="field .*1 channels, a field has 2"):
        make(spec)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--parallel", 0], "--parallel 0"),
        (["--checkpoint_name", "a/b"], "--checkpoint_name"),
        (["--dst_path", ""], "--dst_path"),
    ],
)
def test_flags_that_cannot_work_are_refused(make, spec, flags, match):
    with pytest.raises(UsageError, match=match):
        make(spec, *flags)


@pytest.mark.slow
def test_points_become_a_data_set_that_inspect_passes_and_train_trains_on(
    tmp_path, make, spec, caplog
):
    tissue = [texture(160, 128, seed=z // 2)[0, 0].byte().numpy() for z in range(6)]
    spec["image"]["path"] = make_volume(
        tmp_path / "tissue", [np.stack(tissue)[:, None]], offset=OFFSET
    )
    spec = with_mask(with_field(spec, tmp_path), tmp_path)
    with_reference(spec, spec["image"]["path"])
    spec["pairs"] = []
    (tmp_path / "template.json").write_text(json.dumps(spec))
    points = "x0,y0,z0\n144,32,11\n136,40,12\n144,32,13\n140,36,14\n144,32,15\n"
    (tmp_path / "points.csv").write_text(points)
    paths = [tmp_path / name for name in ("template.json", "points.csv", "made.json")]
    flags = ("--src_spec_path", "--points_path", "--dst_spec_path")
    words = [str(w) for pair in zip(flags, paths, strict=True) for w in pair]
    main(["create-spec", *words, "--offsets", "-1"])
    make(json.loads((tmp_path / "made.json").read_text()))
    caplog.set_level("INFO", "metroem")
    init_pyramid(tmp_path / "pyramid", [2, 0], "scalenet")
    main(["inspect", str(tmp_path / "data")])
    assert "1 image sets, 1 field sets, all in order" in caplog.text
    phase = {"lr": 1e-3, "num_epochs": 1, "smoothness": 5, "crop_size": 32}
    (tmp_path / "schedule.json").write_text(json.dumps({"0": [phase]}))
    train.main(
        [
            *("--pyramid_path", str(tmp_path / "pyramid")),
            *("--dataset_path", str(tmp_path / "data")),
            *("--train_mode", "custom", "--device", "cpu", "--val_pairs", "1"),
            *("--train_params_path", str(tmp_path / "schedule.json")),
            *("--checkpoint_name", "precomputed", "--train_stages", "1"),
            *("--generate_field_stages", "1", "--max_epochs", "1"),
        ]
    )
    weights = "pyramid/1_mip0in_scalenet/model/precomputed.state.pth.tar"
    assert (tmp_path / weights).is_file()
