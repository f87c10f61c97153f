"""train.py --budget_minutes: a whole pyramid within a given time, as a user calls it.

The clock is a fake: only updates of the weights and fields take time, and as much as a
test says.
"""

import json
import math
import time

import pytest
import torch

import train
from metroem.errors import MetroEMError, UsageError
from metroem.io.h5 import FieldSet
from metroem.models.module_folders import init_pyramid
from metroem.training import stage as training
from metroem.training import write_fields as writing
from metroem.training.requests import TrainRequest
from tests.models.specs import scalenet, write_spec
from tests.pairs import write_pairs
from tests.test_train import arguments, digest, twin_of

LR = 1e-3
PHASE = {"lr": LR, "smoothness": 5, "crop_size": 40, "lr_schedule": "cosine"}
UPDATES = {0: 20 * 3, 1: 30 * 3}  # of the schedule: 3 pairs are trained on


@pytest.fixture
def run(tmp_path):
    """A pyramid of two small modules, 6 pairs at both mips, and a schedule of each."""
    write_pairs(tmp_path / "data", mips=(2, 1), num_pairs=6, shape=(96, 112))
    for module in init_pyramid(tmp_path / "pyramid", [2, 1], "scalenet"):
        write_spec(module / "model", scalenet(4, 6))
    phases = {
        "2": [{**PHASE, "num_epochs": 20, "print_every": 5}],
        "1": [{**PHASE, "num_epochs": n, "print_every": 5} for n in (10, 20)],
    }
    (tmp_path / "schedule.json").write_text(json.dumps(phases))
    return tmp_path


class FakeTime:
    """A clock that only updates and fields move on, and a list of the updates.

    Attributes:
        now: seconds.
        step_s: seconds of an update of each stage; a test may change it.
        field_s: seconds of a field of stage 1, whose images have four times the pixels
            of stage 0's.
        untrained: a field takes so many times as long before stage 1 has weights.
        slow_after: time after which everything takes `slowdown` times as long.
        updates: (stage, learning rate) of each update.
    """

    def __init__(self, monkeypatch):
        self.now, self.step_s, self.field_s = 1000.0, {0: 1.0, 1: 2.0}, 1.5
        self.slow_after, self.slowdown, self.untrained = math.inf, 1.0, 1.0
        self.updates = []
        step, field = training.train_step, writing._field_of

        def timed_step(model, optimizer, *args, **options):
            number = options["loss_seed"][1]
            self.updates.append((number, optimizer.param_groups[0]["lr"]))
            self._pass(self.step_s[number])
            return step(model, optimizer, *args, **options)

        def timed_field(aligner, sources, sample, index):
            trained = any(stage == 1 for stage, _ in self.updates)
            longer = 1.0 if trained else self.untrained
            self._pass(longer * self.field_s * sample.src.numel() / (48 * 56))
            return field(aligner, sources, sample, index)

        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(training, "train_step", timed_step)
        monkeypatch.setattr(writing, "_field_of", timed_field)

    def _pass(self, seconds):
        self.now += seconds * (self.slowdown if self.now > self.slow_after else 1)

    def rates(self, number):
        """Learning rates of a stage's updates, as fractions of its highest."""
        return [lr / LR for stage, lr in self.updates if stage == number]


@pytest.fixture
def clock(monkeypatch):
    return FakeTime(monkeypatch)


def check_pyramid(run):
    """Both stages have weights, and fields of all 6 pairs."""
    weights = sorted(p.parts[-3] for p in run.glob("pyramid/*/model/ck.state.pth.tar"))
    assert weights == ["0_mip2in_scalenet", "1_mip1in_scalenet"]
    for number in (0, 1):
        fields = FieldSet(run / f"data/field_{number}_x0_y0_z1_MIP1_ck.h5")
        assert fields.num_pairs == 6 and fields.shape == (48, 56)
    assert not (run / "pyramid/.train/ck/budget.json").exists()


@pytest.mark.parametrize("slowdown", [1.0, 2.0])
def test_a_whole_pyramid_is_made_in_the_time_given(run, clock, caplog, slowdown):
    # The schedule takes 60 x 1 + 90 x 2 s, and 8 fields of each stage 3 + 12 s: 255 s.
    caplog.set_level("INFO", "metroem")
    began = clock.now
    clock.slow_after, clock.slowdown = began + 60, slowdown
    train.main(arguments(run, "--budget_minutes", "3.5"))
    check_pyramid(run)
    # A slowdown of the last fields is not foreseen whole.
    assert 0.85 * 210 < clock.now - began <= 210 * (1 if slowdown == 1 else 1.02)
    for number in (0, 1):
        rates = clock.rates(number)
        assert 20 <= len(rates) < UPDATES[number]
        assert rates[0] == pytest.approx(1)
        assert rates[-1] < 0.05  # the cosine came to its end
    # The second phase of stage 1 begins at its highest rate too.
    assert sum(rate > 0.999 for rate in clock.rates(1)) == 2
    assert "left, from 20 updates measured" in caplog.text
    assert "stage 1 gets about" in caplog.text
    # A training without a budget asks for more than the pyramid got.
    made = len(clock.rates(0))
    caplog.clear()
    train.main(arguments(run))
    (warning,) = (r for r in caplog.records if "stage 0: already" in r.message)
    assert warning.levelname == "WARNING"
    assert f"{made} of the schedule's 60 updates" in warning.message


