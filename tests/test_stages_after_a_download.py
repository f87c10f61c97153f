"""Stages after a downloaded field: where each sees src and tgt, by formula.

Section z shows tissue(p) at p + displacement(z, p), an affine map of mip-0 pixels, so
all that is stored can be computed: images at any mip and their fields.
"""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metroem.__main__ import main
from metroem.data.dataset import find_pairs, read_sample
from metroem.data.sampling import read_skipping
from metroem.errors import DatasetError
from metroem.geometry.field import warp
from metroem.geometry.grid import Grid
from metroem.io.h5 import (
    FieldSet,
    FieldSetMeta,
    ImageSet,
    ImageSetMeta,
    Pair,
    PairLocation,
    verify,
    write_field_set,
    write_image_set,
)
from metroem.models.options import AlignerOptions
from metroem.models.types import Alignment
from metroem.specs.modules import ModuleSpec
from metroem.training import write_fields as writing
from metroem.utils.stop_request import Stopped

MIPS = (3, 2, 1, 0)  # of stages 0, 1, 2 and 3
X, Y, Z, NUM_PAIRS = 64, -32, 6, 2
SIZE = (192, 256)  # mip-0 pixels
BORDER_PX = 8  # fields point out of the patch there
TURN = {
    z: np.array([[0.01 * (z - 5), 0.06], [-0.05, 0.02 * (6 - z)]]) for z in (5, 6, 7)
}
SHIFT = {5: (150.0, -90.0), 6: (-70.0, 33.0), 7: (21.0, 128.0)}


def tissue(x, y):
    """Grey levels of mean 0 and std 1, nowhere 0, of periods above 30 mip-0 px."""
    waves = (
        np.sin(x / 9 + 1) + np.sin(y / 7) + np.sin((x + y) / 13) + np.sin((x - y) / 11)
    )
    return (waves / np.sqrt(2) + 1e-3).astype(np.float32)


def displacement(z, x, y):
    """(2, ...): mip-0 px along x and y."""
    middle = np.array([X + SIZE[0] / 2, Y + SIZE[1] / 2])
    off = np.stack([x - middle[0], y - middle[1]])
    return np.einsum("ij,j...->i...", TURN[z], off) + np.reshape(SHIFT[z], (2, 1, 1))


def stored(z, x, y):
    """What section z holds at points of the volume: displacement undone."""
    middle = np.array([X + SIZE[0] / 2, Y + SIZE[1] / 2])
    off = np.stack([x - middle[0] - SHIFT[z][0], y - middle[1] - SHIFT[z][1]])
    off = np.einsum("ij,j...->i...", np.linalg.inv(np.eye(2) + TURN[z]), off)
    return tissue(off[0] + middle[0], off[1] + middle[1])


def grid_at(mip):
    return Grid(mip, X, Y, SIZE[0] >> mip, SIZE[1] >> mip)


def centers(grid):
    """Mip-0 x and y of the pixels of a grid, (rows, cols) each."""
    rows, cols = np.meshgrid(*map(np.arange, grid.shape), indexing="ij")
    step = 1 << grid.mip
    return grid.x + (rows + 0.5) * step, grid.y + (cols + 0.5) * step


