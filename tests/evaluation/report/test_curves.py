import json
import math

import pytest

from metroem.errors import DatasetError
from metroem.evaluation.report.curves import main_curves, read_curves


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(stage, phase, epoch, seconds, **scores):
    place = {"stage": stage, "phase": phase, "epoch": epoch, "seconds": seconds}
    return place | {"training": scores}


def test_curves_go_by_the_minutes_since_the_stage_began(tmp_path):
    metrics = write(
        tmp_path / "metrics.jsonl",
        line(0, 0, 1, 30, epe_px=3.0, loss=1.0),
        line(0, 1, 0, 60, epe_px=1.5, loss=0.5),
        line(1, 0, 0, 6, epe_px=None, loss=0.25),
    )

    loss, epe, other = read_curves(metrics)

    # Two epochs of half a minute before the first line, then one of a minute.
    assert epe.figure == "EPE, px" and epe.minutes == (1.0, 2.0)
    assert epe.values == {"training": (3.0, 1.5)} and epe.phases == (0, 1)
    assert loss.values == {"training": (1.0, 0.5)}
    assert (other.stage, other.figure, other.minutes) == (1, "loss", (0.1,))
    assert main_curves([loss, epe, other]) == [epe, other]


def test_what_was_not_logged_in_a_phase_is_not_known_there(tmp_path):
    metrics = write(
        tmp_path / "metrics.jsonl",
        line(0, 0, 0, 1, epe_px=3.0, loss=1.0),
        line(0, 1, 0, 1, epe_px=None, loss=0.5),
    )
    loss, epe = read_curves(metrics)
    assert epe.values["training"][0] == 3 and math.isnan(epe.values["training"][1])
    assert main_curves([loss, epe]) == [loss]


@pytest.mark.parametrize("text", ["{", "3", '{"stage": 0}', '{"training": [1]}'])
def test_a_line_that_train_does_not_write_is_named(tmp_path, text):
    path = write(tmp_path / "metrics.jsonl", line(0, 0, 0, 1, loss=1.0))
    path.write_text(path.read_text() + text + "\n")
    with pytest.raises(
        DatasetError, match="metrics.jsonl: line 2 is not a line of train.py"
    ):
        read_curves(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match="no such file; train.py writes it"):
        read_curves(tmp_path / "metrics.jsonl")
