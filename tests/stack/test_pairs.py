"""Pairs of sections: windows, cells and grey levels, by formula."""

import json
from typing import cast

import numpy as np
import pytest
import torch

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.io.image_volume import ImageVolume
from metroem.io.volume_write import write_volume
from metroem.pyramid import Pyramid
from metroem.stack.pairs import (
    GreysStep,
    align_windows,
    finetuned_share,
    make_window,
    open_masks,
    stage_grids,
    to_cells,
)
from metroem.stack.place import Placement
from metroem.stack.solve_placements import Placed
from tests.pairs import white_noise

ROWS, COLS = 96, 144


def test_each_stage_reads_its_own_halo_within_the_area():
    area = Grid(0, 0, 64, 512, 640)
    core = Grid(0, 256, 64, 256, 128)

    coarse, fine = stage_grids(core, area, (2, 0), 16)

    # Rows 256...512 and cols 64...192; the area ends at row 512 and begins at col 64.
    assert fine == Grid(0, 240, 64, 272, 144)
    # 16 px of mip 2 are 64 px of mip 0.
    assert coarse == Grid(2, 192, 64, 80, 48)


def test_what_the_finetuner_adds_falls_to_0_where_another_window_begins():
    area = Grid(0, 0, 0, 512, 1024)
    core = Grid(0, 0, 512, 512, 512)  # the area begins and ends at its other borders

    share = finetuned_share(core, Grid(0, 0, 480, 512, 544), area)

    assert share.shape == (1, 1, 512, 544)
    # Columns 480...511 are halo; from column 512 on it rises over 128 px.
    expected = np.clip((np.arange(544) - 32 + 0.5) / 128, 0, 1)
    np.testing.assert_allclose(share[0, 0], np.tile(expected, (512, 1)), atol=1e-6)
    coarse = finetuned_share(core.at_mip(1), core.at_mip(1), area)
    np.testing.assert_allclose(
        coarse[0, 0, 7], np.clip((np.arange(256) + 0.5) / 128, 0, 1)
    )
    assert bool((finetuned_share(area, area, area) == 1).all())


class KnownFields:
    """Stands in for a pyramid: networks find 1 px, finetuned 3 px, along cols."""

    def __init__(self):
        self.runs = []

    def run(self, inputs, finetune):
        self.runs.append((finetune, inputs[-1].sample.src_defects is not None))
        field = torch.zeros(1, 2, ROWS, COLS)
        field[:, 0] = 3.0 if finetune else 1.0
        return [field]


@pytest.mark.parametrize(
    "share, along_cols, runs",
    [
        (None, 1.0, [(False, False)]),
        (0.25, 1.5, [(False, False), (True, True)]),
        (1.0, 3.0, [(True, True)]),
    ],
)
def test_the_share_of_the_finetuner_counts(share, along_cols, runs):
    pyramid, window = KnownFields(), make_window([white_noise(ROWS, COLS, 0)])
    weight = None if share is None else torch.full((1, 1, ROWS, COLS), share)

    field, alike = align_windows(
        cast(Pyramid, pyramid), window, window, [Grid(0, 0, 0, ROWS, COLS)], weight
    )

    assert bool((field[:, 0] == along_cols).all() and (field[:, 1] == 0).all())
    assert pyramid.runs == runs
    assert alike.shape == (1, 1, ROWS, COLS)


def test_cells_are_means_of_what_they_hold_and_fields_count_in_cells():
    rows, cols = 20, 28  # the last cells hold 4 rows and 4 cols
    row, col = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    field = torch.tensor(np.stack([col, 2.0 * row])[None])

    vectors, alike = to_cells(field, field[:, :1])

    means = np.array([3.5, 11.5, 19.5, 25.5])
    assert vectors.shape == (1, 2, 3, 4)
    np.testing.assert_allclose(vectors[0, 0], np.tile(means / 8, (3, 1)))
    along_rows = np.array([7.0, 23.0, 35.0])[:, None] / 8
    np.testing.assert_allclose(vectors[0, 1], np.tile(along_rows, (1, 4)))
    np.testing.assert_allclose(alike[0, 0], np.tile(means, (3, 1)))


def test_known_defects_replace_those_that_are_found():
    image = white_noise(ROWS, COLS, 0)
    image[..., 40:60, 30:90] = -6.0  # as black as a fold

    known = torch.zeros_like(image, dtype=torch.bool)
    known[..., :8, :8] = True

    assert bool(make_window([image]).defects[..., 45:55, 40:80].all())
    assert torch.equal(make_window([image], known).defects, known)


@pytest.fixture
def volume(tmp_path):
    """Three sections; of the last one only the first rows and cols have data."""
    grey = np.random.default_rng(0).integers(1, 255, (3, 128, 192)).astype(np.uint8)
    grey[1] = grey[1] // 2 + 60
    grey[2, 8:, 8:] = 0
    write_volume(tmp_path / "raw", grey, 2, chunk_px=64)
    return tmp_path / "raw", grey


def test_masks_have_to_cover_the_sections(volume, tmp_path):
    path, grey = volume
    write_volume(tmp_path / "small", grey[:2, :64] * 0, 2, chunk_px=64)
    write_volume(tmp_path / "coarse", grey[:, ::2, ::2] * 0, 1, chunk_px=64)
    images = ImageVolume(str(path))
    with pytest.raises(DatasetError, match="--masks .*small"):
        open_masks(str(tmp_path / "small"), images, 0, range(2))
    write_volume(tmp_path / "good", grey * 0, 2, chunk_px=64)
    assert open_masks(str(tmp_path / "good"), images, 1, range(3)).mips[:2] == [0, 1]


def greys_step(tmp_path, path, how):
    eye = np.eye(3)[:2]
    placed = {z: Placed(how if z == 2 else "keypoints", 9, (), "") for z in range(3)}
    placement = Placement(dict.fromkeys(range(3), eye), placed, Grid(0, 0, 0, 128, 192))
    (tmp_path / "dst").mkdir(exist_ok=True)
    return GreysStep(
        f"file://{tmp_path}/dst", str(path), placement, range(3), 2, (1, 0)
    )


def test_grey_levels_are_those_of_all_pixels_with_data(volume, tmp_path):
    path, grey = volume
    step = greys_step(tmp_path, path, "keypoints")
    assert step.tasks() == ["z0-2", "z2-3"]
    for task in step.tasks():
        step.run(task)

    for name, sections in (("z0-2", (0, 1)), ("z2-3", (2,))):
        note = json.loads((tmp_path / "dst" / "greys" / f"{name}.json").read_text())
        for z in sections:
            data = grey[z][grey[z] > 0].astype(float)
            expected = [data.mean(), data.std()]
            np.testing.assert_allclose(note[str(z)]["0"], expected, rtol=1e-6)
            # Means of 2 x 2 px: the same mean, rounded.
            assert note[str(z)]["1"][0] == pytest.approx(expected[0], abs=1.0)


def test_a_section_whose_tissue_is_not_found_is_named(tmp_path):
    grey = np.full((3, 128, 192), 90, np.uint8)
    grey[:, ::2] = 140
    grey[2] = 0
    write_volume(tmp_path / "raw", grey, 2, chunk_px=64)

    with pytest.raises(DatasetError, match="section 2 has tissue, but none at mip 1"):
        greys_step(tmp_path, tmp_path / "raw", "keypoints").run("z2-3")
    greys_step(tmp_path, tmp_path / "raw", "blank").run("z2-3")
    note = json.loads((tmp_path / "dst" / "greys" / "z2-3.json").read_text())
    assert note == {"2": {"1": None, "0": None}}
