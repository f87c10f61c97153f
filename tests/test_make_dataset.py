"""make-dataset on local volumes: what is cut out, and being killed and repeated."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import sys

import numpy as np
import pytest
from cloudvolume import CloudVolume

import train
from metroem.__main__ import build_parser, main
from metroem.create.pair_volumes import PairVolumes
from metroem.create.pairs import DatasetRequest
from metroem.errors import DatasetError, UsageError
from metroem.grid import Grid
from metroem.io import parts
from metroem.io.h5 import FieldSet, ImageSet, verify
from metroem.io.volume_write import SectionWriter
from metroem.scaffold import init_pyramid
from tests.pairs import texture
from tests.volumes import ReadCount, make_volume

# (Z, C, X, Y) of sections 10...15, x from 64 on and y from -32 on.
SHAPE = (6, 1, 160, 128)
OFFSET = (64, -32, 10)
ROWS, COLS = 48, 32
# Two places, distances of 1 and 2; the last pair has its sides at two places.
PAIRS = [
    [(144, 32, 12), (144, 32, 11)],
    [(144, 32, 12), (144, 32, 10)],
    [(176, 40, 14), (160, 44, 15)],
]
NUM_CUTOUTS = 5


def grid_of(x, y):
    """Centred: 24 px along x and 16 px along y to each side."""
    return Grid(0, x - ROWS // 2, y - COLS // 2, ROWS, COLS)


def stored(sections, z, grid, moved=(0, 0)):
    row, col = grid.x + moved[0] - OFFSET[0], grid.y + moved[1] - OFFSET[1]
    return sections[z - 10, 0, row : row + grid.rows, col : col + grid.cols]


@pytest.fixture
def sections():
    return np.random.default_rng(0).integers(1, 255, SHAPE, dtype=np.uint8)


@pytest.fixture
def volume(tmp_path, sections):
    return make_volume(
        tmp_path / "em", [sections, sections[..., ::2, ::2]], offset=OFFSET
    )


@pytest.fixture
def spec(volume):
    return {
        "image": {"path": volume, "src_mip": 0},
        "masks": [],
        "max_mip": 2,
        "dst_mip": 0,
        "x_size": ROWS,
        "y_size": COLS,
        "pairs": [[dict(zip("xyz", side, strict=True)) for side in p] for p in PAIRS],
    }


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["metroem"])

    def run(spec, *flags, dst="data"):
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        path = dst if "://" in dst else str(tmp_path / dst)
        paths = ["--spec_path", str(tmp_path / "spec.json"), "--dst_path", path]
        main(["make-dataset", *paths, *map(str, flags)])
        return sorted((tmp_path / dst).glob("*.h5"))

    return run


def with_reference(spec, volume):
    spec["image"]["reference"] = {
        "path": volume,
        "src_mip": 0,
        "dst_mip": 1,
        "x_size": 32,
        "y_size": 28,
    }
    return spec


def with_field(spec, tmp_path, *, changed=(2, slice(20, 21), slice(20, 21), np.nan)):
    """Displacements at mip 1, constant over a section: 10 + z along x, -6.5 along y,
    but for those of one area.
    """
    fields = np.zeros((6, 2, 80, 64), np.float32)
    for index in range(6):
        fields[index, 0], fields[index, 1] = -6.5, 20 + index
    index, rows, cols, value = changed
    fields[index, :, rows, cols] = value
    finer = np.zeros((6, 2, 160, 128), np.float32)
    path = make_volume(tmp_path / "field", [finer, fields], offset=OFFSET)
    spec["field"] = {"path": path, "src_mip": 1}
    return spec


def with_mask(spec, tmp_path):
    """Marks one pixel of mip 1 in each section: x 144, y 32 on, 2 x 2 px of mip 0."""
    mask = np.zeros((6, 1, 80, 64), np.uint8)
    mask[:, :, 40, 32] = 3
    mask[:, :, 0, 0] = 2
    finer = np.zeros((6, 1, 160, 128), np.uint8)
    path = make_volume(tmp_path / "mask", [finer, mask], offset=OFFSET)
    spec["masks"] = [{"path": path, "src_mip": 1, "threshold": 3}]
    return spec


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
            moved = 20 + z - 10, -7
            offset = moved[0] + apart[0], moved[1] + apart[1]
            assert fields.offset(index, side) == images.offset(index, side) == offset
            np.testing.assert_allclose(fields.read(index, side)[0], 0.5, atol=0.01)
            np.testing.assert_allclose(fields.read(index, side)[1], 0, atol=0.01)
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
    assert FieldSet(fields_path).offset(0, 0) == (22, -7)


def test_a_section_without_any_vector_is_not_moved(tmp_path, make, spec, caplog):
    spec = with_field(spec, tmp_path, changed=(2, slice(None), slice(None), np.nan))
    fields_path, _ = make(spec)
    assert FieldSet(fields_path).offset(0, 0) == (0, 0)
    assert "no vector to take a mean displacement from in section 12" in caplog.text


class _Killed(BaseException):
    """Stands for what ends a process between two parts."""


def kill_at(patched, owner, name, count):
    countdown = itertools.count()
    original = getattr(owner, name)

    def stop(self, *args):
        if next(countdown) == count:
            raise _Killed
        return original(self, *args)

    patched.setattr(owner, name, stop)


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def whole_spec(spec, tmp_path, volume):
    return with_mask(with_field(with_reference(spec, volume), tmp_path), tmp_path)


@pytest.mark.parametrize("count", [0, 3, 9, 4 * NUM_CUTOUTS - 1])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    tmp_path, make, spec, volume, monkeypatch, count
):
    spec = whole_spec(spec, tmp_path, volume)
    make(spec, dst="twin")
    with monkeypatch.context() as patched:
        kill_at(patched, parts.PartStore, "put", count)
        with pytest.raises(_Killed):
            make(spec)
    make(spec, "--parallel", 2)
    assert digests(tmp_path / "data") == digests(tmp_path / "twin")
    assert len(digests(tmp_path / "data")) == 2


def test_what_is_finished_is_not_read_again_and_another_spec_needs_overwrite(
    tmp_path, make, spec, monkeypatch
):
    make(spec)
    count = ReadCount(monkeypatch)
    make(spec)
    assert not count.times
    spec["pairs"].pop()
    with pytest.raises(DatasetError, match=r"num_pairs 3 \(asked for: 2\).*--overwr"):
        make(spec)
    (path,) = make(spec, "--overwrite")
    assert ImageSet(path).num_pairs == 2


def test_each_chunk_is_read_once_where_pairs_share_sections_in_thick_chunks(
    tmp_path, make, spec, sections, volume, monkeypatch
):
    spec["pairs"] = spec["pairs"][:2]
    thick = make_volume(
        tmp_path / "thick", [sections], offset=OFFSET, chunk=(32, 32, 3)
    )
    spec["image"]["path"] = thick
    count = ReadCount(monkeypatch)
    make(with_reference(spec, thick))
    assert set(count.times.values()) == {1}


def read_volume(path, mip=0):
    volume = CloudVolume(path, mip=mip, progress=False, fill_missing=False)
    return np.asarray(volume[:, :, :]).transpose(2, 3, 0, 1)


def test_a_path_with_a_scheme_gets_one_section_a_side(tmp_path, make, spec, volume):
    spec = whole_spec(spec, tmp_path, volume)
    fields_path, images_path = make(spec)
    fields, images = FieldSet(fields_path), ImageSet(images_path)
    dst = f"file://{tmp_path}/volumes"
    make(spec, dst=dst)
    found = read_volume(f"{dst}/image")
    vectors = read_volume(f"{dst}/field")
    assert found.shape == (6, 1, ROWS, COLS)
    for z in range(6):
        index, side = divmod(z, 2)
        np.testing.assert_array_equal(found[z, 0], images.read(index)[side])
        np.testing.assert_allclose(vectors[z], fields.read(index, side), atol=0.01)
        note = json.loads((tmp_path / "volumes" / "sides" / f"{z}.json").read_text())
        assert (note["pair"], note["side"]) == (index, ("src", "tgt")[side])
        assert note["center"] == list(PAIRS[index][side])
        assert note["box"] == list(images.box(index, side))


@pytest.mark.parametrize("count", [0, 2, 7])
def test_volumes_killed_anywhere_end_with_the_same_bytes(
    tmp_path, make, spec, volume, monkeypatch, count
):
    spec = whole_spec(spec, tmp_path, volume)
    make(spec, dst=f"file://{tmp_path}/twin")
    dst = f"file://{tmp_path}/volumes"
    with monkeypatch.context() as patched:
        kill_at(patched, SectionWriter, "put", count)
        with pytest.raises(_Killed):
            make(spec, dst=dst)
    # A note that was cut short says nothing.
    for note in list((tmp_path / "volumes").glob("sides/*.json"))[:1]:
        note.write_bytes(note.read_bytes()[:9])
    make(spec, dst=dst)
    assert digests(tmp_path / "volumes") == digests(tmp_path / "twin")
    with monkeypatch.context() as patched:
        kill_at(patched, PairVolumes, "put", 0)
        make(spec, dst=dst)


def test_volumes_of_another_spec_need_overwrite_and_others_stay(tmp_path, make, spec):
    dst = f"file://{tmp_path}/volumes"
    make(spec, dst=dst)
    spec["pairs"].pop()
    with pytest.raises(DatasetError, match="num_pairs 3.*--overwrite"):
        make(spec, dst=dst)
    make(spec, "--overwrite", dst=dst)
    assert read_volume(f"{dst}/image").shape == (4, 1, ROWS, COLS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DatasetError, match="no data set of ours"):
        make(spec, "--overwrite", dst=f"file://{tmp_path}/mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_nothing_but_blank_is_refused_and_read_again(tmp_path, make, spec, scheme):
    spec["image"]["path"] = make_volume(
        tmp_path / "unwritten", [np.zeros(SHAPE, np.uint8)], offset=OFFSET
    )
    dst = f"{scheme}{tmp_path}/data"
    with pytest.raises(DatasetError, match="all 3 pairs .* blank here.*credentials"):
        make(spec, dst=dst)
    assert digests(tmp_path / "data") == {}


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
