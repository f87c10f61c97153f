r"""Train a pyramid for half an hour on a CPU, and measure how well it aligns.

The first sections of a stack are written as a CloudVolume. download_image.py, metroem
init and train are run on them as by a user. The last sections are aligned in the
cases of a bench that also runs classical methods (the peers). Then a page of figures,
loss curves and pictures is written. Sections of the stack must be aligned by the
imaging itself (FIB-SEM), so that the truth is exact.

The bench computes the peers' results, in an environment that has the peers:
    python BENCH/run.py --stack STACK:50: --exact --cases A,B,C --magnitudes 12,30,60 \
        --limit 6 --out peers.json \
        --peers identity,dis,tvl1,blockmatch,sitk_demons,elastix,ants_syn

Example:
    python benchmarks/quality.py --stack fib25_a.npy --bench ../shared/bench \
        --peers_json peers.json --out quality
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from quality_cases import Cases, check, epe_by_steps, load_bench, picked
from quality_page import Page, Pair, save_curves, save_pair, write_page
from quality_results import (
    FULL,
    METHODS,
    NONE,
    Bar,
    Checks,
    Results,
    bar_of_distilling,
    bar_of_other_tissue,
    bar_of_training,
    bars_of_cases,
)

from metroem.demo import Run, environment, run_steps
from metroem.errors import MetroEMError, UsageError
from metroem.evaluation.report.curves import main_curves, read_curves
from metroem.evaluation.tables import print_json, write_json
from metroem.io.volume_write import write_volume
from metroem.models.weights import checkpoint_path
from metroem.specs.modules import find_modules
from metroem.synthetic.requests import SCHEDULE
from metroem.utils import cli

logger = logging.getLogger("metroem.benchmarks.quality")

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("train", "score", "other", "distil", "page")
CASES = ("--exact", "--cases", "A,B,C", "--magnitudes", "12,30,60")
OTHER_CASES = ("--cases", "A", "--magnitudes", "12,30")
OTHER_LIMIT = 4
OTHER_PEERS = "identity,dis,tvl1,blockmatch,elastix,sitk_demons"


@dataclass(frozen=True)
class QualityRequest:
    """The flags of this script.

    Raises:
        UsageError: a file is missing, or a part lacks a flag that it needs.
    """

    stack: Path
    bench: Path
    peers_json: Path
    out: Path
    mips: list[int]
    other_stack: Path | None = None
    other_peers_json: Path | None = None
    peers_python: Path | None = None
    pyramid_path: Path | None = None
    distilled_path: Path | None = None
    parts: list[str] | None = None
    page: Path = ROOT / "benchmarks" / "quality.md"
    train_mode: str = "aligned"
    train_params_path: Path | None = None
    num_train: int = 45
    score_from: int = 50
    limit: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for flag in ("stack", "peers_json", "other_stack", "other_peers_json"):
            path = getattr(self, flag)
            if path is not None and not path.is_file():
                raise UsageError(f"--{flag} {path}: no such file")
        load_bench(self.bench)
        for part, flag in (("other", "other_stack"), ("distil", "distilled_path")):
            if part in (self.parts or ()) and getattr(self, flag) is None:
                raise UsageError(f"--parts {part}: expected --{flag} beside it")
        if "train" in (self.parts or ()) and self.pyramid_path is not None:
            raise UsageError("--parts train: expected no --pyramid_path beside it")

    @property
    def todo(self) -> list[str]:
        """The parts to do, in order; all possible ones if none are named."""
        missing = {
            "train": self.pyramid_path is not None,
            "other": self.other_stack is None,
            "distil": self.distilled_path is None,
        }
        if self.parts is None:
            return [part for part in PARTS if not missing.get(part)]
        return [part for part in PARTS if part in self.parts]

    @property
    def pyramid(self) -> str:
        """The pyramid that is scored."""
        return str((self.pyramid_path or self.out / "pyramid").resolve())

    @property
    def pictures(self) -> Path:
        """The folder of the page's pictures."""
        return self.page.with_suffix("")

    @property
    def held_out(self) -> str:
        """The sections that are scored, in the notation of the bench."""
        return f"{self.stack}:{self.score_from}:"


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Define the flags of `QualityRequest`."""
    parser = cli.parser(description)
    add = parser.add_argument
    add("--stack", type=Path, required=True, help=".npy, uint8 [section, rows, cols]")
    add("--bench", type=Path, required=True, help="folder of the bench")
    add("--peers_json", type=Path, required=True, help="the peers' results")
    add("--out", type=Path, required=True, help="folder for all results")
    add("--other_stack", type=Path, help="sections of another tissue (.npy)")
    add("--other_peers_json", type=Path, help="the peers' results on them")
    add(
        "--peers_python",
        type=Path,
        help="python that has the peers, to run them",
    )
    add("--pyramid_path", type=Path, help="a trained pyramid (trains one in --out)")
    add("--distilled_path", type=Path, help="a pyramid trained with `distil`")
    parts = "parts to do (all possible); earlier ones are read from --out"
    add("--parts", nargs="+", choices=PARTS, help=parts)
    page = Path("benchmarks/quality.md")
    add("--page", type=Path, default=ROOT / page, help=f"page to write ({page})")
    add = parser.add_argument_group("training and cases").add_argument
    add("--mips", type=int, nargs="+", default=[1, 0], help="of the stages (1 0)")
    add("--train_mode", default="aligned", help="as train.py has it (aligned)")
    add("--train_params_path", type=Path, help="as train.py has it")
    add("--num_train", type=int, default=45, help="sections to train on (45)")
    add("--score_from", type=int, default=50, help="first section to score (50)")
    add("--limit", type=int, default=6, help="pairs per family and kind (6)")
    add("--seed", type=int, default=0, help="of the training and the cases (0)")
    return parser


def main() -> None:
    """Run the parts; the last line printed is one JSON object."""
    request = QualityRequest(**vars(build_parser(__doc__).parse_args()))
    request.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, object] = {"parts": request.todo}
    for part in request.todo:
        figures |= {
            "train": train,
            "score": score,
            "other": score_other,
            "distil": score_distilled,
            "page": make_page,
        }[part](request)
    print_json(figures)


def train(request: QualityRequest) -> dict[str, object]:
    """Write the volume, run the scripts, and save their times."""
    images = np.load(request.stack, mmap_mode="r")[: request.num_train]
    side = min(images.shape[1:]) >> max(request.mips) << max(request.mips)
    run = Run(
        request.out,
        range(len(images)),
        (0, 0),
        side,
        tuple(request.mips),
        request.train_params_path or SCHEDULE,
        request.seed,
    )
    if run.pyramid.exists():
        raise UsageError(
            f"--out {request.out}: a pyramid already exists there; name a new folder, "
            f"or leave the training out: --pyramid_path {run.pyramid}"
        )
    # The bench takes the whole stack as tissue, so 0 becomes 1.
    write_volume(run.volume, np.maximum(images, 1), max(run.mips) + 1)
    _, download, init, _ = run.commands()
    training = train_command(request, run)
    names = ("download", "init", "train")
    seconds = run_steps([download, init, training])
    words = [Path(word).name if "/" in word else word for word in training]
    timing = dict(zip(names, seconds, strict=True))
    record = {
        "sections": len(images),
        "command": f"metroem {' '.join(words)}",
        "seconds": timing,
    }
    write_json(request.out / "training.json", record)
    return {f"seconds_{name}": value for name, value in timing.items()}


def train_command(request: QualityRequest, run: Run) -> list[str]:
    """Build the command of metroem that trains, as a user types it."""
    command = ["train", "--pyramid_path", str(run.pyramid)]
    command += ["--dataset_path", str(run.folder / "dataset")]
    command += ["--train_mode", request.train_mode]
    command += ["--seed", str(request.seed)]
    if request.train_params_path is not None:
        command += ["--train_params_path", str(request.train_params_path)]
    if len(run.mips) > 1:  # nobody needs fields of the last stage
        before_last = [str(stage) for stage in range(len(run.mips) - 1)]
        command += ["--generate_field_stages", *before_last]
    return command


def score(request: QualityRequest) -> dict[str, object]:
    """Run the bench on the held-out sections, then measure the rest ourselves."""
    for module in find_modules(Path(request.pyramid)):
        weights = checkpoint_path(module.weights_folder, "checkpoint")
        if not weights.is_file():
            raise UsageError(f"{weights}: no such weights; train the pyramid first")
    cases = [*CASES, "--limit", str(request.limit)]
    path = request.out / "ours.json"
    run_bench(request, [*cases, "--stack", request.held_out, "--out", str(path)])
    made = Cases(request.bench, request.held_out, request.seed)
    checks = check(made, Results.read(path), request.pyramid)
    write_json(request.out / "checks.json", checks._asdict())
    return {}


def score_other(request: QualityRequest) -> dict[str, object]:
    """Run the bench on the other tissue; the peers too, if --peers_python has them."""
    cases = [*OTHER_CASES, "--limit", str(min(request.limit, OTHER_LIMIT))]
    cases += ["--stack", str(request.other_stack)]
    run_bench(request, [*cases, "--out", str(request.out / "other.json")])
    if request.peers_python is not None:
        path = request.out / "other_peers.json"
        peers = ["--peers", OTHER_PEERS, "--seed", str(request.seed)]
        script_path = str(request.bench / "run.py")
        command = [str(request.peers_python), script_path, *cases, *peers]
        call([*command, "--out", str(path)], dict(os.environ))
    return {}


def score_distilled(request: QualityRequest) -> dict[str, object]:
    """Measure how much finetuning the pyramid needs, and the distilled one."""
    records = Results.read(request.out / "ours.json").of(FULL, "B")
    cases = Cases(request.bench, request.held_out, request.seed)
    distilled = str(request.distilled_path)
    figures: dict[str, object] = {
        "without": epe_by_steps(cases, records, request.pyramid),
        "distilled": epe_by_steps(cases, records, distilled),
    }
    write_json(request.out / "distil.json", figures)
    return {}


def run_bench(request: QualityRequest, flags: list[str]) -> None:
    """Run our methods in the bench."""
    adapter = Path(__file__).with_name("bench_adapter.py")
    command = [sys.executable, str(request.bench / "run.py"), "--peers", "none"]
    for method, (function, _) in METHODS.items():
        command += ["--adapter", f"{method}={adapter}:{function}"]
    command += ["--adapter-params", json.dumps({"pyramid": request.pyramid})]
    call([*command, "--seed", str(request.seed), *flags], environment())


def call(command: list[str], environment: dict[str, str]) -> None:
    """Run a program, showing it as typed; MetroEMError if it fails."""
    logger.info("\n$ %s", " ".join(command))
    result = subprocess.run(command, env=environment)
    if result.returncode:
        raise MetroEMError(
            f"{' '.join(command)}\nended with exit code {result.returncode}; its "
            "output is above"
        )


def make_page(request: QualityRequest) -> dict[str, object]:
    """Write the page from the files of the other parts; return the bars."""
    results = Results.read(request.out / "ours.json")
    results = results.with_peers(Results.read(request.peers_json))
    other = read_other(request)
    checks = read_json(request.out / "checks.json")
    if not checks:
        raise UsageError(f"--out {request.out}: no checks.json; --parts score makes it")
    bars = bars_of_cases(results, Checks(**checks))
    training = read_json(request.out / "training.json")
    bars += other_bars(request, other, training)
    page = Page(
        shown_command(request),
        bars,
        results,
        other,
        draw_curves(request),
        draw_pairs(request, results),
        [training_note(training), peers_note(request, results)],
    )
    write_page(request.page, page)
    logger.info("wrote %s", request.page)
    return {"bars": bars, "met": sum(bool(bar.is_met) for bar in bars)}


def other_bars(
    request: QualityRequest, other: Results | None, training: dict[str, Any]
) -> list[Bar]:
    """Compute the bars that need more than the stack's own cases."""
    bars = [] if other is None else [bar_of_other_tissue(other)]
    bars.append(bar_of_training(training.get("seconds", {}).get("train")))
    distil = read_json(request.out / "distil.json")
    if distil:
        epes = [
            {int(steps): epe for steps, epe in distil[key].items()}
            for key in ("without", "distilled")
        ]
        bars.append(bar_of_distilling(*epes))
    return bars


