"""The main job on real sections: how well does a new pyramid align later ones?

The sections of a stack are distorted by known smooth fields and written as a
CloudVolume; download_image.py, metroem init and train.py are run on its first part
as a user would; then pairs of later sections, not trained on, are scored.
Unless --natural is given, download_field.py is run too, on a volume of fields whose
values are known, and what it wrote is compared with them; a pyramid that trains its
own first stage needs no downloaded fields, so the scores do not depend on it.

The endpoint error (EPE) is exact where neighbours are aligned as imaged (FIB-SEM).
Other stacks have a misalignment of their own beside the known one: read the
correlation (CPC) there. --natural adds no distortion and scores CPC alone.

Example:
    python benchmarks/real_sections.py --stack fib25_a.npy --out fib25
"""

import argparse
import logging
import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from metroem import cli
from metroem.demo import (
    MARGIN_PX,
    Run,
    distort_sections,
    run_steps,
    score_sections,
    script,
)
from metroem.distort import Distortion, Section
from metroem.errors import UsageError
from metroem.field import downsample_field
from metroem.io.h5 import FieldSet
from metroem.io.volume_write import write_field_volume, write_volume
from metroem.report.scores import print_json, print_scores
from metroem.requests import SCHEDULE

logger = logging.getLogger("metroem.benchmarks.real_sections")

MIPS = (2, 0)
TRAIN_SHARE = 0.7  # of the sections, the first ones
FIELD_TOLERANCE_PX = 0.01  # to which h5 fields are rounded


@dataclass(frozen=True)
class BenchmarkRequest:
    """A call of this script, one field a flag."""

    stack: Path
    out: Path | None = None
    size: int = 520
    natural: bool = False
    seed: int = 0
    train_params_path: Path = SCHEDULE


