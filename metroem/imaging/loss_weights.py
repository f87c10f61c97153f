"""Turn mask rules into weight maps of a pair."""

from typing import NamedTuple

import torch
from torch import Tensor

from metroem.geometry.field import warp
from metroem.imaging.mask_rules import MaskRule, MaskRules
from metroem.imaging.masks import dilate, tissue_mask


class PairMasks(NamedTuple):
    """Images and masks that mask rules read, of one batch."""

    src: Tensor  # (B, C, H, W) image, 0 = no data
    tgt: Tensor  # (B, C, H, W)
    src_defects: Tensor | None = None  # (B, 1, H, W) bool, True on defects
    tgt_defects: Tensor | None = None  # (B, 1, H, W) bool

    def named(self, name: str) -> Tensor | None:
        """Look up one of `MAP_NAMES`: (B, C, H, W) float; None if not given."""
        if name.endswith("_zeros"):
            image = self.src if name.startswith("src") else self.tgt
            return (~tissue_mask(image[:, :1])).float()
        value = getattr(self, name)
        return None if value is None else value.float()


class PairWeight(NamedTuple):
    """Weights of one loss term for a pair."""

    src: Tensor  # (B, 1, H, W), pixels of src
    tgt: Tensor  # (B, 1, H, W), pixels of tgt

    def along(self, field: Tensor) -> Tensor:
        """Compute the weight of each pixel of tgt when src is warped by `field`."""
        return warp(self.src, field, padding="border") * self.tgt


def pair_weights(rules: MaskRules, maps: PairMasks) -> PairWeight:
    """Compute the weights that mask rules give a pair.

    A map that is not given masks nothing.

    Args:
        rules: rules of one loss term.
        maps: images and masks of the pair, (B, C, H, W) each.

    Returns:
        Weights of src and tgt, each (B, 1, H, W) float32.
    """

    def side(side_rules: tuple[MaskRule, ...], like: Tensor) -> Tensor:
        weight = torch.ones_like(like[:, :1], dtype=torch.float32)
        for rule in side_rules:
            values = maps.named(rule.name)
            if values is not None:
                weight = torch.minimum(weight, rule_weight(rule, values))
        return weight

    return PairWeight(side(rules.src, maps.src), side(rules.tgt, maps.tgt))


def rule_weight(rule: MaskRule, values: Tensor) -> Tensor:
    """Compute the weights, (B, 1, H, W), of a rule from its map, (B, C, H, W)."""
    if rule.channel is not None and values.shape[1] > 1:
        values = values[:, rule.channel : rule.channel + 1]
    masked = ~_is_unmasked(rule, values).all(dim=1, keepdim=True)
    weight = torch.where(masked, rule.mask_value, 1.0).float()
    for pixels, ring_weight in rule.rings:
        dilated = dilate(masked, pixels)
        weight = torch.where(dilated & ~masked & (weight == 1), ring_weight, weight)
        masked = dilated
    return weight


def _is_unmasked(rule: MaskRule, values: Tensor) -> Tensor:
    """Mark where a map, (B, C, H, W), gives a pixel its full weight; bool."""
    low, high = rule.bounds
    match rule.strategy:
        case "eq":
            return values == rule.value
        case "neq":
            return values != rule.value
        case "lt":
            return values < rule.value
        case "gt":
            return values > rule.value
        case "between":
            return (values > low) & (values < high)
        case "not_between":
            return (values < low) | (values > high)
    return values == 1
