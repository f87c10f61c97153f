"""Weights of one module: `<name>.state.pth.tar`, a bare state_dict."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metroem.errors import CheckpointError
from metroem.io.files import replace_file
from metroem.specs.modules import ModuleSpec

_ENDING = ".state.pth.tar"


def checkpoint_path(folder: Path, name: str) -> Path:
    """Where the weights called `name` lie in a module's `model` folder."""
    return folder / f"{name}{_ENDING}"


def weights_there(modules: Sequence[ModuleSpec]) -> list[str]:
    """Names of the weights that any of some modules has, sorted."""
    return sorted(
        {
            path.name.removesuffix(_ENDING)
            for module in modules
            for path in module.weights_folder.glob(f"*{_ENDING}")
            if path.name[0] != "."
        }
    )


def check_weights(modules: Sequence[ModuleSpec], name: str, where: str) -> None:
    """Refuse modules without the weights that are to be used.

    Args:
        modules: all of them must have weights.
        name: of the weights.
        where: who asks for them, for the message.

    Raises:
        CheckpointError: some module has none of this name; it is named.
    """
    missing = [
        module
        for module in modules
        if not checkpoint_path(module.weights_folder, name).is_file()
    ]
    if missing:
        names = ", ".join(module.path.name for module in missing)
        raise CheckpointError(
            f"{where}: {names} has no weights {name!r} (expected "
            f"{checkpoint_path(missing[0].weights_folder, name)}); the pyramid has "
            f"{weights_there(modules) or 'none'}: give a checkpoint_name that all "
            "modules have, or train first (train.py --train_mode scratch)"
        )


def save_weights(net: nn.Module, path: Path) -> None:
    """Write a network's state_dict; the file is there whole or not at all.

    Equal weights give equal bytes. Readers may load it with weights_only=True.
    """
    # torch writes the name of its target into the file; a buffer has none.
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    replace_file(path, buffer.getbuffer())


def load_weights(net: nn.Module, path: Path, *, device: str = "cpu") -> None:
    """Load a state_dict into a network, every layer of both accounted for.

    Args:
        net: takes the weights.
        path: file written by `save_weights` or by the original.
        device: where the weights are mapped to.

    Raises:
        CheckpointError: the file cannot be read, is not a state_dict, or
            its layers are not those of `net`; then `net` is unchanged.
    """
    try:
        weights = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises whatever its readers raise
        raise CheckpointError(
            f"{path}: cannot be read as weights ({error}); expected a state_dict "
            "that torch.load(weights_only=True) takes"
        ) from error
    if not isinstance(weights, dict):
        raise CheckpointError(
            f"{path}: holds a {type(weights).__name__}, expected a state_dict"
        )
    if faults := _mismatches(net.state_dict(), weights):
        shown = "; ".join(faults[:5])
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"{path}: not the weights of this network: {shown}{more}. Was "
            "model_spec.json changed, or is the file of another module?"
        )
    net.load_state_dict(weights)


def _mismatches(own: dict[str, Tensor], other: dict[Any, Any]) -> list[str]:
    """What keeps `other` from being loaded, a line a layer."""
    faults = [f"{name} is missing" for name in own.keys() - other.keys()]
    faults += [f"{name} is unknown" for name in other.keys() - own.keys()]
    for name in own.keys() & other.keys():
        found, expected = other[name], tuple(own[name].shape)
        if not isinstance(found, Tensor):
            faults.append(f"{name} is a {type(found).__name__}, expected a tensor")
        elif tuple(found.shape) != expected:
            faults.append(f"{name} is {tuple(found.shape)}, expected {expected}")
        elif found.layout != torch.strided or found.is_complex():
            faults.append(f"{name} is sparse or complex, expected plain numbers")
        elif not bool(torch.isfinite(found).all()):
            faults.append(f"{name} holds NaN or infinite values")
    return sorted(faults)
