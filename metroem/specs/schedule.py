"""Read how a module is trained: its phases, from JSON (train_params).

A schedule maps a mip to its phases, which are run in order:

    {"3": [{"lr": 3e-5, "num_epochs": 100, "smoothness": 15,
            "loss_spec": {"type": "plain"}}, ...], ...}

Keys and meanings are the original's; an unknown key is an error. Our own keys are
`crop_size`, `batch_size`, `accumulate`, `lr_schedule`, `warmup_steps`,
`max_grad_norm` and `ema`.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from metroem.errors import UsageError
from metroem.imaging.mask_rules import (
    SIMILARITY_RULES,
    SMOOTHNESS_RULES,
    MaskRule,
    MaskRules,
)
from metroem.specs.augmentations import (
    KNOWN_WARP_LEAST_PX,
    Augmentation,
    KnownWarp,
    RandomFlip,
    RandomSrcTgtSwap,
    RandomTranspose,
    RandomWarp,
)
from metroem.specs.losses import LossSpec, parse_losses
from metroem.specs.parse_json import Count, NotNegative, Spec, Whole, parse, read_json

logger = logging.getLogger(__name__)

MODES = (
    "scratch",
    "aligned",
    "quick",
    "finetune",
    "classic",
    "classic_finetune",
    "custom",
)
FINETUNING_MODES = ("finetune", "classic_finetune")  # start from existing weights
DEFAULT_CROP_PX = 1024
_LAST_FRACTION = 0.01  # of the learning rate, at the end of a cosine
_MOVES_IMAGES = (RandomTranspose, RandomFlip, RandomSrcTgtSwap, RandomWarp, KnownWarp)
_DECAY = "0 <= decay < 1, such as 0.999"


_KEYS = {  # field -> key, if the key has the original's name
    "losses": "loss_spec",
    "similarity_rules": "mse_keys_to_apply",
    "smoothness_rules": "sm_keys_to_apply",
}


class Phase(Spec, frozen=True, rename=_KEYS):
    """One entry of a stage's schedule."""

    lr: Annotated[NotNegative, "learning rate of Adam, its maximum"]
    num_epochs: Annotated[Count, "epochs: passes over the pairs"]
    smoothness: Annotated[NotNegative, "factor of rigidity in the loss"]
    num_samples: Annotated[
        Count | None,
        "samples of an epoch, each pair equally often; null takes each pair once",
    ] = None
    print_every: Annotated[
        Count, "epochs from one log line and validation to the next"
    ] = 1
    crop_size: Annotated[
        Count,
        "side of a training sample, px of the module's mip; less where the "
        "patches are smaller",
    ] = DEFAULT_CROP_PX
    batch_size: Annotated[
        Count | None,
        "pairs of a batch over all ranks; null means one per rank. `--batch_size` "
        "overrides it",
    ] = None
    accumulate: Annotated[
        Count,
        "batches of an update: their gradients are averaged, as if they were one batch",
    ] = 1
    lr_schedule: Annotated[
        Literal["constant", "cosine"],
        '"constant", or "cosine": falling to 1 % over the phase',
    ] = "constant"
    warmup_steps: Annotated[
        Whole,
        "first steps, over which the learning rate rises from 0; a step is one update "
        "of the weights, of any number of batches",
    ] = 0
    max_grad_norm: Annotated[
        NotNegative | None, "gradients are clipped to this norm; null leaves them"
    ] = None
    ema: Annotated[
        Annotated[float, Meta(ge=0, lt=1, title=_DECAY)] | None,
        "decay of a moving average of the weights, below 1, for example 0.999: "
        "the average is validated, saved, and passed to the next phase. null "
        "averages nothing; `--ema` overrides it",
    ] = None
    losses: Annotated[tuple[LossSpec, ...], "losses, whose sum is minimised"] = (
        LossSpec(),
    )
    similarity_rules: Annotated[MaskRules, "where similarity counts"] = SIMILARITY_RULES
    smoothness_rules: Annotated[MaskRules, "where rigidity counts"] = SMOOTHNESS_RULES
    augmentations: Annotated[tuple[Augmentation, ...], "applied in order"] = ()

    @property
    def embedding_levels(self) -> tuple[int, ...]:
        """Levels whose embeddings the losses compare."""
        return tuple(
            sorted({level for loss in self.losses for level in loss.embedding_levels})
        )

    @property
    def known_warp(self) -> KnownWarp | None:
        """The augmentation that gives samples their ground truth, if there is one."""
        warps = [a for a in self.augmentations if isinstance(a, KnownWarp)]
        return warps[0] if warps else None

    @property
    def least_px(self) -> int:
        """Smallest side of a sample that the augmentations and losses can handle."""
        least = [1] if self.known_warp is None else [KNOWN_WARP_LEAST_PX]
        for loss in self.losses:
            if loss.type == "metric" and loss.pre_align_sample is not None:
                # One whole tile of a level; its last pixel may be incomplete.
                least.append((loss.pre_align_sample - 1) * 2 ** max(loss.levels) + 1)
        return max(least)

    def to_json(self) -> dict[str, Any]:
        """The phase as an entry of a schedule, with all keys."""
        return msgspec.json.decode(msgspec.json.encode(self)) | {
            "loss_spec": [loss.to_json() for loss in self.losses],
            "mse_keys_to_apply": self.similarity_rules.to_json(),
            "sm_keys_to_apply": self.smoothness_rules.to_json(),
        }

    def rate(self, step: float, num_steps: int) -> float:
        """The learning rate at one of the phase's steps, counted from 0.

        With a budget of time the steps between two updates are skipped, and `step` need
        not be whole.
        """
        rate = self.lr * min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.lr_schedule == "constant":
            return rate
        cosine = (1 + math.cos(math.pi * step / max(num_steps, 1))) / 2
        return rate * (_LAST_FRACTION + (1 - _LAST_FRACTION) * cosine)


