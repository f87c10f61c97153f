"""Fields that an evaluation keeps, and what another call does with them."""

import json
import os
import re
import signal

import h5py
import numpy as np
import pytest
import torch

from metroem.errors import StorageError
from metroem.evaluation.evaluate import evaluate_dataset
from metroem.evaluation.measure import Measurer
from metroem.evaluation.predictions import predictions_folder
from metroem.evaluation.requests import EvaluateRequest
from metroem.io.h5 import find_image_sets
from metroem.models.weights import checkpoint_path
from metroem.pyramid import Pyramid
from metroem.training.checkpoint import RunFolder, TrainingState, save_state
from metroem.training.config import IMAGES, PAIRS
from tests.evaluation.report.pages import blocks
from tests.models.specs import pyramid_with_weights
from tests.pairs import write_pairs

SHAPE = (96, 160)


@pytest.fixture
def place(tmp_path):
    """A pyramid of two stages, and three pairs at both mips."""
    write_pairs(tmp_path / "data", mips=(1, 0), num_pairs=3, shape=SHAPE)
    pyramid_with_weights(tmp_path / "pyramid", [1, 0])
    return tmp_path


@pytest.fixture
def runs(monkeypatch):
    """Count how often the networks run."""
    counted = []
    for name in ("run", "run_both_ways"):
        whole = getattr(Pyramid, name)
        monkeypatch.setattr(
            Pyramid, name, lambda *a, whole=whole: counted.append(1) or whole(*a)
        )
    return counted


def request(place, **more):
    flags = {"no_finetune": True, "workers": 1, "json": place / "figures.json"}
    return EvaluateRequest(place / "pyramid", place / "data", **flags | more)


def figures(place, **more):
    """Evaluate, and return what the JSON has."""
    asked = request(place, **more)
    evaluate_dataset(asked)
    return json.loads(asked.json.read_text())


