r"""What reading samples costs, and whether a step ever waits for them.

First the same random crops of pairs are read twice in turn: by h5py alone, just the
stored chunks that the crop touches (it cannot do without decompressing them), and as
samples of the loader, without augmentations. Then `--workers` processes feed steps
with samples of the first phase of the schedule `scratch`, augmentations and all; a
step sleeps, as the process of a GPU does, or trains the default network on this CPU.
Waited is what a step waits for its batch, but for the first two of the run: the
share of all time.

Example:
    python benchmarks/loader.py --crop_px 1024 --train_crop_px 512
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import side_by_side
import torch
from scipy import ndimage
from torch import Tensor

from metroem import cli
from metroem.aligner import Aligner
from metroem.data.dataset import PairRef, find_pairs, read_sample, window_of
from metroem.data.epoch import EpochKey, num_steps, random_crop
from metroem.data.loading import PhaseSamples, read_ahead
from metroem.data.sample import Sample
from metroem.grid import Grid
from metroem.io.h5 import (
    FieldSetMeta,
    ImageSetMeta,
    Pair,
    PairFrame,
    write_field_set,
    write_image_set,
)
from metroem.loss import LossTerms
from metroem.nets.loading import load_module
from metroem.normalize import normalize
from metroem.scaffold import init_pyramid
from metroem.specs.schedule import Phase, load_schedule
from metroem.training.model import TrainingModel
from metroem.training.objectives import levels_wanted, phase_loss
from metroem.training.step import scores_of, train_step

_MIP = 1
_NOT_COUNTED = 2  # steps: the workers have just been started
Work = Callable[[Sample], object]


def main() -> None:
    """Make a data set, read it, print what it cost."""
    parser = side_by_side.parser(__doc__)
    add = parser.add_argument
    add("--patch_px", type=int, default=2048)
    add("--crop_px", type=int, default=1024, help="read without augmentations")
    add("--train_crop_px", type=int, default=512, help="of the steps")
    add("--batch_size", type=int, default=4, help="of the steps")
    add("--workers", type=int, default=2)
    add("--epochs", type=int, default=2)
    add("--steps", type=int, default=8, help="of an epoch")
    step_ms = "steps that sleep, ms (0 takes what the workers can give)"
    add("--step_ms", type=float, nargs="*", default=[0, 250, 1000], help=step_ms)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        make_sets(Path(folder), args.patch_px)
        seconds = reading_seconds(Path(folder), args)
        figures = ratios(seconds)
        figures["feeding"] = [
            feed(Path(folder), args, name, work)
            for name, work in works(Path(folder), args)
        ]
    for found in figures["feeding"]:
        print(json.dumps(found))
    side_by_side.report(seconds, figures)


def make_sets(folder: Path, size: int) -> None:
    """Two pairs of blurred noise, (size, size), and fields of them."""
    chance = np.random.default_rng(0)
    sections = []
    for _ in range(3):
        noise = ndimage.gaussian_filter(chance.standard_normal((size, size)), 1.5)
        grey = np.clip(128 + 40 * noise / noise.std(), 1, 255).astype(np.uint8)
        sections.append(normalize(torch.from_numpy(grey)).numpy())
    grid = Grid(_MIP, 0, 0, size, size)
    frames = [PairFrame(grid, (z, z - 1)) for z in (1, 2)]
    pairs = [Pair(sections[z], sections[z - 1]) for z in (1, 2)]
    kind = {"kind": "tissue"}
    write_image_set(
        folder / f"x0_y0_z1_MIP{_MIP}.h5",
        pairs,
        ImageSetMeta(frames, "noise", "", {}, normalization=kind),
    )
    knots = chance.normal(0, 5, (2, 1, 2, 32, 32)).astype(np.float32)
    fields = [
        torch.nn.functional.interpolate(torch.from_numpy(k), (size, size))[0].numpy()
        for k in knots
    ]
    smooth = [ndimage.gaussian_filter(field, (0, 32, 32)) for field in fields]
    write_field_set(
        folder / f"field_0_x0_y0_z1_MIP{_MIP}_checkpoint.h5",
        smooth,
        FieldSetMeta(frames, "noise", "", {}, stage=0, tag="checkpoint"),
    )


def reading_seconds(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds for a pair: its chunks alone and its sample; also with prior fields."""
    contenders: dict[str, side_by_side.Contender] = {}
    for stage, name in ((0, "images"), (1, "images and prior field")):
        ref = find_pairs(folder, _MIP, stage=stage, checkpoint_name="checkpoint")[0]
        # Both see the same crops, one after the other.
        crops = [
            random_crop(ref.grid, (args.crop_px,) * 2, torch.Generator().manual_seed(i))
            for i in range(args.rounds + 1)
        ]
        chunks, whole = iter(crops), iter(crops)
        contenders[f"chunks of {name}"] = _reader(ref, chunks, read_chunks)
        contenders[f"sample, {name}"] = _reader(ref, whole, read_sample)
    return side_by_side.median_seconds(contenders, args.rounds)


