"""How a module is trained: phases, read from JSON (train_params).

A schedule maps a mip to the phases that are run in turn:

    {"3": [{"lr": 3e-5, "num_epochs": 100, "smoothness": 15,
            "loss_spec": {"type": "plain"}}, ...], ...}

Keys and meanings are the original's; an unknown key is refused. Keys of ours:
`crop_size`, `batch_size`, `accumulate`, `lr_schedule`, `warmup_steps`,
`max_grad_norm`, `ema`.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from metroem.errors import UsageError
from metroem.mask_rules import SIMILARITY_RULES, SMOOTHNESS_RULES, MaskRule, MaskRules
from metroem.specs.augmentations import (
    KNOWN_WARP_LEAST_PX,
    Augmentation,
    KnownWarp,
    RandomFlip,
    RandomSrcTgtSwap,
    RandomTranspose,
    RandomWarp,
    parse_augmentation,
)
from metroem.specs.checks import check_keys, check_list, check_object, read_json
from metroem.specs.losses import LossSpec, parse_losses

logger = logging.getLogger(__name__)

MODES = (
    "scratch",
    "aligned",
    "finetune",
    "classic",
    "classic_finetune",
    "custom",
)
FINETUNING_MODES = ("finetune", "classic_finetune")  # which begin from weights
LR_SCHEDULES = ("constant", "cosine")
DEFAULT_CROP_PX = 1024
_LAST_SHARE = 0.01  # of the learning rate, at the end of a cosine
_COUNTS = (
    "num_epochs",
    "num_samples",
    "print_every",
    "crop_size",
    "batch_size",
    "accumulate",
)
_MOVES_IMAGES = (RandomTranspose, RandomFlip, RandomSrcTgtSwap, RandomWarp, KnownWarp)


@dataclass(frozen=True)
class Phase:
    """One entry of a stage's schedule.

    Attributes:
        lr: learning rate of Adam, at its highest.
        num_epochs: how often the pairs are gone through.
        smoothness: factor of rigidity in the loss.
        num_samples: samples of an epoch, each pair as often as any other; None
            takes each pair once.
        print_every: epochs from one log line and validation to the next.
        crop_size: side of a training sample, px of the module's mip; less
            where the patches are smaller.
        batch_size: pairs of a batch over all ranks; None leaves it to
            --batch_size, which goes before it.
        accumulate: batches of an update: their gradients are averaged, as if they
            were one batch.
        lr_schedule: "constant", or "cosine": falling to 1 % over the phase.
        warmup_steps: over which the rate rises from 0 first; a step is an update of
            the weights, however many batches it is made of.
        max_grad_norm: gradients are clipped to this norm; None leaves them.
        ema: decay of a moving average of the weights, below 1, for example 0.999:
            the average is what is validated, kept, and handed to the next phase.
            None leaves the weights as they are; --ema goes before it.
        losses: what is minimised: their sum.
        similarity_rules: where similarity counts.
        smoothness_rules: where rigidity counts.
        augmentations: applied in turn.
    """

    lr: float
    num_epochs: int
    smoothness: float
    num_samples: int | None = None
    print_every: int = 1
    crop_size: int = DEFAULT_CROP_PX
    batch_size: int | None = None
    accumulate: int = 1
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    ema: float | None = None
    losses: tuple[LossSpec, ...] = (LossSpec(),)
    similarity_rules: MaskRules = SIMILARITY_RULES
    smoothness_rules: MaskRules = SMOOTHNESS_RULES
    augmentations: tuple[Augmentation, ...] = ()

    @property
    def embedding_levels(self) -> tuple[int, ...]:
        """Levels whose embeddings the losses look at."""
        return tuple(
            sorted({level for loss in self.losses for level in loss.embedding_levels})
        )

    @property
    def known_warp(self) -> KnownWarp | None:
        """The augmentation that gives samples their truth, if there is one."""
        warps = [a for a in self.augmentations if isinstance(a, KnownWarp)]
        return warps[0] if warps else None

    @property
    def least_px(self) -> int:
        """Least side of a sample that its augmentations and losses can take."""
        least = [1] if self.known_warp is None else [KNOWN_WARP_LEAST_PX]
        for loss in self.losses:
            if loss.type == "metric" and loss.pre_align_sample is not None:
                # One whole tile of a level, whose last pixel may be a part of one.
                least.append((loss.pre_align_sample - 1) * 2 ** max(loss.levels) + 1)
        return max(least)

    def rate(self, step: int, num_steps: int) -> float:
        """The learning rate of one of the phase's steps, counted from 0."""
        rate = self.lr * min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.lr_schedule == "constant":
            return rate
        fall = (1 + math.cos(math.pi * step / max(num_steps, 1))) / 2
        return rate * (_LAST_SHARE + (1 - _LAST_SHARE) * fall)


