"""How a module is trained: phases, read from JSON (train_params).

A schedule maps a mip to the phases that are run in turn:

    {"3": [{"lr": 3e-5, "num_epochs": 100, "smoothness": 15,
            "loss_spec": {"type": "plain"}}, ...], ...}

Keys and meanings are the original's; an unknown key is refused. Keys of ours:
`crop_size`.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from metroem.errors import UsageError
from metroem.masks import SIMILARITY_RULES, SMOOTHNESS_RULES, MaskRule, MaskRules
from metroem.specs.augmentations import Augmentation, parse_augmentation
from metroem.specs.checks import check_keys, check_list, check_object

logger = logging.getLogger(__name__)

MODES = ("scratch", "finetune", "custom")
DEFAULT_CROP_PX = 1024


@dataclass(frozen=True)
class LossSpec:
    """Which loss a phase minimises.

    Attributes:
        type: "plain" or "metric"; what follows belongs to "metric".
        levels: levels of the network whose embeddings are compared.
        pre_align_sample: side of the tiles compared before alignment, px of
            the level; None compares the whole images.
        pre_align_weight: what their difference is worth.
        norm_embeddings: bring each feature to mean 0, std 1 first.
        sm_div: divide smoothness by 2**level.
        train_thru: let the loss train the embeddings, not only the field.
        pure_emb: measure the difference before alignment against a tgt that
            a random field of up to 50 px has moved, not as the pair came.
    """

    type: str = "plain"
    levels: tuple[int, ...] = (0,)
    pre_align_sample: int | None = None
    pre_align_weight: float = 0.7
    norm_embeddings: bool = True
    sm_div: bool = False
    train_thru: bool = True
    pure_emb: bool = False

    @property
    def embedding_levels(self) -> tuple[int, ...]:
        """Levels whose embeddings the loss looks at."""
        return self.levels if self.type == "metric" else ()


@dataclass(frozen=True)
class Phase:
    """One entry of a stage's schedule.

    Attributes:
        lr: learning rate of Adam.
        num_epochs: how often the pairs are gone through.
        smoothness: factor of rigidity in the loss.
        num_samples: pairs of an epoch; None takes all.
        print_every: epochs from one log line and validation to the next.
        crop_size: side of a training sample, px of the module's mip; less
            where the patches are smaller.
        loss: what is minimised.
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
    loss: LossSpec = LossSpec()
    similarity_rules: MaskRules = SIMILARITY_RULES
    smoothness_rules: MaskRules = SMOOTHNESS_RULES
    augmentations: tuple[Augmentation, ...] = ()


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
        mode: "scratch" or "finetune" (ours), or "custom".
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
    if path is None:
        source = f"{mode}.json"
        text = (resources.files("metroem") / "params" / source).read_text()
    elif path.is_file():
        source, text = str(path), path.read_text()
    else:
        raise UsageError(f"--train_params_path {path}: no such file")
    try:
        return parse_schedule(json.loads(text), source)
    except json.JSONDecodeError as error:
        raise UsageError(f"{source}: not JSON: {error}") from None


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
    loss = _loss(entry.pop("loss_spec", {"type": "plain"}), f"{where}: loss_spec")
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
    plain = ("lr", "num_epochs", "smoothness")
    plain += ("num_samples", "print_every", "crop_size")
    also = ("loss_spec", "mse_keys_to_apply", "sm_keys_to_apply", "augmentations")
    check_keys(entry, plain, where, also=also)
    missing = [key for key in plain[:3] if key not in entry]
    if missing:
        raise UsageError(f"{where}: {missing} missing")
    phase = Phase(loss=loss, augmentations=augmentations, **rules, **entry)
    _check_numbers(phase, where)
    return phase


def _check_numbers(phase: Phase, where: str) -> None:
    """Refuse values of the wrong kind or outside of what they mean."""
    for key, at_least in (("lr", 0.0), ("smoothness", 0.0)):
        value = getattr(phase, key)
        if not isinstance(value, int | float) or not at_least <= value < float("inf"):
            raise UsageError(f"{where}: {key} is {value!r}: expected a number >= 0")
    for key in ("num_epochs", "num_samples", "print_every", "crop_size"):
        value = getattr(phase, key)
        if key == "num_samples" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{where}: {key} is {value!r}: expected a number >= 1")


def _loss(spec: Any, where: str) -> LossSpec:
    spec = check_object(spec, where)
    check_keys(spec, ("type", "params"), where)
    if spec.get("type") not in ("plain", "metric"):
        raise UsageError(
            f"{where}: type {spec.get('type')!r}: expected plain or metric"
        )
    params = dict(check_object(spec.get("params", {}), where))
    known = tuple(f.name for f in dataclasses.fields(LossSpec) if f.name != "type")
    check_keys(params, known, f"{where}: params")
    if "levels" in params:
        params["levels"] = tuple(check_list(params["levels"], f"{where}: levels"))
    return LossSpec(type=spec["type"], **params)


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
