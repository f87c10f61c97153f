"""Pairs that say nothing about a field: in no mean, not made worse, and counted."""

import json
import math

import pytest
import torch

from metroem.data.sample import Sample
from metroem.errors import DatasetError
from metroem.evaluation.evaluate import evaluate_dataset
from metroem.evaluation.metrics import chunked_correlation
from metroem.evaluation.requests import EvaluateRequest
from metroem.evaluation.scores import (
    NO_SCORE,
    can_be_compared,
    score_aligned,
    score_known,
)
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import normalize
from metroem.io.h5 import ImageSetMeta, Pair, PairLocation, write_image_set
from metroem.synthetic.distortion import GroundTruth
from tests.browser import Browser, find_chromium
from tests.evaluation.report.pages import blocks
from tests.models.specs import pyramid_with_weights
from tests.pairs import shifted_pair, texture

ROWS, COLS = 96, 176


def section(seed):
    return normalize(texture(ROWS, COLS, seed))


def left_half(image):
    image = image.clone()
    image[..., COLS // 2 :] = 0
    return image


def right_half(image):
    return image - left_half(image)


def grey(value):
    return torch.full((1, 1, ROWS, COLS), value)


LEFT_OUT = {
    "no overlap": (left_half(section(0)), right_half(section(0))),
    "an overlap of half a chunk": (
        left_half(section(0)),
        right_half(section(0)) + left_half(section(0)) * (torch.arange(COLS) > 66),
    ),
    "tgt of one grey level": (section(0), grey(-1.2)),
    "src of one grey level": (grey(0.1234), section(0)),
    "raw, of one grey level": (grey(128.0), texture(ROWS, COLS, 0)),
    "both of one grey level": (grey(0.7), grey(0.7)),
    "src without tissue": (grey(0.0), section(0)),
}


def as_sample(src, tgt):
    return Sample(src, tgt, None, ("",))


def wild_field(seed):
    generator = torch.Generator().manual_seed(seed)
    return 40 * torch.randn(1, 2, ROWS, COLS, generator=generator)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_pair_that_cannot_be_compared_has_no_figure(name):
    sample = as_sample(*LEFT_OUT[name])
    score, worst = score_aligned(sample, wild_field(0), wild_field(1))
    assert all(map(math.isnan, score)) and worst is None


@pytest.mark.parametrize("change", [1.0, 1e-3, 1e6])
def test_a_pair_that_can_be_compared_has_figures_at_any_scale_of_greys(change):
    src, tgt = (change * image for image in shifted_pair(ROWS, COLS, seed=0))
    sample = as_sample(src, tgt)
    assert can_be_compared(sample)
    none = torch.zeros(1, 2, ROWS, COLS)
    score, _ = score_aligned(sample, none, none)
    assert score.made_worse == 0 and score.det_p50 == 1
    # The field is to blame for what it leaves nothing of.
    assert score_aligned(sample, none + 1000, none)[0].made_worse == 1


@pytest.mark.parametrize("value", [0.1, -1.2, 1 / 3, 128.0, 4e9])
def test_rounding_makes_no_contrast_of_one_grey_level(value):
    found = chunked_correlation(
        torch.full((1, 1, 64, 128), value, dtype=torch.float32),
        texture(64, 128, 0),
        torch.ones(1, 1, 64, 128, dtype=torch.bool),
    )
    assert found.tolist() == [[[[0, 0]]]]


def test_a_section_whose_truth_is_nowhere_known_is_not_made_worse():
    nowhere = torch.zeros(1, 1, ROWS, COLS, dtype=torch.bool)
    truth = GroundTruth(torch.zeros(1, 2, ROWS, COLS), nowhere)
    score, worst = score_known(wild_field(0), truth, nowhere, wild_field(1))
    assert worst is None and math.isnan(score.made_worse)
    assert math.isnan(score.folds_ppm) and math.isnan(score.after.mean)


def write_set(folder, pairs):
    frames = [
        PairLocation(Grid(0, 0, 0, ROWS, COLS), (1 + z, z)) for z in range(len(pairs))
    ]
    images = [Pair(src[0, 0].numpy(), tgt[0, 0].numpy()) for src, tgt in pairs]
    meta = ImageSetMeta(frames, "test", "", {}, normalization={"kind": "tissue"})
    write_image_set(folder / "x0_y0_z1_MIP0.h5", images, meta)


NAMES = ("no overlap", "tgt of one grey level")
GOOD = [tuple(map(normalize, shifted_pair(ROWS, COLS, seed=s))) for s in (1, 2)]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Two good pairs between two that cannot be compared, and the good ones alone."""
    folder = tmp_path_factory.mktemp("left_out")
    pyramid_with_weights(folder / "p", [0])
    bad = [LEFT_OUT[name] for name in NAMES]
    for name, pairs in (("some", [bad[0], *GOOD, bad[1]]), ("good", GOOD)):
        write_set(folder / name, pairs)
        torch.manual_seed(0)
        evaluate_dataset(
            EvaluateRequest(
                *(folder / "p", folder / name),
                json=folder / f"{name}.json",
                report=folder / f"{name}.html",
                known_warps=True,
                no_finetune=True,
                workers=1,
            )
        )
    return folder


def figures(folder, name):
    (found,) = json.loads((folder / f"{name}.json").read_text())["sets"]
    return found


def test_means_are_those_of_the_other_pairs(evaluated):
    some, good = figures(evaluated, "some"), figures(evaluated, "good")
    assert some["mean"] == good["mean"]
    assert (some["without_value"], good["without_value"]) == (2, 0)
    # Sections: tgt of the last pair has no contrast, and that of the first is half.
    assert (some["known_without_value"], good["known_without_value"]) == (1, 0)
    empty, *known, last = (pair["score"] for pair in some["pairs"])
    assert set(empty) == set(NO_SCORE._fields)
    assert set(empty.values()) == set(last.values()) == {None}
    assert known == [pair["score"] for pair in good["pairs"]]
    section = some["known"][-1]["score"]
    assert section["made_worse"] is None and section["after"]["mean"] is None


def test_tables_say_how_many_are_left_out(evaluated, capsys):
    request = EvaluateRequest(
        *(evaluated / "p", evaluated / "some"),
        known_warps=True,
        no_finetune=True,
        workers=1,
    )
    evaluate_dataset(request)
    out = capsys.readouterr().out
    assert "means over 2 pairs of 96x176 px" in out
    assert "pairs left out, no overlap or no contrast: 2" in out
    assert "3 sections, each warped by a known field" in out
    assert "sections left out, no overlap or no contrast: 1" in out
    worst = out[out.index("worst pairs") :]
    assert "pair 1 (z 2 on 1)" in worst and "pair 2 (z 3 on 2)" in worst
    assert "pair 0 (z 1 on 0): CPC" not in worst and "pair 3" not in worst
    assert " nan" not in out


def test_the_page_knows_the_pairs_that_are_left_out(evaluated):
    summary = blocks(evaluated / "some.html")["summary"]
    (found,) = summary["sets"]
    assert found["without_value"] == 2
    stages = [pair["stage_cpc"] for pair in summary["pairs"]]
    assert stages[0] == stages[3] == [None]
    assert None not in stages[1] + stages[2]


def test_nothing_is_left_to_compare(tmp_path, capsys):
    pyramid_with_weights(tmp_path / "p", [0])
    write_set(tmp_path / "d", [LEFT_OUT["no overlap"]])
    request = EvaluateRequest(
        tmp_path / "p", tmp_path / "d", json=tmp_path / "f.json", no_finetune=True
    )
    with pytest.raises(DatasetError, match="no pair can be compared"):
        evaluate_dataset(request)
    assert (tmp_path / "f.json").is_file()
    assert " nan" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium")
def test_the_page_shows_the_pairs_that_are_left_out_last(evaluated):
    with Browser() as browser:
        browser.load(evaluated / "some.html")
        tiles = browser.run("byId('tiles').innerText")
        assert "2\npairs left out: no overlap or no contrast" in tiles
        assert " of 2\npairs made worse" in tiles
        rows = "[...document.querySelectorAll('#pairs tbody tr')]"
        order = browser.run(rows + ".map((row) => row.querySelector('a').hash)")
        assert order[2:] == ["#0", "#3"]
        marks = browser.run(rows + ".map((row) => row.cells[1].innerText)")
        assert ["left out" in mark for mark in marks] == [False, False, True, True]
        assert browser.console == []
