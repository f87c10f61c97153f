r"""A training step of ours beside one of metroem 0.1.3: same spec, weights, pair.

The spec is that of the template `scalenet`; the original builds it with stock
operators, ours with corrected ones. The original's pair is in memory, ours is read
from its h5 file. `--compile` adds ours with a compiled network.

Example:
    python benchmarks/train_step_against_original.py --threads 2 --compile
"""

import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import torch
from original import Original
from train_data import complete_step, made_pairs
from train_step import MIP, fresh_aligner

from metroem import cli
from metroem.data.dataset import read_sample
from metroem.specs.schedule import parse_schedule
from metroem.training.memory import keep_freed_memory

_MASKS = {
    "mse_keys_to_apply": {
        side: [{"name": f"{side}_zeros", "binarization": {"strat": "eq", "value": 0}}]
        for side in ("src", "tgt")
    },
    "sm_keys_to_apply": {
        "src": [
            {
                "name": "src_zeros",
                "binarization": {"strat": "eq", "value": 0},
                "mask_value": 1e-5,
            }
        ]
    },
}
# The original's `scratch` at mip 3.
_PHASE = {"lr": 3e-5, "num_epochs": 1, "smoothness": 15, **_MASKS}
_METRIC = {"levels": [0], "pre_align_sample": 32, "pre_align_weight": 0.7}
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {"type": "plain"},
    "metric": {"type": "metric", "params": _METRIC},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = side_by_side.parser(__doc__)
    add = parser.add_argument
    add("--size", type=int, default=512, help="px (512)")
    add("--loss", nargs="+", choices=list(LOSSES), default=list(LOSSES), help="both")
    add("--compile", action="store_true", help="a compiled network, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as train.py does
    seconds: dict[str, float] = {}
    figures: dict[str, Any] = {"threads": args.threads, "size": args.size}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.size, args.threads)
        for loss in args.loss:
            found = bench.compare(loss, args.rounds, compiled=args.compile)
            seconds |= {f"{loss}: {name}": value for name, value in found.items()}
            for name in set(found) - {"original", "original, bare network"}:
                figures[f"{loss}: original / {name}"] = found["original"] / found[name]
        figures["losses"] = bench.losses
    side_by_side.report(seconds, figures)


class Bench:
    """One pair and one network, for both.

    Attributes:
        losses: of the first step of each, before it has learned.
    """

    def __init__(self, folder: Path, size: int, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.losses: dict[str, float] = {}
        self.pairs = made_pairs(size, MIP, folder)[:1]
        sample = read_sample(self.pairs[0], self.pairs[0].grid)
        np.save(folder / "pair.npy", torch.cat((sample.src, sample.tgt))[:, 0].numpy())

    def compare(self, loss: str, rounds: int, *, compiled: bool) -> dict[str, float]:
        """Median seconds of a step with one of `LOSSES`, by contender."""
        spec = {**_PHASE, "loss_spec": LOSSES[loss]}
        phase_path = self.folder / f"{loss}.json"
        phase_path.write_text(json.dumps(spec))
        phase = parse_schedule({str(MIP): [spec]}, "benchmark").phases[MIP][0]
        aligners = {"ours": fresh_aligner("scalenet", self.folder / f"{loss}_ours")}
        if compiled:
            other = fresh_aligner("scalenet", self.folder / f"{loss}_compiled")
            other.net.compile(dynamic=False)
            aligners["ours, compiled"] = other
        model = self.folder / f"{loss}_ours" / f"0_mip{MIP}in_scalenet" / "model"
        aligners["ours"].save_checkpoint(model)
        settings = {
            "threads": self.threads,
            "model": str(model),
            "phase": str(phase_path),
            "images": str(self.folder / "pair.npy"),
        }
        task = "train_step_original.py"
        contenders: dict[str, Any] = {
            name: complete_step(aligner, phase, self.pairs, 1)
            for name, aligner in aligners.items()
        }
        with contextlib.ExitStack() as stack:
            for name, bare in (("original", False), ("original, bare network", True)):
                given = {**settings, "bare": bare}
                contenders[name] = stack.enter_context(Original(task, given))
            for name, contender in contenders.items():
                found = contender()
                value = found["loss"] if isinstance(found, dict) else found
                self.losses[f"{loss}: {name}"] = value
            return side_by_side.median_seconds(contenders, rounds)


if __name__ == "__main__":
    cli.run(main)