def read_other(request: QualityRequest) -> Results | None:
    """Read the results on the other tissue, ours and the peers', if both exist."""
    measured = request.out / "other_peers.json"
    peers = request.other_peers_json or measured
    if not (request.out / "other.json").is_file() or not peers.is_file():
        logger.warning("another tissue: not measured, or without peers")
        return None
    ours = Results.read(request.out / "other.json")
    return ours.with_peers(Results.read(peers))


def read_json(path: Path) -> dict[str, Any]:
    """Read the file of an earlier part; {} if the part was not done."""
    return json.loads(path.read_text()) if path.is_file() else {}


def draw_curves(request: QualityRequest) -> str | None:
    """Draw the loss curves; None for a pyramid that was not trained here."""
    metrics = Path(request.pyramid) / ".train" / "checkpoint" / "metrics.jsonl"
    if not metrics.is_file():
        logger.warning("%s: no such file, so there are no loss curves", metrics)
        return None
    path = request.pictures / "curves.png"
    save_curves(path, main_curves(read_curves(metrics)))
    return f"{path.parent.name}/{path.name}"


def draw_pairs(request: QualityRequest, results: Results) -> dict[str, list[Pair]]:
    """Draw the best, the median and the worst pair of each family."""
    cases = Cases(request.bench, request.held_out, request.seed)
    pairs: dict[str, list[Pair]] = {}
    for family in "ABC":
        pairs[family] = []
        for which, record in picked(results, family).items():
            path = request.pictures / f"{family}_{which}.png"
            save_pair(path, cases.solve(record, request.pyramid))
            name = f"{path.parent.name}/{path.name}"
            pairs[family].append(Pair(which, record["case"], record["epe_mean"], name))
    return pairs


