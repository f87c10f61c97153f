"""The weights of the package: what they were trained on, and that they fit."""

import numpy as np
import pretrain
import torch
from tissues_cases import TISSUES

from metroem import Pyramid
from metroem.models.requests import PRETRAINED
from metroem.models.weights import checkpoint_path


def test_no_section_that_the_benchmark_measures_was_trained_on():
    trained = {tissue.file: tissue.sections for tissue in pretrain.TISSUES}
    for tissue in TISSUES:
        measured = {z for pair in tissue.pairs for z in (pair.src, pair.tgt)}
        ranges = [tissue.train, trained.get(tissue.file) if tissue.file else None]
        for first, end in filter(None, ranges):
            # Not even a neighbour of one.
            assert not measured & set(range(first - 1, end + 1)), tissue.name


def test_sections_are_resampled_to_a_size_of_pixels_and_keep_their_grey_levels():
    sections = np.full((2, 40, 60), 90, np.uint8)
    sections[:, :, 30:] = 200

    finer = pretrain.resize(sections, 10 / 5)
    coarser = pretrain.resize(sections, 10 / 16)

    assert finer.shape == (2, 80, 120) and coarser.shape == (2, 25, 38)
    for resized in (finer, coarser):
        middle = resized.shape[2] // 2
        assert (resized[:, :, : middle - 4] == 90).all()
        assert (resized[:, :, middle + 4 :] == 200).all()
    assert pretrain.resize(sections, 1.0) is sections


def test_spots_are_bright_and_reach_through_two_or_three_sections():
    sections = pretrain.make_spots(6, 160, seed=3).astype(float)

    assert sections.shape == (6, 160, 160) and sections.min() >= 1
    assert np.median(sections) < 110 and sections.max() > 200
    # One, two and five sections apart.
    apart = [
        np.corrcoef(sections[0].ravel(), sections[n].ravel())[0, 1] for n in (1, 2, 5)
    ]
    assert apart[0] > apart[1] + 0.1 and apart[1] > apart[2]
    np.testing.assert_array_equal(pretrain.make_spots(6, 160, seed=3), sections)
    assert (pretrain.make_spots(6, 160, seed=4) != sections).any()


def test_stored_weights_are_those_that_are_loaded_in_half_precision():
    pyramid = Pyramid.pretrained(mips=(1, 1))

    for stage, aligner in enumerate(pyramid.aligners):
        stored = torch.load(
            checkpoint_path(PRETRAINED, f"stage{stage}"), weights_only=True
        )
        loaded = aligner.net.state_dict()
        assert stored.keys() == loaded.keys()
        for name, value in stored.items():
            assert value.dtype in (torch.float16, torch.int64)
            torch.testing.assert_close(loaded[name], value.to(loaded[name].dtype))
