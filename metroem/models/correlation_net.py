"""Find displacements by correlation, coarse to fine: the template `correlation`.

Both images go through one encoder (siamese). Each level, coarse first, has steps:

1. src is warped by the field found so far.
2. Each pixel of tgt is correlated with a window of pixels of the warped src.
3. A soft arg-max over the window gives the displacement, and its precision along each
   direction: a membrane does not show motion along itself.
4. Displacements are averaged over neighbourhoods, because sections deform smoothly
   while their content changes. Each is weighted by its precision, and by a confidence
   that a small network computes. Displacements far from their neighbours count less.
5. The average is composed with the field.

Errors after the same number of training steps: 2.6 px without averaging, 2.0 px with
it. Weighting by precision lowers the error by 4 %, leaving out outliers by another 4 %
(2026-11).

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
    encode_tiled,
    search_tiled,
    unit_vectors,
)
from metroem.models.local_correlation import local_correlation
from metroem.models.soft_argmax import (
    POOLING_RECEPTIVE_PX,
    POOLS,
    robust_average,
    soft_argmax,
)
from metroem.specs.parse_json import Spec, parse

State = dict[str, dict[str, dict[str, Tensor]]]

_SLOPE = 0.1  # of the leaky ReLUs
# Fractions of the displacement itself, of each neighbourhood and of "no change", before
# the soft-max. With these an untrained step mostly keeps the field it gets, for example
# from the earlier stage, and its changes are smooth.
_FIRST_FRACTIONS = (-2.0, -1.0, 0.0, 1.0, 1.0, 3.0)
_FIRST_TOLERANCE = 1.0  # px from the neighbours' mean that halve a weight
_FIRST_SCALE = 8.0  # factor of the correlation before the soft arg-max

# A broken spec could ask for sizes that fit no memory.
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
    """One level of the network; its pixels span 2**level px of the images.

    Attributes:
        features: number of features of the embedding.
        blocks: number of residual convolutions of the encoder.
        radius: radius of the search window of each step, px of the level; empty for a
            level that is only encoded.
        hidden: number of channels of the steps.
        dilations: dilations of the 3 x 3 convolutions of a step, in order.
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
    """Build the network of a spec of type "correlation".

    Args:
        spec: {"type": "correlation", "levels": [{"features": 16, "radius": [2],
            "hidden": 32, "dilations": [1, 2]}, ...]}, levels 1, 2, ... in order.
        create_module: not used; artificery passes it to every parser.

    Raises:
        PyramidError: keys are missing, unknown, or do not fit together.
    """
    levels = parse(spec, _NetSpec, "correlation", error=PyramidError).levels
    if not levels[-1].radius:
        raise PyramidError(
            "correlation: the coarsest level has no radius: expected one, since the "
            "search begins there"
        )
    return CorrelationNet(levels)


class CorrelationNet(nn.Module):
    """A network that gives the field and the embeddings of a pair.

    The head of the file explains how it works.

    Attributes:
        level_upmodules: encoder of each level from "1" on.
        level_downmodules: steps of each level that has any.
        state: results of the last call. "up" has the features of each level, src half
            and tgt half, channel 0 the image; level 0 has those of level 1, upsampled.
            "down" has the last field of each level ("output") and its confidence
            ("trust"): the weight of each pixel of tgt in a comparison, (B, 1, h, w), 0
            to 1.
    """

    gives_whole_fields = True  # in state["down"], the prior included
    supports_tiling = (
        True  # `forward` takes `tile_px`; the result does not depend on it
    )
    # It finds what the prior leaves over, so weights of another stage are a good start.
    # Conv blocks would add the displacement that they have learned a second time.
    fits_any_stage = True

    def __init__(self, levels: Sequence[LevelSpec]) -> None:
        """Make untrained layers for levels 1, 2, ... in this order."""
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
        # This layout is twice as fast on a CPU.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, x: Tensor, in_field: Tensor | None = None, tile_px: int | None = None
    ) -> Tensor:
        """Find the field of a pair.

        Args:
            x: (B, 2, H, W), src and tgt; H and W whole pixels of the coarsest
                level.
            in_field: prior field, (B, 2, H, W), pixels.
            tile_px: side of a tile at the finest level, px of the image. Each level
                goes tile by tile; None: each level at once.

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
            inputs: Any = _pair(maps) if side is None else maps
            if field is not None:
                field = upsample_field(field, 1)
            elif in_field is not None:
                field = downsample_field(in_field.float(), level)
            for step in steps:  # type: ignore[union-attr]
                run = step
                if side is not None:
                    last = key == finest and step is steps[-1]  # type: ignore[index]
                    run = partial(search_tiled, step, side, keep_hidden=not last)
                field, confidence, hidden = run(inputs, field, hidden)
            found = {"output": field, "trust": confidence}
            state["down"][key] = found  # type: ignore[assignment]
        self.state = state
        return upsample_field(field, level)  # type: ignore[arg-type]

    def up_path(self, x: Tensor, *_: Any, tile_px: int | None = None) -> State:
        """Compute the features only: a state with "up".

        Args:
            x: (B, 2, H, W), src and tgt.
            tile_px: see `forward`.
        """
        # One batch: src of all pairs, then tgt of all. One pair needs no copy.
        images = x.transpose(0, 1).reshape(-1, 1, *x.shape[-2:])
        images = images.contiguous(memory_format=torch.channels_last)
        features, up = images, {}
        for key, encode in self.level_upmodules.items():
            if tile_px is None:
                features = encode(features)
            else:
                features = encode_tiled(encode, tile_px // 2, features)
            up[key] = _LevelState(images, features, int(key))
        finest = up["1"].features
        up["0"] = _LevelState(images, finest, 0)
        return {"up": up}  # type: ignore[dict-item]


class Encoder(nn.Module):
    """Compute the features of a level from the finer level's, or from the image."""

    def __init__(self, before: int, spec: LevelSpec) -> None:
        super().__init__()
        size = 5 if before == 1 else 3
        self.halve = _convolution(before, spec.features, size=size)
        self.halve.stride = (2, 2)
        self.receptive_px = 1 + spec.blocks  # px of the level on each side of a pixel
        blocks = (Residual(spec.features, 1) for _ in range(spec.blocks))
        self.refine = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, features, H / 2, W / 2)."""
        return self.refine(_activated(self.halve(x)))


class Residual(nn.Module):
    """Add the result of a convolution to its input."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.change = _convolution(channels, channels, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + _activated(self.change(x))


