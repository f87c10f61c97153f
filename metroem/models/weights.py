"""Read and write the weights of a module: `<name>.state.pth.tar`, a state_dict."""

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
    """Give the path of the weights `name` in a module's `model` folder."""
    return folder / f"{name}{_ENDING}"


def weight_names(modules: Sequence[ModuleSpec]) -> list[str]:
    """List the names of all weights in some modules, sorted."""
    return sorted(
        {
            path.name.removesuffix(_ENDING)
            for module in modules
            for path in module.weights_folder.glob(f"*{_ENDING}")
            if path.name[0] != "."
        }
    )


def check_weights(modules: Sequence[ModuleSpec], name: str, where: str) -> None:
    """Refuse modules that do not have the weights of a name.

    Args:
        modules: modules, all of which must have the weights.
        name: name of the weights.
        where: the pyramid or flag that asks for them, for the message.

    Raises:
        CheckpointError: a module does not have them; the message names it.
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
            f"{weight_names(modules) or 'none'}: give a checkpoint_name that all "
            "modules have, or train first (train.py --train_mode scratch)"
        )


def save_weights(net: nn.Module, path: Path) -> None:
    """Write a network's state_dict; the file is complete or does not exist.

    Equal weights give equal bytes. `torch.load(weights_only=True)` reads it.
    """
    # torch writes the file's name into the file; a buffer does not have a name.
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    replace_file(path, buffer.getbuffer())


def load_weights(net: nn.Module, path: Path, *, device: str = "cpu") -> None:
    """Load a state_dict into a network; the layers of both must be the same.

    Args:
        net: network to load into.
        path: file written by `save_weights` or by the original.
        device: device to map the weights to.

    Raises:
        CheckpointError: the file cannot be read, is not a state_dict, or
            its layers are not those of `net`; then `net` is unchanged.
    """
    try:
        weights = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch may raise anything
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
    """List the layers that differ between two state_dicts, a line each."""
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
