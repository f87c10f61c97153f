"""How a module is applied: what its callers may set, by the original's names."""

from dataclasses import dataclass, fields, replace
from typing import Any

from msgspec import structs

from metroem.errors import UsageError
from metroem.finetune.analytic_loss import AdamOptions
from metroem.finetune.gauss_newton import GaussNewtonOptions
from metroem.finetuner import mask_rules
from metroem.imaging.mask_rules import (
    SIMILARITY_RULES,
    SMOOTHNESS_RULES,
    MaskRule,
    MaskRules,
)
from metroem.models.tiling import Tiling


@dataclass(frozen=True)
class AlignerOptions:
    """How a module works; the names are those of the original.

    Attributes:
        finetune: improve each field on the embeddings of its pair.
        finetune_iter: at most so many steps.
        finetune_lr: rate of the first steps, px.
        finetune_sm: smoothness of the finetuned field.
        finetune_coarseness: the change to a field is found so many levels
            coarser; not in the original, which has 0.
        finetune_knots: distances, px, of the knots that the change to a field is
            given at, coarse first: finetune by `metroem.finetune.gauss_newton`, of
            which `finetune_sm` is the smoothness. () finetunes as the original.
        finetune_level: level of the embeddings that are compared; the original's
            finetuner takes 0 alone.
        finetune_both_ways: finetune the swapped pair, too, and make the two fields
            agree (`metroem.geometry.regularize`); not in the original.
        sm_defect_coarsening: (pixels, weight) in turn: rings around defects
            and their weight in the smoothness.
        mse_defect_coarsening: likewise in the similarity.
        sm_mask_value: weight of the smoothness where src has no data.
        sm_keys_to_apply: mask rules of the smoothness, as in a schedule, in place of
            those that the two options for it above make.
        mse_keys_to_apply: likewise of the similarity.
        min_defect_thickness: gaps of the tissue up to so many pixels wide are
            taken for defects, where none are given.
        min_defect_px: smaller ones are not.
        train: record gradients in `forward` unless the call says otherwise.
        crop: border left out by the finetuner, px.
        normalize: whether `forward` brings images to mean 0 and std 1 over their
            tissue first: True, False, or "raw" for those that are not normalised
            yet (`metroem.imaging.normalize.normalize_if_raw`). Modules of ours have
            "raw"; the original never does.
        tiling: how the network is shown images larger than a tile; None: at once.
        skip_initial_prediction: refused. In the original it acts with `train` alone,
            and then drops the prior field.

    Raises:
        UsageError: options that cannot be, or of which one would leave another without
            effect.
    """

    finetune: bool = False
    finetune_iter: int = 100
    finetune_lr: float = 0.1
    finetune_sm: float = 30.0
    finetune_coarseness: int = 0
    finetune_knots: tuple[int, ...] = ()
    finetune_level: int = 0
    finetune_both_ways: bool = False
    sm_defect_coarsening: tuple[tuple[int, float], ...] = ((1, 0.0),)
    mse_defect_coarsening: tuple[tuple[int, float], ...] = ((1, 0.0),)
    sm_mask_value: float = 1e-5
    sm_keys_to_apply: dict[str, Any] | None = None
    mse_keys_to_apply: dict[str, Any] | None = None
    min_defect_thickness: int = 70
    min_defect_px: int = 400
    train: bool = False
    crop: int = 1
    normalize: bool | str = False
    tiling: Tiling | None = None
    skip_initial_prediction: bool = False

    @property
    def tuning(self) -> AdamOptions:
        """How a field is finetuned, whether or not `finetune` says to."""
        return AdamOptions(
            smoothness=self.finetune_sm,
            rate_px=self.finetune_lr,
            num_iter=self.finetune_iter,
            border=self.crop,
            coarseness=self.finetune_coarseness,
        )

    def __post_init__(self) -> None:
        if self.normalize not in (True, False, "raw"):
            raise UsageError(
                f'normalize {self.normalize!r}: expected True, False or "raw"'
            )
        if self.finetune_level and not self.finetune_knots:
            raise UsageError(
                f"finetune_level {self.finetune_level} without finetune_knots: the "
                "original's finetuner compares embeddings of level 0; give "
                "finetune_knots too, for example (64, 32, 16)"
            )
        if self.skip_initial_prediction:
            raise UsageError(
                "skip_initial_prediction is not supported: metroem 0.1.3 heeds it with "
                "train=True alone, where it drops the prior field; leave it out"
            )
        self._check_rules("sm_keys_to_apply", ("sm_defect_coarsening", "sm_mask_value"))
        self._check_rules("mse_keys_to_apply", ("mse_defect_coarsening",))

    def _check_rules(self, key: str, replaced: tuple[str, ...]) -> None:
        """Refuse mask rules that cannot be, or beside options that they replace."""
        if getattr(self, key) is None:
            return
        given = {name: _plain(getattr(self, name)) for name in replaced}
        if clash := [n for n in replaced if given[n] != _plain(getattr(type(self), n))]:
            raise UsageError(
                f"{key} and {clash[0]} ({given[clash[0]]}) are given: {key} replaces "
                f"it; say in {key} what is meant, and leave {clash[0]} out"
            )
        rules = mask_rules(getattr(self, key), key)
        for rule in (*rules.src, *rules.tgt):
            compares = (rule.strategy, rule.value) != ("neq", 0)
            if rule.name in ("src", "tgt") and compares:
                raise UsageError(
                    f"{key}: a rule of {rule.name!r} that compares: the finetuner's "
                    "images are features, of which 0 alone has a meaning; expected "
                    '{"strat": "neq", "value": 0}, or a rule of '
                    f"'{rule.name}_zeros' or '{rule.name}_defects'"
                )

    @property
    def refining(self) -> GaussNewtonOptions:
        """How a field is finetuned where there are `finetune_knots`."""
        return GaussNewtonOptions(
            spacing_px=tuple(self.finetune_knots),
            smoothness=self.finetune_sm,
            num_iter=self.finetune_iter,
            border=self.crop,
        )

    @property
    def similarity_rules(self) -> MaskRules:
        """Where the finetuner compares the embeddings."""
        if self.mse_keys_to_apply is not None:
            return mask_rules(self.mse_keys_to_apply, "mse_keys_to_apply")
        rings = tuple((int(px), float(w)) for px, w in self.mse_defect_coarsening)
        return MaskRules(
            _with_rings(SIMILARITY_RULES.src, rings),
            _with_rings(SIMILARITY_RULES.tgt, rings),
        )

    @property
    def smoothness_rules(self) -> MaskRules:
        """Where the finetuner wants the field to be smooth."""
        if self.sm_keys_to_apply is not None:
            return mask_rules(self.sm_keys_to_apply, "sm_keys_to_apply")
        rings = tuple((int(px), float(w)) for px, w in self.sm_defect_coarsening)
        src = tuple(
            structs.replace(rule, mask_value=self.sm_mask_value)
            if rule.name == "src_zeros"
            else rule
            for rule in SMOOTHNESS_RULES.src
        )
        return MaskRules(
            _with_rings(src, rings), _with_rings(SMOOTHNESS_RULES.tgt, rings)
        )

    def with_all(self, given: dict[str, Any]) -> "AlignerOptions":
        """`updated`, where each of `given` has to be known; else UsageError."""
        known = [field.name for field in fields(self)]
        if unknown := sorted(given.keys() - set(known)):
            raise UsageError(
                f"{', '.join(unknown)}: no option of an aligner; expected some of "
                f"{', '.join(known)}. Correct what hands it over: create.py, or the "
                "params of the call"
            )
        return self.updated(given)

    def updated(self, given: dict[str, Any]) -> "AlignerOptions":
        """These options with those of `given` that are known and not None."""
        known = {field.name for field in fields(self)}
        return replace(
            self,
            **{k: v for k, v in given.items() if k in known and v is not None},
        )


def _plain(value: Any) -> Any:
    """With lists for tuples, as JSON has them."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _with_rings(
    rules: tuple[MaskRule, ...], rings: tuple[tuple[int, float], ...]
) -> tuple[MaskRule, ...]:
    """The rules, with other rings around defects."""
    return tuple(
        structs.replace(rule, rings=rings) if rule.name.endswith("_defects") else rule
        for rule in rules
    )
