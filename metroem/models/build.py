"""Build a network from its `model_spec.json`."""

import contextlib
import io
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from artificery import Artificery
from scalenet import ScaleNet
from torch import Tensor, nn

from metroem.errors import PyramidError
from metroem.models.operators import CORRECTED_PARSERS

OPERATORS = ("corrected", "stock")
_STRIDED = (nn.AvgPool2d, nn.MaxPool2d, nn.Conv2d)  # layers that may shrink maps


def build_net(spec_path: Path, *, operators: str) -> nn.Module:
    """Build the network that a spec describes, with fresh weights.

    Args:
        spec_path: `model_spec.json` of a module.
        operators: "corrected" (ours) or "stock" (artificery's own, for
            checkpoints that were trained with those).

    Returns:
        The network; `net(x=(B, 2, H, W), in_field=(B, 2, H, W) or None)` gives
        a field in pixels and leaves its embeddings in `net.state`.

    Raises:
        PyramidError: the file does not exist, is not JSON, or describes a network that
            artificery does not know; or the operators are unknown.
    """
    if operators not in OPERATORS:
        raise PyramidError(f"operators {operators!r}: expected one of {OPERATORS}")
    builder = _Builder(spec_path.parent)
    if operators == "corrected":
        builder.parsers.update(CORRECTED_PARSERS)
    try:
        # artificery and scalenet print what they parse.
        with contextlib.redirect_stdout(io.StringIO()):
            return _without_in_place(builder.parse(spec_path.name))
    except PyramidError as error:
        raise PyramidError(f"{spec_path}: {error}") from error
    except Exception as error:  # artificery does not define errors
        raise PyramidError(
            f"{spec_path}: artificery cannot build this network: {error!r}"
        ) from error


@contextlib.contextmanager
def stock_operators_at_work() -> Iterator[None]:
    """Set torch's default type for stock operators, and hide their warnings.

    They call grid_sample without align_corners, which warns each time. They also make
    tensors of torch's default type, which must be the type of the network.
    """
    default = torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*align_corners.*", UserWarning)
        warnings.filterwarnings("ignore", "Ambiguous Residual", UserWarning)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


class _ReLU(nn.ReLU):
    """A ReLU that works out of place, and does not need its output again.

    Values and gradients are the same. nn.ReLU stores its output for the backward pass,
    but `convblock` adds to that output in place.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.threshold(x, 0.0, 0.0)


def _without_in_place(net: nn.Module) -> nn.Module:
    """Make all layers work out of place, so that they keep their inputs."""
    for module in net.modules():
        if type(module) is nn.ReLU:
            module.__class__ = _ReLU
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return net


def _refuse_mask(spec: dict[str, Any], create_module: Any) -> nn.Module:
    raise PyramidError(
        "mask_output_based_on_input does not run on this version of torch (artificery "
        'masks by bytes); take it out of the spec: "no data" is masked in the losses'
    )


class _Builder(Artificery):
    """artificery's builder, which reads files beside the spec only.

    artificery itself prefers a file of that name in the working directory, and reads
    files from anywhere.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.parsers["mask_output_based_on_input"] = _refuse_mask
        self._root = self._folder = Path(os.path.normpath(folder))

    def parse(self, params_file: str) -> nn.Module:
        paths = [self._folder / params_file, self._root / params_file]
        for path in paths:
            if not Path(os.path.normpath(path)).is_relative_to(self._root):
                raise PyramidError(f"{params_file!r} leads out of the spec's folder")
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            raise PyramidError(f"no file {paths[0]}")
        spec: dict[str, Any] = json.loads(path.read_text())
        outer, self._folder = self._folder, path.parent
        try:
            return self.create_net(spec)
        finally:
            self._folder = outer


def size_divisor(net: nn.Module, spec_path: Path) -> int:
    """Compute how many pixels a pixel of a network's coarsest level spans.

    Args:
        net: a network from `build_net`.
        spec_path: its spec, for the message.

    Raises:
        PyramidError: the network does not have levels.
    """
    levels = _levels(net)
    if not levels:
        raise PyramidError(
            f"{spec_path}: no levels; expected a net of type scalenet with "
            "upmodules and downmodules"
        )
    return _shrink_factor(net) if isinstance(net, ScaleNet) else 2 ** max(levels)


def _levels(net: nn.Module) -> list[int]:
    """List the levels of a network."""
    parts = ("level_upmodules", "level_downmodules")
    return [int(level) for part in parts for level in getattr(net, part, {})]


def _shrink_factor(module: nn.Module) -> int:
    """Compute how many times smaller than its input a module's smallest map is."""
    if isinstance(module, ScaleNet):
        coarsest = max(_levels(module), default=0)
        nested = [
            2 ** int(level) * _shrink_factor(part)
            for kind in ("upmodules", "downmodules", "skiplinks")
            for level, part in getattr(module, f"level_{kind}").items()
            if int(level) <= coarsest
        ]
        return max(nested, default=1)
    if isinstance(module, _STRIDED):
        stride = module.stride
        return max(stride) if isinstance(stride, tuple) else stride
    parts = [_shrink_factor(part) for part in module.children()]
    is_sequential = isinstance(module, nn.Sequential)
    return math.prod(parts) if is_sequential else max(parts, default=1)


def padding(
    shape: tuple[int, int], multiple: int, *, square: bool
) -> tuple[int, int, int, int]:
    """Compute the padding of an image on the right and below, for F.pad.

    It pads to whole pixels of the coarsest level, at least 4 of them: a stock network
    mistakes a width of 2 for the two channels of a field.

    Args:
        shape: (H, W).
        multiple: see `size_divisor`.
        square: pad both sides to the longer one, which stock operators need.
    """
    wanted = (max(shape), max(shape)) if square else shape
    rows, cols = (max(4, -(-side // multiple)) * multiple for side in wanted)
    return 0, cols - shape[1], 0, rows - shape[0]