def test_fields_are_timed_again_with_weights_of_the_first_phase(run, clock):
    # Else 6 fields of stage 1 would count as 54 s, and 45 s of the budget be left.
    clock.untrained = 6.0
    began = clock.now
    train.main(arguments(run, "--budget_minutes", "3.5"))
    check_pyramid(run)
    assert 0.85 * 210 < clock.now - began <= 210


def test_a_resumed_run_has_the_rest_of_its_budget(run, clock, caplog):
    caplog.set_level("INFO", "metroem")
    began = clock.now
    train.main(arguments(run, "--budget_minutes", "3.5", "--max_minutes", "0.4"))
    used = clock.now - began
    record = json.loads((run / "pyramid/.train/ck/budget.json").read_text())
    assert record["used_s"] == pytest.approx(used) and 24 <= used < 27
    before = len(clock.updates)
    clock.now += 5000  # the time between the two commands does not count
    resumed = clock.now
    train.main(arguments(run, "--budget_minutes", "3.5"))
    check_pyramid(run)
    assert 0.85 * (210 - used) < clock.now - resumed <= 210 - used
    rates = clock.rates(0)
    assert rates[before] < rates[before - 1] and rates[-1] < 0.05
    assert "resumes at phase 1, epoch" in caplog.text


def test_a_budget_used_up_while_a_run_was_stopped_still_ends_in_a_pyramid(
    run, clock, caplog
):
    train.main(arguments(run, "--budget_minutes", "3.5", "--max_minutes", "0.4"))
    record = run / "pyramid/.train/ck/budget.json"
    record.write_text(json.dumps({"used_s": 500.0, "stages": [0, 1]}))
    before = len(clock.updates)
    train.main(arguments(run, "--budget_minutes", "3.5"))
    check_pyramid(run)
    # The least: 20 of 60, and 20 of 90.
    assert len(clock.rates(0)) - before <= 20 and len(clock.rates(1)) in (20, 21, 22)
    assert "--budget_minutes 3.5: the run took" in caplog.text


def test_a_budget_that_is_too_small_is_refused_with_the_least_that_would_do(run, clock):
    # 20 updates of stage 0 take 20 s, 8 fields of each stage 15 s. Stage 1 is known by
    # (3 + 1/4) x 40 x 40 px to 3 x 24 x 28 px, so 2.6 s an update. In all 87 s.
    with pytest.raises(UsageError, match=r"--budget_minutes 0\.7: .* at least about 2"):
        train.main(arguments(run, "--budget_minutes", "0.7"))
    assert len(clock.updates) == 6  # the first one is not measured
    train.main(arguments(run, "--budget_minutes", "2"))
    check_pyramid(run)


def test_a_budget_larger_than_the_schedule_changes_nothing(run, clock, caplog):
    caplog.set_level("INFO", "metroem")
    twin = twin_of(run)
    train.main(arguments(run, "--budget_minutes", "30"))
    assert "--budget_minutes 30: is more than the schedule needs" in caplog.text
    assert [len(clock.rates(n)) for n in (0, 1)] == [60, 90]
    train.main(arguments(twin))
    assert digest(run) == digest(twin)


def test_the_stages_to_train_share_the_budget(run, clock):
    zero = ("--train_stages", "0", "--generate_field_stages", "0")
    began = clock.now
    train.main(arguments(run, *zero, "--budget_minutes", "1"))
    assert 0.85 * 60 < clock.now - began <= 60
    assert {number for number, _ in clock.updates} == {0}


def test_a_run_without_a_budget_says_what_it_does_and_how_long_it_takes(
    run, clock, caplog
):
    caplog.set_level("INFO", "metroem")
    train.main(arguments(run))
    plan = "plan: stage 1 mip 1: train 2 phases, 10 + 20 epochs, 30 + 60 updates"
    assert f"{plan}; write 6 fields" in caplog.text
    assert "left, from 20 updates measured" in caplog.text
    # 30 updates are left, 2 s each, and 6 fields. They are known by those of stage 0,
    # of a quarter of the pixels: 1.5 s each.
    (line,) = (line for line in caplog.messages if "phase 2/2 epoch 10/20" in line)
    assert line.endswith("; about 69 s left")


def test_a_state_of_an_earlier_version_is_resumed(run, clock):
    twin = twin_of(run)
    train.main(arguments(run, "--max_minutes", "0.5"))
    path = run / "pyramid/.train/ck/stage_0.state.pt"
    state = torch.load(path, weights_only=True)
    assert state.pop("updates") == len(clock.updates)
    assert state.pop("position") == 3 * state["epoch"] + state["step"] > 0
    torch.save(state, path)
    train.main(arguments(run))
    train.main(arguments(twin))
    assert digest(run) == digest(twin)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_minutes": 0.0}, "--budget_minutes 0.0: expected more than 0"),
        ({"budget_minutes": math.inf}, "--budget_minutes inf"),
        ({"budget_minutes": 5.0, "train_stages": []}, "no training to shorten"),
    ],
)
def test_a_budget_without_meaning_is_refused(tmp_path, options, message):
    with pytest.raises(MetroEMError, match=message):
        TrainRequest(tmp_path, tmp_path, **options)
