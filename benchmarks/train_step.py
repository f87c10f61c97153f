r"""How long a whole training step takes beside the bare network.

The bare step is forward, the mean square of the field, backward, on one pair. A
whole step reads a pair from an h5 file, augments it, and adds loss, checks, scores
and optimizer. Three kinds: the two phases of the default schedule (the first shows
one section twice; the second takes what the network itself makes of the pair for its
natural field, which is one more forward pass for three samples in five), and the
plain loss of the `classic` schedule. Ratios are of means over the same rounds, since
steps differ by chance; medians are printed, too.

Example:
    python benchmarks/train_step.py --threads 2
    python benchmarks/train_step.py --threads 2 --template scalenet --size 256
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import side_by_side
import torch
from msgspec.structs import replace
from train_data import Step, complete_step, made_pairs

from metroem import cli
from metroem.aligner import Aligner
from metroem.data.dataset import PairRef, read_sample
from metroem.nets.loading import load_module
from metroem.scaffold import init_pyramid, templates
from metroem.specs.schedule import Phase, load_schedule
from metroem.training.memory import keep_freed_memory

MIP = 3  # both schedules have it
WARM_UP_ROUNDS = 2


def main(argv: Sequence[str] | None = None) -> None:
    parser = side_by_side.parser(__doc__)
    parser.set_defaults(rounds=15)
    add = parser.add_argument
    add("--template", nargs="+", default=templates(), help="all")
    add("--size", type=int, default=512, help="px (512)")
    add("--batch_size", type=int, default=1, help="pairs a step (1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as train.py does
    figures: dict[str, Any] = {"threads": args.threads, "size": args.size}
    with tempfile.TemporaryDirectory() as folder:
        pairs = made_pairs(args.size, MIP, Path(folder))
        for template in args.template:
            aligner = fresh_aligner(template, Path(folder) / template)
            figures[template] = compare(aligner, pairs, args.rounds, args.batch_size)
            print(template, json.dumps(figures[template], indent=1))
    print(json.dumps({"torch": torch.__version__, **figures}))


def fresh_aligner(template: str, folder: Path) -> Aligner:
    """The network of a template with fresh weights."""
    (path,) = init_pyramid(folder, [MIP], template)
    torch.manual_seed(0)
    loaded = load_module(path, checkpoint_name=None, finetune=False)
    return loaded.aligner  # type: ignore[return-value]


def kinds(size: int) -> dict[str, Phase]:
    """A phase of each kind that is timed, on crops of a size, px."""
    one_section, pairs = load_schedule("scratch", None).phases[MIP][:2]
    plain = load_schedule("classic", None).phases[MIP][0]
    found = {"known_warp_one_section": one_section, "known_warp": pairs, "plain": plain}
    return {name: replace(phase, crop_size=size) for name, phase in found.items()}


def bare_step(aligner: Aligner, pairs: list[PairRef], batch_size: int) -> Step:
    """Forward and backward of the network alone."""
    sample = read_sample(pairs[0], pairs[0].grid)
    images = torch.cat((sample.src, sample.tgt), 1).repeat(batch_size, 1, 1, 1)

    def step() -> float:
        for parameter in aligner.net.parameters():
            parameter.grad = None
        loss = aligner.net(x=images, in_field=None).square().mean()
        aligner.net.state = {}
        loss.backward()
        return float(loss.detach())

    return step


def compare(
    aligner: Aligner, pairs: list[PairRef], rounds: int, batch_size: int
) -> dict[str, Any]:
    """Mean and median seconds of each step, and their ratios to the bare one."""
    steps = {"bare": bare_step(aligner, pairs, batch_size)}
    for name, phase in kinds(pairs[0].grid.rows).items():
        steps[name] = complete_step(aligner, phase, pairs, batch_size)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + WARM_UP_ROUNDS):
        for name, step in steps.items():
            taken[name].append(_seconds(step))
    kept = {name: times[WARM_UP_ROUNDS:] for name, times in taken.items()}
    means = {name: statistics.fmean(times) for name, times in kept.items()}
    medians = {name: statistics.median(times) for name, times in kept.items()}
    return {
        "median_seconds": medians,
        "of_bare": {k: v / means["bare"] for k, v in means.items()},
        "median_of_bare": {k: v / medians["bare"] for k, v in medians.items()},
    }


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    cli.run(main)
