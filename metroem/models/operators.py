"""Define corrected operators for networks of artificery and scalenet.

Each replaces a parser of artificery, so that a `model_spec.json` and its checkpoints
fit both. Their results differ ("stock" is artificery's):

- A level's field `out` is composed with the earlier field `in` as
  out(p) + in(p + out(p)), so that warping by the result equals warping by `in` and then
  by `out` (stock: in(p) + out(p + in(p))).
- Outside its grid a field repeats its border (stock: 0).
- A warp moves by exactly the pixels of the field (stock: S / (S - 1) times as far for a
  side of S).
- A prior field keeps its detail. Levels refine the displacement relative to the prior,
  and the final one is composed with the prior (stock: the prior goes through the
  coarsest level, which smooths it).
- Any height and width are possible, and torch.compile works.
"""

from collections.abc import Callable
from typing import Any

import torch
from scalenet import ScaleNet
from torch import Tensor, nn

from metroem.errors import PyramidError
from metroem.geometry.field import compose, downsample_field, upsample_field, warp
from metroem.models.correlation_net import parse_correlation

Spec = dict[str, Any]
CreateModule = Callable[[Spec], nn.Module]
State = dict[str, dict[str, dict[str, Tensor]]]


class WarpSource(nn.Module):
    """Warp the src half of the features by the field found so far."""

    def forward(self, x: Tensor, field: Tensor, state: State, level: int) -> Tensor:
        """(B, 2C, H, W) features and (B, 2, H, W) pixels -> (B, 2C, H, W)."""
        src, tgt = x.chunk(2, dim=1)
        return torch.cat((warp(src, field), tgt), 1)


class RefineField(nn.Module):
    """Compose the inner module's field with the input field of the level."""

    def __init__(self, inner_module: nn.Module) -> None:
        super().__init__()
        self.module = inner_module

    def forward(self, x: Tensor, state: State, level: int) -> Tensor:
        """(B, 2C, H, W) features -> (B, 2, H, W) field, pixels of the level."""
        # float32 also under autocast: bf16 has 16 px no finer than 0.06 px.
        found = self.module(x).float()
        return compose(found, state["down"][str(level)]["input"])


class UpsampleField(nn.Module):
    """Resample a field to the next finer level."""

    def forward(self, field: Tensor, **_: Any) -> Tensor:
        """(B, 2, H, W) -> (B, 2, 2H, 2W), pixels of the finer level."""
        return upsample_field(field, 1)


class ApplyToEach(nn.Module):
    """Apply one module to each range of channels, with the same weights."""

    def __init__(self, module: nn.Module, fm_range: int) -> None:
        super().__init__()
        self.module = module
        self.fm_range = fm_range

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B, n * fm_range, H, W) -> (B, n * C of the module's result, H, W)."""
        batch, _channels, rows, cols = x.shape
        out = self.module(x.reshape(-1, self.fm_range, rows, cols))
        return out.reshape(batch, -1, *out.shape[-2:])


class SplitProcessor(nn.Module):
    """Apply a different module to each range of channels; join the results."""

    def __init__(self, processors: list[nn.Module], ranges: list[list[list[int]]]):
        super().__init__()
        self.processors = nn.ModuleList(processors)
        self.ranges = ranges

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B, C, H, W) -> (B, sum of the modules' channels, H, W)."""
        pieces = [
            module(torch.cat([x[:, first:end] for first, end in ranges], 1))
            for module, ranges in zip(self.processors, self.ranges, strict=True)
        ]
        return torch.cat(pieces, 1)


class RefiningScaleNet(ScaleNet):
    """A ScaleNet that refines its prior field, and does not pass it through levels."""

    def down_path(self, state: State, in_field: Tensor | None = None) -> Tensor:
        """Run from the coarsest level to the finest: (B, 2, H, W), pixels of level 0.

        Args:
            state: result of `up_path`; "down" is filled in, with fields relative to
                the prior.
            in_field: prior field, (B, 2, H, W), pixels of level 0.
        """
        state["down"] = {}
        found: Tensor | None = None
        for level in sorted(map(int, state["up"]), reverse=True):
            key = str(level)
            skip = state["up"][key]["skip"]
            if found is None:
                shape = (skip.shape[0], 2, *skip.shape[-2:])
                before = skip.new_zeros(shape, dtype=torch.float32)
            else:
                before = self.level_downlinks[key](found)
            level_state = state["down"][key] = {"input": before}
            if key in self.level_downmodules:
                total = before
                if in_field is not None:
                    total = compose(before, downsample_field(in_field, level))
                if found is not None or in_field is not None:
                    skip = self.level_combiners[key](skip, total, state, level)
                before = self.level_downmodules[key](skip, state, level)
            level_state["output"] = found = before
        assert found is not None, "a net has at least one level"
        return found if in_field is None else compose(found, in_field)


def _parse_warp(spec: Spec, create_module: CreateModule) -> nn.Module:
    if rollback := spec["arch_desc"]["rollback"]:
        raise PyramidError(f"rollback_warp with rollback {rollback}: expected 0")
    return WarpSource()


def _parse_refine(spec: Spec, create_module: CreateModule) -> nn.Module:
    return RefineField(create_module(spec["arch_desc"]["inner_module"]))


def _parse_upsample(spec: Spec, create_module: CreateModule) -> nn.Module:
    return UpsampleField()


def _parse_apply(spec: Spec, create_module: CreateModule) -> nn.Module:
    return ApplyToEach(create_module(spec["module"]), spec["fm_range"])


def _parse_split(spec: Spec, create_module: CreateModule) -> nn.Module:
    processors = spec["processors"]
    return SplitProcessor(
        [create_module(p["module"]) for p in processors],
        [p["fm_ranges"] if "fm_ranges" in p else [p["fm_range"]] for p in processors],
    )


def _parse_scalenet(spec: Spec, create_module: CreateModule) -> nn.Module:
    net = RefiningScaleNet(max_level=spec.get("max_level", 14))
    # Same order as the stock parser, so that a seed gives the same weights.
    for kind in ("downmodule", "upmodule", "uplink", "downlink", "skiplink"):
        _set_parts(net, kind, spec.get(f"{kind}s", {}), create_module)
    _set_parts(net, "combiner", spec.get("combiners", {}), create_module)
    return net


def _set_parts(
    net: ScaleNet, kind: str, parts: Spec, create_module: CreateModule
) -> None:
    """Set the parts of one kind, each at its level, or one for all levels."""
    if "all" in parts and not kind.endswith("module"):
        getattr(net, f"set_all_{kind}s")(create_module(parts["all"]))
        return
    for level, part in parts.items():
        getattr(net, f"set_{kind}")(create_module(part), level)


def _refuse(spec: Spec, create_module: CreateModule) -> nn.Module:
    raise PyramidError(
        f"{spec['type']} has no corrected form; set operators='stock' in create.py"
    )


# Name of an artificery type -> its corrected parser; "correlation" is only ours.
CORRECTED_PARSERS = {
    "rollback_warp": _parse_warp,
    "warp_with_input_downmodule": _parse_refine,
    "upsample_residuals": _parse_upsample,
    "fm_range_apply": _parse_apply,
    "split_processor": _parse_split,
    "scalenet": _parse_scalenet,
    "hindsight_warp": _refuse,
    "combine_in_out_res": _refuse,
    "correlation": parse_correlation,
}