@dataclass(frozen=True)
class Schedule:
    """The phases of each mip, and the name of the file that they were read from."""

    source: str
    phases: Mapping[int, tuple[Phase, ...]] = field(default_factory=dict)

    def for_mip(self, mip: int, *, max_epochs: int | None = None) -> tuple[Phase, ...]:
        """The phases of a mip, or of the nearest mip that has an entry.

        Args:
            mip: of the module's images.
            max_epochs: maximum of the epochs of each phase.
        """
        nearest = min(self.phases, key=lambda entry: (abs(entry - mip), entry))
        if nearest != mip:
            logger.info(
                "%s has no entry for mip %d: using the entry of mip %d",
                self.source,
                mip,
                nearest,
            )
        if max_epochs is None:
            return self.phases[nearest]
        return tuple(
            replace(phase, num_epochs=min(phase.num_epochs, max_epochs))
            for phase in self.phases[nearest]
        )


def load_schedule(mode: str, path: Path | None) -> Schedule:
    """Read the schedule of a train mode.

    Args:
        mode: one of `MODES`: one of our schedules, or "custom".
        path: JSON file, for "custom" only.

    Raises:
        UsageError: a path without "custom" or "custom" without a path, a file that is
            missing or not JSON, an unknown key, or a value of the wrong kind. The
            message says where.
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
    text = (resources.files("metroem") / "specs" / "schedules" / source).read_text()
    return parse_schedule(json.loads(text), source)


def parse_schedule(tree: Any, source: str) -> Schedule:
    """Check a decoded schedule and turn it into phases.

    Args:
        tree: decoded JSON.
        source: name of the file, for messages.

    Raises:
        UsageError: an unknown key, or a value of the wrong kind.
    """
    if not isinstance(tree, dict) or not tree:
        raise UsageError(
            f"{source}: expected an object of mips, such as {{'3': [...]}}"
        )
    phases: dict[int, tuple[Phase, ...]] = {}
    for mip, entries in tree.items():
        if not mip.isdecimal():
            raise UsageError(f"{source}: mip {mip!r}: expected a whole number")
        if not isinstance(entries, list) or not entries:
            raise UsageError(f"{source}: mip {mip}: expected a list of phases")
        phases[int(mip)] = tuple(
            _phase(entry, f"{source}: mip {mip}, phase {number}")
            for number, entry in enumerate(entries)
        )
    return Schedule(source, phases)


def _phase(entry: Any, where: str) -> Phase:
    nested = {}
    if isinstance(entry, dict):
        nested = {key: entry[key] for key in _KEYS.values() if key in entry}
        entry = {key: value for key, value in entry.items() if key not in nested}
    phase = parse(entry, Phase, where)
    parsers = (parse_losses, parse_mask_rules, parse_mask_rules)
    for (name, key), parse_nested in zip(_KEYS.items(), parsers, strict=True):
        if key in nested:
            value = parse_nested(nested[key], f"{where}: {key}")
            phase = replace(phase, **{name: value})
    if phase.crop_size < phase.least_px:
        raise UsageError(
            f"{where}: crop_size is {phase.crop_size}: the augmentations and losses of "
            f"the phase need at least {phase.least_px} px"
        )
    _check_truth(phase, where)
    return phase


def check_decay(decay: Any, flag: str) -> None:
    """Refuse a decay of averaged weights that is not 0 <= decay < 1 (UsageError)."""
    if isinstance(decay, bool | str) or not 0 <= decay < 1:
        raise UsageError(f"{flag} {decay!r}: expected {_DECAY}")


def _check_truth(phase: Phase, where: str) -> None:
    """Refuse a loss without its ground truth, and augmentations that invalidate it."""
    kinds = [type(a) for a in phase.augmentations]
    if any(loss.type == "known_warp" for loss in phase.losses) != (KnownWarp in kinds):
        raise UsageError(
            f"{where}: the loss known_warp and the augmentation known_warp need each "
            "other; give both or none"
        )
    after = kinds[kinds.index(KnownWarp) + 1 :] if KnownWarp in kinds else []
    misplaced = [kind.__name__ for kind in after if kind in _MOVES_IMAGES]
    if misplaced:
        raise UsageError(
            f"{where}: augmentations: known_warp comes once, and after all that "
            f"flips, swaps or warps a pair; after it came {misplaced}"
        )


def parse_mask_rules(spec: Any, where: str) -> MaskRules:
    """Read `mse_keys_to_apply` or `sm_keys_to_apply`.

    Args:
        spec: {"src": [...], "tgt": [...]}, decoded JSON.
        where: its position, for messages.

    Raises:
        UsageError: an unknown key, or a value of the wrong kind.
    """
    if isinstance(spec, dict):
        spec = {
            side: [
                MaskRule.flatten_json(rule, f"{where}: {side} {number}")
                for number, rule in enumerate(rules)
            ]
            if isinstance(rules, list)
            else rules
            for side, rules in spec.items()
        }
    # Callers of the original may write 1.0 for a number of pixels.
    return parse(spec, MaskRules, where, strict=False)
