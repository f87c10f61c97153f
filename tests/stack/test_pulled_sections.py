"""Sections read through fields: truth by formula; rows are x of the volume."""

import math

import numpy as np
import pytest
import torch

from metroem.errors import DatasetError, FieldError
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import coarsen_image
from metroem.io.image_volume import ImageVolume
from metroem.io.volume import Volume
from metroem.stack import pulled_sections
from metroem.stack.pulled_sections import iter_nearest, iter_pulled
from tests.volumes import ReadCount as FilesRead
from tests.volumes import make_volume

FIELD_MIP = 3
NOTHING_MOVES = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


def noise(*shape, dtype=np.uint8, seed=0):
    """Tissue without 0."""
    top = 250 if dtype == np.uint8 else 60000
    return np.random.default_rng(seed).integers(1, top, shape).astype(dtype)


def open_volume(folder, sections, **how):
    """Write sections, (Z, rows, cols), and open them."""
    return ImageVolume(make_volume(folder, [sections[:, None]], **how))


def affine_field(grid, matrix):
    """The field of a map of (row, col, 1), mip-0 pixels, on the pixels of a grid."""
    size = 2**grid.mip
    row = grid.x + (np.arange(grid.rows) + 0.5)[:, None] * size - 0.5
    col = grid.y + (np.arange(grid.cols) + 0.5) * size - 0.5
    (a, b, c), (d, e, f) = matrix
    along_rows = a * row + b * col + c - row
    along_cols = d * row + e * col + f - col
    field = np.stack(np.broadcast_arrays(along_cols, along_rows)) / size
    return torch.from_numpy(field[None].astype(np.float32)), grid


def around(target, mip=FIELD_MIP):
    """The grid of a field that covers a target, and a pixel more."""
    return target.cover(mip, margin_px=1)


def pull(volume, matrix, target, z=0):
    """Pull one section by an affine map; (H, W)."""
    fields = {z: affine_field(around(target), matrix)}
    count = pulled_sections.ReadCount()
    ((at, image),) = iter_pulled(volume, fields, target, count)
    assert at == z and image.dtype == torch.float32
    assert image.shape == (1, 1, *target.shape)
    return image[0, 0].numpy()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shift", [(0, 0), (5, -9), (-40, 70)])
def test_a_shift_by_whole_pixels_copies_pixels_exactly(tmp_path, dtype, shift):
    image = noise(1, 150, 130, dtype=dtype)
    volume = open_volume(tmp_path / "v", image)
    down, right = shift

    pulled = pull(volume, ((1, 0, down), (0, 1, right)), Grid(0, 8, 16, 90, 70))

    expected = np.zeros((90, 70), np.float64)
    for row in range(90):
        for col in range(70):
            at = row + 8 + down, col + 16 + right
            if 0 <= at[0] < 150 and 0 <= at[1] < 130:
                expected[row, col] = image[0][at]
    np.testing.assert_array_equal(pulled, expected)


def test_turns_by_90_degrees_are_exact(tmp_path):
    image = noise(1, 96, 80, dtype=np.uint16)
    volume = open_volume(tmp_path / "v", image)

    pulled = pull(volume, ((0, 1, 0), (-1, 0, 79)), Grid(0, 0, 0, 80, 96))

    # The pixel (row, col) shows (col, 79 - row).
    expected = image[0].T[::-1]
    np.testing.assert_array_equal(pulled, expected)


def test_an_affine_map_of_a_ramp_is_a_ramp(tmp_path):
    row, col = np.mgrid[:160, :140].astype(np.float32)
    ramp = 10 + 0.5 * row + 2 * col
    volume = open_volume(tmp_path / "v", ramp[None])
    matrix = ((0.9, -0.3, 30.25), (0.25, 0.8, 20.6))
    target = Grid(0, 32, 16, 72, 56)

    pulled = pull(volume, matrix, target)

    row, col = np.mgrid[32:104, 16:72]
    at_row = 0.9 * row - 0.3 * col + 30.25
    at_col = 0.25 * row + 0.8 * col + 20.6
    # The field is rounded to float32: 60 px have steps of 4e-6 px, times 8, times 2.
    np.testing.assert_allclose(pulled, 10 + 0.5 * at_row + 2 * at_col, atol=3e-4)


