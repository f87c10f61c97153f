r"""Time training, finetuning, fields and loading on a GPU, relative to bare operations.

Each part is timed for each batch size and precision, with and without torch.compile. A
training step and a field are compared with the bare network, run by torch. A step of
the finetuner is compared with the bare warp. Steps run in two ways: as in `train.py`,
with the passes of the network recorded as CUDA graphs, and with torch starting one
operation at a time. For steps of training and of the finetuner, the lines that make the
host wait for the GPU are listed (null on a CPU).

Example:
    python benchmarks/gpu.py --compiled 1 16 --profile profile.txt
    python benchmarks/gpu.py --device cpu --size 64 --batches 1 2 --precisions fp32
"""

import json
import platform
import statistics
import tempfile
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from side_by_side import MIN_ROUNDS, parser
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from train_step import fresh_aligner, make_pairs, timed_phases, whole_step

from metroem.aligner import Aligner
from metroem.data.dataset import PairRef
from metroem.data.sample import Sample, stack_samples
from metroem.data.sampling import EpochSeed, TrainingEpoch
from metroem.errors import UsageError
from metroem.finetune.adam import FieldAdam
from metroem.finetune.analytic_loss import AdamOptions, AnalyticLoss
from metroem.imaging.loss_weights import PairWeight
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase
from metroem.training.compile import compile_network
from metroem.training.model import TrainingModel
from metroem.utils import cli
from metroem.utils.cuda_graphs import RecordedStep

Part = Callable[[], object]

_NUM_FEATURES = 7
_WARM_UP = 5  # calls of each part that are not counted; the fourth records
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}


class Kind(NamedTuple):
    """How a network is run."""

    precision: str  # "fp32" or "bf16"
    is_compiled: bool = False
    is_recorded: bool = False


