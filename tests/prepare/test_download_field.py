import argparse
import dataclasses

import numpy as np
import pytest
import torch

import download_field
from metroem.errors import DatasetError, UsageError
from metroem.geometry.field import warp
from metroem.geometry.grid import Grid
from metroem.io import resume
from metroem.io.h5 import FieldSet, verify
from metroem.prepare.requests import FieldRequest
from tests.volumes import ReadCount, make_volume

# (Z, X, Y) at mip 2: sections 5...9, mip-0 x from 32 and y from -64 on.
SHAPE = (5, 40, 56)
SRC_MIP = 2
OFFSET = (32, -64, 5)
AREA = ["--x_offset", "64", "--y_offset", "-16", "--z_start", "6", "--z_end", "9"]
# 0.01 px is where fields are rounded on disk, see test_h5.
ROUNDED = 0.01 + 1e-4


def displacement(x, y, z):
    """Mip-0 displacement along x and y at a mip-0 point: linear, so that bilinear
    resampling is exact.
    """
    return 40 + 0.05 * x - 0.02 * y + 10 * z, -70 + 0.03 * x + 0.04 * y - 5 * z


def centers(corner, size, mip):
    """Mip-0 coordinates of pixel centres, minus half a mip-0 pixel."""
    return corner + (np.arange(size) + 0.5) * 2**mip


def stored(z):
    """(2, X, Y): mip-0 displacements along x and y at SRC_MIP."""
    x = centers(OFFSET[0], SHAPE[1], SRC_MIP)[:, None]
    y = centers(OFFSET[1], SHAPE[2], SRC_MIP)[None]
    return np.stack(np.broadcast_arrays(*displacement(x, y, z)))


def all_stored():
    return np.stack([stored(z) for z in range(5, 10)]).astype(np.float32)


def write_volume(folder, values, **more):
    """Make a volume with fields only at SRC_MIP."""
    finer = np.zeros((5, values.shape[1], 160, 224), values.dtype)
    by_mip = [finer, None, values]
    return make_volume(folder, by_mip, offset=OFFSET, **more)


@pytest.fixture
def download(tmp_path):
    def run(cv_path, *flags, dst_mip=1, patch_size=32):
        common = ["--cv_path", cv_path, "--dst_folder", str(tmp_path / "data"), *AREA]
        common += ["--src_mip", str(SRC_MIP), "--dst_mip", str(dst_mip)]
        common += ["--patch_size", str(patch_size)]
        download_field.main([*common, *(str(flag) for flag in flags)])
        (path,) = (tmp_path / "data").glob("*.h5")
        return FieldSet(path)

    return run


def total(field_set, index, side):
    """Mip-0 displacements along x and y, offset added again: (2, H, W)."""
    field = field_set.read(index, side)
    x, y = field_set.offset(index, side)
    scale = 2**field_set.mip
    return np.stack([field[1] * scale + x, field[0] * scale + y])


def expected(grid, z):
    x = centers(grid.x, grid.rows, grid.mip)[:, None]
    y = centers(grid.y, grid.cols, grid.mip)[None]
    return np.stack(np.broadcast_arrays(*displacement(x, y, z)))


def test_each_flag_is_a_field_of_the_request():
    dests = {
        action.dest
        for action in download_field.build_parser()._actions
        if not isinstance(action, argparse._HelpAction)
    }
    assert dests == {field.name for field in dataclasses.fields(FieldRequest)}


def test_flags_left_out_are_what_the_request_has_by_default():
    required = "--cv_path a --src_mip 2 --dst_mip 1 --patch_size 8".split()
    required += "--z_start 1 --z_end 2".split()
    request = FieldRequest(**vars(download_field.build_parser().parse_args(required)))
    assert request == FieldRequest("a", 2, 1, 8, z_start=1, z_end=2)


@pytest.mark.parametrize("dst_mip", [0, 1, 2])
def test_fields_keep_their_displacement_at_any_finer_mip(tmp_path, download, dst_mip):
    volume = write_volume(tmp_path / "field", all_stored())
    patch_size = 64 >> dst_mip
    fields = download(volume, dst_mip=dst_mip, patch_size=patch_size)
    grid = Grid(dst_mip, 64, -16, patch_size, patch_size)
    assert fields.path.name == f"field_0_x64_y-16_z6_MIP{dst_mip}.h5"
    assert fields.num_sides == 2 and fields.num_pairs == 3
    for index, z in enumerate((6, 7, 8)):
        assert fields.sections(index) == (z, z - 1)
        assert fields.grid(index) == grid
        for side in (0, 1):
            np.testing.assert_allclose(
                total(fields, index, side),
                expected(grid, z - side),
                atol=ROUNDED * 2**dst_mip,
            )