def test_a_coarser_mip_of_the_image_is_pulled_by_the_same_field(tmp_path):
    # Mip-1 pixel j has its centre at 2 j + 0.5, so its ramp holds 10 + 2 j + 0.5.
    fine = 10 + np.broadcast_to(np.arange(128.0), (120, 128))
    coarse = 10.5 + 2 * np.broadcast_to(np.arange(64.0), (60, 64))
    by_mip = [one[None, None].astype(np.float32) for one in (fine, coarse)]
    volume = ImageVolume(make_volume(tmp_path / "v", by_mip))
    target = Grid(1, 16, 32, 30, 20)

    pulled = pull(volume, ((1, 0, 0), (0, 1, 7)), target)

    expected = 10.5 + 2 * (np.arange(20) + 16 + 7 / 2)
    np.testing.assert_allclose(pulled, np.tile(expected, (30, 1)), atol=1e-4)


def test_displacements_of_200000_px_keep_a_hundredth_of_a_pixel(tmp_path):
    far = 200_000
    row, col = np.mgrid[:96, :64].astype(np.float32)
    volume = open_volume(
        tmp_path / "v", (1 + row + 2 * col)[None], offset=(far + 32, -far - 64, 0)
    )
    shift = far + 40.3125, -far - 50.625  # multiples of 1/32: exact in the field

    pulled = pull(volume, ((1, 0, shift[0]), (0, 1, shift[1])), Grid(0, 0, 0, 48, 40))

    row, col = np.mgrid[:48, :40]
    expected = 1 + (row + 8.3125) + 2 * (col + 13.375)
    np.testing.assert_allclose(pulled, expected, atol=0.01)


def test_blank_stays_blank_and_tissue_is_averaged_with_tissue_alone(tmp_path):
    image = np.full((1, 64, 48), 200, np.uint8)
    image[0, 20:40] = 0
    volume = open_volume(tmp_path / "v", image)

    pulled = pull(volume, ((1, 0, 0.25), (0, 1, 0)), Grid(0, 0, 0, 64, 48))

    # Row 19 is read at 19.25: nearest is tissue. Row 39 at 39.25: nearest is blank.
    expected = np.full((64, 48), 200.0)
    expected[20:40] = 0
    np.testing.assert_allclose(pulled, expected, rtol=1e-6)


def test_pixels_are_blank_from_half_a_pixel_outside_of_the_volume(tmp_path):
    volume = open_volume(tmp_path / "v", np.full((1, 40, 48), 7, np.uint8))

    pulled = pull(volume, ((1, 0, -8.4), (0, 1, 8.6)), Grid(0, 0, 0, 56, 64))

    # Rows from -0.4 to 39.6, cols up to 47.6: nearest 0 to 39, and 9 to 47.
    rows = np.flatnonzero(pulled.any(1))
    cols = np.flatnonzero(pulled.any(0))
    assert (rows[0], rows[-1], cols[0], cols[-1]) == (8, 47, 0, 38)
    np.testing.assert_allclose(pulled[8:48, :39], 7, rtol=1e-6)


def test_values_that_are_not_finite_are_no_data_and_0_is_kept_for_it(tmp_path):
    image = np.ones((1, 32, 40), np.float32)
    image[0, :, 1::2] = -1
    image[0, 16:, 20:] = np.nan
    volume = open_volume(tmp_path / "v", image)

    pulled = pull(volume, ((1, 0, 0), (0, 1, 0.5)), Grid(0, 0, 0, 32, 38))

    assert (pulled[:16] != 0).all()
    assert np.abs(pulled[:16]).max() < 0.01
    assert (pulled[16:, 20:] == 0).all()


def test_beside_a_missing_vector_there_is_no_data(tmp_path):
    volume = open_volume(tmp_path / "v", noise(1, 96, 80))
    target = Grid(0, 0, 0, 64, 48)
    field, grid = affine_field(around(target), NOTHING_MOVES)
    field[0, 0, 3, 4] = float("nan")  # covers rows 16 to 24, cols 24 to 32
    count = pulled_sections.ReadCount()

    ((_, pulled),) = iter_pulled(volume, {0: (field, grid)}, target, count)
    ((_, nearest),) = iter_nearest(volume, {0: (field, grid)}, target, count)

    # The next centres are 8 px away from its own, at 19.5 and 27.5.
    for found in (pulled[0, 0].numpy(), nearest):
        rows, cols = np.nonzero(found == 0)
        assert (rows.min(), rows.max(), cols.min(), cols.max()) == (12, 27, 20, 35)
        assert len(rows) == 16 * 16


def test_a_field_that_is_missing_gives_no_data(tmp_path, monkeypatch):
    volume = open_volume(tmp_path / "v", noise(1, 64, 64))
    target = Grid(0, 0, 0, 48, 40)
    field, grid = affine_field(around(target), NOTHING_MOVES)
    files = FilesRead(monkeypatch)
    count = pulled_sections.ReadCount()

    fields = {0: (torch.full_like(field, float("nan")), grid)}
    ((_, pulled),) = iter_pulled(volume, fields, target, count)

    assert not pulled.any()
    assert not files.times and count.read == 0


