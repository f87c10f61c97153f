"""Small networks for tests."""

import json
from pathlib import Path
from typing import Any

import torch

from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.models.weights import checkpoint_path, save_weights


def convblock(*channels: int) -> dict[str, Any]:
    return {"type": "convblock", "arch_desc": {"fms": list(channels), "k": 3}}


def level(channels_in: int, channels_out: int) -> tuple[dict, dict]:
    """Up and down module of one level: features per side in and out."""
    features = {
        "type": "split_processor",
        "processors": [
            {"fm_range": [0, 1], "module": {"type": "identity"}},
            {
                "fm_range": [0, channels_in],
                "module": convblock(channels_in, 4, channels_out - 1),
            },
        ],
    }
    up = {"type": "fm_range_apply", "fm_range": channels_in, "module": features}
    down = {
        "type": "warp_with_input_downmodule",
        "arch_desc": {"inner_module": convblock(2 * channels_out, 8, 2)},
    }
    return up, down


def scalenet(*channels: int) -> dict[str, Any]:
    """A spec with one level for each number of channels."""
    levels = [
        level(before, after)
        for before, after in zip((1, *channels), channels, strict=False)
    ]
    return {
        "type": "scalenet",
        "max_level": len(levels),
        "upmodules": {str(i): up for i, (up, _) in enumerate(levels)},
        "downmodules": {str(i): down for i, (_, down) in enumerate(levels)},
        "downlinks": {"all": {"type": "upsample_residuals"}},
        "combiners": {
            "all": {"type": "rollback_warp", "arch_desc": {"rollback": 0}},
        },
    }


# Two levels of the template `correlation`, which learn in seconds.
CORRELATION = {
    "type": "correlation",
    "levels": [
        {"features": 8, "radius": [2], "hidden": 16, "dilations": [1, 2]},
        {"features": 12, "radius": [3], "hidden": 16, "dilations": [1, 2]},
    ],
}


def without_features() -> dict[str, Any]:
    """A spec of two levels, whose level 0 is the image alone."""
    spec = scalenet(4, 6)
    del spec["upmodules"]["0"]
    spec["downmodules"]["0"]["arch_desc"]["inner_module"] = convblock(2, 8, 2)
    spec["upmodules"]["1"] = level(1, 6)[0]
    return spec


def write_spec(folder: Path, spec: dict[str, Any]) -> Path:
    path = folder / "model_spec.json"
    path.write_text(json.dumps(spec))
    return path


def pyramid_with_weights(
    folder: Path, mips: list[int], template: str = "correlation"
) -> list[Path]:
    """Make a pyramid whose modules have weights, drawn from seed 0, not trained."""
    modules = init_pyramid(folder, mips, template)
    torch.manual_seed(0)
    for module in modules:
        net = load_module(module, checkpoint_name=None).aligner.net
        save_weights(net, checkpoint_path(module / "model", "checkpoint"))
    return modules
