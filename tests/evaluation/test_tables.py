import json
from pathlib import Path

import pytest

from metroem.evaluation.metrics import EndpointError
from metroem.evaluation.scores import (
    AlignedPair,
    PairScore,
    Score,
    SetResult,
    Spot,
    WarpedSection,
    WarpScore,
    Where,
)
from metroem.evaluation.tables import (
    NUM_WORST,
    print_evaluation,
    print_json,
    print_scores,
    write_json,
)

NAN = float("nan")
BEFORE = EndpointError(11.0, 10.5, 20.0, 25.0, 1.0, 0.99, 0.98, 0.6)
AFTER = EndpointError(0.8, 0.7, 2.0, 3.0, 0.6, 0.25, 0.05, 0.0125)


def aligned(index, *, cpc, ring=NAN, worse=0.0):
    spot = Spot(cpc - 0.1, 100 + index, 200 + index) if cpc == cpc else None
    figures = (3.0, 12.5, 0.9, 1.0, 1.1, 0.2, 0.6, 0.25, 0.7)
    score = PairScore(0.4, cpc, ring, ring, *figures, counted=0.8, made_worse=worse)
    return AlignedPair(Where("a.h5", index, 10 + index, 9 + index, spot), score)


def one_set(*pairs, known=()):
    mean_known = known[0].score if known else None
    mean = pairs[0].score
    return SetResult("a.h5", 2, 96, 128, mean, pairs, mean_known, tuple(known))


def printed(capsys, *results):
    print_evaluation(results)
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_scores_are_printed_one_row_a_stage(capsys):
    score = Score(6.0, (3.0, 1.5), 0.2, (0.4, 0.5), 0.6, 0.001)
    print_scores(score, (2, 0), title="five pairs")
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "five pairs"
    assert lines[2].split() == ["no", "alignment", "6.00", "1.00", "0.200"]
    assert lines[4].split() == ["stage", "1", "(mip", "0)", "1.50", "0.25", "0.500"]
    assert lines[5].split()[:2] == ["true", "field"]
    assert "0.100 %" in lines[6]


def test_an_image_set_is_printed_as_a_table(capsys):
    rows = printed(capsys, one_set(aligned(0, cpc=0.7, ring=0.5), aligned(1, cpc=0.6)))
    assert "a.h5: means over 2 pairs of 96x128 px at mip 2".split() in rows
    assert "CPC, 64 px chunks 0.400 0.700".split() in rows
    assert "within 32 px of defects 0.500 0.500".split() in rows
    assert "cycle error, px 0.20 0.60".split() in rows
    assert "swap error, px 0.25 0.70".split() in rows
    assert "Jacobian determinant 0.90 1.00 1.10".split() in rows
    assert "folds off defects, ppm 12.5".split() in rows
    assert "pairs made worse 0 of 2".split() in rows


def test_what_there_is_none_of_is_not_printed(capsys):
    rows = printed(capsys, one_set(aligned(0, cpc=0.7)))
    text = " ".join(word for row in rows for word in row)
    assert "of defects" not in text and "EPE" not in text and " nan" not in text


def test_known_warps_are_printed_with_the_worst_section(capsys):
    spot = Spot(4.5, 64, 32)
    score = WarpScore(BEFORE, AFTER, 1.5, 3.0, 0.02, 0.0)
    known = [WarpedSection(Where("a.h5", 0, 9, 9, spot), score)]
    rows = printed(capsys, one_set(aligned(0, cpc=0.7), known=known))
    assert "before 11.00 10.50 20.00 25.00 99.00 % 60.00 %".split() in rows
    assert "after 0.80 0.70 2.00 3.00 25.00 % 1.25 %".split() in rows
    assert "after, near defects 1.50".split() in rows
    assert "section on itself, px 0.020".split() in rows
    assert rows[-1][:7] == "a.h5 pair 0 (z 9 on 9):".split()
    assert rows[-1][7:] == "EPE 0.80 px, before 11.00; worst 4.50 at x 64, y 32".split()


def test_the_worst_pairs_come_first_those_without_a_figure_before_all(capsys):
    pairs = [aligned(i, cpc=c) for i, c in enumerate((0.5, 0.9, NAN, 0.2))]
    rows = printed(capsys, one_set(*pairs[:2]), one_set(*pairs[2:]))
    worst = rows[-NUM_WORST:]
    assert [row[2] for row in worst] == ["2", "3", "0"]
    assert worst[0][-3:] == ["no", "chunk", "counts"]
    assert worst[1][:7] == "a.h5 pair 3 (z 13 on 12):".split()
    found = "CPC 0.200, before 0.400; worst 0.100 at x 103, y 203"
    assert worst[1][7:] == found.split()


def test_figures_that_are_unknown_become_null(capsys):
    print_json({"epe_none": NAN, "epe": (1.2345678, float("inf")), "n": 3})
    line = capsys.readouterr().out.strip()
    assert json.loads(line) == {"epe_none": None, "epe": [1.23457, None], "n": 3}


def test_results_are_written_as_json_by_name(tmp_path):
    path = tmp_path / "made" / "figures.json"
    write_json(path, {"sets": [one_set(aligned(0, cpc=0.7))], "json": Path("a/b")})
    found = json.loads(path.read_text())
    assert found["json"] == "a/b"
    assert found["sets"][0]["pairs"][0]["score"]["cpc"] == 0.7
    assert found["sets"][0]["pairs"][0]["where"]["worst"]["x"] == 100
    assert found["sets"][0]["mean"]["ring_cpc"] is None


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "figures.json"
    write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        write_json(path, {"n": {1, 2}})
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]
    assert json.loads(path.read_text()) == {"n": 1}


def test_what_training_gives_is_seen_beside_what_the_finetuner_does(capsys):
    score = Score(6.0, (3.0, 1.5), 0.2, (0.4, 0.5), 0.6, 0.001)
    print_scores(
        score, (2, 0), title="a", others={"other": score._replace(epe=(4.0, 2.4))}
    )
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[3].split() == ["other", "2.40", "0.40", "0.500"]
