"""Which pairs are evaluated, and which of them were trained on."""

import pytest

from metroem.data.dataset import find_pairs, split_pairs
from metroem.errors import PyramidError
from metroem.evaluation.plan import (
    HELD_OUT,
    NOT_USED,
    TRAINED_ON,
    Location,
    find_locations,
    find_roles,
    list_tasks,
    select_pairs,
)
from metroem.evaluation.requests import EvaluateRequest
from metroem.specs.modules import find_modules, select_stages
from metroem.training.checkpoint import RunFolder, TrainingState, save_state
from metroem.training.config import IMAGES, PAIRS
from tests.models.specs import pyramid_with_weights
from tests.pairs import write_pairs

SHAPE = (192, 320)


def locations(*counts):
    """Locations without images, whose pairs have the indices 10, 11, ..."""
    return [Location((), tuple(range(10, 10 + count))) for count in counts]


def chosen(counts, max_pairs):
    return [found.indices for found in select_pairs(locations(*counts), max_pairs)]


def test_pairs_are_the_middles_of_equal_parts_of_a_set():
    assert chosen([12], 3) == [(12, 16, 20)]
    assert chosen([5], 1) == [(12,)]


def test_sets_get_the_same_number_of_pairs_as_far_as_they_have_them():
    assert [len(pairs) for pairs in chosen([2, 40, 40], 12)] == [2, 5, 5]
    assert chosen([1, 3], 9) == [(10,), (10, 11, 12)]


def test_fewer_pairs_than_sets_are_taken_from_sets_at_even_distances():
    # The middles of the halves of four sets: the second and the fourth.
    assert chosen([1, 3, 1, 5], 2) == [(11,), (12,)]


def test_pairs_come_before_the_warped_sections_of_their_location():
    roles = [{10: "a", 11: "b"}, {10: "c"}]
    tasks = list_tasks(locations(2, 1), roles, known_warps=True)
    assert [(t.location, t.index, t.is_known, t.role) for t in tasks] == [
        *((0, 10, False, "a"), (0, 11, False, "b")),
        *((0, 10, True, "a"), (0, 11, True, "b")),
        *((1, 10, False, "c"), (1, 10, True, "c")),
    ]


@pytest.fixture
def trained(tmp_path):
    """Five pairs, of which a training held out the last; the one before is unused."""
    write_pairs(tmp_path / "data", mips=(1, 0), num_pairs=5, shape=SHAPE)
    pyramid_with_weights(tmp_path / "pyramid", [1, 0])
    pairs = find_pairs(tmp_path / "data", 1, stage=0, checkpoint_name="checkpoint")
    split = split_pairs(pairs, 1)
    refs = [*split.training, *split.validation]
    run = RunFolder.of(tmp_path / "pyramid", "checkpoint")
    run.make()
    fingerprint = {
        PAIRS: [ref.name for ref in split.training],
        IMAGES: [ref.images.identity(ref.index) for ref in refs],
    }
    save_state(run.state(0), TrainingState(fingerprint))
    return tmp_path


def roles_of(folder, stages=None):
    request = EvaluateRequest(folder / "pyramid", folder / "data", stages=stages)
    modules = select_stages(find_modules(request.pyramid_path), stages, "--stages")
    return find_roles(request, modules, find_locations(request, modules))


def test_pairs_that_were_trained_on_are_told_from_those_held_out(trained):
    # Pair i is z i + 1 on i. Those within one section of z 4 and 5 are not used.
    (roles,) = roles_of(trained, [0])
    assert roles == {
        **{0: TRAINED_ON, 1: TRAINED_ON},
        **{2: NOT_USED, 3: NOT_USED, 4: HELD_OUT},
    }


def test_pairs_are_recognised_under_another_name_and_other_images_are_not(trained):
    file = trained / "data" / "x0_y0_z1_MIP1.h5"
    file.rename(file.with_name("x0_y0_z1_MIP1_other.h5"))
    assert roles_of(trained, [0])[0][0] == TRAINED_ON
    file.with_name("x0_y0_z1_MIP1_other.h5").unlink()
    write_pairs(trained / "data", mips=(1,), num_pairs=6, shape=(176, 320))
    assert set(roles_of(trained, [0])[0].values()) == {NOT_USED}


def test_a_stage_without_a_state_is_named(trained, caplog):
    (roles,) = roles_of(trained)
    assert roles[0] == TRAINED_ON
    assert "has no state of stages [1]" in caplog.text


def test_without_a_state_nothing_is_said_of_the_pairs(trained):
    RunFolder.of(trained / "pyramid", "checkpoint").state(0).unlink()
    assert set(roles_of(trained)[0].values()) == {""}


def test_a_state_that_cannot_be_read_is_named_and_ends_nothing(trained, caplog):
    RunFolder.of(trained / "pyramid", "checkpoint").state(0).write_bytes(b"?")
    assert set(roles_of(trained, [0])[0].values()) == {""}
    assert "pairs that were trained on are not recognised" in caplog.text


def test_a_stage_that_the_pyramid_lacks_is_refused(trained):
    with pytest.raises(PyramidError, match="--stages: the pyramid has no stage"):
        roles_of(trained, [0, 1, 2])
