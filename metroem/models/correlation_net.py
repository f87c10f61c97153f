"""The network of the template `correlation`: what moved where, coarse to fine.

Both images go through one encoder (siamese). At each level, coarse first, src is
warped by the field found so far, and each place of tgt is compared with a window
of places of the warped src. A soft arg-max over the window says where the place
went, and how sure that is in each direction: a membrane tells nothing of moves along
it. Sections deform smoothly while their content changes, so these votes are pooled
over neighbourhoods, each by its precision, by the trust that a small network has in
it, and less the further it is off its neighbours. What comes out is composed with
the field. What that is worth, after as many training steps: 2.6 px without pooling,
2.0 with it; 4 % less by precision, 4 % more by leaving out outliers (2026-11).

Source: cost volumes and warping as in PWC-Net (arXiv:1709.02371); the soft
arg-max as in GC-Net (arXiv:1703.04309).
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from metroem.errors import PyramidError
from metroem.geometry.field import compose, downsample_field, upsample_field, warp
from metroem.imaging.masks import tissue_mask
from metroem.models.correlation_net_tiles import (
    LevelMaps,
    Pair,
    encode_by_tiles,
    search_by_tiles,
    unit_vectors,
)
from metroem.models.local_correlation import local_correlation
from metroem.models.soft_argmax import POOLING_REACH, POOLS, robust_average, soft_argmax
from metroem.specs.parse_json import Spec, parse

State = dict[str, dict[str, dict[str, Tensor]]]

_SLOPE = 0.1  # of the leaky ReLUs
# Shares of the vote itself, of each neighbourhood and of "no change", before the
# soft-max: fresh steps keep to what was found before them, for example by the stage
# before, and what they change is smooth.
_FIRST_SHARES = (-2.0, -1.0, 0.0, 1.0, 1.0, 3.0)
_FIRST_TOLERANCE = 1.0  # px that a vote is off its neighbours to count half
_FIRST_SCALE = 8.0  # of a correlation of unit vectors, before the soft arg-max


# A spec may be broken: no memory holds what larger sizes ask for.
_LARGEST = 1024
Size = Annotated[
    int, Meta(ge=1, le=_LARGEST, title=f"a whole number from 1 to {_LARGEST}")
]
Sizes = Annotated[
    tuple[Size, ...], Meta(title=f"a list of whole numbers from 1 to {_LARGEST}")
]
SizeOrNone = Annotated[
    int, Meta(ge=0, le=_LARGEST, title=f"a whole number from 0 to {_LARGEST}")
]


class LevelSpec(Spec, frozen=True):
    """One level of the network, 2**level px of its input a pixel.

    Attributes:
        features: of the embedding.
        blocks: residual convolutions that the encoder has.
        radius: of the search window of each step, px of the level; no steps
            for a level that is only encoded.
        hidden: channels of the steps.
        dilations: of the 3 x 3 convolutions of a step, in turn.
    """

    features: Size
    blocks: SizeOrNone = 1
    radius: Sizes = ()
    hidden: SizeOrNone = 0
    dilations: Sizes = ()

    def __post_init__(self) -> None:
        if self.radius and not self.hidden:
            raise PyramidError("hidden is 0: a level with a radius needs hidden")


class _NetSpec(Spec, frozen=True, tag="correlation"):
    levels: Annotated[
        tuple[LevelSpec, ...], Meta(min_length=1, title="a list of at least one level")
    ]


def parse_correlation(spec: dict[str, Any], create_module: Any) -> "CorrelationNet":
    """The network of a spec of type "correlation".

    Args:
        spec: {"type": "correlation", "levels": [{"features": 16, "radius": [2],
            "hidden": 32, "dilations": [1, 2]}, ...]}, levels 1, 2, ... in order.
        create_module: not used; artificery passes it to every parser.

    Raises:
        PyramidError: keys that are missing, unknown, or do not fit together.
    """
    levels = parse(spec, _NetSpec, "correlation", error=PyramidError).levels
    if not levels[-1].radius:
        raise PyramidError(
            "correlation: the coarsest level has no radius: expected one, since the "
            "search begins there"
        )
    return CorrelationNet(levels)


class CorrelationNet(nn.Module):
    """Field and embeddings of a pair; see the module's docstring.

    Attributes:
        level_upmodules: encoder of each level from "1" on.
        level_downmodules: steps of each level that has any.
        state: of the last call: "up" has each level's features, src half and
            tgt half, channel 0 the image; "down" the field that each level
            ends with, and its trust: (B, 1, h, w), what places of tgt are worth
            in a comparison, 0 to 1. Level 0 has the features of level 1,
            upsampled.
    """

    gives_whole_fields = True  # in state["down"], the prior included
    takes_tiles = True  # of any size, with what the whole image gives
    # It looks for what the prior leaves over, so weights of another stage serve too:
    # conv blocks would add the displacement that they have learned once more.
    fits_any_stage = True

    def __init__(self, levels: Sequence[LevelSpec]) -> None:
        """Fresh weights for levels 1, 2, ... in this order."""
        super().__init__()
        self.level_upmodules = nn.ModuleDict()
        self.level_downmodules = nn.ModuleDict()
        channels, above = 1, 0
        for level, spec in enumerate(levels, start=1):
            self.level_upmodules[str(level)] = Encoder(channels, spec)
            channels = spec.features
        for level, spec in reversed(list(enumerate(levels, start=1))):
            if spec.radius:
                steps = [MatchingStep(spec, r, above) for r in spec.radius[:1]]
                steps += [MatchingStep(spec, r, spec.hidden) for r in spec.radius[1:]]
                self.level_downmodules[str(level)] = nn.ModuleList(steps)
                above = spec.hidden
        self.state: State = {}
        # Twice as fast on a CPU.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, x: Tensor, in_field: Tensor | None = None, tile_px: int | None = None
    ) -> Tensor:
        """The whole field of a pair.

        Args:
            x: (B, 2, H, W), src and tgt; H and W whole pixels of the coarsest
                level.
            in_field: prior field, (B, 2, H, W), pixels.
            tile_px: side of the tiles that each level is shown one by one, px of
                the image at the finest level; None: all at once.

        Returns:
            (B, 2, H, W) float32, pixels, the prior included.
        """
        state = self.up_path(x, tile_px=tile_px)
        tissue = tissue_mask(x[:, :1]).float()
        field, hidden, level = None, None, 0
        side = None if tile_px is None else tile_px // 2
        finest = list(self.level_downmodules)[-1]
        state["down"] = {}
        for key, steps in self.level_downmodules.items():
            level = int(key)
            features = state["up"][key].features  # type: ignore[attr-defined]
            maps = LevelMaps(features, F.avg_pool2d(tissue, 2**level))
            look: Any = _pair(maps) if side is None else maps
            if field is not None:
                field = upsample_field(field, 1)
            elif in_field is not None:
                field = downsample_field(in_field.float(), level)
            for step in steps:  # type: ignore[union-attr]
                run = step
                if side is not None:
                    more = key != finest or step is not steps[-1]  # type: ignore[index]
                    run = partial(search_by_tiles, step, side, keep_hidden=more)
                field, trust, hidden = run(look, field, hidden)
            found = {"output": field, "trust": trust}
            state["down"][key] = found  # type: ignore[assignment]
        self.state = state
        return upsample_field(field, level)  # type: ignore[arg-type]

    def up_path(self, x: Tensor, *_: Any, tile_px: int | None = None) -> State:
        """The features alone: a state with "up".

        Args:
            x: (B, 2, H, W), src and tgt.
            tile_px: see `forward`.
        """
        # As one batch: src of each pair, then tgt of each. One pair needs no copy.
        images = x.transpose(0, 1).reshape(-1, 1, *x.shape[-2:])
        images = images.contiguous(memory_format=torch.channels_last)
        features, up = images, {}
        for key, encode in self.level_upmodules.items():
            if tile_px is None:
                features = encode(features)
            else:
                features = encode_by_tiles(encode, tile_px // 2, features)
            up[key] = _LevelState(images, features, int(key))
        finest = up["1"].features
        up["0"] = _LevelState(images, finest, 0)
        return {"up": up}  # type: ignore[dict-item]


class Encoder(nn.Module):
    """Features of a level from those of the level before, or from the image."""

    def __init__(self, before: int, spec: LevelSpec) -> None:
        super().__init__()
        size = 5 if before == 1 else 3
        self.halve = _convolution(before, spec.features, size=size)
        self.halve.stride = (2, 2)
        self.reach = 1 + spec.blocks  # how far around a place it sees, px of the level
        blocks = (Residual(spec.features, 1) for _ in range(spec.blocks))
        self.refine = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, features, H / 2, W / 2)."""
        return self.refine(_activated(self.halve(x)))


