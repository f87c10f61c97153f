r"""Measure time, memory and reads of align-stack, by number and size of sections.

For each case a volume is made of a real stack: its sections, mirrored and turned, lie
side by side, and run back and forth along z. Then each step of align-stack runs in a
process of one thread. Times are those of the CPU, so other work on the machine hardly
changes them.

- seconds: CPU seconds a section and megapixel of the canvas, which is larger than the
  sections; without the start of the process.
- peak: most memory of the process (VmHWM), MiB; it has `start` before its first task.
- read: bytes of stored chunks that the tasks read, over the bytes that they needed, as
  their markers say; 0 for relax, which does not read the volume.

With --workers_ratio, one volume of many tasks is aligned by one worker and by two; the
figure is the ratio of tasks an hour, by the clock. The machine must be idle for it.

Example:
    python benchmarks/stack_scale.py --stack vnc_stack1.npy --pyramid work/pyramid

The last line printed is a JSON object: all figures, and how many times the largest of
each exceeds the smallest, over the numbers of sections and over the sizes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metroem.demo import environment
from metroem.errors import UsageError
from metroem.io.cloud_paths import cloud_path
from metroem.io.volume_write import write_volume
from metroem.specs.modules import find_modules
from metroem.stack.align_stack import align_stack
from metroem.stack.place import Placement
from metroem.stack.requests import STEPS, AlignStackRequest
from metroem.utils import cli

Case = tuple[int, int]  # number of sections, side in px

_CASES = ["8x512", "32x512", "128x512", "8x1024", "8x2048"]
# The case of --workers_ratio, and sections of a task: 8 tasks of each step.
_RATIO_CASE, _RATIO_SECTIONS = (32, 512), 4


def build_parser() -> argparse.ArgumentParser:
    """Define the flags."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--stack", type=Path, help=".npy, uint8 [section, rows, cols]")
    add("--pyramid", type=Path, help="a trained pyramid")
    add("--cases", nargs="+", default=_CASES, metavar="NxPX", help="volumes to align")
    add("--neighbours", type=int, default=3)
    add("--folder", type=Path, help="new folder for all volumes (one that is deleted)")
    add("--workers_ratio", action="store_true", help="only compare one and two workers")
    add("--one", type=Path, help="internal: the flags of one step")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all cases, or run the one step of --one."""
    args = build_parser().parse_args(argv)
    if args.one is not None:
        _run_one(args.one)
        return
    if args.stack is None or args.pyramid is None:
        raise UsageError("--stack and --pyramid: give both")
    stack = np.load(args.stack, mmap_mode="r")
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"--folder {folder}: holds files; name a new folder")
        if args.workers_ratio:
            figures = _compare_workers(args, stack, folder)
        else:
            figures = _measure_cases(args, stack, folder)
    print(json.dumps({"neighbours": args.neighbours, **figures}))


def _measure_cases(
    args: argparse.Namespace, stack: np.ndarray, folder: Path
) -> dict[str, Any]:
    """Measure all cases, a table each."""
    cases = [_parse_case(text) for text in args.cases]
    measured: dict[Case, dict[str, dict[str, float]]] = {}
    for case in cases:
        cv_path = _write_case(args, stack, folder, case)
        dst_path = folder / f"{cv_path.name}_aligned"
        measured[case] = {
            step: _measure_step(args, cv_path, dst_path, case, step) for step in STEPS
        }
        _print_table(case, measured[case])
    figures: dict[str, Any] = {f"{n}x{px}": measured[n, px] for n, px in cases}
    sides, numbers = min(px for _, px in cases), min(n for n, _ in cases)
    figures["by_sections"] = _ratios([measured[c] for c in cases if c[1] == sides])
    figures["by_size"] = _ratios([measured[c] for c in cases if c[0] == numbers])
    return figures


def _parse_case(text: str) -> Case:
    """Parse "8x512"."""
    num, _, side = text.partition("x")
    if not (num.isdigit() and side.isdigit()):
        raise UsageError(f"--cases {text}: expected sections and px, such as 8x512")
    return int(num), int(side)


def _write_case(
    args: argparse.Namespace, stack: np.ndarray, folder: Path, case: Case
) -> Path:
    """Write the volume of a case."""
    num, side = case
    order = np.pad(np.arange(len(stack)), (0, max(num - len(stack), 0)), mode="reflect")
    # 0 means no data; these sections have none without.
    sections = np.maximum(stack[order[:num]], 1)
    own = min(stack.shape[1:])
    while sections.shape[1] < side:
        sections = _four_times(sections[:, :own, :own])
        own = sections.shape[1]
    path = folder / f"{num}x{side}"
    mips = 1 + max(module.in_mip for module in find_modules(args.pyramid))
    write_volume(path, np.ascontiguousarray(sections[:, :side, :side]), mips)
    return path


def _four_times(sections: np.ndarray) -> np.ndarray:
    """Lay four copies of square sections side by side, (n, 2 * side, 2 * side).

    No turn or shift of the result leaves it as it is: sections that are only mirrored
    are the same after half a turn, and would be placed so.
    """
    turned = sections.swapaxes(1, 2)
    upper = np.concatenate([sections, sections[:, ::-1]], 2)
    lower = np.concatenate([turned, turned[:, :, ::-1]], 2)
    return np.concatenate([upper, lower], 1)


def _measure_step(
    args: argparse.Namespace, cv_path: Path, dst_path: Path, case: Case, step: str
) -> dict[str, float]:
    """Run one step of a case in a process of its own."""
    found = _in_process(_flags(args, cv_path, dst_path, case, steps=[step]))
    area = Placement.read(cloud_path(str(dst_path))).area
    megapixels = case[0] * area.rows * area.cols / 1e6
    read, needed = (
        sum(note["figures"].get(key, 0) for note in _markers(dst_path, step))
        for key in ("bytes_read", "bytes_needed")
    )
    return {
        "canvas_px": (area.rows * area.cols) ** 0.5,
        "seconds": found["cpu"] / megapixels,
        "wall": found["wall"] / megapixels,
        "start": found["start"],
        "peak": found["peak"],
        "read": read / needed if needed else 0.0,
    }


def _compare_workers(
    args: argparse.Namespace, stack: np.ndarray, folder: Path
) -> dict[str, Any]:
    """Compare one worker and two by the tasks that they do an hour."""
    cv_path = _write_case(args, stack, folder, _RATIO_CASE)
    figures: dict[str, Any] = {}
    for workers in (1, 2):
        dst_path = folder / f"by_{workers}"
        seconds = {}
        for step in STEPS:
            flags = _flags(args, cv_path, dst_path, _RATIO_CASE, steps=[step])
            flags |= {"workers": workers, "block_sections": _RATIO_SECTIONS}
            seconds[step] = _in_process(flags)["wall"]
        tasks = sum(len(list(_markers(dst_path, step))) for step in STEPS)
        an_hour = tasks / sum(seconds.values()) * 3600
        figures[f"{workers}"] = {"tasks": tasks, "an_hour": an_hour, "wall": seconds}
        print(f"{workers} workers: {tasks} tasks, {an_hour:.0f} an hour", flush=True)
    figures["ratio"] = figures["2"]["an_hour"] / figures["1"]["an_hour"]
    print(f"ratio {figures['ratio']:.2f}")
    return figures


def _flags(
    args: argparse.Namespace,
    cv_path: Path,
    dst_path: Path,
    case: Case,
    *,
    steps: list[str],
) -> dict[str, Any]:
    """Make the flags of align-stack."""
    return {
        "cv_path": str(cv_path),
        "dst_path": str(dst_path),
        "pyramid_path": str(args.pyramid),
        "z_start": 0,
        "z_end": case[0],
        "neighbours": args.neighbours,
        "steps": steps,
        "allow_unplaced": True,
    }


def _markers(dst_path: Path, step: str) -> Iterable[dict[str, Any]]:
    """Read the markers of the tasks of a step of --steps."""
    for path in (dst_path / "tasks").glob(f"{step}*/*.json"):
        yield json.loads(path.read_text())


def _in_process(flags: dict[str, Any]) -> dict[str, float]:
    """Run align-stack in a process of one thread; its figures."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(flags, file)
        file.flush()
        command = [sys.executable, __file__, "--one", file.name]
        env = environment() | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _run_one(path: Path) -> None:
    """Run align-stack, and print time and memory."""
    flags = json.loads(path.read_text())
    flags["pyramid_path"] = Path(flags["pyramid_path"])
    torch.set_num_threads(1)
    figures = {"start": _peak_mib()}
    cpu, wall = time.process_time(), time.perf_counter()
    align_stack(AlignStackRequest(**flags))
    figures["cpu"] = time.process_time() - cpu
    figures["wall"] = time.perf_counter() - wall
    figures["peak"] = _peak_mib()
    print(json.dumps(figures))


