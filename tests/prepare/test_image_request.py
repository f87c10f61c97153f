import pytest

from metroem.errors import UsageError
from metroem.geometry.grid import Grid
from metroem.prepare.requests import ImageRequest


def request(**more):
    flags = {
        "cv_path": "gs://em",
        "mips": [5, 3],
        "patch_sizes": [48, 64],
        "z_start": 12,
        "z_end": 15,
        "x_offset": 320,
        "y_offset": -64,
    }
    return ImageRequest(**(flags | more))


def test_patches_share_the_corner():
    assert request().grids() == [Grid(5, 320, -64, 48, 48), Grid(3, 320, -64, 64, 64)]


def test_patches_share_the_centre_as_far_as_the_coarsest_pixels_allow():
    # 48 px of mip 5 are 1536, 64 px of mip 3 are 512: 512 are left on each side.
    coarse, fine = request(anchor="center").grids()
    assert (fine.x, fine.y) == (320 + 512, -64 + 512)
    assert fine.center == coarse.center
    # 65 px of mip 3 are 520: 508 on a side, rounded down to a multiple of 32.
    fine = request(anchor="center", patch_sizes=[48, 65]).grids()[1]
    assert (fine.x - 320) == 480


def test_the_largest_patch_keeps_its_corner_even_if_it_is_the_finest():
    coarse, fine = request(anchor="center", patch_sizes=[8, 64]).grids()
    assert (fine.x, fine.y) == (320, -64)
    assert coarse.center == fine.center


def test_all_mips_of_a_place_are_named_alike():
    names = [request(anchor="center", suffix="a").path(mip).name for mip in (5, 3)]
    assert names == ["x320_y-64_z12_MIP5_a.h5", "x320_y-64_z12_MIP3_a.h5"]


def test_the_tgt_of_the_first_pair_is_needed_too():
    assert list(request().sections) == [11, 12, 13, 14]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"anchor": "middle"}, "corner or center"),
        ({"mips": []}, "--mip"),
        ({"reference_mip": 2}, "--normalize"),
        ({"reference_mip": -1, "normalize": True}, "--reference_mip -1"),
        ({"reference_size": 0, "normalize": True}, "--reference_size 0"),
        ({"y_offset": 16}, r"--y_offset 16.*2\^5 = 32.*use 0 or 32"),
    ],
)
def test_values_that_cannot_work_are_refused(more, match):
    with pytest.raises(UsageError, match=match):
        request(**more)