class MatchingStep(nn.Module):
    """Search for the remaining displacement at a level, once."""

    def __init__(self, spec: LevelSpec, radius: int, before: int) -> None:
        """Make untrained layers.

        Args:
            spec: options of the level.
            radius: radius of the search window, px of the level.
            before: channels of the earlier step's hidden map, 0 for none.
        """
        super().__init__()
        window = (2 * radius + 1) ** 2
        self.radius = radius
        # How far it sees on each side of a pixel, px of the level.
        self.receptive_px = radius + sum(spec.dilations) + 1 + POOLING_RECEPTIVE_PX
        self.scale = nn.Parameter(torch.tensor(_FIRST_SCALE))
        self.tolerance = nn.Parameter(torch.tensor(_FIRST_TOLERANCE))
        # Sums of 1 x 1 convolutions: a single one would copy all maps into one tensor.
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
            self.to_pools.bias[1:] = torch.tensor(_FIRST_FRACTIONS)  # type: ignore[index]

    def forward(
        self, pair: Pair, field: Tensor | None, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Warp src, then search.

        Args:
            pair: maps of the level.
            field: field found so far, (B, 2, h, w), pixels of the level.
            hidden: hidden map of the earlier step, of this level or the coarser one.

        Returns:
            The new field, (B, 2, h, w), the confidence, (B, 1, h, w), and the hidden
            map for the next step.
        """
        if field is not None:
            src, tissue = warp(pair.src, field), warp(pair.tissue, field)
            pair = pair._replace(src=src, tissue=tissue)
        return self.search(pair, field, hidden)

    def search(
        self, pair: Pair, field: Tensor | None, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same as `forward`, for a pair whose src is warped already."""
        dtype = pair.features.dtype
        correlation = local_correlation(
            pair.tgt.to(dtype), pair.src.to(dtype), self.radius
        )
        correlation = correlation * self.scale.to(dtype)
        x = self.from_correlation(correlation)
        x += self.from_features(pair.features)
        x += self.from_tissue(pair.tissue.to(dtype))
        if self.from_hidden is not None and hidden is not None:
            known = self.from_hidden(hidden)
            x += F.interpolate(known, size=x.shape[-2:], mode="nearest")
        x = self.blocks(_activated(x))
        window = self.to_window(x)
        window += correlation
        weights = window.permute(0, 2, 3, 1).float().softmax(-1)
        displacement, precision = soft_argmax(weights, self.radius)
        # A correction is at most the radius. Otherwise bad weights could lead further
        # away with each step.
        radius = float(self.radius)
        correction = radius * torch.tanh(self.to_change(x).float() / radius)
        displacement = displacement + correction
        confidence, fractions = self.to_pools(x).float().split((1, 2 + len(POOLS)), 1)
        confidence = confidence.sigmoid()
        change = robust_average(
            displacement, confidence * precision, fractions.softmax(1), self.tolerance
        )
        change = change.contiguous()
        return (change if field is None else compose(change, field)), confidence, x


class _LevelState(dict[str, Tensor]):
    """The features of a level; "output" is computed when it is read.

    "output" is (B, 2C, H, W): src half and tgt half, channel 0 of each the image. It
    needs as much memory as the level itself, and few callers read it.
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
    """Split the maps of a level into src and tgt, as unit vectors."""
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
    """Apply the leaky ReLU in place: no convolution needs its own result again."""
    return F.leaky_relu_(x, _SLOPE)


def _channels_last(gradient: Tensor) -> Tensor:
    """Give a gradient the layout of its features: mixed layouts are slow on a CPU."""
    return gradient.contiguous(memory_format=torch.channels_last)