@pytest.mark.parametrize("dtype", [np.uint64, np.int32, np.uint8])
def test_labels_are_those_of_the_nearest_pixel(tmp_path, dtype):
    labels = np.random.default_rng(1).integers(
        np.iinfo(dtype).min, np.iinfo(dtype).max, (1, 64, 72), dtype, endpoint=True
    )
    volume = open_volume(tmp_path / "v", labels)
    matrix = ((0.8, -0.6, 20.23), (0.6, 0.8, -3.18))
    target = Grid(0, 0, 0, 56, 40)
    fields = {0: affine_field(around(target), matrix)}

    ((z, found),) = iter_nearest(volume, fields, target, pulled_sections.ReadCount())

    expected = np.zeros(target.shape, dtype)
    for row, col in np.ndindex(*target.shape):
        at = (
            math.floor(0.8 * row - 0.6 * col + 20.23 + 0.5),
            math.floor(0.6 * row + 0.8 * col - 3.18 + 0.5),
        )
        if 0 <= at[0] < 64 and 0 <= at[1] < 72:
            expected[row, col] = labels[0][at]
    assert z == 0 and found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


def elastic_fields(grid, sections):
    """A turn, a shift and a smooth wave, another one for each section."""
    fields = {}
    for z in sections:
        cos, sin = math.cos(0.4 + z), math.sin(0.4 + z)
        field, _ = affine_field(grid, ((cos, -sin, 90 + z), (sin, cos, 40 - z)))
        row = (grid.x / 2**grid.mip + torch.arange(grid.rows))[:, None]
        col = grid.y / 2**grid.mip + torch.arange(grid.cols)
        wave = 0.4 * torch.sin(row / 2 + z) * torch.cos(col / 3)
        fields[z] = (field + wave).float(), grid
    return fields


def test_a_pixel_is_the_same_bytes_in_whatever_area_it_is_asked_for(tmp_path):
    volume = open_volume(tmp_path / "v", noise(3, 240, 220), chunk=(48, 64, 2))
    whole = Grid(0, 0, 0, 160, 128)
    everywhere = elastic_fields(around(whole), range(3))

    def pulled(target):
        inner = around(target)
        row, col = (inner.x >> 3) + 1, (inner.y >> 3) + 1
        fields = {
            z: (field[..., row : row + inner.rows, col : col + inner.cols], inner)
            for z, (field, _) in everywhere.items()
        }
        count = pulled_sections.ReadCount()
        found = list(iter_pulled(volume, fields, target, count))
        assert [z for z, _ in found] == [0, 1, 2]
        return np.stack([image[0, 0].numpy() for _, image in found])

    expected = pulled(whole)
    assert (expected != 0).mean() > 0.3
    for window in (whole.crop(0, 0, 64, 32), whole.crop(64, 32, 96, 96)):
        row, col = window.x, window.y
        np.testing.assert_array_equal(
            pulled(window),
            expected[:, row : row + window.rows, col : col + window.cols],
        )


def test_each_chunk_is_read_once_and_counted(tmp_path, monkeypatch):
    volume = open_volume(tmp_path / "v", noise(7, 200, 150), chunk=(32, 32, 4))
    target = Grid(0, 0, 0, 96, 64)
    fields = elastic_fields(around(target), (0, 1, 3, 4, 6))
    count = pulled_sections.ReadCount()
    files = FilesRead(monkeypatch)

    found = [z for z, _ in iter_pulled(volume, fields, target, count)]

    assert found == [0, 1, 3, 4, 6]
    assert files.times and set(files.times.values()) == {1}
    assert count.read == files.num_bytes  # chunks of raw volumes are as long as counted
    assert count.needed <= count.read <= 1.3 * count.needed


