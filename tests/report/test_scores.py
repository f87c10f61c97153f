import json

from metroem.evaluate import Score
from metroem.report.scores import print_json, print_scores


def test_scores_are_printed_one_row_a_stage(capsys):
    score = Score(6.0, (3.0, 1.5), 0.2, (0.4, 0.5), 0.6, 0.001)
    print_scores(score, (2, 0), title="five pairs")
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "five pairs"
    assert lines[2].split() == ["no", "alignment", "6.00", "1.00", "0.200"]
    assert lines[4].split() == ["stage", "1", "(mip", "0)", "1.50", "0.25", "0.500"]
    assert lines[5].split()[:2] == ["true", "field"]
    assert "0.100 %" in lines[6]


def test_figures_that_are_unknown_become_null(capsys):
    print_json({"epe_none": float("nan"), "epe": (1.23456, float("nan")), "n": 3})
    line = capsys.readouterr().out.strip()
    assert json.loads(line) == {"epe_none": None, "epe": [1.2346, None], "n": 3}