def offset(z):
    """The translation of a section, in whole pixels of mip 2."""
    return tuple(int(value // 4 * 4) for value in SHIFT[z])


def frames_at(mip):
    pairs = [(z, z - 1) for z in range(Z, Z + NUM_PAIRS)]
    return [PairLocation(grid_at(mip), p, (offset(p[0]), offset(p[1]))) for p in pairs]


def write_images(folder, mip, *, moved=True):
    def read(z):
        x, y = centers(grid_at(mip))
        dx, dy = offset(z) if moved else (0, 0)
        return stored(z, x + dx, y + dy)

    frames = frames_at(mip)
    if not moved:
        frames = [PairLocation(frame.grid, frame.sections) for frame in frames]
    pairs = [Pair(read(a), read(b)) for a, b in (f.sections for f in frames)]
    meta = ImageSetMeta(frames, "test", "", {}, normalization={"kind": "tissue"})
    write_image_set(folder / f"x{X}_y{Y}_z{Z}_MIP{mip}.h5", pairs, meta)


def residual(z, mip):
    """(2, rows, cols): the field of a section less its offset, px, along cols first."""
    x, y = displacement(z, *centers(grid_at(mip)))
    dx, dy = offset(z)
    return (np.stack([y - dy, x - dx]) / (1 << mip)).astype(np.float32)


def write_download(folder, mip):
    frames = frames_at(mip)
    fields = [np.stack([residual(z, mip) for z in f.sections]) for f in frames]
    meta = FieldSetMeta(frames, "test", "", {"cv_path": "f"}, tag="ck", num_sides=2)
    path = folder / f"field_0_x{X}_y{Y}_z{Z}_MIP{mip}_ck.h5"
    write_field_set(path, fields, meta)
    return path


class Keeps:
    """An aligner whose fields are what they start from."""

    options = AlignerOptions()

    def align_pair(self, src, tgt, prior, *, options, defects):
        return Alignment(prior, None)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Images at all mips and a downloaded field at that of stage 1."""
    monkeypatch.setattr(writing, "_load", lambda *job: Keeps())
    for mip in MIPS[1:]:
        write_images(tmp_path, mip)
    write_download(tmp_path, MIPS[1])
    return tmp_path


def write_fields(folder, stage, stops=0, mips=MIPS):
    """Fields of a stage; `stops`: after the first pair."""
    modules = []
    for number, mip in enumerate(mips):
        module = ModuleSpec(number, mip, "n", folder / f"{number}_mip{mip}in_n")
        (module.path / "model").mkdir(parents=True, exist_ok=True)
        (module.path / "model" / "ck.state.pth.tar").write_bytes(b"weights")
        modules.append(module)
    mip = modules[min(stage + 1, len(modules) - 1)].in_mip
    device = torch.device("cpu")
    job = writing.WriteFieldsConfig(modules[stage], mip, folder, folder, "ck", device)
    writing.write_fields(job, SimpleNamespace(code=stops))  # type: ignore[arg-type]


def pairs_at(folder, stage, mips=MIPS):
    return find_pairs(folder, mips[stage], stage=stage, checkpoint_name="ck")


def inner(values):
    return np.asarray(values)[..., BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX]


def correlation(a, b):
    return np.corrcoef(inner(a).ravel(), inner(b).ravel())[0, 1]


def check_stage(pairs):
    """Both sides of each pair show the tissue in its place."""
    for ref in pairs:
        sample = read_sample(ref, ref.grid)
        expected = tissue(*centers(ref.grid))
        placed = warp(sample.src, sample.prior_field)
        assert correlation(sample.tgt[0, 0], expected) > 0.985
        assert correlation(placed[0, 0], expected) > 0.985
        assert correlation(placed[0, 0], sample.tgt[0, 0]) > 0.99


def test_every_stage_sees_tgt_where_stage_1_saw_it(data):
    check_stage(pairs_at(data, 1))
    for stage in (1, 2, 3):
        write_fields(data, stage)
    for stage in (2, 3):
        check_stage(pairs_at(data, stage))
    last = FieldSet(data / f"field_3_x{X}_y{Y}_z{Z}_MIP0_ck.h5")
    assert last.num_sides == 2 and not verify(last.path)


def test_stages_of_one_mip_pass_the_field_of_tgt_on_as_it_is(data):
    mips = (3, 2, 2)
    write_fields(data, 1, mips=mips)
    given = FieldSet(data / f"field_0_x{X}_y{Y}_z{Z}_MIP2_ck.h5")
    passed = FieldSet(data / f"field_1_x{X}_y{Y}_z{Z}_MIP2_ck.h5")
    for index in range(NUM_PAIRS):
        # HDF5 rounds again: 0.01 px becomes 0.
        was, now = given.read(index, 1), passed.read(index, 1)
        np.testing.assert_allclose(now, was, atol=0.0101)


def test_a_run_that_was_stopped_writes_the_same_fields(data):
    write_fields(data, 1)
    path = data / f"field_1_x{X}_y{Y}_z{Z}_MIP1_ck.h5"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(Stopped):
        write_fields(data, 1, stops=1)
    assert not path.exists() and list(data.glob(".field_1_*.parts/0.h5"))
    write_fields(data, 1)
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(whole).digest()
    check_stage(pairs_at(data, 2))


def test_fields_of_src_alone_made_from_fields_of_both_are_refused_then_replaced(data):
    write_fields(data, 1)
    path = data / f"field_1_x{X}_y{Y}_z{Z}_MIP1_ck.h5"
    made = FieldSet(path)
    request = {key: made.request[key] for key in made.request if key != "num_sides"}
    frames = [PairLocation(made.grid(i), made.sections(i)) for i in range(NUM_PAIRS)]
    meta = FieldSetMeta(frames, "1.0.0", "", request, stage=1, tag="ck")
    write_field_set(path, [made.read(i) for i in range(NUM_PAIRS)], meta)
    match = "has no fields of tgt.*write-fields --checkpoint_name ck --stages 1"
    with pytest.raises(DatasetError, match=match):
        pairs_at(data, 2)
    with pytest.raises(DatasetError, match=match):
        main(["inspect", str(data)])
    write_fields(data, 1)
    check_stage(pairs_at(data, 2))


def test_fields_say_how_far_the_images_were_moved(data):
    write_fields(data, 1)
    fields = FieldSet(data / f"field_1_x{X}_y{Y}_z{Z}_MIP1_ck.h5")
    images = ImageSet(data / f"x{X}_y{Y}_z{Z}_MIP1.h5")
    for index in range(NUM_PAIRS):
        for side in (0, 1):
            z = images.sections(index)[side]
            assert fields.offset(index, side) == images.offset(index, side) == offset(z)


def test_exported_fields_lead_from_the_place_of_each_section_to_the_volume(data):
    write_fields(data, 1)
    to = str(data / "out")
    main(
        ["export-fields", "--dataset_path", str(data), "--dst_path", to]
        + ["--checkpoint_name", "ck", "--stage", "1", "--format", "sofima"]
    )
    (path,) = (data / "out").glob("*_z5-7.npy")
    exported = np.load(path)  # (2 along x and y, z, y, x), px of mip 1
    x, y = centers(grid_at(1))
    for index, z in enumerate((5, 6, 7)):
        expected = displacement(z, x, y).transpose(0, 2, 1) / 2
        np.testing.assert_allclose(
            inner(exported[:, index]), inner(expected), atol=0.05
        )


def test_a_section_is_skipped_by_way_of_where_the_next_pair_sees_it(data):
    write_fields(data, 1)
    near, far = pairs_at(data, 2)
    # As if a stage had moved src of the first pair by (2, -1) px more.
    change = np.array([2.0, -1.0], np.float32)[:, None, None]
    fields = near.prior
    moved = [fields.read(i) + (change if i == 0 else 0) for i in range(NUM_PAIRS)]
    both = [np.stack([moved[i], fields.read(i, 1)]) for i in range(NUM_PAIRS)]
    meta = FieldSetMeta(frames_at(1), "", "", {}, stage=1, tag="ck", num_sides=2)
    write_field_set(fields.path, both, meta)
    near, far = pairs_at(data, 2)
    whole = read_skipping(near, far, near.grid)
    # Then the step between is that change, seen through the field of section 6.
    turn = np.eye(2) + TURN[6][::-1, ::-1]
    step = np.linalg.solve(turn, change[:, 0, 0])
    x, y = centers(grid_at(1))
    dy, dx = step
    along_x, along_y = displacement(7, x + 2 * dx, y + 2 * dy) - np.reshape(
        offset(7), (2, 1, 1)
    )
    expected = np.stack([along_y / 2 + dy, along_x / 2 + dx])
    np.testing.assert_allclose(inner(whole.prior_field[0]), inner(expected), atol=0.05)

    crop = near.grid.crop(30, 41, 24, 33)
    part = read_skipping(near, far, crop)
    rows, cols = slice(30, 54), slice(41, 74)
    for name in ("src", "tgt", "prior_field"):
        cut = getattr(whole, name)[..., rows, cols]
        torch.testing.assert_close(getattr(part, name), cut, atol=0.01, rtol=0)


def test_a_crop_with_a_field_of_tgt_is_a_window_of_the_whole(data):
    ref = pairs_at(data, 1)[1]
    whole = read_sample(ref, ref.grid)
    for row, col, rows, cols in ((0, 0, 9, 11), (17, 30, 12, 20), (39, 51, 9, 13)):
        part = read_sample(ref, ref.grid.crop(row, col, rows, cols))
        window = (..., slice(row, row + rows), slice(col, col + cols))
        for name in ("src", "tgt", "prior_field"):
            expected = getattr(whole, name)[window]
            torch.testing.assert_close(getattr(part, name), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("skips", [False, True])
def test_a_crop_reads_as_far_as_its_longest_vector(data, monkeypatch, skips):
    shapes = []

    def recorded(this, index, *window):
        pair = original(this, index, *window)
        shapes.append(pair.src.shape)
        return pair

    original = ImageSet.read
    write_fields(data, 1)
    write_fields(data, 2)
    near, far = pairs_at(data, 3)
    monkeypatch.setattr(ImageSet, "read", recorded)
    crop = near.grid.crop(90, 120, 16, 24)
    _ = read_skipping(near, far, crop) if skips else read_sample(near, crop)
    # Near the middle of the patch the fields are shorter than 6 px.
    assert shapes and max(rows for rows, _ in shapes) <= 16 + 2 * 8
    assert max(cols for _, cols in shapes) <= 24 + 2 * 8