@dataclass(frozen=True)
class Schedule:
    """The phases of each mip, and where they were read from."""

    source: str
    phases: Mapping[int, tuple[Phase, ...]] = field(default_factory=dict)

    def for_mip(self, mip: int, *, max_epochs: int | None = None) -> tuple[Phase, ...]:
        """The phases of a mip; those of the nearest entry if it has none.

        Args:
            mip: of the module's images.
            max_epochs: cap on the epochs of each phase.
        """
        nearest = min(self.phases, key=lambda entry: (abs(entry - mip), entry))
        if nearest != mip:
            logger.info(
                "%s has no entry for mip %d: using that of mip %d",
                self.source,
                mip,
                nearest,
            )
        if max_epochs is None:
            return self.phases[nearest]
        return tuple(
            dataclasses.replace(phase, num_epochs=min(phase.num_epochs, max_epochs))
            for phase in self.phases[nearest]
        )


def load_schedule(mode: str, path: Path | None) -> Schedule:
    """Read the schedule of a train mode.

    Args:
        mode: one of `MODES`: a schedule of ours, or "custom".
        path: JSON file, for "custom" alone.

    Raises:
        UsageError: a path without "custom" or the other way round, a file
            that is missing or no JSON, an unknown key, or a value of the
            wrong kind; the message says where.
    """
    if (mode == "custom") != (path is not None):
        raise UsageError(
            f"--train_params_path belongs to --train_mode custom, and only to it; "
            f"got --train_mode {mode} and --train_params_path {path}"
        )
    if path is not None:
        tree = read_json(path, f"--train_params_path {path}")
        return parse_schedule(tree, str(path))
    source = f"{mode}.json"
    text = (resources.files("metroem") / "params" / source).read_text()
    return parse_schedule(json.loads(text), source)


def parse_schedule(tree: Any, source: str) -> Schedule:
    """Check a decoded schedule and turn it into phases; UsageError if wrong."""
    if not isinstance(tree, dict) or not tree:
        raise UsageError(
            f"{source}: expected an object of mips, such as {{'3': [...]}}"
        )
    phases: dict[int, tuple[Phase, ...]] = {}
    for mip, entries in tree.items():
        if not mip.isdigit():
            raise UsageError(f"{source}: mip {mip!r}: expected a whole number")
        if not isinstance(entries, list) or not entries:
            raise UsageError(f"{source}: mip {mip}: expected a list of phases")
        phases[int(mip)] = tuple(
            _phase(entry, f"{source}: mip {mip}, phase {number}")
            for number, entry in enumerate(entries)
        )
    return Schedule(source, phases)


def _phase(entry: Any, where: str) -> Phase:
    entry = dict(check_object(entry, where))
    spec = entry.pop("loss_spec", {"type": "plain"})
    losses = parse_losses(spec, f"{where}: loss_spec")
    rules = {
        ours: parse_mask_rules(entry.pop(key), f"{where}: {key}")
        for key, ours in (
            ("mse_keys_to_apply", "similarity_rules"),
            ("sm_keys_to_apply", "smoothness_rules"),
        )
        if key in entry
    }
    augmentations = tuple(
        parse_augmentation(spec, f"{where}: augmentations {number}")
        for number, spec in enumerate(check_list(entry.pop("augmentations", []), where))
    )
    plain = ("lr", "num_epochs", "smoothness", *_COUNTS[1:])
    plain += ("lr_schedule", "warmup_steps", "max_grad_norm", "ema")
    also = ("loss_spec", "mse_keys_to_apply", "sm_keys_to_apply", "augmentations")
    check_keys(entry, plain, where, also=also)
    missing = [key for key in plain[:3] if key not in entry]
    if missing:
        raise UsageError(f"{where}: {missing} missing")
    phase = Phase(losses=losses, augmentations=augmentations, **rules, **entry)
    _check_numbers(phase, where)
    _check_truth(phase, where)
    return phase


