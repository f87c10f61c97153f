"""The aligner: any size, any form of call, the whole field back."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from metroem.aligner import Aligner
from metroem.errors import CheckpointError, PyramidError
from metroem.finetune.adam import FinetuneResult
from metroem.geometry.field import compose, invert, warp
from metroem.models.module_folders import init_pyramid
from metroem.models.options import AlignerOptions
from tests.models.specs import scalenet, write_spec

OPERATORS = ("corrected", "stock")


def make_aligner(folder, *, channels=(4, 6, 8), **params):
    write_spec(folder, scalenet(*channels))
    torch.manual_seed(0)
    return Aligner(folder, **params)


def silence(aligner):
    for down in aligner.net.level_downmodules.values():
        for parameter in down.parameters():
            nn.init.zeros_(parameter)


def texture(rows, cols, *, shift=(0.0, 0.0)):
    """(1, 1, rows, cols): a formula, displaced by (cols, rows) px."""
    row, col = torch.meshgrid(
        torch.arange(float(rows)) + shift[1],
        torch.arange(float(cols)) + shift[0],
        indexing="ij",
    )
    return (torch.sin(row / 3) + torch.cos(col / 4) + 0.3)[None, None]


@pytest.fixture
def aligner(tmp_path):
    return make_aligner(tmp_path, operators="corrected")


@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize(("rows", "cols"), [(33, 50), (7, 9), (16, 64), (3, 5)])
def test_any_size_goes_in_and_comes_out(tmp_path, operators, rows, cols):
    aligner = make_aligner(tmp_path, operators=operators)
    prior = torch.rand(2, 2, rows, cols)

    field, embeddings, *_ = aligner.predict(
        torch.rand(2, 1, rows, cols), torch.rand(2, 1, rows, cols), prior, levels=(0, 2)
    )

    assert field.shape == (2, 2, rows, cols)
    assert embeddings[0].src.shape == (2, 4, rows, cols)
    assert embeddings[2].tgt.shape == (2, 8, -(-rows // 4), -(-cols // 4))


def test_channel_0_of_the_embeddings_is_the_image(aligner):
    src, tgt = texture(21, 30), texture(21, 30, shift=(2, 1))

    embeddings = aligner.predict(src, tgt).embeddings

    assert torch.equal(embeddings[0].src[:, :1], src)
    assert torch.equal(embeddings[0].tgt[:, :1], tgt)


def test_features_of_a_level_that_the_network_lacks_are_refused(aligner):
    image = texture(21, 30)
    with pytest.raises(PyramidError, match="features of level 7.*levels 0, 1, 2:"):
        aligner.predict(image, image, levels=(7,))


@pytest.mark.parametrize("operators", OPERATORS)
def test_both_images_pass_through_the_same_weights(tmp_path, operators):
    aligner = make_aligner(tmp_path, operators=operators)
    image = texture(21, 30)

    embeddings = aligner.predict(image, image).embeddings

    torch.testing.assert_close(embeddings[0].src, embeddings[0].tgt)


def test_a_fresh_scalenet_hardly_moves_equal_images(tmp_path):
    (module,) = init_pyramid(tmp_path / "pyramid", [3], template="scalenet")
    torch.manual_seed(0)
    aligner = Aligner(module / "model", operators="corrected")
    image = texture(64, 96)

    # Weights as torch draws them give a few hundredths of a pixel.
    assert aligner.predict(image, image).field.abs().max() < 0.3


@pytest.mark.parametrize("pass_field", [True, False])
def test_the_field_returned_contains_the_prior(tmp_path, pass_field):
    aligner = make_aligner(tmp_path, operators="corrected", pass_field=pass_field)
    silence(aligner)
    prior = torch.randn(1, 2, 33, 50)

    field = aligner.predict(texture(33, 50), texture(33, 50), prior).field

    torch.testing.assert_close(field, prior)


def test_without_pass_field_src_is_warped_before_and_composed_after(tmp_path):
    aligner = make_aligner(tmp_path, operators="corrected", pass_field=False)
    src, tgt = texture(32, 48), texture(32, 48, shift=(2, 1))
    prior = torch.full((1, 2, 32, 48), 1.5)

    prediction = aligner.predict(src, tgt, prior)

    residual = aligner.predict(warp(src, prior), tgt).field
    torch.testing.assert_close(prediction.field, compose(residual, prior))
    assert torch.equal(prediction.embeddings[0].src[:, :1], src)


def test_a_batch_gives_what_its_samples_give(aligner):
    src, tgt = torch.rand(2, 2, 1, 21, 30)
    prior = torch.rand(2, 2, 21, 30)

    together = aligner.predict(src, tgt, prior).field

    alone = [
        aligner.predict(src[i : i + 1], tgt[i : i + 1], prior[i : i + 1]).field
        for i in range(2)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


def test_every_weight_gets_a_gradient(aligner):
    field = aligner.predict(texture(32, 48), texture(32, 48, shift=(2, 1))).field

    (field**2).mean().backward()

    assert all(p.grad is not None and p.grad.any() for p in aligner.parameters())


def test_the_network_keeps_no_activations(aligner):
    aligner.predict(texture(32, 48), texture(32, 48))

    assert aligner.net.state == {}


def test_a_network_learns_a_shift(tmp_path):
    aligner = make_aligner(tmp_path, operators="corrected")
    src, tgt = texture(48, 64), texture(48, 64, shift=(1.5, -1.0))
    optimizer = torch.optim.Adam(aligner.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        field = aligner.predict(src, tgt).field
        difference = (warp(src, field) - tgt)[..., 6:-6, 6:-6]
        loss = (difference**2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.3 * losses[0]


class TestBlankPairs:
    def test_a_blank_pair_gives_the_prior_back(self, aligner):
        prior = torch.rand(1, 2, 21, 30)
        image, blank = texture(21, 30), torch.zeros(1, 1, 21, 30)

        assert torch.equal(aligner.align(blank, image, prior), prior)
        assert torch.equal(aligner.align(image, blank, prior), prior)

    def test_a_blank_pair_without_prior_gives_zeros(self, aligner):
        blank = torch.zeros(1, 1, 21, 30)

        field, state = aligner(src_img=blank, tgt_img=blank, return_state=True)

        assert field.shape == (1, 2, 21, 30)
        assert not field.any()
        assert state == {}

    def test_only_the_blank_samples_of_a_batch_are_left(self, aligner):
        image = texture(21, 30).expand(2, -1, -1, -1).clone()
        src = image.clone()
        src[1] = 0
        prior = torch.rand(2, 2, 21, 30)

        field = aligner.align(src, image, prior)

        assert torch.equal(field[1], prior[1])
        assert not torch.equal(field[0], prior[0])


class TestBoundary:
    """What corgie and code written for the original rely on."""

    def test_a_torchfields_field_comes_back(self, aligner):
        import torchfields

        field = aligner(src_img=texture(21, 30), tgt_img=texture(21, 30))

        assert isinstance(field, torchfields.Field)
        assert field.x.shape == (1, 1, 21, 30)
        assert field.dtype == torch.float32
        assert not field.requires_grad

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
    @pytest.mark.parametrize("dims", [2, 3, 4])
    def test_images_of_any_form_are_taken(self, aligner, dtype, dims):
        image = (10 * texture(30, 21)[0, 0] + 30).to(dtype)
        image = image.reshape((1,) * (dims - 2) + (30, 21)).transpose(-1, -2)
        assert not image.is_contiguous()

        field = aligner(src_img=image, tgt_img=image)

        assert field.shape == (1, 2, 21, 30)

    def test_layers_that_are_not_known_are_ignored(self, tmp_path):
        aligner = make_aligner(tmp_path, finetune=False)

        aligner(
            src_img=texture(21, 30),
            tgt_img=texture(21, 30),
            src_agg_field=None,
            tgt_agg_field=torch.rand(1, 2, 21, 30),
            src_align_field_stage_0=torch.rand(1, 2, 21, 30),
            src_folds=torch.zeros(1, 1, 21, 30, dtype=torch.bool),
        )

    def test_gradients_flow_only_when_asked_for(self, aligner):
        pair = {"src_img": texture(21, 30), "tgt_img": texture(21, 30)}

        assert not aligner(**pair).requires_grad
        assert aligner(**pair, train=True).requires_grad

    def test_the_state_is_returned_when_asked_for(self, aligner):
        field, state = aligner(
            src_img=texture(16, 24), tgt_img=texture(16, 24), return_state=True
        )

        assert field.shape == (1, 2, 16, 24)
        assert state["up"]["0"]["output"].shape == (1, 8, 16, 24)

    def test_train_and_eval_still_work(self, tmp_path):
        aligner = make_aligner(tmp_path, train=True)

        assert aligner.eval().training is False
        assert aligner.train().training is True

    def test_a_prior_without_batch_axis_is_taken(self, aligner):
        silence(aligner)
        prior = torch.rand(2, 21, 30)

        field = aligner(
            src_img=texture(21, 30), tgt_img=texture(21, 30), src_agg_field=prior
        )

        torch.testing.assert_close(field.as_subclass(torch.Tensor)[0], prior)

    def test_raw_grey_levels_are_normalised_on_request(self, aligner):
        grey = (20 * texture(24, 40) + 50).to(torch.uint8)
        other = (20 * texture(24, 40, shift=(2, 1)) + 50).to(torch.uint8)

        field = aligner(src_img=grey, tgt_img=other, normalize=True)

        brighter = aligner(src_img=2 * grey, tgt_img=other, normalize=True)
        torch.testing.assert_close(field, brighter, atol=1e-4, rtol=0)

    def test_finetuning_is_off_unless_asked_for(self, aligner):
        pair = texture(24, 40), texture(24, 40, shift=(1, 0))

        plain = aligner.predict(*pair).field
        tuned = aligner(*pair, finetune=True, finetune_iter=5)

        as_is = aligner(*pair).as_subclass(torch.Tensor)
        assert torch.equal(as_is, plain)
        assert not torch.equal(tuned.as_subclass(torch.Tensor), plain)

    def test_what_the_finetuner_gained_comes_with_the_field(self, aligner):
        pair = texture(40, 56), texture(40, 56, shift=(1.0, 0.0))
        options = replace(aligner.options, finetune=True, finetune_iter=5)

        field, finetuned = aligner.align_pair(*pair, options=options)

        assert torch.equal(field, aligner.align(*pair, options=options))
        assert (finetuned.loss_after < finetuned.loss_before).all()
        assert finetuned.iterations == 5
        assert aligner.align_pair(*pair).finetuned is None

    def test_finetuned_both_ways_a_swap_inverts_the_field(self, tmp_path):
        aligner = make_aligner(
            tmp_path,
            operators="corrected",
            finetune=True,
            finetune_knots=(16, 8),
            finetune_sm=1.0,
        )
        pair = texture(40, 56), texture(40, 56, shift=(1.0, 0.5))
        prior = torch.full((1, 2, 40, 56), 0.3)

        def cycle(both_ways):
            options = replace(aligner.options, finetune_both_ways=both_ways)
            forward = aligner.align(*pair, prior, options=options)
            backward = aligner.align(*pair[::-1], invert(prior), options=options)
            return compose(forward, backward)[..., 4:-4, 4:-4].norm(dim=1).mean()

        assert cycle(True) < 0.1 * cycle(False)

    def test_the_final_stage_is_ten_times_as_stiff(self, aligner, monkeypatch):
        seen = []

        def spy(src, tgt, field, similarity, smoothness, options):
            seen.append(options.smoothness)
            return type("Tuned", (), {"field": field})

        monkeypatch.setattr("metroem.models.finetuning.finetune_adam", spy)
        pair = texture(24, 40), texture(24, 40)

        aligner(*pair, finetune=True)
        aligner(*pair, finetune=True, final_stage=True)
        aligner(*pair, finetune=True, final_stage=True, finetune_sm=7)

        assert seen == [30, 300, 7]

    def test_the_final_stage_is_no_stiffer_where_there_are_knots(
        self, aligner, monkeypatch
    ):
        seen = []

        def spy(features, field, weights, options, *, level):
            seen.append(options.smoothness)
            return FinetuneResult(field, field.new_zeros(1), field.new_zeros(1), 0)

        monkeypatch.setattr("metroem.models.finetuning.finetune_gauss_newton", spy)
        pair = texture(24, 40), texture(24, 40)

        aligner(*pair, finetune=True, finetune_knots=(16,))
        aligner(*pair, finetune=True, finetune_knots=(16,), final_stage=True)

        assert seen == [30, 30]


class TestEmbeddings:
    def test_features_come_without_the_image(self, aligner):
        features = aligner.get_embeddings(texture(21, 30)[0, 0], level=1)

        assert features.shape == (5, 11, 15)

    def test_zeros_are_kept_on_request(self, aligner):
        image = texture(21, 30)
        image[..., 4:6, 8:10] = 0

        features = aligner.get_embeddings(image, level=1, preserve_zeros=True)

        assert not features[:, 2, 4].any()
        assert features[:, 4, 4].all()


class TestCheckpoints:
    def test_fresh_weights_and_operators_are_said_in_the_log(self, tmp_path, caplog):
        with caplog.at_level(logging.INFO, logger="metroem"):
            make_aligner(tmp_path, checkpoint_name="best")

        assert "stock operators, fresh weights" in caplog.text

    @pytest.mark.parametrize("operators", OPERATORS)
    def test_weights_come_back(self, tmp_path, operators, caplog):
        params = {"operators": operators, "checkpoint_name": "best"}
        saved = make_aligner(tmp_path, **params)
        with torch.no_grad():
            for parameter in saved.parameters():
                parameter.add_(0.01)
        saved.save_checkpoint(checkpoint_folder=str(tmp_path))

        with caplog.at_level(logging.INFO, logger="metroem"):
            loaded = make_aligner(tmp_path, **params)

        assert "weights of best.state.pth.tar" in caplog.text
        for name, values in saved.net.state_dict().items():
            assert torch.equal(loaded.net.state_dict()[name], values)
        weights = torch.load(tmp_path / "best.state.pth.tar", weights_only=True)
        assert weights.keys() == saved.net.state_dict().keys()

    def test_weights_of_another_network_are_refused(self, tmp_path):
        make_aligner(tmp_path, channels=(4, 6)).save_checkpoint(tmp_path)

        with pytest.raises(CheckpointError, match="level_downmodules.2"):
            make_aligner(tmp_path, channels=(4, 6, 8))

    def test_a_spec_without_levels_is_refused(self, tmp_path):
        write_spec(tmp_path, {"type": "identity"})

        with pytest.raises(PyramidError, match="no levels"):
            Aligner(tmp_path)


def test_rings_around_defects_follow_the_options():
    options = AlignerOptions(
        mse_defect_coarsening=((3, 0.5),), sm_defect_coarsening=(), sm_mask_value=0.1
    )

    similarity = {rule.name: rule for rule in options.similarity_rules.src}
    smoothness = {rule.name: rule for rule in options.smoothness_rules.src}
    assert similarity["src_defects"].rings == ((3, 0.5),)
    assert smoothness["src_defects"].rings == ()
    assert smoothness["src_zeros"].mask_value == 0.1
