r"""Compare the time of a whole training step with the bare network.

The bare step is a forward pass, the mean square of the field, and a backward pass, on
one pair. A whole step also reads the pair from an h5 file, augments it, and has the
loss, checks, scores and optimizer. Three kinds are timed: the two phases of the default
schedule, and the plain loss of the schedule `classic`. The first phase shows the same
section twice. The second needs the network's own field of the pair: one more forward
pass for three samples in five. Ratios are of means over the same rounds, since steps
differ randomly. Medians are printed, too.

Example:
    python benchmarks/train_step.py --threads 2
    python benchmarks/train_step.py --threads 2 --template scalenet --size 256
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import side_by_side
import torch
from msgspec.structs import replace

from metroem.aligner import Aligner
from metroem.data.dataset import PairRef, find_pairs, read_sample
from metroem.data.sample import Sample, stack_samples
from metroem.data.sampling import EpochSeed, TrainingEpoch
from metroem.geometry.grid import Grid
from metroem.imaging.normalize import normalize
from metroem.io.h5 import ImageSetMeta, Pair, PairLocation, write_image_set
from metroem.models.load import load_module
from metroem.models.module_folders import init_pyramid
from metroem.models.requests import templates
from metroem.specs.schedule import Phase, load_schedule
from metroem.synthetic.tissue import TissueRecipe, make_tissue
from metroem.training.model import TrainingModel
from metroem.training.step import train_step
from metroem.training.targets import EarlierStages
from metroem.utils import cli
from metroem.utils.memory import keep_freed_memory

MIP = 3  # both schedules have it
WARM_UP_ROUNDS = 2

Step = Callable[[], object]
Batches = Iterator[tuple[Sample, torch.Generator]]


def main(argv: Sequence[str] | None = None) -> None:
    """Time the steps of each template; the last line is one JSON object."""
    parser = side_by_side.parser(__doc__)
    parser.set_defaults(rounds=15)
    add = parser.add_argument
    add("--template", nargs="+", default=templates(), help="templates (all)")
    add("--size", type=int, default=512, help="px (512)")
    add("--batch_size", type=int, default=1, help="pairs per step (1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as train.py does
    figures: dict[str, Any] = {"threads": args.threads, "size": args.size}
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(Path(folder), 2, args.size)
        for template in args.template:
            aligner = fresh_aligner(template, Path(folder) / template)
            figures[template] = compare(aligner, pairs, args.rounds, args.batch_size)
            print(template, json.dumps(figures[template], indent=1))
    print(json.dumps({"torch": torch.__version__, **figures}))


def make_pairs(folder: Path, num_pairs: int, size: int) -> list[PairRef]:
    """Write an image set of synthetic tissue, `size` x `size` px; return its pairs."""
    tissue = make_tissue(TissueRecipe(num_pairs + 1, size, size))
    images = [normalize(torch.from_numpy(section)).numpy() for section in tissue]
    grid = Grid(MIP, 0, 0, size, size)
    frames = [PairLocation(grid, (z + 1, z)) for z in range(num_pairs)]
    pairs = [Pair(images[z + 1], images[z]) for z in range(num_pairs)]
    meta = ImageSetMeta(frames, "made", "", {}, normalization={"kind": "tissue"})
    write_image_set(folder / f"x0_y0_z1_MIP{MIP}.h5", pairs, meta)
    return find_pairs(folder, MIP, stage=0, checkpoint_name="checkpoint")


def fresh_aligner(template: str, folder: Path) -> Aligner:
    """Make the network of a template, always with the same fresh weights."""
    (path,) = init_pyramid(folder, [MIP], template)
    torch.manual_seed(0)
    loaded = load_module(path, checkpoint_name=None, finetune=False)
    return loaded.aligner  # type: ignore[return-value]


def compare(
    aligner: Aligner, pairs: list[PairRef], rounds: int, batch_size: int
) -> dict[str, Any]:
    """Time all steps in turn: medians, and ratios to the bare step."""
    steps = {"bare": bare_step(aligner, pairs, batch_size)}
    for name, phase in timed_phases(pairs[0].grid.rows).items():
        model = TrainingModel(aligner, "fp32").train()
        steps[name] = whole_step(model, phase, read_batches(phase, pairs, batch_size))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + WARM_UP_ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - start)
    counted = {name: times[WARM_UP_ROUNDS:] for name, times in taken.items()}
    means = {name: statistics.fmean(times) for name, times in counted.items()}
    medians = {name: statistics.median(times) for name, times in counted.items()}
    return {
        "median_seconds": medians,
        "of_bare": {k: v / means["bare"] for k, v in means.items()},
        "median_of_bare": {k: v / medians["bare"] for k, v in medians.items()},
    }


def timed_phases(size: int) -> dict[str, Phase]:
    """Choose one phase of each kind, with crops of the given size, px."""
    one_section, pairs = load_schedule("scratch", None).phases[MIP][:2]
    plain = load_schedule("classic", None).phases[MIP][0]
    found = {"known_warp_one_section": one_section, "known_warp": pairs, "plain": plain}
    return {name: replace(phase, crop_size=size) for name, phase in found.items()}


def bare_step(aligner: Aligner, pairs: list[PairRef], batch_size: int) -> Step:
    """Make a step: forward and backward pass of the network alone."""
    sample = read_sample(pairs[0], pairs[0].grid)
    images = torch.cat((sample.src, sample.tgt), 1).repeat(batch_size, 1, 1, 1)

    def step() -> None:
        for parameter in aligner.net.parameters():
            parameter.grad = None
        loss = aligner.net(x=images, in_field=None).square().mean()
        aligner.net.state = {}
        loss.backward()

    return step


def whole_step(
    model: TrainingModel,
    phase: Phase,
    batches: Iterator[tuple[Sample, torch.Generator]],
) -> Step:
    """Make a training step as in train.py; each call takes the next batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=phase.lr, fused=True)
    phase = replace(phase, accumulate=1)
    earlier = EarlierStages(0, (), "checkpoint", next(model.parameters()).device)
    return lambda: train_step(
        model, optimizer, [next(batches)[0]], phase, earlier, loss_seed=(0,), stop=0
    )


def read_batches(phase: Phase, pairs: list[PairRef], batch_size: int) -> Batches:
    """Yield batches without end; each is read when it is needed."""
    epoch = 0
    while True:
        seed = EpochSeed(0, 0, 0, epoch)
        samples = TrainingEpoch(pairs, phase, seed, batch_size=batch_size)
        for first in range(0, len(samples), batch_size):
            batch = [samples[first + i] for i in range(batch_size)]
            yield stack_samples(batch), seed.generator(-1 - first)
        epoch += 1


if __name__ == "__main__":
    cli.run(main)