def shown_command(request: QualityRequest) -> str:
    """Write the command that makes the page, with short paths."""
    words = ["python benchmarks/quality.py"]
    for field in fields(request):
        value = getattr(request, field.name)
        if value == field.default or value is None or field.name in ("parts", "page"):
            continue
        if field.name in ("stack", "bench", "other_stack"):
            value = os.path.relpath(value, ROOT)
        elif isinstance(value, Path):
            value = value.name
        elif isinstance(value, list):
            value = " ".join(str(item) for item in value)
        words.append(f"--{field.name} {value}")
    return " \\\n    ".join(words)


def training_note(training: dict[str, Any]) -> str:
    """Describe how the pyramid was trained."""
    if not training:
        return "The pyramid was trained before."
    minutes = training["seconds"]["train"] / 60
    return (
        f"Trained on sections 0 to {training['sections'] - 1} by "
        f"`{training['command']}`: {minutes:.1f} minutes of wall time."
    )


def peers_note(request: QualityRequest, results: Results) -> str:
    """Describe how the peers were run."""
    stack = f"{request.stack.name}:{request.score_from}:"
    cases = " ".join([*CASES, "--limit", str(request.limit)])
    return (
        f"{request.peers_json.name} is from the same bench on the same cases: `run.py "
        f"--stack {stack} {cases} --peers {','.join([NONE, *results.peers])}`."
    )


if __name__ == "__main__":
    cli.run(main)
