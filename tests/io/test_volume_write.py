import numpy as np
import pytest
from cloudvolume import CloudVolume

from metroem.errors import DatasetError
from metroem.io.volume_write import write_volume


@pytest.fixture
def sections():
    image = np.random.default_rng(0).integers(1, 255, (3, 101, 77)).astype(np.uint8)
    image[1, :50] = 0
    return image


def read(path, mip):
    volume = CloudVolume(f"file://{path.resolve()}", mip=mip, progress=False)
    return volume, np.asarray(volume[:, :, :])[..., 0].transpose(2, 0, 1)


def test_rows_run_along_x_and_cols_along_y(tmp_path, sections):
    write_volume(tmp_path / "a b", sections, 1, offset=(40, 80, 7))
    volume, stored = read(tmp_path / "a b", 0)
    np.testing.assert_array_equal(stored, sections)
    assert list(volume.bounds.minpt) == [40, 80, 7]
    assert list(volume.chunk_size) == [128, 128, 1]


def test_coarser_mips_average_the_tissue_alone(tmp_path, sections):
    write_volume(tmp_path / "v", sections, 3)
    _, coarse = read(tmp_path / "v", 1)
    assert coarse.shape == (3, 51, 39)
    mean = sections[0, 10:12, 20:22].mean()
    assert abs(coarse[0, 5, 10] - mean) <= 0.5
    assert (coarse[1, :25] == 0).all()
    assert (coarse[1, 25:] > 0).all()
    assert read(tmp_path / "v", 2)[1].shape == (3, 26, 20)


def test_normalised_float_sections_are_kept_as_they_are(tmp_path, sections):
    grey = (sections.astype(np.float32) - 128) / 50
    write_volume(tmp_path / "v", grey, 1)
    np.testing.assert_array_equal(read(tmp_path / "v", 0)[1], grey)


def test_sections_of_another_type_are_refused(tmp_path, sections):
    with pytest.raises(DatasetError, match="uint8 or float32"):
        write_volume(tmp_path / "v", sections.astype(np.int64), 1)