class Residual(nn.Module):
    """A convolution whose result is added to what it was given."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.change = _convolution(channels, channels, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return x + _activated(self.change(x))


class MatchingStep(nn.Module):
    """One search for what is left of the displacement at a level."""

    def __init__(self, spec: LevelSpec, radius: int, before: int) -> None:
        """Fresh weights.

        Args:
            spec: of the level.
            radius: of the search window, px.
            before: channels of the hidden map of the step before, 0 for none.
        """
        super().__init__()
        window = (2 * radius + 1) ** 2
        self.radius = radius
        # How far around a place it sees, px of the level.
        self.reach = radius + sum(spec.dilations) + 1 + POOLING_REACH
        self.scale = nn.Parameter(torch.tensor(_FIRST_SCALE))
        self.tolerance = nn.Parameter(torch.tensor(_FIRST_TOLERANCE))
        # Convolutions of 1 px, summed: one of all channels would copy them.
        self.from_correlation = _convolution(window, spec.hidden, size=1)
        self.from_features = _convolution(spec.features, spec.hidden, size=1)
        self.from_tissue = _convolution(1, spec.hidden, size=1)
        self.from_hidden = _convolution(before, spec.hidden, size=1) if before else None
        self.blocks = nn.Sequential(*(Residual(spec.hidden, d) for d in spec.dilations))
        self.to_window = _convolution(spec.hidden, window, size=1)
        self.to_pools = _convolution(spec.hidden, 3 + len(POOLS))
        self.to_change = _convolution(spec.hidden, 2)
        for layer in (self.to_window, self.to_change):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.to_pools.bias[1:] = torch.tensor(_FIRST_SHARES)  # type: ignore[index]

    def forward(
        self, pair: Pair, field: Tensor | None, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The field after this step, trust, and what the next may want to know.

        Args:
            pair: of the level.
            field: found so far, (B, 2, H, W), pixels of the level.
            hidden: of the step before, at this level or the coarser one.
        """
        if field is not None:
            src, tissue = warp(pair.src, field), warp(pair.tissue, field)
            pair = pair._replace(src=src, tissue=tissue)
        return self.search(pair, field, hidden)

    def search(
        self, pair: Pair, field: Tensor | None, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` of a pair of which src lies where the field has moved it."""
        dtype = pair.features.dtype
        alike = local_correlation(pair.tgt.to(dtype), pair.src.to(dtype), self.radius)
        alike = alike * self.scale.to(dtype)
        x = self.from_correlation(alike)
        x += self.from_features(pair.features)
        x += self.from_tissue(pair.tissue.to(dtype))
        if self.from_hidden is not None and hidden is not None:
            known = self.from_hidden(hidden)
            x += F.interpolate(known, size=x.shape[-2:], mode="nearest")
        x = self.blocks(_activated(x))
        window = self.to_window(x)
        window += alike
        weights = window.permute(0, 2, 3, 1).float().softmax(-1)
        votes, precision = soft_argmax(weights, self.radius)
        # No step goes further than it can see, or bad weights lead ever further away.
        reach = float(self.radius)
        votes = votes + reach * torch.tanh(self.to_change(x).float() / reach)
        trust, shares = self.to_pools(x).float().split((1, 2 + len(POOLS)), 1)
        trust = trust.sigmoid()
        change = robust_average(
            votes, trust * precision, shares.softmax(1), self.tolerance
        )
        change = change.contiguous()
        return (change if field is None else compose(change, field)), trust, x


class _LevelState(dict[str, Tensor]):
    """The features of a level; "output" is made when it is asked for.

    (B, 2C, H, W): src half and tgt half, channel 0 of each the image. It costs
    as much memory as the level itself, and few callers want it.
    """

    def __init__(self, images: Tensor, features: Tensor, level: int) -> None:
        super().__init__()
        self.images, self.features, self.level = images, features, level

    def __missing__(self, key: str) -> Tensor:
        if key != "output":
            raise KeyError(key)
        features = self.features
        if self.level == 0:
            features = F.interpolate(
                features, scale_factor=2, mode="bilinear", align_corners=False
            )
        image = F.avg_pool2d(self.images, 2**self.level).to(features.dtype)
        both = torch.cat((image, features), 1)
        self[key] = torch.cat(both.chunk(2), 1)
        return self[key]


def _pair(maps: LevelMaps) -> Pair:
    features = maps.features
    if features.requires_grad:
        features.register_hook(_channels_last)
    src, tgt = unit_vectors(features).chunk(2)
    return Pair(src.contiguous(), tgt, features.chunk(2)[1], maps.tissue)


def _convolution(
    before: int, after: int, *, size: int = 3, dilation: int = 1
) -> nn.Conv2d:
    padding = dilation * (size // 2)
    return nn.Conv2d(before, after, size, padding=padding, dilation=dilation)


def _activated(x: Tensor) -> Tensor:
    """The leaky ReLU of `x`, in its own memory: no convolution keeps its result."""
    return F.leaky_relu_(x, _SLOPE)


def _channels_last(gradient: Tensor) -> Tensor:
    """In the layout of what it is the gradient of: mixed layouts cost a CPU dear."""
    return gradient.contiguous(memory_format=torch.channels_last)
