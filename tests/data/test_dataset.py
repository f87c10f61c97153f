import numpy as np
import pytest
import torch

from metroem.data.dataset import find_pairs, read_sample, split_pairs
from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.io.h5 import Pair, PairLocation
from tests.image_sets import COLS, ROWS, one_mask, pairs_of, write_fields, write_images


def test_the_split_shares_no_section_and_leaves_a_gap(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=8)
    training, validation = split_pairs(pairs_of(tmp_path), 2)
    assert [ref.index for ref in validation] == [6, 7]  # sections 6, 7, 8
    assert [ref.index for ref in training] == [0, 1, 2, 3]  # sections 0 to 4

    held_out = {z for ref in validation for z in ref.images.sections(ref.index)}
    trained = {z for ref in training for z in ref.images.sections(ref.index)}
    assert min(held_out) - max(trained) > 1


def test_the_split_reaches_into_other_sets_of_the_same_area_only(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=3, z=1)
    write_images(tmp_path, "x0_y0_z4_MIP1.h5", num_pairs=2, z=4)
    write_images(tmp_path, "x500_y0_z4_MIP1.h5", num_pairs=2, z=4, x=500)
    training, validation = split_pairs(pairs_of(tmp_path), 1)
    assert [ref.name for ref in validation] == ["x500_y0_z4_MIP1.h5 pair 1 (z 5 on 4)"]
    assert {ref.images.path.name for ref in training} == {
        "x0_y0_z1_MIP1.h5",
        "x0_y0_z4_MIP1.h5",
    }
    assert len(training) == 5


def test_the_split_does_not_depend_on_the_order(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=6)
    write_images(tmp_path, "x0_y0_z20_MIP1.h5", num_pairs=6, z=20)
    pairs = pairs_of(tmp_path)
    names = [[r.name for r in part] for part in split_pairs(pairs, 3)]
    assert names == [[r.name for r in part] for part in split_pairs(pairs[::-1], 3)]


def test_holding_out_everything_is_refused(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=3)
    with pytest.raises(DatasetError, match="--val_pairs 2 of 3 pairs leaves none"):
        split_pairs(pairs_of(tmp_path), 2)
    assert len(split_pairs(pairs_of(tmp_path), 0).training) == 3


def test_blank_pairs_are_left_out_when_the_index_is_built(tmp_path):
    def blank(index, pair):
        return Pair(pair.src, pair.tgt * 0) if index == 1 else pair

    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=3, change=blank)
    assert [ref.index for ref in pairs_of(tmp_path)] == [0, 2]


def test_raw_grey_levels_are_refused(tmp_path):
    def raw(index, pair):
        return Pair(100 + 30 * pair.src, 100 + 30 * pair.tgt)

    write_images(tmp_path, "x0_y0_z1_MIP1.h5", change=raw)
    with pytest.raises(DatasetError, match="not normalised.*--normalize"):
        pairs_of(tmp_path)


def test_a_mip_without_images_names_those_there_are(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5")
    with pytest.raises(DatasetError, match=r"no image set at mip 3, only at \[1\]"):
        find_pairs(tmp_path, 3, stage=0, checkpoint_name="ck")


def test_prior_fields_must_be_there_and_fit(tmp_path):
    frames = write_images(tmp_path, "x0_y0_z1_MIP1.h5")
    name = "field_0_x0_y0_z1_MIP1_ck.h5"
    with pytest.raises(DatasetError, match=f"{name}: no such field set"):
        pairs_of(tmp_path, stage=1)
    write_fields(tmp_path, name, frames[:-1])
    with pytest.raises(DatasetError, match="fields of 7 pairs, .* has 8"):
        pairs_of(tmp_path, stage=1)
    moved = [PairLocation(Grid(1, 64, 0, ROWS, COLS), f.sections) for f in frames]
    write_fields(tmp_path, name, moved)
    with pytest.raises(DatasetError, match="pair 0 lies on"):
        pairs_of(tmp_path, stage=1)


def test_a_translation_taken_out_must_be_that_of_the_images(tmp_path):
    frames = write_images(tmp_path, "x0_y0_z1_MIP1.h5")
    moved = [PairLocation(f.grid, f.sections, ((8, 0), (0, 4))) for f in frames]
    name = "field_0_x0_y0_z1_MIP1_ck.h5"
    write_fields(tmp_path, name, moved, num_sides=2)
    with pytest.raises(DatasetError, match=r"\(8, 0\) was taken out.*--field_dset"):
        pairs_of(tmp_path, stage=1)


def test_a_crop_and_its_field_lie_in_the_same_place(tmp_path):
    frames = write_images(tmp_path, "x0_y0_z1_MIP1.h5")
    write_fields(tmp_path, "field_0_x0_y0_z1_MIP1_ck.h5", frames, value=(1.5, -2.0))
    ref = pairs_of(tmp_path, stage=1)[2]
    sample = read_sample(ref, ref.grid.crop(5, 7, 16, 24))
    whole = ref.images.read(2)
    np.testing.assert_array_equal(sample.src[0, 0], whole.src[5:21, 7:31])
    assert sample.prior_field is not None
    assert sample.prior_field[0, :, 3, 4].tolist() == [1.5, -2.0]


def test_the_tgt_side_of_a_downloaded_field_warps_tgt(tmp_path):
    frames = write_images(tmp_path, "x0_y0_z1_MIP1.h5")
    name = "field_0_x0_y0_z1_MIP1_ck.h5"
    write_fields(tmp_path, name, frames, num_sides=2, value=(2.0, 0.0))
    ref = pairs_of(tmp_path, stage=1)[0]
    sample = read_sample(ref, ref.grid.crop(4, 6, 20, 30))
    whole = ref.images.read(0)
    torch.testing.assert_close(
        sample.tgt[0, 0], torch.from_numpy(whole.tgt[4:24, 8:38]), atol=1e-4, rtol=0
    )
    np.testing.assert_array_equal(sample.src[0, 0], whole.src[4:24, 6:36])


@pytest.mark.parametrize("num_sides", [None, 1, 2])
def test_the_defects_of_a_crop_lie_where_its_images_are(tmp_path, num_sides):
    name = "x0_y0_z1_MIP1.h5"
    src, tgt = one_mask(slice(20), slice(30, 40)), one_mask(slice(30), slice(25, 35))
    frames = write_images(tmp_path, name, num_pairs=1, defects=[Pair(src, tgt)])
    if num_sides:
        field = "field_0_x0_y0_z1_MIP1_ck.h5"
        write_fields(tmp_path, field, frames, num_sides=num_sides, value=(3.0, 0.0))
    (ref,) = pairs_of(tmp_path, stage=1 if num_sides else 0)
    sample = read_sample(ref, ref.grid.crop(4, 20, 30, 24))
    window = (slice(4, 34), slice(20, 44))
    assert sample.src_defects.dtype == torch.bool
    assert torch.equal(sample.src_defects[0, 0], torch.from_numpy(src[window]))
    # The field of the tgt side reads 3 px to the right, where there is one.
    moved = np.roll(tgt, -3, axis=1) if num_sides == 2 else tgt
    assert torch.equal(sample.tgt_defects[0, 0], torch.from_numpy(moved[window]))