def _peak_mib() -> float:
    """Return the most memory that this process has had, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise UsageError("/proc/self/status has no VmHWM; run this on Linux")


def _print_table(case: Case, steps: dict[str, dict[str, float]]) -> None:
    """Print the figures of a case, and what all steps take together."""
    canvas = _together(steps)["canvas_px"]
    print(f"{case[0]} sections of {case[1]} px, canvas of {canvas:.0f} px")
    print(f"{'step':>8}{'CPU s':>10}{'wall s':>10}{'peak MiB':>10}{'read':>8}")
    for step, one in {**steps, "all": _together(steps)}.items():
        print(
            f"{step:>8}{one['seconds']:10.3f}{one['wall']:10.3f}{one['peak']:10.0f}"
            f"{one['read']:8.2f}",
            flush=True,
        )


def _together(steps: dict[str, dict[str, float]]) -> dict[str, float]:
    """Add up the seconds of all steps; take the largest of the other figures."""
    return {
        key: (sum if key in ("seconds", "wall") else max)(
            [one[key] for one in steps.values()]
        )
        for key in ("canvas_px", "seconds", "wall", "peak", "read")
    }


def _ratios(cases: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Divide the largest figure of all cases by the smallest, by step."""
    with_all = [{**steps, "all": _together(steps)} for steps in cases]
    return {
        step: {
            key: round(
                max(steps[step][key] for steps in with_all)
                / min(steps[step][key] for steps in with_all),
                3,
            )
            for key in ("seconds", "peak")
        }
        for step in with_all[0]
    }


if __name__ == "__main__":
    cli.run(main)
