r"""Compare the time of download_image.py with cloud-volume alone; measure its memory.

A volume on the local disk, three mips of blurred noise, is read in three ways in turn:

- by cloud-volume alone, each chunk once;
- by cloud-volume and h5py, which writes the same arrays with the compression of image
  sets, and nothing else;
- by download_image.py (`download_image`, in this process).

Then fresh processes download small patches, of few sections and of many, and report
their peak memory.

Example:
    python benchmarks/download_speed.py --num_sections 20 --patch_px 2048
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import side_by_side
import torch
from cloudvolume import Bbox, CloudVolume
from scipy import ndimage

from metroem.imaging.normalize import normalize
from metroem.prepare.download_image import download_image
from metroem.prepare.requests import ImageRequest
from metroem.utils import cli

_MIPS = (2, 1, 0)
_CORNER = 64  # mip-0 pixels along x and y; not on the border of a chunk


def main() -> None:
    """Make volumes, download from them, and print times and memory."""
    parser = side_by_side.parser(__doc__)
    add = parser.add_argument
    add("--num_sections", type=int, default=20)
    add("--patch_px", type=int, default=2048, help="at mip 0")
    add("--chunk", type=int, nargs=2, default=(512, 1), help="side and sections")
    add("--parallel", type=int, default=1)
    add("--small_patch_px", type=int, default=256, help="for the measurement of memory")
    add(
        "--many",
        type=int,
        default=200,
        help="sections; the short run has a tenth",
    )
    add("--download", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.download:
        download(args.download, args.num_sections, args.patch_px, args.parallel)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"peak_mib": peak}))
        return
    with tempfile.TemporaryDirectory() as folder:
        seconds = download_seconds(Path(folder), args)
        figures = memory(Path(folder) / "small", args)
    ours = seconds["download_image.py"]
    figures["times_cloud_volume"] = ours / seconds["cloud-volume"]
    figures["times_cloud_volume_and_h5py"] = ours / seconds["cloud-volume and h5py"]
    side_by_side.report(seconds, figures)


def download_seconds(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Time each way of reading the same chunks: median seconds."""
    write_volume(folder, args.num_sections, args.patch_px, tuple(args.chunk))
    shape = args.num_sections, args.patch_px
    return side_by_side.median_seconds(
        {
            "cloud-volume": lambda: read_all(folder, *shape),
            "cloud-volume and h5py": lambda: write_plainly(folder, *shape),
            "download_image.py": lambda: download(folder, *shape, args.parallel),
        },
        args.rounds,
    )


def memory(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Measure the peak memory of a short and a long download, MiB."""
    chunk = (min(args.chunk[0], args.small_patch_px // 4), args.chunk[1])
    write_volume(folder, args.many, args.small_patch_px, chunk)
    peaks = {
        num: _peak_mib(folder, num, args)
        for num in (max(args.many // 10, 2), args.many)
    }
    few, many = peaks.values()
    return {"peak_mib_by_sections": peaks, "times_memory_of_few": many / few}


def _peak_mib(folder: Path, num_sections: int, args: argparse.Namespace) -> float:
    flags = {
        "--download": folder,
        "--num_sections": num_sections,
        "--patch_px": args.small_patch_px,
        "--parallel": args.parallel,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    done = subprocess.run(
        [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.splitlines()[-1])["peak_mib"]


def write_volume(
    folder: Path, num_sections: int, patch_px: int, chunk: tuple[int, int]
) -> None:
    """Write uint8 sections at three mips: a patch with a margin of `_CORNER`."""
    side = patch_px + 2 * _CORNER
    size = (chunk[0], chunk[0], chunk[1])
    info = CloudVolume.create_new_info(
        num_channels=1,
        layer_type="image",
        data_type="uint8",
        encoding="raw",
        resolution=(4, 4, 40),
        voxel_offset=(0, 0, 0),
        chunk_size=size,
        volume_size=(side, side, num_sections),
    )
    path = f"file://{folder / 'em'}"
    volume = CloudVolume(path, info=info, progress=False)
    for mip in sorted(_MIPS)[1:]:
        volume.add_scale((2**mip, 2**mip, 1), chunk_size=size)
    volume.commit_info()
    noise = np.random.default_rng(0).standard_normal((side, side))
    noise = ndimage.gaussian_filter(noise, 1.5)
    grey = np.clip(128 + 40 * noise / noise.std(), 1, 255).astype(np.uint8)
    for mip in _MIPS:
        level = CloudVolume(path, mip=mip, progress=False, compress=False)
        small = grey[:: 1 << mip, :: 1 << mip]
        # Each section has the noise shifted by another distance.
        shifted = [np.roll(small, 37 * z, (0, 1)) for z in range(num_sections)]
        level[:, :, :] = np.stack(shifted, -1)[..., None]


def read_all(folder: Path, num_sections: int, patch_px: int) -> list[np.ndarray]:
    """Read all patches, (X, Y, Z, 1) uint8 of each mip, by cloud-volume alone."""
    found = []
    for mip in _MIPS:
        start, side = _CORNER >> mip, patch_px >> mip
        volume = CloudVolume(
            f"file://{folder / 'em'}", mip=mip, progress=False, fill_missing=True
        )
        box = Bbox((start, start, 0), (start + side, start + side, num_sections))
        found.append(np.asarray(volume.download(box)))
    return found


def write_plainly(folder: Path, num_sections: int, patch_px: int) -> None:
    """Read all patches and write them as pairs: no resuming, no checksums, no sync."""
    for mip, patches in zip(
        _MIPS, read_all(folder, num_sections, patch_px), strict=True
    ):
        side = min(512, patch_px >> mip)
        shape = (num_sections - 1, 2, *patches.shape[:2])
        with h5py.File(folder / "plain.h5", "w") as file:
            images = file.create_dataset(
                "img", shape, np.float32, chunks=(1, 1, side, side), compression="lzf"
            )
            before = _normalized(patches, 0)
            for z in range(1, num_sections):
                section = _normalized(patches, z)
                images[z - 1, 0], images[z - 1, 1] = section, before
                before = section


def _normalized(patches: np.ndarray, z: int) -> np.ndarray:
    section = np.ascontiguousarray(patches[:, :, z, 0])
    return normalize(torch.from_numpy(section)).numpy()


def download(folder: Path, num_sections: int, patch_px: int, parallel: int) -> None:
    """Make the image sets by download_image.py, in an empty folder."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    download_image(
        ImageRequest(
            cv_path=str(folder / "em"),
            mips=list(_MIPS),
            patch_sizes=[patch_px >> mip for mip in _MIPS],
            z_start=1,
            z_end=num_sections,
            x_offset=_CORNER,
            y_offset=_CORNER,
            dst_folder=folder / "data",
            normalize=True,
            parallel=parallel,
        )
    )


if __name__ == "__main__":
    cli.run(main)
