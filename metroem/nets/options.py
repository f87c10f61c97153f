"""How a module is applied: what its callers may set, by the original's names."""

from dataclasses import dataclass, fields, replace
from typing import Any

from metroem.coarse_to_fine import RefineOptions
from metroem.errors import UsageError
from metroem.finetuner import FinetuneOptions
from metroem.masks import SIMILARITY_RULES, SMOOTHNESS_RULES, MaskRule, MaskRules
from metroem.tiles import Tiling


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
            given at, coarse first: finetune by `metroem.coarse_to_fine`, of
            which `finetune_sm` is the smoothness. () finetunes as the original.
        finetune_level: level of the embeddings that are compared; the original's
            finetuner takes 0 alone.
        finetune_both_ways: finetune the swapped pair, too, and make the two fields
            agree (`metroem.both_ways`); not in the original.
        sm_defect_coarsening: (pixels, weight) in turn: rings around defects
            and their weight in the smoothness.
        mse_defect_coarsening: likewise in the similarity.
        sm_mask_value: weight of the smoothness where src has no data.
        min_defect_thickness: gaps of the tissue up to so many pixels wide are
            taken for defects, where none are given.
        min_defect_px: smaller ones are not.
        train: record gradients in `forward` unless the call says otherwise.
        crop: border left out by the finetuner, px.
        normalize: whether `forward` brings images to mean 0 and std 1 over their
            tissue first: True, False, or "raw" for those that are not normalised
            yet (`metroem.normalize.normalize_given`). Modules of ours have "raw";
            the original never does.
        tiling: how the network is shown images larger than a tile; None: at once.
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
    min_defect_thickness: int = 70
    min_defect_px: int = 400
    train: bool = False
    crop: int = 1
    normalize: bool | str = False
    tiling: Tiling | None = None

    @property
    def tuning(self) -> FinetuneOptions:
        """How a field is finetuned, whether or not `finetune` says to."""
        return FinetuneOptions(
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

    @property
    def refining(self) -> RefineOptions:
        """How a field is finetuned where there are `finetune_knots`."""
        return RefineOptions(
            knots_px=tuple(self.finetune_knots),
            smoothness=self.finetune_sm,
            num_iter=self.finetune_iter,
            border=self.crop,
        )

    @property
    def similarity_rules(self) -> MaskRules:
        """Where the finetuner compares the embeddings."""
        rings = tuple((int(px), float(w)) for px, w in self.mse_defect_coarsening)
        return MaskRules(
            _with_rings(SIMILARITY_RULES.src, rings),
            _with_rings(SIMILARITY_RULES.tgt, rings),
        )

    @property
    def smoothness_rules(self) -> MaskRules:
        """Where the finetuner wants the field to be smooth."""
        rings = tuple((int(px), float(w)) for px, w in self.sm_defect_coarsening)
        src = tuple(
            replace(rule, mask_value=self.sm_mask_value)
            if rule.name == "src_zeros"
            else rule
            for rule in SMOOTHNESS_RULES.src
        )
        return MaskRules(
            _with_rings(src, rings), _with_rings(SMOOTHNESS_RULES.tgt, rings)
        )

    def updated(self, given: dict[str, Any]) -> "AlignerOptions":
        """These options with those of `given` that are known and not None."""
        known = {field.name for field in fields(self)}
        return replace(
            self,
            **{k: v for k, v in given.items() if k in known and v is not None},
        )


def _with_rings(
    rules: tuple[MaskRule, ...], rings: tuple[tuple[int, float], ...]
) -> tuple[MaskRule, ...]:
    """The rules, with other rings around defects."""
    return tuple(
        replace(rule, rings=rings) if rule.name.endswith("_defects") else rule
        for rule in rules
    )