def build_parser() -> argparse.ArgumentParser:
    """The flags of `BenchmarkRequest`."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--stack", type=Path, required=True, help=".npy, uint8 [section, rows, cols]")
    add("--out", type=Path, help="new folder that keeps everything (a temporary one)")
    add("--size", type=int, default=520, help="side of the centred window used, px")
    add("--natural", action="store_true", help="add no distortion")
    add("--seed", type=int, default=0, help="of the distortions and the training")
    add("--train_params_path", type=Path, default=SCHEDULE, help="the schedule (JSON)")
    return parser


def main() -> None:
    """Run the benchmark; the last line is one JSON object."""
    request = BenchmarkRequest(**vars(build_parser().parse_args()))
    if request.out is not None:
        if request.out.exists():
            raise UsageError(f"--out {request.out}: exists already; name a new folder")
        request.out.mkdir(parents=True)
        run_benchmark(request, request.out)
        return
    folder = Path(tempfile.mkdtemp(prefix="metroem-benchmark-"))
    try:
        run_benchmark(request, folder)
    finally:
        shutil.rmtree(folder)


def run_benchmark(request: BenchmarkRequest, folder: Path) -> None:
    """Write the volume, run the scripts, score, report."""
    started = time.monotonic()
    sections = read_sections(request)
    num_train, pairs = split(len(sections))
    images = np.stack([section.image for section in sections])
    side = min(images.shape[1:]) >> max(MIPS) << max(MIPS)
    run = Run(
        folder,
        range(num_train),
        (0, 0),
        side,
        MIPS,
        request.train_params_path,
        request.seed,
    )
    write_volume(run.volume, images, max(MIPS) + 1)
    logger.info("sections 0..%d to train on, pairs %s held out", num_train - 1, pairs)
    names: list[str] = ["download", "init", "train"]
    seconds: dict[str, float] = dict(zip(names, run_steps(run.commands()), strict=True))
    if not request.natural:  # else there is no known field to download
        seconds["field"], error = check_field_download(run, sections)
        logger.info(
            "download_field.py: at most %.4f px off what the volume holds (rounded to "
            "%g px)",
            *(error, FIELD_TOLERANCE_PX),
        )
    figures = score(request, run, sections, pairs)
    figures |= {f"seconds_{step}": value for step, value in seconds.items()}
    total = time.monotonic() - started
    print(f"{total:.0f} s in all, {os.cpu_count()} cores, {platform.machine()}")
    print_json({"stack": request.stack.name, **figures, "seconds": total})


def read_sections(request: BenchmarkRequest) -> list[Section]:
    """The stack's sections, distorted unless they are to stay as they are."""
    if not request.stack.is_file():
        raise UsageError(f"--stack {request.stack}: no such file")
    stack = np.load(request.stack)
    if stack.ndim != 3 or stack.dtype != np.uint8 or len(stack) < 10:
        raise UsageError(
            f"--stack {request.stack}: expected uint8 [section, rows, cols] of 10 "
            f"sections or more, got {stack.dtype} {stack.shape}"
        )
    first = [max(side - request.size, 0) // 2 for side in stack.shape[1:]]
    stack = stack[
        :, first[0] : first[0] + request.size, first[1] : first[1] + request.size
    ]
    stack = np.maximum(stack, 1)  # these stacks are tissue everywhere
    if not request.natural:
        # Noise, contrast and defects are the stack's own.
        shapes = Distortion(
            fold=0, corner=0, noise=(0, 0), contrast=0.15, brightness=12
        )
        return distort_sections(stack, shapes, MARGIN_PX, request.seed)
    none = torch.zeros(1, 2, *stack.shape[1:])
    return [Section(image, none, np.zeros(image.shape, bool)) for image in stack]


def split(num_sections: int) -> tuple[int, range]:
    """How many sections are trained on, and the pairs (their src) held out."""
    num_train = int(TRAIN_SHARE * num_sections)
    gap = max(num_sections // 13, 1)
    return num_train, range(num_train + gap + 1, num_sections)


def score(
    request: BenchmarkRequest, run: Run, sections: list[Section], pairs: range
) -> dict[str, object]:
    """Score with and without finetuning, and untrained: figures of the JSON line."""
    is_exact = not request.natural
    untrained = score_sections(
        run, sections, pairs, is_exact=is_exact, is_trained=False
    )
    figures: dict[str, object] = {
        "epe_untrained": untrained.epe[-1],
        "cpc_untrained": untrained.cpc[-1],
    }
    for suffix, finetune in (("", True), ("_net", False)):
        began = time.monotonic()
        means = score_sections(
            run, sections, pairs, finetune=finetune, is_exact=is_exact
        )
        seconds = (time.monotonic() - began) / len(pairs)
        how = "with" if finetune else "without"
        print_scores(
            means,
            MIPS,
            title=f"{request.stack.name}: {len(pairs)} pairs not trained on, {how} "
            f"finetuning, {seconds:.1f} s a pair",
            untrained=untrained,
        )
        figures |= {
            "epe_none": means.epe_none,
            f"epe{suffix}": means.epe,
            f"ratio{suffix}": means.epe[-1] / means.epe_none,
            "cpc_none": means.cpc_none,
            f"cpc{suffix}": means.cpc,
            "cpc_true": means.cpc_true,
            f"folds{suffix}": means.folds,
        }
    return figures


def check_field_download(run: Run, sections: list[Section]) -> tuple[float, float]:
    """Download the sections' known fields: seconds, and the largest error in px."""
    mip, rows, cols = max(run.mips), *sections[0].image.shape
    fields = []
    for section in sections:
        margin = (section.field.shape[-1] - cols) // 2
        inner = section.field[..., margin : margin + rows, margin : margin + cols]
        fields.append(downsample_field(inner, mip)[0].numpy())
    known = np.stack(fields)
    write_field_volume(run.folder / "fields", known, mip, (rows, cols))
    folder = run.folder / "downloaded_fields"
    command = [script("download_field.py"), "--cv_path", str(run.folder / "fields")]
    command += ["--dst_folder", str(folder), "--suffix", "known"]
    command += ["--src_mip", str(mip), "--dst_mip", str(mip)]
    command += ["--patch_size", str(run.patch_px >> mip)]
    command += ["--z_start", str(run.train.start + 1), "--z_end", str(run.train.stop)]
    command += ["--channel_order", "yx", "--field_unit", "relative"]
    (seconds,) = run_steps([command])
    (path,) = sorted(folder.glob("*.h5"))
    stored, error, side = FieldSet(path), 0.0, run.patch_px >> mip
    for index in range(stored.num_pairs):
        for which, z in enumerate((index + 1, index)):
            x, y = stored.offset(index, which)
            shift = np.array([y, x])[:, None, None] / 2**mip  # cols run along y
            found = stored.read(index, which) + shift
            wanted = known[z, :, :side, :side]
            error = max(error, float(np.abs(found - wanted).max()))
    return seconds, error


if __name__ == "__main__":
    cli.run(main)