def build_parser() -> ArgumentParser:
    """Define the flags."""
    made = parser(__doc__)
    add = made.add_argument
    add("--device", default="cuda", help="cuda or cpu (cuda)")
    add("--size", type=int, default=512, help="side of an image, px (512)")
    add("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    add("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    add(
        "--compiled",
        type=int,
        nargs="*",
        default=[],
        metavar="BATCH",
        help="batch sizes to measure with torch.compile, too (none)",
    )
    add("--profile", type=Path, help="file for tables of torch's profiler")
    return made


class Bench:
    """A fresh network and a batch on a device."""

    def __init__(
        self, folder: Path, device: torch.device, batch: int, pairs: list[PairRef]
    ) -> None:
        """Make the network and the batches.

        Args:
            folder: new, for pyramids.
            device: for the network and the batches.
            batch: pairs per step.
            pairs: square, at least as many as a batch has.
        """
        self.folder, self.device = folder, device
        self.batch, self.pairs = batch, pairs
        self.size = pairs[0].grid.rows
        self.aligner = fresh_aligner("correlation", folder / "eager").to(device)
        self._compiled: dict[str, Aligner] = {}
        self.phase = Phase(
            lr=1e-4,
            num_epochs=1,
            smoothness=20.0,
            crop_size=self.size,
            losses=(LossSpec(type="plain"),),
        )
        # The second phase, on pairs, also needs the network's own field.
        self.default_phase = timed_phases(self.size)["known_warp"]
        self.sample: Sample = self._load(self.phase).to(device)
        self.default_sample: Sample = self._load(self.default_phase).to(device)

    def _load(self, phase: Phase) -> Sample:
        seed = EpochSeed(0, 0, 0, 0)
        epoch = TrainingEpoch(self.pairs, phase, seed, batch_size=self.batch)
        return stack_samples([epoch[i] for i in range(self.batch)])

    def load(self) -> Part:
        """Read, crop and stack a batch, and copy it to the device."""
        return lambda: self._load(self.phase).to(self.device)

    def load_default(self) -> Part:
        """The same as `load`, with the augmentations of the default schedule."""
        return lambda: self._load(self.default_phase).to(self.device)

    def bare_network(self, kind: Kind) -> Part:
        """Forward and backward pass of the network alone."""
        model = self._model(kind)

        def run() -> None:
            model.zero_grad(set_to_none=True)
            model(self.sample, ()).field.square().mean().backward()

        return run

    def train_step(self, kind: Kind) -> Part:
        """A training step with the plain loss: network, loss, checks, optimizer."""
        return self._step(kind, self.phase, self.sample)

    def default_step(self, kind: Kind) -> Part:
        """The same by the default schedule: needs the network's own field, too."""
        return self._step(kind, self.default_phase, self.default_sample)

    def _step(self, kind: Kind, phase: Phase, sample: Sample) -> Part:
        generator = torch.Generator().manual_seed(0)
        model = self._model(kind).train()
        return whole_step(model, phase, repeat((sample, generator)))

    def forward(self, kind: Kind) -> Part:
        """Forward pass of the network alone, without gradients."""
        model = self._model(kind)

        def run() -> None:
            with torch.no_grad():
                model(self.sample, ())

        return run

    def generate(self, *, finetune: bool) -> Part:
        """Compute a field as it is written between stages, in float32."""
        options = self.aligner.options.updated({"finetune": finetune})
        return lambda: self.aligner.align(
            self.sample.src, self.sample.tgt, options=options
        )

    def search(self) -> tuple[Part, AnalyticLoss, Tensor]:
        """A step of the finetuner, its loss, and the field it starts from."""
        loss, start = field_loss(self.device, self.batch, self.size)
        search = FieldAdam(start, loss.options)
        step = RecordedStep(lambda: search.step(*loss.with_gradient(search.field)))
        return lambda: step(self.device), loss, start

    def search_by_torch(self) -> Part:
        """The same step, with torch starting each operation alone."""
        loss, start = field_loss(self.device, self.batch, self.size)
        search = FieldAdam(start, loss.options)

        def run() -> None:
            with (
                patch(
                    "metroem.finetune.analytic_loss.can_use_triton", return_value=False
                ),
                patch("metroem.finetune.adam.can_use_triton", return_value=False),
            ):
                search.step(*loss.with_gradient(search.field))

        return run

    def _model(self, kind: Kind) -> TrainingModel:
        """Wrap the network as `train.py` does; recorded only if the kind says so."""
        aligner = self.aligner
        if kind.is_compiled:
            if kind.precision not in self._compiled:
                folder = self.folder / kind.precision
                fresh = fresh_aligner("correlation", folder).to(self.device)
                compile_network(fresh)
                self._compiled[kind.precision] = fresh
            aligner = self._compiled[kind.precision]
        return TrainingModel(aligner, kind.precision, is_recorded=kind.is_recorded)


def field_loss(
    device: torch.device, batch: int, size: int
) -> tuple[AnalyticLoss, Tensor]:
    """Make a loss on random features with masks, and a smooth field of some pixels."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, batch, _NUM_FEATURES, size, size, generator=generator)
    start = 3 * torch.nn.functional.interpolate(
        torch.randn(batch, 2, 4, 4, generator=generator), (size, size), mode="bicubic"
    )
    weight = torch.ones(batch, 1, size, size)
    weight[..., size // 4 : size // 3, :] = 0
    pair = PairWeight(weight.to(device), weight.mT.contiguous().to(device))
    src, tgt = features.to(device)
    options = AdamOptions(l2=0.0, border=2)
    return AnalyticLoss((src, tgt), (pair, pair), options), start.to(device)


def bare_warp(loss: AnalyticLoss, start: Tensor) -> Part:
    """`F.grid_sample` of equally many features, with its backward pass to the field."""
    size = start.shape[-1]
    src = torch.randn(len(start), _NUM_FEATURES, size, size, device=start.device)
    theta = torch.eye(2, 3, device=start.device).expand(len(start), -1, -1)
    here = torch.nn.functional.affine_grid(theta, [len(start), 1, size, size], False)

    def run() -> None:
        leaf = start.clone().requires_grad_()
        grid = here + leaf.permute(0, 2, 3, 1) * (2 / size)
        warped = torch.nn.functional.grid_sample(src, grid, align_corners=False)
        torch.autograd.grad(warped, leaf, src)

    return run


def differences_from_cpu(bench: Bench) -> dict[str, float]:
    """Compare the device with a CPU, as fractions of the CPU's largest value.

    Returns:
        Fractions for the network's field, the finetuner's loss, and its gradient.
    """
    sample = bench.sample
    images = sample.src[:1], sample.tgt[:1]
    on_device = bench.aligner.predict(*images).field.detach().cpu()
    bench.aligner.to("cpu")
    on_cpu = bench.aligner.predict(*(image.cpu() for image in images)).field.detach()
    bench.aligner.to(bench.device)
    loss, start = field_loss(bench.device, 1, bench.size)
    found = [value.cpu() for value in loss.with_gradient(start)]
    loss, start = field_loss(torch.device("cpu"), 1, bench.size)
    pairs = zip((on_cpu, *loss.with_gradient(start)), (on_device, *found), strict=True)
    fractions = [float((a - b).abs().max() / a.abs().max()) for a, b in pairs]
    return dict(zip(("field", "loss", "gradient"), fractions, strict=True))


def host_syncs(part: Part, device: torch.device) -> list[str] | None:
    """List the lines of a part that make the host wait for the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    part()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            part()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [
        f"{Path(one.filename).name}:{one.lineno}"
        for one in caught
        if "synchroniz" in str(one.message)
    ]


def seconds_of(parts: dict[str, Part], rounds: int, device: torch.device) -> dict:
    """Time the parts in turn: median seconds, after rounds that are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds + _WARM_UP):
        for name, part in parts.items():
            wait(device)
            start = time.perf_counter()
            part()
            wait(device)
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[_WARM_UP:]) for name, times in taken.items()}


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Measure how fast the device copies: bytes read and written, GB/s."""
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    taken = seconds_of({"copy": lambda: target.copy_(source)}, rounds, device)
    return 2 * _COPY_BYTES[device.type] / taken["copy"] / 1e9


def time_network(bench: Bench, args: Namespace, precision: str, compiled: bool) -> dict:
    """Time the passes and steps of the network, with ratios to the bare network."""
    unrecorded = Kind(precision, compiled)
    recorded = unrecorded._replace(is_recorded=True)  # as train.py runs it
    parts = {
        "bare_network": bench.bare_network(unrecorded),
        "bare_network_recorded": bench.bare_network(recorded),
        "train_step_not_recorded": bench.train_step(unrecorded),
        "train_step": bench.train_step(recorded),
        "default_step_not_recorded": bench.default_step(unrecorded),
        "default_step": bench.default_step(recorded),
        "forward": bench.forward(unrecorded),
        "forward_recorded": bench.forward(recorded),
    }
    seconds = seconds_of(parts, args.rounds, bench.device)
    steps = ("train_step", "default_step")
    ratios = {
        f"{name}_per_bare": seconds[name] / seconds["bare_network"] for name in steps
    }
    gains = {
        f"{name}_gain": seconds[f"{name}_not_recorded"] / seconds[name]
        for name in steps
    }
    return {
        "seconds": seconds,
        **ratios,
        **gains,
        "pairs_per_second": bench.batch / seconds["train_step"],
        "host_syncs": host_syncs(parts["train_step"], bench.device),
        "default_host_syncs": host_syncs(parts["default_step"], bench.device),
    }


def time_rest(bench: Bench, args: Namespace) -> dict:
    """Time fields, loading and a step of the finetuner, in float32."""
    step, loss, start = bench.search()
    parts = {
        "forward": bench.forward(Kind("fp32")),
        "generate": bench.generate(finetune=False),
        "generate_finetuned": bench.generate(finetune=True),
        "load": bench.load(),
        "load_default": bench.load_default(),
        "bare_warp": bare_warp(loss, start),
        "finetuner_step": step,
        "finetuner_step_by_torch": bench.search_by_torch(),
    }
    seconds = seconds_of(parts, args.rounds, bench.device)
    by_torch = seconds["finetuner_step_by_torch"]
    return {
        "seconds": seconds,
        "generate_per_forward": seconds["generate"] / seconds["forward"],
        "finetuner_step_per_warp": seconds["finetuner_step"] / seconds["bare_warp"],
        "finetuner_step_gain": by_torch / seconds["finetuner_step"],
        "host_syncs": host_syncs(step, bench.device),
    }


def write_profile(bench: Bench, path: Path) -> None:
    """Write tables of torch's profiler for steps of training and of the finetuner."""
    kinds = [ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if bench.device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
        key = "self_device_time_total"
    parts = {
        "train_step_not_recorded": bench.train_step(Kind("fp32")),
        "train_step": bench.train_step(Kind("fp32", is_recorded=True)),
        "default_step": bench.default_step(Kind("fp32", is_recorded=True)),
        "finetuner_step": bench.search()[0],
    }
    tables = []
    for name, part in parts.items():
        for _ in range(_WARM_UP):
            part()
        with profile(activities=kinds) as found:
            part()
            wait(bench.device)
        averages = found.key_averages()
        tables.append(f"{name}\n{averages.table(sort_by=key, row_limit=30)}\n")
    path.write_text("\n".join(tables))


def describe(device: torch.device) -> str:
    """Name the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"


def show(name: str, found: dict) -> None:
    """Print the figures of one row."""
    times = ", ".join(f"{k} {1000 * v:.2f} ms" for k, v in found["seconds"].items())
    ratios = ", ".join(f"{k} {v:.3g}" for k, v in found.items() if isinstance(v, float))
    print(f"{name}: {times}; {ratios}; host waits: {found['host_syncs']}", flush=True)


def measure(args: Namespace, folder: Path) -> dict[str, Any]:
    """Measure every row, and print each at once."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    bandwidth = copy_bandwidth(device, args.rounds)
    print(f"{describe(device)}: copies {bandwidth:.1f} GB/s")
    pairs = make_pairs(folder, max(args.batches), args.size)
    rows: dict[str, Any] = {}
    for batch in args.batches:
        bench = Bench(folder / str(batch), device, batch, pairs)
        for precision in args.precisions:
            for compiled in (False, True) if batch in args.compiled else (False,):
                name = f"batch {batch}, {precision}{', compiled' if compiled else ''}"
                rows[name] = time_network(bench, args, precision, compiled)
                show(name, rows[name])
        if batch == args.batches[0]:
            rows["differs_from_cpu"] = differences_from_cpu(bench)
            print(f"differs from a CPU by {rows['differs_from_cpu']}", flush=True)
        name = f"batch {batch}, finetuner, generation and loader"
        rows[name] = time_rest(bench, args)
        show(name, rows[name])
        if args.profile and batch == args.batches[0]:
            write_profile(bench, args.profile)
    return {"device": describe(device), "copy_gb_per_second": bandwidth, "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; the last line is one JSON object."""
    args = build_parser().parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device {args.device}: no GPU here; try --device cpu")
    if args.rounds < MIN_ROUNDS:
        raise UsageError(f"--rounds {args.rounds}: expected at least {MIN_ROUNDS}")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    print(json.dumps({"torch": torch.__version__, "size": args.size, **found}))


if __name__ == "__main__":
    cli.run(main)
