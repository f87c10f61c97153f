"""A published module directory gives the numbers that it always gave."""

import pytest
import torch

from metroem.models.load import load_module
from tests.compatibility.original import arrays, text
from tests.models.test_load import OLD_CREATE

# What float32 leaves of sums in another order, px.
SAME_PX = 1e-4


@pytest.fixture(scope="module")
def numbers():
    return arrays("aligner")


@pytest.fixture(scope="module")
def path(tmp_path_factory, numbers):
    path = tmp_path_factory.mktemp("old") / "0_mip8in_old"
    (path / "model").mkdir(parents=True)
    (path / "create.py").write_text(OLD_CREATE)
    spec = text("aligner", "spec")
    (path / "model" / "model_spec.json").write_text(spec)
    weights = {
        key.removeprefix("weights/"): value
        for key, value in numbers.items()
        if key.startswith("weights/")
    }
    torch.save(weights, path / "model" / "ck.state.pth.tar")
    return path


@pytest.mark.parametrize(
    ("pass_field", "prior", "expected"),
    [
        (True, None, "field_no_prior"),
        (True, "prior", "field_prior"),
        (False, None, "field_no_prior"),
        (False, "prior", "field_warped_src"),
    ],
)
def test_it_gives_the_field_that_it_always_gave(
    path, numbers, pass_field, prior, expected
):
    module = load_module(
        path, checkpoint_name="ck", pass_field=pass_field, finetune=False
    )

    field = module(
        src_img=numbers["src"],
        tgt_img=numbers["tgt"],
        src_agg_field=None if prior is None else numbers[prior],
    )

    expected = numbers[expected]
    assert expected.abs().mean() > 0.5  # px, so that there is what to compare
    torch.testing.assert_close(
        field.as_subclass(torch.Tensor), expected, atol=SAME_PX, rtol=0
    )


def test_a_prior_is_not_counted_twice(path, numbers):
    # With pass_field=False the original warps src by the prior, hands the prior to the
    # network as well, and composes.
    module = load_module(path, checkpoint_name="ck", pass_field=False, finetune=False)
    pair = {"src_img": numbers["src"], "tgt_img": numbers["tgt"]}

    field = module(**pair, src_agg_field=numbers["prior"]).as_subclass(torch.Tensor)

    residual = field - numbers["prior"]
    theirs = numbers["field_prior_twice"] - numbers["prior"]
    assert residual.abs().mean() < 0.5 * theirs.abs().mean()


def test_it_returns_the_state_that_it_always_gave(path, numbers):
    module = load_module(path, checkpoint_name="ck", finetune=False)

    _, state = module(src_img=numbers["src"], tgt_img=numbers["tgt"], return_state=True)

    torch.testing.assert_close(state["up"]["1"]["output"], numbers["state_up_1"])


def test_it_gives_the_embeddings_that_it_always_gave(path, numbers):
    aligner = load_module(path, checkpoint_name="ck").aligner

    embeddings = aligner.get_embeddings(numbers["src"], preserve_zeros=True)

    torch.testing.assert_close(embeddings, numbers["embeddings_0"])
    assert not embeddings[:, numbers["src"][0, 0] == 0].any()