def _check_numbers(phase: Phase, where: str) -> None:
    """Refuse values of the wrong kind or outside of what they mean."""
    for key in ("lr", "smoothness", "max_grad_norm"):
        value = getattr(phase, key)
        if key == "max_grad_norm" and value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise UsageError(f"{where}: {key} is {value!r}: expected a number >= 0")
    for key in (*_COUNTS, "warmup_steps"):
        value = getattr(phase, key)
        if key in ("num_samples", "batch_size") and value is None:
            continue
        least = 0 if key == "warmup_steps" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(
                f"{where}: {key} is {value!r}: expected a whole number >= {least}"
            )
    if phase.crop_size < phase.least_px:
        raise UsageError(
            f"{where}: crop_size is {phase.crop_size}: the augmentations and losses of "
            f"the phase need at least {phase.least_px} px"
        )
    if phase.ema is not None:
        check_decay(phase.ema, f"{where}: ema is")
    if phase.lr_schedule not in LR_SCHEDULES:
        raise UsageError(
            f"{where}: lr_schedule is {phase.lr_schedule!r}: expected one of "
            f"{LR_SCHEDULES}"
        )


def check_decay(decay: Any, what: str) -> None:
    """Refuse a decay of averaged weights that is none; `what` names it (UsageError)."""
    is_number = isinstance(decay, int | float) and not isinstance(decay, bool)
    if not is_number or not 0 <= decay < 1:
        raise UsageError(f"{what} {decay!r}: expected 0 <= decay < 1, such as 0.999")


def _check_truth(phase: Phase, where: str) -> None:
    """Refuse a loss without its truth, and what would spoil a truth."""
    kinds = [type(a) for a in phase.augmentations]
    if any(loss.type == "known_warp" for loss in phase.losses) != (KnownWarp in kinds):
        raise UsageError(
            f"{where}: the loss known_warp and the augmentation known_warp need each "
            "other; give both or none"
        )
    after = kinds[kinds.index(KnownWarp) + 1 :] if KnownWarp in kinds else []
    spoiling = [kind.__name__ for kind in after if kind in _MOVES_IMAGES]
    if spoiling:
        raise UsageError(
            f"{where}: augmentations: known_warp comes once, and after all that "
            f"flips, swaps or warps a pair; after it came {spoiling}"
        )


def parse_mask_rules(spec: Any, where: str) -> MaskRules:
    """Read `mse_keys_to_apply` or `sm_keys_to_apply`.

    Args:
        spec: {"src": [...], "tgt": [...]}, decoded JSON.
        where: its place, for messages.

    Raises:
        UsageError: an unknown key, or a value of the wrong kind.
    """
    spec = check_object(spec, where)
    check_keys(spec, ("src", "tgt"), where)
    return MaskRules(
        **{
            side: tuple(
                _rule(rule, f"{where}: {side} {number}")
                for number, rule in enumerate(check_list(rules, f"{where}: {side}"))
            )
            for side, rules in spec.items()
        }
    )


def _rule(spec: Any, where: str) -> MaskRule:
    spec = check_object(spec, where)
    known = ("name", "fm", "binarization", "mask_value", "coarsen_ranges")
    check_keys(spec, known, where)
    binarization = check_object(spec.get("binarization", {}), f"{where}: binarization")
    check_keys(binarization, ("strat", "value", "range"), f"{where}: binarization")
    rings = check_list(spec.get("coarsen_ranges") or [], f"{where}: coarsen_ranges")
    try:
        return MaskRule(
            name=spec.get("name", ""),
            channel=spec.get("fm"),
            strategy=binarization.get("strat"),
            value=float(binarization.get("value", 0.0)),
            bounds=tuple(map(float, binarization.get("range", (0.0, 0.0)))),  # type: ignore[arg-type]
            mask_value=float(spec.get("mask_value", 0.0)),
            rings=tuple((int(pixels), float(weight)) for pixels, weight in rings),
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from None
