"""What a pair costs: seconds of one CPU core and bytes, for `docs/scaling.md`.

Measured at several sides, so that it shows whether the cost grows as the area:
training (a step of the default network on one crop), writing a field (network and
finetuner), packing a field, joining a packed one, reading a pair. Seconds are those of
the processor: waiting for a disk, or for other programs, is not counted.

Example:
    python benchmarks/pair_cost.py --sides_px 192 384
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from made_run import make_run

from metroem import cli
from metroem.data.dataset import PairRef, image_sets_at, read_sample
from metroem.grid import Grid
from metroem.io.field_parts import FieldParts
from metroem.io.h5 import FieldSetMeta, PairFrame
from metroem.nets.loading import load_module
from metroem.specs.pyramid import find_modules
from metroem.training.generate import finetune_iterations

REPEATS = 3


def main() -> None:
    """Run the benchmark; the last line is one JSON object."""
    parser = cli.parser(__doc__)
    sides, packed = "of pairs, px (192 384)", "side of the field packed (2048)"
    parser.add_argument(
        "--sides_px", type=int, nargs="+", default=[192, 384], help=sides
    )
    parser.add_argument("--fields_px", type=int, default=2048, help=packed)
    request = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="metroem-cost-"))
    try:
        print(json.dumps(measure(request, folder)))
    finally:
        shutil.rmtree(folder)


def measure(request: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Seconds and bytes by name; those of a side by its px."""
    figures: dict[str, object] = packing(folder, request.fields_px)
    for side in request.sides_px:
        figures[f"{side} px"] = of_side(folder / str(side), side, figures)
    return figures


def of_side(folder: Path, side: int, figures: dict[str, object]) -> dict[str, float]:
    """Seconds of one core for a pair of one side, and its bytes on disk."""
    run = make_run(folder, pairs=2, side_px=side, phase={"lr": 1e-3, "num_epochs": 1})
    (module,) = find_modules(run.pyramid)
    loaded = load_module(
        module.path,
        checkpoint_name=None,
        finetune=True,
        pass_field=True,
        finetune_iter=finetune_iterations(0),
    )
    aligner = loaded.aligner.eval()  # type: ignore[union-attr]
    parameters = list(aligner.net.parameters())
    figures["gradient_bytes"] = 4 * sum(p.numel() for p in parameters)
    (images,) = image_sets_at(folder / "dataset", 0)
    ref = PairRef(images, None, 0)
    sample = read_sample(ref, ref.grid)

    def step() -> None:
        prediction = aligner.predict(sample.src, sample.tgt, None, levels=())
        (prediction.field**2).mean().backward()

    return {
        "read_s": median(lambda: read_sample(ref, ref.grid)),
        "step_s": median(step),
        "field_s": median(lambda: aligner.align_pair(sample.src, sample.tgt, None)),
        "image_bytes": images.path.stat().st_size / len(images),
    }


def packing(folder: Path, side: int) -> dict[str, object]:
    """Seconds for packing and for joining a field, and its bytes packed."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(0, 5, (1, 2, side // 32, side // 32)))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    field = smooth[0].float().numpy()
    parts = FieldParts(folder / "parts", {})
    pack = median(lambda: parts.put(0, field))
    frames = [PairFrame(Grid(0, 0, 0, side, side), (1, 0))]
    meta = FieldSetMeta(frames, "", "", {}, stage=0, tag="ck")
    joined = folder / "field_0_x0_y0_z1_MIP0_ck.h5"
    join = median(lambda: list(parts.join(joined, meta)))
    size = joined.stat().st_size
    return {
        "field_px": side,
        "pack_s": pack,
        "join_s": join,
        "join_raw_bytes_per_core_s": field.nbytes / join,
        "field_bytes": size,
    }


def median(work: Callable[[], object]) -> float:
    """Median seconds of a core for a few calls, after one that does not count."""
    work()
    taken = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    cli.run(main)