def test_the_mean_displacement_is_taken_out_rounded_down(tmp_path, download):
    fields = download(write_volume(tmp_path / "field", all_stored()))
    grid = fields.grid(0)
    for index, z in enumerate((6, 7, 8)):
        for side in (0, 1):
            mean = expected(grid, z - side).mean((1, 2))
            offset = fields.offset(index, side)
            assert all(value % 2 == 0 for value in offset)
            assert 0 <= mean[0] - offset[0] < 2
            assert 0 <= mean[1] - offset[1] < 2


@pytest.mark.parametrize(
    ("flags", "order", "scale", "dtype"),
    [
        (["--channel_order", "xy"], [0, 1], 1, np.float32),
        (["--channel_order", "yx"], [1, 0], 1, np.float32),
        (["--channel_order", "yx", "--field_unit", "relative"], [1, 0], 4, np.float32),
        (["--channel_order", "xy"], [0, 1], 0.25, np.int16),
        (["--int16_scale", 0.5], [0, 1], 0.5, np.int16),
        (["--field_unit", "relative"], [0, 1], 1, np.int16),
    ],
)
def test_the_volume_may_store_them_otherwise(
    tmp_path, download, caplog, flags, order, scale, dtype
):
    caplog.set_level("INFO", "metroem")
    values = all_stored()[:, order] / scale
    if dtype == np.int16:
        values = values.round()
    fields = download(write_volume(tmp_path / "field", values.astype(dtype)), *flags)
    # A stored integer is off by at most half of what it stands for.
    error = scale / 2 if dtype == np.int16 else 0
    found = total(fields, 1, 0)
    truth = expected(fields.grid(1), 7)
    np.testing.assert_allclose(found, truth, atol=error + 2 * ROUNDED)
    assert ("int16" in caplog.text) == (dtype == np.int16)
    assert fields.attributes["channel_order"] == "cols,rows"


def test_warping_with_a_downloaded_corgie_field_is_what_corgie_renders(
    tmp_path, download
):
    # corgie: rendered(x, y) = src(x + channel 1, y + channel 0), pixels of the mip.
    values = np.empty((5, 2, *SHAPE[1:]), np.float32)
    values[:, 0], values[:, 1] = 3, -5
    fields = download(
        write_volume(tmp_path / "field", values),
        *("--channel_order", "yx", "--field_unit", "relative"),
        dst_mip=2,
        patch_size=16,
    )
    assert fields.offset(0, 0) == (-20, 12)
    residual = torch.from_numpy(fields.read(0, 0))
    offset = torch.tensor(fields.offset(0, 0)[::-1])[:, None, None] / 4
    image = torch.arange(256.0).reshape(1, 1, 16, 16)
    warped = warp(image, (residual + offset)[None])
    torch.testing.assert_close(warped[..., 5:, :13], image[..., :11, 3:])