def _reader(
    ref: PairRef, crops: Iterator[Grid], read: Callable[[PairRef, Grid], object]
) -> side_by_side.Contender:
    return lambda: read(ref, next(crops))


def read_chunks(ref: PairRef, crop: Grid) -> list[np.ndarray]:
    """All of the stored chunks that a crop touches, by h5py alone."""
    found = []
    files = [(ref.images.path, "img")]
    files += [(ref.prior.path, "main")] if ref.prior else []
    for path, key in files:
        with h5py.File(path, "r") as file:
            stored = file[key]
            assert isinstance(stored, h5py.Dataset) and stored.chunks is not None
            spans = zip(
                window_of(crop, ref.grid), stored.chunks[-2:], ref.grid.shape,
                strict=True,
            )  # fmt: skip
            rows, cols = (
                slice(s.start // step * step, min(-(-s.stop // step) * step, end))
                for s, step, end in spans
            )
            found.append(np.asarray(stored[ref.index, :, rows, cols]))
    return found


def ratios(seconds: dict[str, float]) -> dict[str, object]:
    """How many times the time of its chunks a sample takes, and pairs a second."""
    figures: dict[str, object] = {}
    for key, name in (("", "images"), ("_with_prior", "images and prior field")):
        sample = seconds[f"sample, {name}"]
        figures[f"times_decompressing{key}"] = sample / seconds[f"chunks of {name}"]
        figures[f"pairs_per_second_and_worker{key}"] = 1 / sample
    return figures


def phase_of(args: argparse.Namespace) -> Phase:
    """The first phase of `scratch`, at other sizes."""
    phase = load_schedule("scratch", None).for_mip(_MIP)[0]
    return replace(
        phase,
        num_epochs=args.epochs,
        num_samples=args.steps * args.batch_size,
        crop_size=args.train_crop_px,
    )


def works(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, Work]]:
    """What a step does with a batch, by name."""
    for ms in args.step_ms:
        yield f"{ms:g} ms asleep", lambda _, ms=ms: time.sleep(ms / 1000)
    path = init_pyramid(folder / "pyramid", [_MIP])[0]
    loaded = load_module(path, checkpoint_name=None, finetune=False)
    aligner: Aligner = loaded.aligner  # type: ignore[assignment]
    model, phase = TrainingModel(aligner, "fp32").train(), phase_of(args)
    optimizer = torch.optim.Adam(aligner.net.parameters(), lr=phase.lr)

    def train(sample: Sample) -> None:
        def batch() -> tuple[LossTerms, Tensor]:
            found = model(sample, levels_wanted(phase, aligner.options))
            terms = phase_loss(phase, sample, found, torch.Generator())
            return terms, scores_of(found, terms, None)

        train_step([batch], optimizer, stop=0)

    yield f"trains on a CPU, {args.threads} threads", train


def feed(
    folder: Path, args: argparse.Namespace, name: str, work: Work
) -> dict[str, object]:
    """Run the steps of a phase and say how long they waited for their samples."""
    pairs = find_pairs(folder, _MIP, stage=0, checkpoint_name="checkpoint")
    phase = phase_of(args)
    samples = PhaseSamples(
        pairs, phase, EpochKey(0, 0, 0, 0), update_size=args.batch_size
    )
    batches = samples.batches(0, args.batch_size, rank=0, ranks=1)
    waited, worked = [], []
    with closing(
        read_ahead(samples, batches, num_workers=args.workers, pin_memory=False)
    ) as ahead:
        for _ in range(args.epochs * num_steps(phase, len(pairs), args.batch_size)):
            start = time.perf_counter()
            sample = next(ahead)
            come = time.perf_counter()
            work(sample)
            waited.append(come - start)
            worked.append(time.perf_counter() - come)
        peaks = [_peak_mib(child.pid) for child in multiprocessing.active_children()]
    waits, works_ = waited[_NOT_COUNTED:], worked[_NOT_COUNTED:]
    return {
        "step": name,
        "step_seconds": sum(works_) / len(works_),
        "waited_share": sum(waits) / (sum(waits) + sum(works_)),
        "first_wait_seconds": waited[0],
        "pairs_per_second": args.batch_size * len(waits) / (sum(waits) + sum(works_)),
        "worker_peak_mib": max(peaks, default=0.0),
    }


def _peak_mib(pid: int | None) -> float:
    """Most memory that a process has had, MiB; what it shares counts too."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) / 1024


if __name__ == "__main__":
    cli.run(main)