def test_another_call_runs_no_network_and_gives_the_same_figures(place, runs):
    first = figures(place, known_warps=True)
    # Each section is aligned twice: warped, and with itself.
    assert len(runs) == 3 + 2 * 3
    again = figures(place, known_warps=True, report=place / "report.html")
    assert len(runs) == 9
    assert again["sets"] == first["sets"]
    assert blocks(place / "report.html")["summary"]["pairs"]
    # Two fields of each stage less one, float32: stage 0 has half the rows and cols.
    (file, *_) = predictions_folder(request(place)).glob("*_pair0_*.npy")
    rows, cols = SHAPE
    assert np.load(file).shape == (2 * (rows * cols // 4 + 2 * rows * cols),)


def test_other_weights_run_the_networks_again_and_it_is_said(place, runs, caplog):
    caplog.set_level("INFO")
    figures(place)
    for path in (place / "pyramid").glob("1_*/model"):
        weights = torch.load(checkpoint_path(path, "checkpoint"), weights_only=True)
        torch.save(
            {key: value + 0.01 for key, value in weights.items()},
            checkpoint_path(path, "checkpoint"),
        )
    figures(place)
    assert len(runs) == 6
    assert re.search(r"made in another way \(weights of stage 1 ", caplog.text)


def test_a_pair_with_other_images_is_aligned_again_and_the_others_are_not(
    place, runs, caplog
):
    caplog.set_level("INFO")
    before = figures(place)
    write_pairs(place / "new", mips=(0,), num_pairs=3, shape=SHAPE)
    new = place / "new" / "x0_y0_z1_MIP0.h5"
    with h5py.File(new, "r+") as file:
        file["checksum"][1] += 1  # as if its images were others
    new.replace(place / "data" / new.name)
    after = figures(place)
    assert len(runs) == 4
    assert "the images of 1 pairs have changed" in caplog.text
    assert after["sets"] == before["sets"]
    assert len(list(predictions_folder(request(place)).glob("*.npy"))) == 3


def test_a_file_that_is_not_whole_is_made_again(place, runs):
    before = figures(place)
    (file, *_) = sorted(predictions_folder(request(place)).glob("*.npy"))
    file.write_bytes(file.read_bytes()[:-8])
    assert figures(place)["sets"] == before["sets"]
    assert len(runs) == 4


def test_networks_alone_and_finetuned_are_kept_apart(place, runs):
    alone = figures(place)
    assert figures(place, no_finetune=False)["sets"] != alone["sets"]
    assert len(runs) == 6
    assert figures(place)["sets"] == alone["sets"]
    assert len(runs) == 6


def test_fields_are_kept_where_the_flag_says(place):
    figures(place, predictions=place / "kept")
    assert not (place / "pyramid" / ".evaluate").exists()
    assert len(list((place / "kept" / "networks").glob("*.npy"))) == 3


def refuse(*_):
    raise StorageError("pyramid: Read-only file system")


def test_a_pyramid_that_cannot_be_written_is_evaluated(place, monkeypatch, caplog):
    monkeypatch.setattr("metroem.evaluation.predictions.try_writing", refuse)
    assert len(figures(place)["sets"][0]["pairs"]) == 3
    assert "fields are kept only until the end" in caplog.text
    assert not (place / "pyramid" / ".evaluate").exists()
    with pytest.raises(StorageError, match="Read-only"):
        figures(place, predictions=place / "kept")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_run_that_is_stopped_writes_its_files_and_goes_on(
    place, runs, monkeypatch, caplog, number, code
):
    caplog.set_level("INFO")
    whole = figures(place, predictions=place / "undisturbed")
    runs.clear()
    run = Measurer.run

    def run_and_stop(measurer, task):
        if task.index == 1:
            os.kill(os.getpid(), number)
        return run(measurer, task)

    monkeypatch.setattr(Measurer, "run", run_and_stop)
    page = place / "report.html"
    with pytest.raises(SystemExit) as stopped:
        figures(place, report=page)
    assert stopped.value.code == code
    assert "stopped: 2 of 3 pairs; the same command resumes" in caplog.text
    part = json.loads((place / "figures.json").read_text())
    assert part["coverage"] == {
        **{"done": 2, "asked": 3, "in_data_set": 3, "was_stopped": True}
    }
    (found,) = part["sets"]
    assert found["pairs"] == whole["sets"][0]["pairs"][:2]
    data = blocks(page)
    assert list(data) == ["pair-0", "pair-1", "summary"]
    assert data["summary"]["about"]["coverage"]["was_stopped"]

    monkeypatch.setattr(Measurer, "run", run)
    assert figures(place, report=page) == whole | {"report": str(page)}
    assert len(runs) == 3
    assert len(blocks(page)) == 4


def test_a_run_that_is_stopped_before_its_first_pair_keeps_the_old_files(
    place, monkeypatch
):
    (place / "figures.json").write_text("old")

    def stop_at_once(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("metroem.evaluation.evaluate._log_plan", stop_at_once)
    with pytest.raises(SystemExit) as stopped:
        evaluate_dataset(request(place, report=place / "report.html"))
    assert stopped.value.code == 130
    assert (place / "figures.json").read_text() == "old"
    assert not (place / "report.html").exists()


def test_two_processes_give_the_same_bytes_as_one(place):
    pages = {}
    for workers in (1, 2):
        name = f"{workers}.html"
        figures(
            place,
            workers=workers,
            known_warps=True,
            json=place / f"{workers}.json",
            report=place / name,
            predictions=place / f"kept{workers}",
        )
        pages[workers] = blocks(place / name)
        for data in pages[workers].values():
            data.get("about", {}).pop("made", None)
            for key in ("json", "report"):
                data.get("about", {}).pop(key, None)
    assert pages[1] == pages[2]
    one, two = (
        {p.name: p.read_bytes() for p in (place / f"kept{n}" / "networks").glob("*")}
        for n in (1, 2)
    )
    assert one == two and len(one) == 7  # with request.json


def test_the_first_stage_alone_is_measured_at_its_own_mip(place):
    for path in (place / "pyramid").glob("1_*/model/*.tar"):
        path.unlink()  # a stage that is not run needs no weights
    write_pairs(place / "wide", mips=(1,), num_pairs=1, shape=(2 * 96, 2 * 160))
    asked = EvaluateRequest(
        *(place / "pyramid", place / "wide"),
        **{"stages": [0], "no_finetune": True, "workers": 1},
        json=place / "f.json",
        report=place / "r.html",
    )
    evaluate_dataset(asked)
    (found,) = json.loads((place / "f.json").read_text())["sets"]
    assert (found["mip"], found["rows"], found["cols"]) == (1, 96, 160)
    about = blocks(place / "r.html")["summary"]["about"]
    assert about["stages"] == ["stage 0 (mip 1)"]


def test_some_of_the_pairs_are_evaluated_and_counted(place, caplog):
    caplog.set_level("INFO")
    found = figures(place, max_pairs=1)
    # The middle of three.
    assert [pair["where"]["pair"] for pair in found["sets"][0]["pairs"]] == [1]
    assert found["coverage"]["asked"] == 1 and found["coverage"]["in_data_set"] == 3
    assert "1 of 3 pairs of 1 image sets; stages 0 (mip 1), 1 (mip 0)" in caplog.text


def mark_as_trained(place, num_pairs):
    """Write the state of a training of stage 1 on the first pairs; it held out none."""
    images = next(s for s in find_image_sets(place / "data") if s.mip == 0)
    run = RunFolder.of(place / "pyramid", "checkpoint")
    run.make()
    identities = [images.identity(index) for index in range(num_pairs)]
    fingerprint = {PAIRS: ["a"] * num_pairs, IMAGES: identities}
    save_state(run.state(1), TrainingState(fingerprint))


def test_pairs_that_were_trained_on_have_means_of_their_own(place, caplog, capsys):
    mark_as_trained(place, 2)
    (found,) = figures(place)["sets"]
    roles = [pair["role"] for pair in found["pairs"]]
    assert roles == ["trained on", "trained on", "not trained on"]
    groups, cpc = found["groups"], [pair["score"]["cpc"] for pair in found["pairs"]]
    assert groups["trained on"]["num_pairs"] == 2
    assert groups["trained on"]["mean"]["cpc"] == pytest.approx(sum(cpc[:2]) / 2, 1e-5)
    assert groups["not trained on"]["mean"]["cpc"] == pytest.approx(cpc[2], 1e-5)
    assert "2 of 3 pairs were trained on: their figures flatter" in caplog.text
    assert "CPC, 2 trained on" in capsys.readouterr().out


def test_a_data_set_that_was_trained_on_entirely_is_named(place, caplog):
    mark_as_trained(place, 3)
    (found,) = figures(place)["sets"]
    assert found["groups"] == {}
    assert "these pairs were trained on: figures flatter" in caplog.text
