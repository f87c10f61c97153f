"""Test the prior fields that earlier stages make for warped samples."""

import pytest
import torch

from metroem.data.sample import Sample, seeded_generator
from metroem.errors import CheckpointError
from metroem.geometry.field import upsample_field
from metroem.imaging.normalize import coarsen_image, normalize
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.specs.modules import find_modules
from metroem.training.targets import EarlierStages
from tests.models.specs import scalenet, write_spec

ROWS, COLS = 50, 76
CPU = torch.device("cpu")


@pytest.fixture
def modules(tmp_path):
    """Three stages of random weights: mips 3, 1 and 0."""
    for path in init_pyramid(tmp_path / "pyramid", [3, 1, 0]):
        write_spec(path / "model", scalenet(4, 6))
        torch.manual_seed(path.name.encode()[0])
        save_weights(path, "ck")
    return find_modules(tmp_path / "pyramid")


def save_weights(path, name):
    aligner = load_module(path, checkpoint_name=name).aligner
    aligner.save_checkpoint(path / "model")


def images(*shape):
    return torch.randn(*shape, generator=seeded_generator(*shape))


@pytest.fixture
def sample():
    src, tgt, field = images(2, 1, ROWS, COLS), images(3, 1, ROWS, COLS)[:2], None
    truth = images(2, 2, ROWS, COLS)
    return Sample(src, tgt, field, ("a", "b"), truth=truth)


def test_the_prior_is_what_the_stages_before_make_of_the_pair(modules, sample):
    done = EarlierStages(0, modules[:2], "ck", CPU).add_prior(sample)

    first, second = (
        load_module(module.path, checkpoint_name="ck").aligner for module in modules[:2]
    )
    for i in range(2):
        src, tgt = sample.src[i : i + 1], sample.tgt[i : i + 1]
        with torch.no_grad():
            at_3 = first.predict(
                *(normalize(coarsen_image(image, 3)) for image in (src, tgt))
            ).field
            fine = [normalize(coarsen_image(image, 1)) for image in (src, tgt)]
            prior = upsample_field(at_3, 2)[..., : ROWS // 2, : COLS // 2]
            at_1 = second.predict(*fine, prior).field
        expected = upsample_field(at_1, 1)[..., :ROWS, :COLS]
        torch.testing.assert_close(
            done.prior_field[i : i + 1], expected, atol=1e-4, rtol=0
        )
    assert not done.prior_field.requires_grad
    assert torch.equal(done.src, sample.src) and torch.equal(done.truth, sample.truth)


def test_a_stage_of_the_same_mip_may_come_before(modules, sample):
    done = EarlierStages(1, modules[:2], "ck", CPU).add_prior(sample)
    assert done.prior_field.shape == (2, 2, ROWS, COLS)
    assert done.prior_field.isfinite().all()


def test_samples_that_no_warp_has_changed_keep_their_prior(modules, sample):
    stages = EarlierStages(0, modules[:2], "ck", CPU)
    plain = sample._replace(truth=None)
    assert stages.add_prior(plain) is plain


def test_without_stages_before_there_is_nothing_to_do(modules, sample):
    assert EarlierStages(3, (), "ck", CPU).add_prior(sample) is sample


def test_a_stage_without_weights_makes_no_priors(modules, sample):
    stages = EarlierStages(0, modules[:2], "other", CPU)
    assert stages.aligners == [] and stages.add_prior(sample) is sample


def test_weights_that_do_not_fit_are_refused(modules):
    write_spec(modules[0].path / "model", scalenet(3, 5))
    with pytest.raises(CheckpointError):
        EarlierStages(0, modules[:2], "ck", CPU)
