import numpy as np
import pytest
import torch

from metroem.data.dataset import read_sample, split_pairs
from metroem.data.sample import stack_samples, with_defects
from metroem.data.sampling import (
    NUM_KNOWN_WARPS,
    EpochSeed,
    TrainingEpoch,
    ValidationPairs,
    num_steps,
    read_skipping,
)
from metroem.errors import DatasetError
from metroem.geometry.field import compose
from metroem.imaging.mask_rules import MaskRules
from metroem.io.h5 import FieldSetMeta, Pair, write_field_set
from metroem.specs.augmentations import (
    KnownWarp,
    Photometric,
    RandomTranspose,
    SkipSection,
)
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase
from tests.image_sets import COLS, ROWS, one_mask, pairs_of, write_fields, write_images


def epoch_of(pairs, *, batch_size=1, epoch=0, **phase):
    options = {"lr": 1e-3, "num_epochs": 1, "smoothness": 1.0, "crop_size": 24} | phase
    key = EpochSeed(0, 0, 0, epoch)
    return TrainingEpoch(pairs, Phase(**options), key, batch_size=batch_size)


def test_an_epoch_goes_through_all_pairs_in_an_order_of_its_own(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5")
    pairs = pairs_of(tmp_path)
    orders = [epoch_of(pairs, epoch=e).order for e in range(3)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] != orders[1] and orders[0] == epoch_of(pairs).order
    assert len(epoch_of(pairs, num_samples=3)) == 3
    assert len(epoch_of(pairs, batch_size=3)) == 9


def test_samples_are_crops_that_repeat_with_their_key(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5")
    pairs = pairs_of(tmp_path)
    first, again = epoch_of(pairs)[3], epoch_of(pairs)[3]
    assert first.src.shape == (1, 1, 24, 24)
    assert torch.equal(first.src, again.src) and first.pair == again.pair
    assert not torch.equal(first.src, epoch_of(pairs, epoch=1)[3].src)


SHAPES = {"x0_y0_z1_MIP1.h5": (40, 56), "x800_y0_z1_MIP1.h5": (20, 30)}


@pytest.fixture
def mixed(tmp_path):
    """Ten pairs of one size, six of another; the second set has masks of defects."""
    for x, (name, shape) in zip((0, 800), SHAPES.items(), strict=True):
        count = 6 if x else 10
        masks = [(np.ones(shape, bool),) * 2] * count if x else None
        write_images(tmp_path, name, num_pairs=count, x=x, shape=shape, defects=masks)
    return pairs_of(tmp_path)


def batches_of(epoch, size):
    return [range(start, start + size) for start in range(0, len(epoch), size)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_of_sets_of_mixed_sizes_have_one_size_each(mixed, batch_size):
    epoch = epoch_of(mixed, batch_size=batch_size, crop_size=24)
    assert sorted(epoch.order) == list(range(16))  # each pair once, as ever
    seen = []
    for positions in batches_of(epoch, batch_size):
        batch = stack_samples([epoch[position] for position in positions])
        sets = {mixed[epoch.order[p]].images.path.name for p in positions}
        small = "x800_y0_z1_MIP1.h5" in sets
        assert batch.src.shape == (batch_size, 1, *((20, 24) if small else (24, 24)))
        seen.append(tuple(sorted(sets)))
    # 10 + 6 = 16 pairs in batches of 4: two batches of the first set alone, one of
    # both, one of the second; and not in the order of sizes in every epoch.
    assert sum(len(sets) == 2 for sets in seen) == (batch_size == 4)
    others = [epoch_of(mixed, batch_size=batch_size, epoch=e).order for e in range(4)]
    assert len({tuple(index < 10 for index in order) for order in others}) > 1
    assert epoch.order == epoch_of(mixed, batch_size=batch_size, crop_size=24).order


def test_where_some_sets_have_defects_and_others_none_a_batch_has_both(mixed):
    epoch = epoch_of(mixed, batch_size=16, crop_size=24)
    batch = stack_samples([epoch[position] for position in range(16)])
    assert batch.src_defects is not None
    masked = batch.src_defects.flatten(1).all(1)
    assert [not bool(m) for m in masked] == [index < 10 for index in epoch.order]


def test_a_batch_of_pairs_of_which_some_are_transposed_is_square(mixed):
    turns = (RandomTranspose(prob=0.5),)
    epoch = epoch_of(mixed[:10], batch_size=10, crop_size=48, augmentations=turns)
    batch = stack_samples([epoch[position] for position in range(10)])
    assert batch.src.shape == (10, 1, 40, 40)
    alone = epoch_of(mixed[:10], crop_size=48, augmentations=turns)
    shapes = {alone[position].src.shape[-2:] for position in range(10)}
    assert shapes == {(40, 48), (48, 40)}


@pytest.mark.parametrize(("num_samples", "batch_size"), [(20, 1), (20, 3), (3, 8)])
def test_more_samples_than_pairs_take_each_as_often_as_any_other(
    tmp_path, num_samples, batch_size
):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5")
    pairs = pairs_of(tmp_path)
    epoch = epoch_of(pairs, num_samples=num_samples, batch_size=batch_size)
    # Whole batches: the last one is filled.
    assert len(epoch) == -(-num_samples // batch_size) * batch_size
    assert len(epoch) == num_steps(epoch.phase, len(pairs), batch_size) * batch_size
    counts = [epoch.order.count(index) for index in range(8)]
    assert max(counts) - min(counts) <= 1
    if num_samples > 16:
        assert sorted(epoch.order[:8]) == sorted(epoch.order[8:16]) == list(range(8))
        assert epoch.order[:8] != epoch.order[8:16]


def test_a_pair_that_comes_again_is_another_sample(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=1)
    epoch = epoch_of(pairs_of(tmp_path), num_samples=3, augmentations=KNOWN)
    truths = [sample.truth for sample in epoch]
    assert len(truths) == 3 and not torch.equal(truths[0], truths[1])


def test_validation_takes_the_middle(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5")
    phase = Phase(lr=1e-3, num_epochs=1, smoothness=1.0)
    pairs = ValidationPairs(pairs_of(tmp_path), phase, 0)
    assert len(pairs) == 8 and pairs[1].truth is None
    assert pairs[1].src.shape == (1, 1, ROWS, COLS)


KNOWN = (KnownWarp(prob=1, same=1, peak_px=5, shift_px=2, tear=0),)
KNOWN_PHASE = Phase(
    lr=1e-3,
    num_epochs=1,
    smoothness=1.0,
    losses=(LossSpec("known_warp"),),
    augmentations=(*KNOWN, Photometric(prob=1)),
)


def test_validation_warps_each_pair_some_times_by_fields_that_stay(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=3)
    pairs = pairs_of(tmp_path)
    samples = ValidationPairs(pairs, KNOWN_PHASE, 5)
    assert len(samples) == 3 * NUM_KNOWN_WARPS
    names = [samples[index].pair for index in range(len(samples))]
    assert all(names.count((ref.name,)) == NUM_KNOWN_WARPS for ref in pairs)
    truths = [samples[index].truth for index in range(len(samples))]
    again = ValidationPairs(pairs, KNOWN_PHASE, 5)
    assert all(torch.equal(again[i].truth, truth) for i, truth in enumerate(truths))
    for i, truth in enumerate(truths):
        assert not any(torch.equal(truth, other) for other in truths[:i])
    other_seed = ValidationPairs(pairs, KNOWN_PHASE, 6)
    assert not torch.equal(other_seed[0].truth, truths[0])


def test_validation_shows_two_sections_mirrored_each_way(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=3)
    pairs = pairs_of(tmp_path)
    samples = ValidationPairs(pairs, KNOWN_PHASE, 5)
    plain = read_sample(pairs[1], pairs[1].grid)
    # `same` would have taken tgt for src, and `photometric` changed both.
    for which, dims in enumerate(([], [-1], [-2], [-1, -2])):
        sample = samples[1 + 3 * which]
        assert torch.equal(sample.unwarped_src, plain.src.flip(dims))
        assert torch.equal(sample.tgt, plain.tgt.flip(dims))


NO_RULES = {"similarity_rules": MaskRules(), "smoothness_rules": MaskRules()}


@pytest.mark.parametrize("masks", [None, [Pair(one_mask(0), one_mask(1))] * 8])
def test_defects_are_looked_for_where_none_are_given_and_a_loss_asks(tmp_path, masks):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", defects=masks)
    pairs = pairs_of(tmp_path)
    expected = read_sample(pairs[0], pairs[0].grid)
    if masks is None:
        expected = with_defects(expected)
    for rules in ({}, NO_RULES):
        phase = Phase(lr=1e-3, num_epochs=1, smoothness=1.0, **rules)
        for sample in (
            ValidationPairs(pairs, phase, 0)[0],
            epoch_of(pairs, crop_size=100, **rules)[0],
        ):
            if masks is None and rules:
                assert sample.src_defects is None and sample.tgt_defects is None
            else:
                assert torch.equal(sample.src_defects, expected.src_defects)
                assert torch.equal(sample.tgt_defects, expected.tgt_defects)


def test_the_distance_from_a_truth_asks_for_no_defects(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5")
    sample = ValidationPairs(pairs_of(tmp_path), KNOWN_PHASE, 0)[0]
    assert sample.tgt_defects is None and not sample.src_defects.any()


SKIP = (SkipSection(1.0),)


def test_skipping_takes_src_of_the_pair_that_follows(tmp_path):
    masks = [Pair(one_mask(slice(i)), one_mask(slice(9 + i))) for i in range(3)]
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=3, defects=masks)
    pairs = pairs_of(tmp_path)
    epoch = epoch_of(pairs, augmentations=SKIP, crop_size=100)
    samples = {sample.pair: sample for sample in epoch}
    assert sorted(name for (name,) in samples) == [
        "x0_y0_z1_MIP1.h5 pair 0 (z 1 on 0), but src z 2",
        "x0_y0_z1_MIP1.h5 pair 1 (z 2 on 1), but src z 3",
        "x0_y0_z1_MIP1.h5 pair 2 (z 3 on 2)",  # the last: none follows
    ]
    sample = samples[("x0_y0_z1_MIP1.h5 pair 1 (z 2 on 1), but src z 3",)]
    images = pairs[0].images
    assert np.array_equal(sample.src[0, 0], images.read(2).src)
    assert np.array_equal(sample.tgt[0, 0], images.read(1).tgt)
    assert np.array_equal(sample.src_defects[0, 0], masks[2].src)
    assert np.array_equal(sample.tgt_defects[0, 0], masks[1].tgt)
    assert sample.prior_field is None


def sloping_fields(folder, frames):
    """Pair i: d_cols = 3 i + 0.1 i col, d_rows = 2 - 0.05 i row."""
    rows, cols = np.mgrid[:ROWS, :COLS].astype(np.float32)
    fields = [
        np.stack([3 * i + 0.1 * i * cols, 2 - 0.05 * i * rows])
        for i in range(len(frames))
    ]
    meta = FieldSetMeta(frames, "test", "", {}, stage=0, tag="ck", num_sides=1)
    write_field_set(folder / "field_0_x0_y0_z1_MIP1_ck.h5", fields, meta)
    return [torch.from_numpy(field)[None] for field in fields]


def test_a_skipping_sample_has_both_prior_fields_composed(tmp_path):
    frames = write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=3)
    fields = sloping_fields(tmp_path, frames)
    pairs = pairs_of(tmp_path, stage=1)
    crop = pairs[1].grid.crop(5, 20, 16, 24)
    sample = read_skipping(pairs[1], pairs[2], crop)
    # Warping by compose(f, g) warps by g first: src z 3 to z 2, then z 2 to z 1.
    # The field between is read beyond the crop, so the whole is composed.
    whole = compose(fields[1], fields[2])
    expected = whole[..., 5:21, 20:44]
    # Fields are kept to 0.005 px, and the second is read where the first points.
    torch.testing.assert_close(sample.prior_field, expected, atol=0.012, rtol=0)
    assert sample.src.shape == sample.tgt.shape == (1, 1, 16, 24)


def test_where_tgt_has_a_field_too_the_prior_is_that_of_src(tmp_path):
    frames = write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=2)
    name = "field_0_x0_y0_z1_MIP1_ck.h5"
    write_fields(tmp_path, name, frames, num_sides=2, value=(2.0, 1.0))
    epoch = epoch_of(pairs_of(tmp_path, stage=1), augmentations=SKIP)
    (sample,) = [s for s in epoch if "but src z 2" in s.pair[0]]
    assert torch.unique(sample.prior_field[0, 0]).tolist() == [2.0]
    assert torch.unique(sample.prior_field[0, 1]).tolist() == [1.0]


def test_no_held_out_section_is_skipped_to(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=8)
    training, validation = split_pairs(pairs_of(tmp_path), 1)
    names = " ".join(s.pair[0] for s in epoch_of(training, augmentations=SKIP))
    assert "src z 5" in names
    assert all(f"src z {z}" not in names for z in range(6, 9)) and validation


def test_skipping_without_pairs_that_follow_is_refused(tmp_path):
    write_images(tmp_path, "x0_y0_z1_MIP1.h5", num_pairs=3)
    with pytest.raises(DatasetError, match="skip_section needs pairs of consecutive"):
        epoch_of(pairs_of(tmp_path)[::2], augmentations=SKIP)
