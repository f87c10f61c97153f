"""Run all commands on synthetic sections, and score the result against the truth.

A block of artificial tissue is cut into sections. Each is distorted by a known field
and written as a PNG file. Commands then import them, download pairs, make a pyramid and
train it, as a user types them. The pyramid is scored on later sections, whose true
fields are known.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import metroem
from metroem.errors import MetroEMError
from metroem.evaluation.scores import Score, mean_score, score_pair
from metroem.evaluation.tables import print_json, print_scores
from metroem.geometry.field import warp
from metroem.io.pictures import save_pair_picture
from metroem.synthetic.distortion import Distortion, Section, distort, true_pair
from metroem.synthetic.requests import MARKER, DemoRequest
from metroem.synthetic.tissue import TissueRecipe, make_tissue

logger = logging.getLogger(__name__)

MIPS = (2, 0)  # mip of each stage
_RESOLUTION = ("8", "8", "40")  # nm along x, y, z
MARGIN_PX = 24  # extra tissue on each side, wider than any displacement


@dataclass(frozen=True)
class Run:
    """Sections, and settings for the steps on them.

    Attributes:
        folder: contains the files `images`, the volume `sections` and all files of the
            steps.
        train: sections to train on.
        corner: (x, y) mip-0 corner of the patch.
        patch_px: side of the patch at mip 0, a multiple of 2**max(mips).
        mips: mip of each stage.
        train_params_path: the schedule.
        seed: random seed of the training.
    """

    folder: Path
    train: range
    corner: tuple[int, int]
    patch_px: int
    mips: tuple[int, ...]
    train_params_path: Path
    seed: int = 0

    @property
    def images(self) -> Path:
        """The folder of image files."""
        return self.folder / "images"

    @property
    def volume(self) -> Path:
        """The CloudVolume of the sections."""
        return self.folder / "sections"

    @property
    def pyramid(self) -> Path:
        """The folder of the pyramid."""
        return self.folder / "pyramid"

    def commands(self) -> list[list[str]]:
        """Commands of metroem: import, download pairs, make a pyramid, train it."""
        mips = [str(mip) for mip in self.mips]
        imports = ["import", str(self.images), str(self.volume)]
        imports += ["--resolution", *_RESOLUTION, "--mips", str(max(self.mips) + 1)]
        sizes = [str(self.patch_px >> mip) for mip in self.mips]
        data = str(self.folder / "dataset")
        download = ["download-image", "--cv_path", str(self.volume)]
        download += ["--dst_folder", data, "--mip", *mips, "--patch_size", *sizes]
        download += ["--x_offset", str(self.corner[0])]
        download += ["--y_offset", str(self.corner[1])]
        download += ["--z_start", str(self.train.start + 1)]
        download += ["--z_end", str(self.train.stop), "--normalize"]
        init = ["init", "--pyramid_path", str(self.pyramid), "--mip", *mips]
        train = ["train", "--pyramid_path", str(self.pyramid)]
        train += ["--dataset_path", data, "--train_mode", "custom"]
        train += ["--train_params_path", str(self.train_params_path)]
        # No later stage needs the fields of the last one.
        before_last = [str(stage) for stage in range(len(mips) - 1)]
        train += ["--generate_field_stages", *before_last]
        train += ["--seed", str(self.seed)]
        return [imports, download, init, train]


def run_demo(request: DemoRequest) -> None:
    """Make sections, train a pyramid on them, and print how well it aligns.

    The last line printed is a JSON object, means over the held-out pairs: `epe_none`
    and `epe` (px; `epe` is a list with a value per stage), `cpc_none` and `cpc`, and
    `epe_untrained` and `epe_pretrained` (px). The first of these is the error of the
    same networks and finetuner without training, the second that of the weights that
    come with the package, which need no training.

    Args:
        request: the flags.

    Raises:
        UsageError: the folder contains files of no demo.
        MetroEMError: one of the steps failed.
    """
    started = time.monotonic()
    request.check_paths()
    _clear(request.folder)
    sections = make_sections(request)
    longest = min(request.rows, request.cols)
    run = Run(
        request.folder,
        range(request.num_train),
        ((request.rows - longest) // 8 * 4, (request.cols - longest) // 8 * 4),
        longest,
        MIPS,
        request.train_params_path,
        request.seed,
    )
    run.images.mkdir()
    for z, section in enumerate(sections):
        # Rows of a section are x, rows of an image file are y.
        Image.fromarray(section.image.T).save(run.images / f"z{z:04d}.png")
    logger.info("wrote %s: %d sections", run.images, len(sections))
    pairs = range(request.num_sections - request.num_held_out, request.num_sections)
    imports, download, init, train = run.commands()
    run_steps([imports, download, init])
    untrained = score_sections(untrained_pyramid(run), sections, pairs)
    pretrained = score_sections(metroem.Pyramid.pretrained(), sections, pairs)
    run_steps([train])
    picture = run.folder / "before_after.png"
    pyramid = metroem.Pyramid.load(run.pyramid)
    score = score_sections(pyramid, sections, pairs, picture)
    print_scores(
        score,
        MIPS,
        title=f"pairs {pairs[0]}..{pairs[-1]}, not trained on "
        f"({time.monotonic() - started:.0f} s in all)",
        others={"untrained": untrained, "general weights": pretrained},
    )
    print_json(
        {
            "epe_none": score.epe_none,
            "epe": score.epe,
            "epe_untrained": untrained.epe[-1],
            "epe_pretrained": pretrained.epe[-1],
            "cpc_none": score.cpc_none,
            "cpc": score.cpc[-1],
        }
    )


def make_sections(request: DemoRequest) -> list[Section]:
    """Make the distorted sections of the demo; equal requests give equal sections."""
    tissue = make_tissue(
        TissueRecipe(
            num_sections=request.num_sections,
            rows=request.rows + 2 * MARGIN_PX,
            cols=request.cols + 2 * MARGIN_PX,
            seed=request.seed,
        )
    )
    return distort_sections(tissue, Distortion(), MARGIN_PX, request.seed)


def distort_sections(
    tissue: np.ndarray, distortion: Distortion, margin_px: int, seed: int
) -> list[Section]:
    """Distort each section of a stack by its own random field.

    Args:
        tissue: (num_sections, H, W) uint8, truly aligned.
        distortion: ranges of the random values.
        margin_px: cut off on each side.
        seed: random seed of all fields.

    Returns:
        One distorted section each, (H - 2 * margin_px, W - 2 * margin_px).
    """
    return [
        distort(
            section,
            distortion,
            margin_px=margin_px,
            rng=np.random.default_rng([seed, z]),
        )
        for z, section in enumerate(tissue)
    ]


def run_steps(commands: Sequence[list[str]]) -> list[float]:
    """Run commands of metroem one after the other, and log them as typed.

    Returns:
        Duration of each, s.

    Raises:
        MetroEMError: one of them failed.
    """
    seconds = []
    for command in commands:
        typed = shlex.join(["metroem", *command])
        logger.info("\n$ %s", typed)
        started = time.monotonic()
        words = [sys.executable, "-m", "metroem", *command]
        result = subprocess.run(words, env=environment())
        if result.returncode:
            raise MetroEMError(
                f"{typed}\nended with exit code "
                f"{result.returncode}; its output is above"
            )
        seconds.append(time.monotonic() - started)
        logger.info("(%.0f s)", seconds[-1])
    return seconds


def score_sections(
    pyramid: metroem.Pyramid,
    sections: Sequence[Section],
    pairs: range,
    picture: Path | None = None,
) -> Score:
    """Align held-out pairs and score them.

    Args:
        pyramid: aligns the pairs.
        sections: all sections of the volume.
        pairs: section z to z - 1 for each z.
        picture: file for a picture of the first pair.

    Returns:
        The mean score over the pairs.
    """
    scores = []
    for z in pairs:
        src, tgt = sections[z], sections[z - 1]
        fields = pyramid.fields(src.image, tgt.image, mip=0)
        scores.append(score_pair(src.image, tgt.image, fields, true_pair(src, tgt)))
        if z == pairs[0] and picture is not None:
            save_before_after(picture, src.image, tgt.image, fields[-1])
    return mean_score(scores)


def untrained_pyramid(run: Run) -> metroem.Pyramid:
    """Load the pyramid of a run with untrained weights, drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return metroem.Pyramid.load(run.pyramid, None)


def save_before_after(
    path: Path, src: np.ndarray, tgt: np.ndarray, field: np.ndarray
) -> None:
    """Save a picture of one pair: before, after, and its (2, H, W) field."""
    image = torch.from_numpy(src.astype(np.float32))[None, None]
    warped = warp(image, torch.from_numpy(field)[None])[0, 0].numpy()
    save_pair_picture(path, src, warped, tgt, field)
    logger.info("wrote %s", path)


def environment() -> dict[str, str]:
    """Environment variables with which `import metroem` finds this package."""
    package = str(Path(metroem.__file__).resolve().parents[1])
    others = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [package, others])),
    }


def _clear(folder: Path) -> None:
    """Delete the files of an earlier demo, or create the folder."""
    if folder.exists() and any(folder.iterdir()):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("made by metroem demo, which removes it when run\n")