@pytest.mark.parametrize("degrees", [0, 30, 45, -75])
def test_a_turned_area_reads_little_more_than_the_chunks_that_it_needs(
    tmp_path, monkeypatch, degrees
):
    volume = open_volume(tmp_path / "v", noise(1, 800, 700), chunk=(32, 32, 1))
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Turned about the middle of the target, which goes to the middle of the volume.
    matrix = (
        (cos, -sin, 400.5 - 200 * cos + 160 * sin),
        (sin, cos, 350.5 - 200 * sin - 160 * cos),
    )
    target = Grid(0, 0, 0, 400, 320)
    files = FilesRead(monkeypatch)
    count = pulled_sections.ReadCount()

    fields = {0: affine_field(around(target), matrix)}
    ((_, pulled),) = iter_pulled(volume, fields, target, count)

    row, col = np.mgrid[:400, :320]
    chunks = set()
    for round_row in (np.floor, np.ceil):
        for round_col in (np.floor, np.ceil):
            at_row = round_row(matrix[0][0] * row + matrix[0][1] * col + matrix[0][2])
            at_col = round_col(matrix[1][0] * row + matrix[1][1] * col + matrix[1][2])
            where = np.stack([at_row // 32, at_col // 32]).reshape(2, -1)
            chunks |= {tuple(one) for one in np.unique(where, axis=1).T}
    assert (pulled != 0).all()
    assert count.read == files.num_bytes
    exact = len(chunks) * 32 * 32
    assert exact <= count.needed <= 1.03 * exact
    assert count.needed <= count.read <= 1.3 * count.needed


def test_sections_that_lie_far_apart_are_windows_of_their_own(tmp_path, monkeypatch):
    volume = open_volume(tmp_path / "v", noise(2, 1000, 96), chunk=(32, 32, 2))
    target = Grid(0, 0, 0, 64, 48)
    fields = {
        z: affine_field(around(target), ((1, 0, shift), (0, 1, 0)))
        for z, shift in ((0, 32), (1, 896))
    }
    files = FilesRead(monkeypatch)

    found = list(iter_pulled(volume, fields, target, pulled_sections.ReadCount()))

    stored = Volume(volume.path).read(Grid(0, 0, 0, 1000, 96), range(2))[:, 0]
    np.testing.assert_array_equal(found[0][1][0, 0], stored[0, 32:96, :48])
    np.testing.assert_array_equal(found[1][1][0, 0], stored[1, 896:960, :48])
    # Each leads to 2 x 2 chunks; the last reading is the whole volume.
    between = {"128-160", "480-512"}
    assert not [
        name
        for name, times in files.times.items()
        if times > 1 and any(part in name for part in between)
    ]


def test_a_mip_that_is_not_stored_is_made_and_keeps_its_fractions(tmp_path):
    image = noise(1, 128, 96)
    volume = open_volume(tmp_path / "v", image)
    target = Grid(1, 16, 0, 40, 32)

    pulled = pull(volume, NOTHING_MOVES, target)

    whole = torch.from_numpy(image.astype(np.float32))[None]
    expected = coarsen_image(whole, 1)[0, 0, 8:48, :32].numpy()
    assert (expected % 1 != 0).any()
    np.testing.assert_array_equal(pulled, expected)


def test_the_bytes_of_a_mip_that_is_made_are_those_of_the_finer_one(
    tmp_path, monkeypatch
):
    volume = open_volume(tmp_path / "v", noise(2, 128, 96), chunk=(32, 32, 2))
    target = Grid(1, 0, 0, 40, 32)
    files = FilesRead(monkeypatch)
    count = pulled_sections.ReadCount()

    fields = {0: affine_field(around(target), NOTHING_MOVES)}
    list(iter_pulled(volume, fields, target, count))

    assert count.read == files.num_bytes == count.needed


def test_a_broken_chunk_is_an_error_and_never_black(tmp_path):
    volume = open_volume(tmp_path / "v", noise(1, 64, 64))
    (chunk,) = (tmp_path / "v").glob("4_4_40/32-64_0-32_0-1")
    chunk.write_bytes(chunk.read_bytes()[:100])

    with pytest.raises(DatasetError, match="32-64_0-32_0-1"):
        pull(volume, NOTHING_MOVES, Grid(0, 0, 0, 48, 48))


def test_a_field_that_does_not_cover_the_target_is_refused(tmp_path):
    volume = open_volume(tmp_path / "v", noise(1, 64, 64))
    target = Grid(0, 0, 0, 48, 48)
    field = affine_field(Grid(3, 0, 0, 5, 8), NOTHING_MOVES)

    with pytest.raises(FieldError, match="does not cover"):
        list(iter_pulled(volume, {0: field}, target, pulled_sections.ReadCount()))


def test_where_fields_end_a_turn_goes_on_in_a_straight_line(tmp_path):
    row, col = np.mgrid[:80, :80].astype(np.float32)
    volume = open_volume(tmp_path / "v", (1 + row + 3 * col)[None])
    target = Grid(0, 0, 0, 32, 24)
    matrix = ((0.8, -0.6, 25.0), (0.6, 0.8, 10.0))

    # No pixel around the target: its outermost 4 px lie beyond the centres.
    fields = {0: affine_field(target.cover(FIELD_MIP), matrix)}
    count = pulled_sections.ReadCount()
    ((_, pulled),) = iter_pulled(volume, fields, target, count)

    row, col = np.mgrid[:32, :24]
    expected = 1 + (0.8 * row - 0.6 * col + 25) + 3 * (0.6 * row + 0.8 * col + 10)
    np.testing.assert_allclose(pulled[0, 0], expected, atol=1e-3)
