import json

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from metroem.errors import DatasetError
from metroem.export.field_files import Stack, mha_bytes, stacks
from metroem.export.field_sets import ExportedSet
from metroem.geometry.field import warp
from metroem.geometry.grid import Grid
from metroem.io.h5 import FieldSet
from tests.export.sets import COLS, ROWS, export, make_sets


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def test_sofima_gets_one_array_for_consecutive_sections(tmp_path, data):
    offsets = {z: (2 * z, -4 * z) for z in range(4, 8)}
    fields = make_sets(data, downloaded=True, offsets=offsets)
    export(data, tmp_path / "flow", "--format", "sofima")
    name = "field_0_x64_y-32_z5_MIP1_checkpoint_x64_y-32_z4-7"
    flow = np.load(tmp_path / "flow" / f"{name}.npy")
    # (2, z, y, x), x first, pixels: channel 1 of a field is along rows, and so x.
    assert flow.shape == (2, 4, COLS, ROWS) and flow.dtype == np.float32
    for index, z in enumerate((5, 6, 7)):
        along_y, along_x = fields.read(index)
        np.testing.assert_array_equal(flow[0, z - 4], (along_x + z).T)
        np.testing.assert_array_equal(flow[1, z - 4], (along_y - 2 * z).T)
    place = json.loads((tmp_path / "flow" / f"{name}.json").read_text())
    assert place["start_xyz"] == [32, -16, 4]
    assert place["mip"] == 1 and place["stride"] == 1


def test_warping_as_sofima_does_gives_the_same_image(tmp_path, data):
    fields = make_sets(data)
    export(data, tmp_path / "flow", "--format", "sofima")
    (path,) = (tmp_path / "flow").glob("*.npy")
    dx, dy = np.load(path)[:, 1]
    image = np.random.default_rng(3).random((ROWS, COLS)).astype(np.float32)
    ours = warp(
        torch.from_numpy(image)[None, None], torch.from_numpy(fields.read(1))[None]
    )[0, 0].numpy()
    # SOFIMA: warped[y, x] = image[y + dy, x + dx], in arrays of (y, x).
    y, x = np.mgrid[:COLS, :ROWS]
    theirs = map_coordinates(image.T, [y + dy, x + dx], order=1)
    np.testing.assert_allclose(theirs.T[8:-8, 8:-8], ours[8:-8, 8:-8], atol=1e-4)


def test_sections_apart_and_places_apart_go_to_files_of_their_own(data):
    class Scattered(FieldSet):
        def sections(self, index):
            return [(5, 4), (6, 5), (9, 8)][index]

    made = make_sets(data)
    found = list(stacks(ExportedSet(Scattered(made.path), None)))
    assert [(s.first, s.vectors.shape[1]) for s in found] == [(5, 2), (9, 1)]


def test_files_that_are_there_are_left_or_refused(tmp_path, data):
    make_sets(data)
    folder = tmp_path / "flow"
    export(data, folder, "--format", "sofima")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    export(data, folder, "--format", "sofima")
    assert before == {
        p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()
    }
    (path,) = folder.glob("*.npy")
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(DatasetError, match="other fields; give --overwrite"):
        export(data, folder, "--format", "sofima")
    export(data, folder, "--format", "sofima", "--overwrite")
    assert path.read_bytes() == content


def stack():
    """2 sections of 2 x 3 pixels (rows = x, cols = y) at mip 1, from (8, -4, 7) on."""
    vectors = np.zeros((2, 2, 3, 2), np.float32)
    vectors[0, 1, 2, 0] = 0.5  # along x, at section 8, y 2, x 0
    vectors[1, 0, 0, 1] = -2  # along y, at section 7, y 0, x 1
    return Stack(Grid(1, 8, -4, 2, 3), 7, vectors)


def test_an_itk_image_is_what_was_written_by_hand():
    content = mha_bytes(stack(), (4.0, 8.0, 40.0))
    # Voxels of mip 1 are 8 x 16 x 40 nm; the first one's centre is at x (4 + 0.5) *
    # 8 nm, y (-2 + 0.5) * 16 nm, z (7 + 0.5) * 40 nm. All of it in mm.
    header = b"""ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 3.6e-05 -2.4e-05 0.0003
CenterOfRotation = 0 0 0
AnatomicalOrientation = RAI
ElementSpacing = 8e-06 1.6e-05 4e-05
DimSize = 2 3 2
ElementNumberOfChannels = 3
ElementType = MET_DOUBLE
ElementDataFile = LOCAL
"""
    text, data = content[: -12 * 24], content[-12 * 24 :]
    assert _numbers(text) == pytest.approx(_numbers(header))
    assert _words(text) == _words(header)
    # x runs fastest, then y, then the section; three numbers a voxel.
    values = np.frombuffer(data, "<f8").reshape(12, 3)
    expected = np.zeros((12, 3))
    expected[1, 1] = -2 * 1.6e-5  # section 0, y 0, x 1
    expected[6 + 2 * 2, 0] = 0.5 * 8e-6  # section 1, y 2, x 0
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def _numbers(text):
    lines = text.decode().splitlines()
    return [float(w) for line in lines for w in line.split()[2:] if _is_number(w)]


def _words(text):
    return [w for w in text.decode().split() if not _is_number(w)]


def _is_number(word):
    try:
        float(word)
    except ValueError:
        return False
    return True


def test_simpleitk_reads_the_field_and_maps_points_by_it(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    path = tmp_path / "field.mha"
    path.write_bytes(mha_bytes(stack(), (4.0, 8.0, 40.0)))
    image = sitk.ReadImage(str(path))
    assert image.GetSize() == (2, 3, 2)
    assert image.GetSpacing() == pytest.approx((8e-6, 16e-6, 40e-6))
    assert image.GetOrigin() == pytest.approx((36e-6, -24e-6, 300e-6))
    point = image.TransformIndexToPhysicalPoint((0, 2, 1))
    assert point == pytest.approx((36e-6, (0 + 0.5) * 16e-6, 340e-6))
    mapped = sitk.DisplacementFieldTransform(image).TransformPoint(point)
    assert mapped == pytest.approx((40e-6, 8e-6, 340e-6))


def test_resampling_in_simpleitk_warps_as_we_do(tmp_path, data):
    sitk = pytest.importorskip("SimpleITK")
    fields = make_sets(data)
    export(data, tmp_path / "itk", "--format", "itk")
    (path,) = (tmp_path / "itk").glob("*.mha")
    field = sitk.ReadImage(str(path))
    sections = np.random.default_rng(3).random((3, ROWS, COLS)).astype(np.float32)
    moving = sitk.GetImageFromArray(np.ascontiguousarray(sections.transpose(0, 2, 1)))
    moving.CopyInformation(field)
    transform = sitk.DisplacementFieldTransform(field)
    warped = sitk.Resample(moving, transform, sitk.sitkLinear, 0.0)
    theirs = sitk.GetArrayFromImage(warped).transpose(0, 2, 1)
    for index in range(3):
        ours = warp(
            torch.from_numpy(sections[index])[None, None],
            torch.from_numpy(fields.read(index))[None],
        )[0, 0].numpy()
        inside = (index, slice(8, -8), slice(8, -8))
        np.testing.assert_allclose(theirs[inside], ours[inside[1:]], atol=1e-4)
