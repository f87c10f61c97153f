r"""Training, finetuning, generation and loading beside the bare network, on one device.

For each batch size, precision, and with and without torch.compile: the median time of
a part, and what it is to its yardstick: the bare network as torch runs it for a step of
training and for generation, the bare warp for a step of the finetuner. Steps are made
as `train.py` makes them, with the passes of the network recorded, and with those made
by torch one operation at a time. For training and finetuning the lines that make the
host wait for the GPU are listed; on a CPU that is null.

Example:
    python benchmarks/gpu.py --compiled 1 16 --profile profile.txt
    python benchmarks/gpu.py --device cpu --size 64 --batches 1 2 --precisions fp32
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_parts
import torch
from gpu_parts import Bench, Kind, Part
from side_by_side import LEAST_ROUNDS, parser
from torch.profiler import ProfilerActivity, profile

from metroem import cli
from metroem.errors import UsageError

_WARM_UP = 5  # calls of each part: passes are recorded in the fourth
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}


def build_parser() -> Any:
    made = parser(__doc__)
    add = made.add_argument
    add("--device", default="cuda", help="cuda or cpu (cuda)")
    add("--size", type=int, default=512, help="of a side, px (512)")
    add("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    add("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    add(
        "--compiled",
        type=int,
        nargs="*",
        default=[],
        metavar="BATCH",
        help="of the batches, those to measure with torch.compile, too (none)",
    )
    add("--profile", type=Path, help="file for tables of torch's profiler")
    return made


def seconds_of(parts: dict[str, Part], rounds: int, device: torch.device) -> dict:
    """Median time of each part, in turn, after rounds that do not count."""
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes read and written in a second by copying within the device, GB/s."""
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    taken = seconds_of({"copy": lambda: target.copy_(source)}, rounds, device)
    return 2 * _COPY_BYTES[device.type] / taken["copy"] / 1e9


def time_network(bench: Bench, args: Any, precision: str, compiled: bool) -> dict:
    as_torch_does = Kind(precision, compiled)
    recorded = as_torch_does._replace(is_recorded=True)  # as train.py runs it
    parts = {
        "bare_network": bench.bare_network(as_torch_does),
        "bare_network_recorded": bench.bare_network(recorded),
        "train_step_not_recorded": bench.train_step(as_torch_does),
        "train_step": bench.train_step(recorded),
        "default_step_not_recorded": bench.default_step(as_torch_does),
        "default_step": bench.default_step(recorded),
        "forward": bench.forward(as_torch_does),
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
        "host_syncs": gpu_parts.host_syncs(parts["train_step"], bench.device),
        "default_host_syncs": gpu_parts.host_syncs(parts["default_step"], bench.device),
    }


def time_rest(bench: Bench, args: Any) -> dict:
    """Generation, loading and the finetuner, in float32."""
    step, loss, start = bench.search()
    parts = {
        "forward": bench.forward(Kind("fp32")),
        "generate": bench.generate(finetune=False),
        "generate_finetuned": bench.generate(finetune=True),
        "load": bench.load(),
        "load_default": bench.load_default(),
        "bare_warp": gpu_parts.bare_warp(loss, start),
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
        "host_syncs": gpu_parts.host_syncs(step, bench.device),
    }


def write_profile(bench: Bench, path: Path) -> None:
    """Tables of where a step of training and of the finetuner spend their time."""
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
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"


def show(name: str, found: dict) -> None:
    times = ", ".join(f"{k} {1000 * v:.2f} ms" for k, v in found["seconds"].items())
    ratios = ", ".join(f"{k} {v:.3g}" for k, v in found.items() if isinstance(v, float))
    print(f"{name}: {times}; {ratios}; host waits: {found['host_syncs']}", flush=True)


def measure(args: Any, folder: Path) -> dict[str, Any]:
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    bandwidth = copy_bandwidth(device, args.rounds)
    print(f"{describe(device)}: copies {bandwidth:.1f} GB/s")
    rows: dict[str, Any] = {}
    for batch in args.batches:
        bench = Bench(folder, device, batch, args.size)
        for precision in args.precisions:
            for compiled in (False, True) if batch in args.compiled else (False,):
                name = f"batch {batch}, {precision}{', compiled' if compiled else ''}"
                rows[name] = time_network(bench, args, precision, compiled)
                show(name, rows[name])
        if batch == args.batches[0]:
            rows["differs_from_cpu"] = gpu_parts.differences_from_cpu(bench)
            print(f"differs from a CPU by {rows['differs_from_cpu']}", flush=True)
        name = f"batch {batch}, finetuner, generation and loader"
        rows[name] = time_rest(bench, args)
        show(name, rows[name])
        if args.profile and batch == args.batches[0]:
            write_profile(bench, args.profile)
    return {"device": describe(device), "copy_gb_per_second": bandwidth, "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device {args.device}: no GPU here; try --device cpu")
    if args.rounds < LEAST_ROUNDS:
        raise UsageError(f"--rounds {args.rounds}: expected at least {LEAST_ROUNDS}")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    print(json.dumps({"torch": torch.__version__, "size": args.size, **found}))


if __name__ == "__main__":
    cli.run(main)
