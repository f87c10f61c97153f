import torch

from metroem.normalize import (
    DARKEST,
    GreyStatistics,
    coarsen_image,
    normalize,
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


def test_coarsening_averages_tissue_alone():
    image = torch.tensor([[4.0, 8, 0, 0, 6], [0, 0, 0, 2, 6]])[None, None]
    assert coarsen_image(image, 1).tolist() == [[[[6.0, 0.0, 6.0]]]]
