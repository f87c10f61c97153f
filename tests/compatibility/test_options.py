"""Every option that the original's Aligner takes is heeded, or refused by its name."""

import logging
from dataclasses import replace

import pytest
import torch

from metroem.aligner import Aligner
from metroem.errors import UsageError
from metroem.geometry.field import warp
from metroem.geometry.rigidity import rigidity_map
from metroem.imaging.loss_weights import pair_weights
from metroem.models.finetuning import find_pair_masks
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.models.options import AlignerOptions
from tests.models.specs import scalenet, write_spec
from tests.models.test_load import OLD_CREATE, write_module

ROWS, COLS = 24, 40


def pair():
    rows, cols = torch.meshgrid(
        torch.arange(float(ROWS)), torch.arange(float(COLS)), indexing="ij"
    )
    src, tgt = (
        torch.sin(rows / 3) + torch.cos((cols + shift) / 4) + 0.3 for shift in (0, 1)
    )
    return {"src_img": src, "tgt_img": tgt}


def make_aligner(folder, **params):
    write_spec(folder, scalenet(4, 6))
    torch.manual_seed(0)
    return Aligner(folder, **params)


def plain(field):
    return field.as_subclass(torch.Tensor)


def misfit(field):
    images = [image[None, None] for image in pair().values()]
    return (warp(images[0], plain(field)) - images[1])[..., 4:-4, 4:-4].square().mean()


def strain(field):
    return rigidity_map(plain(field)).mean()


def rule(name, strategy="eq", **more):
    return {"name": name, "binarization": {"strat": strategy, "value": 0}, **more}


def test_a_module_of_the_original_is_finetuned_unless_it_says_otherwise(
    tmp_path, caplog
):
    # As by metroem 0.1.2 and 0.1.3.
    path = write_module(tmp_path / "0_mip8in_old", OLD_CREATE)
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, "metroem"):
        module = load_module(path, finetune_iter=30, finetune_sm=1.0)
    assert "finetuned, as by the original" in caplog.text

    field = module(**pair())

    assert torch.equal(field, module(**pair(), finetune=True))
    assert not torch.equal(field, module(**pair(), finetune=False))
    caplog.clear()
    assert not load_module(path, finetune=False).aligner.options.finetune
    assert "as by the original" not in caplog.text


def test_a_module_of_ours_is_finetuned_when_asked(tmp_path):
    (path,) = init_pyramid(tmp_path / "pyramid", [1])

    assert not load_module(path).aligner.options.finetune
    assert load_module(path, finetune=True).aligner.options.finetune


@pytest.mark.parametrize("operators", ["stock", "corrected"])
def test_an_option_that_is_not_known_is_refused_by_its_name(tmp_path, operators):
    says = f"^{tmp_path}: finetune_itr: not an option of an aligner.*finetune_iter"
    with pytest.raises(UsageError, match=says):
        make_aligner(tmp_path, operators=operators, finetune_itr=5)


def test_the_module_that_hands_over_such_an_option_is_named(tmp_path):
    path = write_module(tmp_path / "0_mip8in_old", OLD_CREATE)
    with pytest.raises(UsageError, match=f"^{path}/model: gpu: not an option"):
        load_module(path, gpu=0)


@pytest.mark.parametrize("name", ["finetune_knots", "none"])
def test_mask_rules_say_where_the_finetuner_compares_and_is_stiff(name):
    options = AlignerOptions(
        finetune_knots=(16,) if name == "finetune_knots" else (),
        mse_keys_to_apply={
            "src": [rule("src_zeros", coarsen_ranges=[(2, 0.25)])],
            "tgt": [rule("tgt", "neq", fm=0, mask_value=0.5)],
        },
        sm_keys_to_apply={"tgt": [rule("tgt_defects", mask_value=0.125)]},
    )
    src, tgt = (torch.ones(1, 1, ROWS, COLS) for _ in range(2))
    src[..., :5] = 0
    tgt[..., 30:] = 0
    defects = torch.zeros(2, 1, 1, ROWS, COLS, dtype=torch.bool)
    defects[1, ..., 10:14] = True
    maps = find_pair_masks(src, tgt, (defects[0], defects[1]), options)

    similarity = pair_weights(options.similarity_rules, maps)
    smoothness = pair_weights(options.smoothness_rules, maps)

    expected = torch.ones(COLS)
    expected[:5], expected[5:7] = 0, 0.25
    assert torch.equal(similarity.src[0, 0], expected.expand(ROWS, COLS))
    expected = torch.ones(COLS)
    expected[30:] = 0.5
    assert torch.equal(similarity.tgt[0, 0], expected.expand(ROWS, COLS))
    assert (smoothness.src == 1).all()
    expected = torch.ones(COLS)
    expected[10:14] = 0.125
    assert torch.equal(smoothness.tgt[0, 0], expected.expand(ROWS, COLS))


@pytest.mark.parametrize(
    ("key", "nowhere", "grows"),
    [
        ("mse_keys_to_apply", {"src": [rule("src_zeros", "gt")]}, misfit),
        ("sm_keys_to_apply", {"tgt": [rule("tgt_zeros", "gt")]}, strain),
    ],
)
def test_mask_rules_of_a_module_change_its_finetuned_field(
    tmp_path, key, nowhere, grows
):
    # Where nothing is compared src fits no better, where nothing is stiff it is bent.
    usual, changed = (
        grows(make_aligner(tmp_path, finetune_iter=20, **more)(**pair()))
        for more in ({}, {key: nowhere})
    )
    assert changed > 2 * usual


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"skip_initial_prediction": True}, "skip_initial_prediction is not supported"),
        (
            {"mse_keys_to_apply": {}, "mse_defect_coarsening": [[3, 0.0]]},
            r"mse_keys_to_apply and mse_defect_coarsening \(\[\[3, 0.0\]\]\)",
        ),
        (
            {"sm_keys_to_apply": {}, "sm_mask_value": 0.5},
            r"sm_keys_to_apply and sm_mask_value \(0.5\)",
        ),
        (
            {"sm_keys_to_apply": {"src_tgt_comb": {}}},
            r"sm_keys_to_apply: unknown key \['src_tgt_comb'\]",
        ),
        (
            {"mse_keys_to_apply": {"src": [rule("src", "gt")]}},
            "mse_keys_to_apply: a rule of 'src' that compares",
        ),
        ({"mse_keys_to_apply": {"src": [rule("folds")]}}, "mask of 'folds'"),
        ({"sm_keys_to_apply": [1]}, "sm_keys_to_apply: expected an object"),
    ],
)
def test_what_cannot_be_heeded_is_refused_by_name(tmp_path, options, says):
    with pytest.raises(UsageError, match=says):
        make_aligner(tmp_path, **options)


def test_what_the_original_has_by_default_may_be_said():
    said = AlignerOptions(
        mse_keys_to_apply={"src": [rule("src_zeros")]},
        mse_defect_coarsening=[(1, 0)],  # type: ignore[arg-type]
        sm_keys_to_apply=None,
        sm_mask_value=0.5,
        skip_initial_prediction=False,
    )

    assert not said.smoothness_rules.tgt[0].mask_value
    assert replace(said, sm_mask_value=1e-5).smoothness_rules.src[0].mask_value == 1e-5
