r"""How soon training halves the endpoint error that no alignment leaves.

Sections are distorted by known fields (about 3 px between neighbours); the last ones
are held out, and no training sees them. Ours: `init` and train.py with their defaults,
timed from the start of its process to the end of the first epoch whose weights, without
finetuning, halve the error. Original: metroem 0.1.3 with the spec of the template
`scalenet`, its own loop and its `scratch` schedule; only its steps are timed, neither
its start nor the scoring. One after the other, so the machine should be left alone.

Example:
    python benchmarks/time_to_quality.py --threads 2
    python benchmarks/time_to_quality.py --threads 2 --original_seconds 540 \
        --stack fib.npy --last_section 44
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from original import Original
from torch import Tensor
from train_data import write_sections

from metroem import cli
from metroem.demo import environment, script
from metroem.distort import Distortion, distort, true_pair
from metroem.errors import MetroEMError, UsageError
from metroem.nets.checkpoint import load_weights
from metroem.nets.loading import load_module
from metroem.normalize import normalize
from metroem.scaffold import init_pyramid
from metroem.tissue import TissueRecipe, make_tissue
from metroem.training.checkpoint import RunFolder

MIP, MARGIN_PX, HELD_OUT, GAP = 0, 32, 4, 1
DISTORTION = Distortion(peak_px=(2.5, 5.0), shift_px=2.5, fold=0.0, corner=0.0)
WATCH_EVERY_S = 0.5


class Pair(NamedTuple):
    """A held-out pair and its truth."""

    images: Tensor  # (1, 2, H, W), normalised: src, tgt
    field: Tensor  # (1, 2, H, W), px
    valid: Tensor  # (1, 1, H, W) bool

    def epe(self, field: Tensor) -> float:
        """Mean distance of a (1, 2, H, W) field from the truth, px."""
        return float((field - self.field).norm(dim=1)[self.valid[:, 0]].mean())


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--threads", type=int, default=2, help="of torch, for both (2)")
    add("--size", type=int, default=256, help="px (256)")
    add("--sections", type=int, default=24, help="to make, the last 4 held out (24)")
    add("--stack", type=Path, help="(N, H, W) uint8 .npy of aligned sections instead")
    add("--last_section", type=int, help="of the stack to use (all)")
    add("--seconds", type=float, default=900, help="at most, for ours (900)")
    longest = "at most; 0 leaves it out (10 times what ours took, or 300)"
    add("--original_seconds", type=float, help=longest)
    train = "more flags for train.py, after all others"
    add("--train_flags", nargs="...", default=[], help=train)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), tissue_of(args), args.threads)
        none = bench.epe_none
        print(f"no alignment: {none:.2f} px; half of it: {none / 2:.2f} px")
        ours = bench.train_ours(args.seconds, args.train_flags)
        longest = args.original_seconds
        if longest is None:
            longest = max(10 * ours["seconds"], 300)
        original = bench.train_original(longest) if longest else None
    # A bound where the original did not get there.
    ratio = original and original["seconds"] / ours["seconds"]
    report = {"epe_none": none, "ours": ours, "original": original}
    report["times_sooner_at_least"] = ratio
    print(json.dumps({"torch": torch.__version__, "threads": args.threads, **report}))


def tissue_of(args: Any) -> np.ndarray:
    """(N, size + 2 * margin, ...) uint8, truly aligned."""
    side = args.size + 2 * MARGIN_PX
    if args.stack is None:
        return make_tissue(TissueRecipe(args.sections, side, side))
    stack = np.load(args.stack, mmap_mode="r")
    last = len(stack) - 1 if args.last_section is None else args.last_section
    if min(stack.shape[1:]) < side:
        raise UsageError(f"{args.stack}: {stack.shape}, expected {side} px a side")
    return np.array(stack[: last + 1, :side, :side])


class Bench:
    """The data, and both trainings on it."""

    def __init__(self, folder: Path, tissue: np.ndarray, threads: int) -> None:
        """Distort the sections, and write those to train on."""
        self.folder, self.threads = folder, threads
        sections = [
            distort(
                section,
                DISTORTION,
                margin_px=MARGIN_PX,
                rng=np.random.default_rng([0, z]),
            )
            for z, section in enumerate(tissue)
        ]
        images = [torch.from_numpy(section.image) for section in sections]
        self.num_train = len(sections) - HELD_OUT - GAP
        self.images = torch.stack([normalize(image) for image in images])
        self.held_out = []
        for z in range(len(sections) - HELD_OUT + 1, len(sections)):
            truth = true_pair(sections[z], sections[z - 1])
            pair = torch.stack((self.images[z], self.images[z - 1]))[None]
            self.held_out.append(Pair(pair, *truth))
        (folder / "data").mkdir()
        write_sections(images[: self.num_train], MIP, folder / "data")
        self.epe_none = self.mean_epe(
            [torch.zeros_like(p.field) for p in self.held_out]
        )

    def mean_epe(self, fields: Sequence[Tensor]) -> float:
        """Of fields of the held-out pairs, px."""
        found = [p.epe(f) for p, f in zip(self.held_out, fields, strict=True)]
        return float(np.mean(found))

    def train_ours(self, longest: float, flags: Sequence[str]) -> dict[str, Any]:
        """Run train.py until the error is halved, or for so many seconds."""
        pyramid = self.folder / "pyramid"
        (module,) = init_pyramid(pyramid, [MIP])
        aligner = load_module(module, checkpoint_name=None, finetune=False).aligner
        weights = RunFolder.of(pyramid, "checkpoint").weights(0, "last")
        command = [sys.executable, script("train.py"), "--pyramid_path", str(pyramid)]
        command += ["--dataset_path", str(self.folder / "data"), *flags]
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        started, seen, curve = time.time(), None, []
        process = subprocess.Popen(command, env={**environment(), **threads})
        try:
            while time.time() - started < longest and process.poll() is None:
                time.sleep(WATCH_EVERY_S)
                if not weights.is_file() or weights.stat().st_mtime_ns == seen:
                    continue
                seen = weights.stat().st_mtime_ns
                load_weights(aligner.net, weights)  # type: ignore[union-attr]
                epe = self.mean_epe([_field(aligner, p) for p in self.held_out])
                curve.append((seen / 1e9 - started, epe))
                print(f"ours: {curve[-1][0]:.0f} s, {epe:.2f} px", flush=True)
                if epe <= self.epe_none / 2:
                    break
            if process.poll():
                raise MetroEMError(f"train.py ended with exit code {process.poll()}")
        finally:
            process.terminate()
            process.wait()
        return _figures(curve, self.epe_none, time.time() - started)

    def train_original(self, longest: float) -> dict[str, Any]:
        """Run the original until the error is halved, or for so many seconds."""
        (module,) = init_pyramid(self.folder / "original", [MIP], "scalenet")
        train, scored = self.folder / "train.npy", self.folder / "scored.npy"
        images = self.images[: self.num_train]
        np.save(train, torch.stack((images[1:], images[:-1]), 1).numpy())
        np.save(scored, torch.cat([pair.images for pair in self.held_out]).numpy())
        settings = {"threads": self.threads, "model": str(module / "model")}
        settings |= {"train": str(train), "scored": str(scored), "seconds": 20}
        settings["fields"] = str(self.folder / "fields.npy")
        curve, spent = [], 0.0
        with Original("time_to_quality_original.py", settings) as original:
            while spent < longest:
                done = original()
                spent += done["seconds"]
                fields = torch.from_numpy(np.load(settings["fields"]))
                curve.append((spent, self.mean_epe(fields.split(1))))
                print(f"original: {spent:.0f} s, {done['steps']} steps, ", end="")
                print(f"{curve[-1][1]:.2f} px", flush=True)
                if curve[-1][1] <= self.epe_none / 2:
                    break
        return _figures(curve, self.epe_none, spent)


def _field(aligner: Any, pair: Pair) -> Tensor:
    with torch.no_grad():
        src, tgt = pair.images.split(1, 1)
        return aligner.predict(src, tgt, None, levels=()).field


def _figures(
    curve: list[tuple[float, float]], epe_none: float, spent: float
) -> dict[str, Any]:
    reached = bool(curve) and curve[-1][1] <= epe_none / 2
    epe = curve[-1][1] if curve else None
    seconds = curve[-1][0] if reached else spent
    return {"reached": reached, "seconds": seconds, "epe": epe, "curve": curve}


if __name__ == "__main__":
    cli.run(main)
