import pytest
import torch

from metroem.imaging.normalize import (
    DARKEST,
    GreyStatistics,
    coarsen_image,
    normalize,
    normalize_if_raw,
    tissue_statistics,
)


def image_with_a_blank_corner():
    image = torch.arange(1.0, 36.0).view(1, 1, 5, 7)
    image[..., :2, :3] = 0
    return image


def test_tissue_becomes_mean_0_and_std_1_and_blank_stays_0():
    image = image_with_a_blank_corner()
    grey = normalize(image)
    tissue = grey[image != 0]
    assert (grey[image == 0] == 0).all() and (tissue != 0).all()
    torch.testing.assert_close(tissue.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(tissue.std(correction=0), torch.tensor(1.0))


def test_a_reference_gives_the_statistics():
    grey = normalize(torch.tensor([0.0, 30.0, 50.0]), GreyStatistics(40.0, 5.0))
    assert grey.tolist() == [0.0, -2.0, 2.0]


def test_dark_tissue_is_not_taken_for_no_data():
    grey = normalize(torch.tensor([1.0]), GreyStatistics(100.0, 5.0))
    assert grey.tolist() == [DARKEST]


def test_a_blank_or_flat_image_has_no_statistics():
    assert tissue_statistics(torch.zeros(4, 6)) is None
    assert tissue_statistics(torch.full((4, 6), 7.0)) is None
    assert not normalize(torch.zeros(4, 6)).any()


def test_uint8_is_taken_as_it_is():
    image = torch.tensor([[0, 10, 20]], dtype=torch.uint8)
    assert normalize(image).tolist() == [[0.0, -1.0, 1.0]]


def test_uint8_gives_what_the_same_floats_give():
    chance = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 17, 29), generator=chance, dtype=torch.uint8)
    # A rounding of the standard deviation, 1e-15 of it, may turn a last bit.
    torch.testing.assert_close(
        normalize(image), normalize(image.float()), rtol=2e-7, atol=0
    )
    assert normalize(torch.full((4, 5), 9, dtype=torch.uint8)).count_nonzero() == 0


def test_coarsening_averages_tissue_alone():
    image = torch.tensor([[4.0, 8, 0, 0, 6], [0, 0, 0, 2, 6]])[None, None]
    assert coarsen_image(image, 1).tolist() == [[[[6.0, 0.0, 6.0]]]]


def raw_pair(dtype):
    rows, cols = torch.meshgrid(torch.arange(12.0), torch.arange(17.0), indexing="ij")
    src = (100 + 40 * torch.sin(rows + cols))[None, None]
    src[..., :3, :4] = 0
    tgt = (90 + 30 * torch.cos(rows - cols))[None, None]
    return src.to(dtype), tgt.to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_raw_images_are_normalised_once(dtype):
    raw = raw_pair(dtype)
    once = normalize_if_raw(raw, "raw")
    assert all(torch.equal(o, normalize(r)) for o, r in zip(once, raw, strict=True))
    again = normalize_if_raw(once, "raw")
    assert all(torch.equal(a, o) for a, o in zip(again, once, strict=True))


def test_floats_between_0_and_1_are_raw():
    raw = [image / 255 for image in raw_pair(torch.float32)]
    found = normalize_if_raw(raw, "raw")
    assert all(torch.equal(f, normalize(r)) for f, r in zip(found, raw, strict=True))


def test_floats_with_the_range_of_grey_levels_are_raw_whatever_their_mean():
    raw = [image - 100 for image in raw_pair(torch.float32)]
    found = normalize_if_raw(raw, "raw")
    assert all(torch.equal(f, normalize(r)) for f, r in zip(found, raw, strict=True))


def test_a_pale_image_of_a_normalised_pair_is_taken_as_it_is():
    pale = 0.7 + 0.1 * normalize(raw_pair(torch.float32)[0])
    tgt = normalize(raw_pair(torch.float32)[1])
    assert torch.equal(normalize_if_raw([pale, tgt], "raw")[0], pale)


def test_integers_are_raw_beside_a_normalised_image():
    src, tgt = raw_pair(torch.uint8)
    found = normalize_if_raw([src, normalize(tgt)], "raw")
    assert torch.equal(found[0], normalize(src))
    assert torch.equal(found[1], normalize(tgt))


def test_what_is_wanted_outweighs_what_images_look_like():
    raw = raw_pair(torch.uint8)
    as_they_are = normalize_if_raw(raw, False)
    assert all(torch.equal(a, r.float()) for a, r in zip(as_they_are, raw, strict=True))
    halved = [normalize(image) / 2 for image in raw]
    found = normalize_if_raw(halved, True)
    assert all(torch.equal(f, normalize(h)) for f, h in zip(found, halved, strict=True))


def test_each_sample_is_normalised_by_itself():
    src, _ = raw_pair(torch.uint8)
    batch = normalize_if_raw([torch.cat([src, src // 2])], "raw")[0]
    assert torch.equal(batch[:1], normalize(src))
    assert torch.equal(batch[1:], normalize(src // 2))


def test_blank_floats_stay_blank():
    assert not normalize_if_raw([torch.zeros(1, 1, 4, 6)], "raw")[0].any()