def test_vectors_that_are_not_finite_are_filled_and_not_counted(
    tmp_path, download, caplog
):
    values = all_stored()
    values[1, 0, 8:14, 12:20] = np.nan  # section 6
    values[1, 1, 20, 20] = np.inf
    values[2] = np.nan  # section 7 as a whole
    fields = download(
        write_volume(tmp_path / "field", values), dst_mip=2, patch_size=16
    )
    found, truth = total(fields, 0, 0), expected(fields.grid(0), 6)
    # x 64, y -16 is pixel 8, 12 of the volume: rows 0...5, cols 0...7 are filled
    # with vectors at most 6 px away, which are off by less than 6 * 4 * 0.07.
    assert np.abs(found - truth).max() < 6 * 4 * 0.07
    np.testing.assert_allclose(
        np.delete(found, 12, axis=1)[:, 6:],
        np.delete(truth, 12, axis=1)[:, 6:],
        atol=4 * ROUNDED,
    )
    finite = np.ones((16, 16), bool)
    finite[:6, :8] = finite[12, 8] = False
    mean = truth[:, finite].mean(1)
    assert fields.offset(0, 0) == tuple(int(value // 4 * 4) for value in mean)
    assert fields.offset(1, 0) == (0, 0)
    assert not fields.read(1, 0).any()
    assert "section 7 100.0%" in caplog.text
    assert "section 7 has no vector" in caplog.text


def test_masked_vectors_do_not_count_for_the_mean(tmp_path, download):
    values = all_stored()
    values[:, :, 8:16, 12:28] += 1000  # the upper half of the patch
    mask = np.zeros((5, 1, 160, 224), np.uint8)
    coarse = np.zeros((5, 1, 40, 56), np.uint8)
    coarse[:, :, 8:16] = 3
    defects = make_volume(tmp_path / "mask", [mask, None, coarse], offset=OFFSET)
    fields = download(
        write_volume(tmp_path / "field", values),
        *("--cv_path_defects", defects, "--mask_val", 3),
        dst_mip=2,
        patch_size=16,
    )
    mean = expected(fields.grid(0), 6)[:, 8:].mean((1, 2))
    assert fields.offset(0, 0) == tuple(int(value // 4 * 4) for value in mean)
    # The vectors themselves stay.
    found = total(fields, 0, 0)[:, :8]
    assert np.abs(found - expected(fields.grid(0), 6)[:, :8] - 1000).max() < 1


def test_at_the_border_of_the_volume_the_field_is_continued(tmp_path, download):
    values = np.full((5, 2, *SHAPE[1:]), 6.0, np.float32)
    volume = write_volume(tmp_path / "field", values)
    fields = download(volume, "--x_offset", 32, "--y_offset", -64)
    np.testing.assert_allclose(total(fields, 0, 0), 6, atol=2 * ROUNDED)


def test_the_name_is_where_train_looks(tmp_path, download, caplog):
    caplog.set_level("INFO", "metroem")
    fields = download(
        write_volume(tmp_path / "field", all_stored()),
        *("--suffix", "precomputed", "--place", "x0_y-16_z6_left"),
    )
    assert fields.path.name == "field_0_x0_y-16_z6_left_MIP1_precomputed.h5"
    assert "--checkpoint_name precomputed" in caplog.text
    assert fields.grid(0) == Grid(1, 64, -16, 32, 32)
    assert fields.attributes["stage"] == 0
    assert fields.attributes["checkpoint"] == "precomputed"
    assert verify(fields.path) == []


def test_each_sections_field_is_read_once(tmp_path, download, monkeypatch):
    volume = write_volume(tmp_path / "field", all_stored(), chunk=(16, 16, 1))
    count = ReadCount(monkeypatch)
    download(volume, "--parallel", 2)
    assert set(count.times.values()) == {1}
    # 16 px and one around them, from pixel 7, 11 on: 2 x 2 chunks of 4 sections.
    assert len(count.times) == 4 * 4


class _Killed(BaseException):
    """Stands for a kill between two sections."""


def test_a_killed_download_goes_on_and_is_then_not_repeated(
    tmp_path, download, monkeypatch
):
    volume = write_volume(tmp_path / "field", all_stored(), chunk=(64, 64, 1))
    original = resume.ResumeStore.put

    def put(self, key, array):
        if len(self.keys()) == 2:
            raise _Killed
        original(self, key, array)

    with monkeypatch.context() as patched:
        patched.setattr(resume.ResumeStore, "put", put)
        with pytest.raises(_Killed):
            download(volume)
    with monkeypatch.context() as patched:
        count = ReadCount(patched)
        fields = download(volume)
        assert len(count.times) == 2
        download(volume)
        assert sum(count.times.values()) == 2
    assert [p.name for p in fields.path.parent.iterdir()] == [fields.path.name]
    with pytest.raises(DatasetError, match="--overwrite"):
        download(volume, "--channel_order", "yx")
    download(volume, "--channel_order", "yx", "--overwrite")


def test_parts_of_a_download_killed_at_its_very_end_are_dropped(
    tmp_path, download, monkeypatch
):
    volume = write_volume(tmp_path / "field", all_stored())
    with monkeypatch.context() as patched:
        patched.setattr(resume.ResumeStore, "remove", lambda self: None)
        path = download(volume).path
    assert len(list(path.parent.iterdir())) == 2
    download(volume)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--src_mip", 0], "--src_mip 0 --dst_mip 1"),
        (["--x_offset", 65], "64 or 66"),
        (["--patch_size", 0], "must be >= 1"),
        (["--z_end", 6], "one past"),
        (["--suffix", "MIP3"], "--suffix"),
        (["--place", "x0_y0"], "expected x<X>_y<Y>_z6"),
        (["--place", "x0_y0_z7"], "expected x<X>_y<Y>_z6"),
        (["--int16_scale", -1], "must be > 0"),
        (["--int16_scale", 0.25], "float32; leave"),
    ],
)
def test_flags_that_cannot_work_are_refused(tmp_path, download, flags, match):
    volume = write_volume(tmp_path / "field", all_stored())
    with pytest.raises(UsageError, match=match):
        download(volume, *flags)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--src_mip", 3], "available: 0, 1, 2"),
        (["--patch_size", 200], r"x 64\.\.\.464.*volume x 32\.\.\.192"),
        (["--z_end", 11], "holds 5...9"),
        (["--src_mip", 1], "blank here"),
    ],
)
def test_what_the_volume_does_not_hold_is_refused(tmp_path, download, flags, match):
    volume = write_volume(tmp_path / "field", all_stored())
    with pytest.raises(DatasetError, match=match):
        download(volume, *flags)


def test_volumes_that_are_no_fields_are_refused(tmp_path, download):
    image = write_volume(tmp_path / "image", all_stored()[:, :1])
    with pytest.raises(DatasetError, match="1 channels, a field has 2"):
        download(image)
    bytes_ = write_volume(tmp_path / "bytes", np.ones((5, 2, 40, 56), np.uint8))
    with pytest.raises(DatasetError, match="uint8; fields are"):
        download(bytes_)
