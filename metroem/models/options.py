"""Options of a module that its callers may set, by the original's names."""

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
    """Options of a module; the names are those of the original.

    Attributes:
        finetune: improve each field on the embeddings of its pair.
        finetune_iter: limit of steps.
        finetune_lr: rate of the first steps, px.
        finetune_sm: smoothness of the finetuned field.
        finetune_coarseness: level of the change that Adam adds to a field, see
            `AdamOptions`; not in the original, which has 0.
        finetune_knots: distances of control points, px, coarse first: finetune by
            `metroem.finetune.gauss_newton`, with `finetune_sm` as the smoothness. ()
            finetunes as the original does.
        finetune_level: level of the embeddings to compare. Without `finetune_knots` it
            has to be 0, as in the original.
        finetune_both_ways: finetune the swapped pair, too, and make the two fields
            agree (`metroem.geometry.regularize`); not in the original.
        sm_defect_coarsening: (pixels, weight), one after the other: rings around
            defects and their weight in the smoothness.
        mse_defect_coarsening: the same for the similarity.
        sm_mask_value: weight of the smoothness where src has no data.
        sm_keys_to_apply: mask rules of the smoothness, as in a schedule. They replace
            `sm_defect_coarsening` and `sm_mask_value`.
        mse_keys_to_apply: mask rules of the similarity. They replace
            `mse_defect_coarsening`.
        min_defect_thickness: where no defects are given, gaps of the tissue up to this
            many pixels wide are taken as defects.
        min_defect_px: gaps of at most this many pixels are not.
        train: record gradients in `forward` unless the call says otherwise.
        crop: border left out by the finetuner, px.
        normalize: whether `forward` normalises images to mean 0 and std 1 over their
            tissue: True, False, or "raw" for images that are not normalised yet
            (`metroem.imaging.normalize.normalize_if_raw`). Our own modules have "raw";
            the original never normalises.
        tiling: how images larger than a tile are split for the network; None: never.
        skip_initial_prediction: refused. In the original it has an effect with `train`
            only, where it drops the prior field.

    Raises:
        UsageError: an option has a value that is not allowed, or one option would leave
            another without effect.
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
    def adam_options(self) -> AdamOptions:
        """Options of the finetuner without `finetune_knots`."""
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
        """Refuse wrong mask rules, and mask rules beside options that they replace."""
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
    def gauss_newton_options(self) -> GaussNewtonOptions:
        """Options of the finetuner with `finetune_knots`."""
        return GaussNewtonOptions(
            spacing_px=tuple(self.finetune_knots),
            smoothness=self.finetune_sm,
            num_iter=self.finetune_iter,
            border=self.crop,
        )

    @property
    def similarity_rules(self) -> MaskRules:
        """Mask rules of the finetuner's similarity."""
        if self.mse_keys_to_apply is not None:
            return mask_rules(self.mse_keys_to_apply, "mse_keys_to_apply")
        rings = tuple((int(px), float(w)) for px, w in self.mse_defect_coarsening)
        return MaskRules(
            _with_rings(SIMILARITY_RULES.src, rings),
            _with_rings(SIMILARITY_RULES.tgt, rings),
        )

    @property
    def smoothness_rules(self) -> MaskRules:
        """Mask rules of the finetuner's smoothness."""
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
        """Do the same as `updated`, but raise UsageError for an unknown option."""
        known = [field.name for field in fields(self)]
        if unknown := sorted(given.keys() - set(known)):
            raise UsageError(
                f"{', '.join(unknown)}: not an option of an aligner; expected some of "
                f"{', '.join(known)}. Correct the caller: create.py, or the "
                "params of the call"
            )
        return self.updated(given)

    def updated(self, given: dict[str, Any]) -> "AlignerOptions":
        """Replace options by the known entries of `given` that are not None."""
        known = {field.name for field in fields(self)}
        return replace(
            self,
            **{k: v for k, v in given.items() if k in known and v is not None},
        )


def _plain(value: Any) -> Any:
    """Turn tuples into lists, as JSON has them."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _with_rings(
    rules: tuple[MaskRule, ...], rings: tuple[tuple[int, float], ...]
) -> tuple[MaskRule, ...]:
    """Replace the rings around defects in mask rules."""
    return tuple(
        structs.replace(rule, rings=rings) if rule.name.endswith("_defects") else rule
        for rule in rules
    )
