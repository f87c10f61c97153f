r"""Measure memory and time of aligning a large section, whole and by tiles.

Each run has its own process. Its memory is its peak, minus the memory that it had
with the pyramid loaded and the images read. "arrays" is the memory of the images and
the fields themselves. A section is one artificial section, mirrored side by side.

Example:
    python benchmarks/large_section.py --pyramid work/pyramid --sizes 1024 2048 4096

The last line printed is a JSON object. For each size it has memory in MiB and time in
seconds, tiled and whole, and the distance of the two fields, px.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import metroem
from metroem.demo import distort_sections, environment
from metroem.models.module_folders import init_pyramid
from metroem.models.tiling import Tiling
from metroem.synthetic.distortion import Distortion
from metroem.synthetic.tissue import TissueRecipe, make_tissue
from metroem.utils import cli

_MARGIN_PX = 32
_WHOLE = 1 << 20  # a tile that no section exceeds


def build_parser() -> argparse.ArgumentParser:
    """Define the flags."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--pyramid", type=Path, help="a trained pyramid (an untrained one)")
    add("--sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="sides, px")
    add(
        "--whole_up_to",
        type=int,
        default=2048,
        help="largest side run whole, px",
    )
    add("--made_px", type=int, default=1024, help="side of the artificial section, px")
    add("--tile", type=int, nargs=2, default=[1024, 256], help="tile and overlap, px")
    add("--finetune", action="store_true", help="finetune each stage too")
    add("--one", type=Path, help="internal: the request of one run")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all sizes, or do the one run of --one."""
    args = build_parser().parse_args(argv)
    if args.one is not None:
        _run_one(args.one)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pyramid = args.pyramid
        if pyramid is None:
            pyramid = folder / "pyramid"
            init_pyramid(pyramid, (2, 0))
        made = _make_pair(args.made_px)
        figures = {
            str(size): _measure(args, folder, pyramid, _mirrored(made, size))
            for size in args.sizes
        }
    print(json.dumps({"tile": args.tile, "finetune": args.finetune, **figures}))


def _make_pair(side: int) -> np.ndarray:
    """Make src and tgt: (2, side, side) uint8."""
    padded = side + 2 * _MARGIN_PX
    tissue = make_tissue(TissueRecipe(num_sections=2, rows=padded, cols=padded))
    distortion = Distortion(fold=0.0, corner=0.0)
    tgt, src = distort_sections(tissue, distortion, _MARGIN_PX, seed=1)
    return np.stack([src.image, tgt.image])


def _mirrored(pair: np.ndarray, side: int) -> np.ndarray:
    """Mirror a pair to (2, side, side), without edges between the copies."""
    more = max(side - pair.shape[-1], 0)
    padded = np.pad(pair, ((0, 0), (0, more), (0, more)), mode="symmetric")
    return np.ascontiguousarray(padded[:, :side, :side])


def _measure(
    args: argparse.Namespace, folder: Path, pyramid: Path, pair: np.ndarray
) -> dict[str, Any]:
    """Measure one size, and print its figures."""
    side = pair.shape[-1]
    np.save(folder / "pair.npy", pair)
    tilings = {"tiled": args.tile}
    if side <= args.whole_up_to:
        tilings["whole"] = [_WHOLE, 256]
    figures: dict[str, Any] = {}
    for name, tile in tilings.items():
        request = {"pyramid": str(pyramid), "tile": tile, "finetune": args.finetune}
        request["is_trained"] = args.pyramid is not None
        request |= {"pair": str(folder / "pair.npy"), "out": str(folder / name)}
        figures[name] = _in_process(folder / "request.json", request)
        memory = figures[name]["mib"] * 2**20
        figures[name]["bytes_per_px"] = round(memory / side**2)
    # Two images in uint8 and in float32, and a float32 field of two channels.
    figures["arrays_mib"] = round((2 + 8 + 8) * side**2 / 2**20)
    if "whole" in tilings:
        figures |= _compare(*(np.load(folder / f"{name}.npy") for name in tilings))
        seconds = [figures[name]["seconds"] for name in ("tiled", "whole")]
        figures["time_ratio"] = round(seconds[0] / seconds[1], 3)
    print(f"{side} px: {figures}", flush=True)
    return figures


def _in_process(path: Path, request: dict[str, Any]) -> dict[str, float]:
    path.write_text(json.dumps(request))
    command = [sys.executable, __file__, "--one", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _run_one(path: Path) -> None:
    """Align a pair, write its field, and print time and memory."""
    request = json.loads(path.read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)  # untrained pyramids draw their weights when loaded
    name = "checkpoint" if request["is_trained"] else None
    pyramid = metroem.Pyramid.load(request["pyramid"], checkpoint_name=name)
    pyramid = replace(pyramid, tiling=Tiling(*request["tile"]))
    src, tgt = np.load(request["pair"])
    before, start = _peak_mib(), time.perf_counter()
    field = pyramid.align(src, tgt, finetune=request["finetune"])
    seconds = time.perf_counter() - start
    figures = {"mib": round(_peak_mib() - before), "seconds": round(seconds, 2)}
    np.save(request["out"], field)
    print(json.dumps(figures))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _compare(tiled: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """Compare two fields, px: their distance, and the largest step of one alone."""
    lengths = np.sort(np.hypot(*(tiled - whole)).ravel())
    steps = [
        np.abs(np.diff(tiled, axis=axis) - np.diff(whole, axis=axis)).max()
        for axis in (1, 2)
    ]
    return {
        "apart_mean_px": round(float(lengths.mean()), 5),
        "apart_p99_px": round(float(lengths[int(0.99 * len(lengths))]), 4),
        "apart_max_px": round(float(lengths[-1]), 4),
        "step_max_px": round(float(max(steps)), 4),
    }


if __name__ == "__main__":
    cli.run(main)
