r"""Bytes that download_image.py reads per byte that it needs.

Needed are the stored chunks that the patches touch, each once. The last line is one
JSON object; `read_per_needed` is the figure of the README. `read_per_pixel` is
per byte of the pixels asked for, which also pays for the parts of chunks that lie
beyond the patch.

Example:
    python benchmarks/download_bytes.py --num_sections 20 --chunk_z 1
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from cloudfiles import interfaces
from cloudvolume import CloudVolume

from metroem import cli
from metroem.create.image import create_image_sets
from metroem.create.requests import ImageRequest

_CHUNK_PX = 128
_SIDE_PX = 1024
_MIPS = (1, 0)
_PATCH_PX = (256, 512)
_CORNER = (66, 130)  # mip-0 pixels, not on the border of a chunk


def main() -> None:
    """Make a volume, download from it and print what was read."""
    parser = cli.parser(__doc__)
    parser.add_argument("--num_sections", type=int, default=20)
    parser.add_argument("--chunk_z", type=int, default=1, help="sections a chunk")
    parser.add_argument("--parallel", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), args)))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """The figures for one volume of random grey levels.

    Args:
        folder: for the volume and the files.
        args: num_sections, chunk_z and parallel.
    """
    write_volume(folder / "em", args.num_sections, args.chunk_z)
    sizes = count_reads()
    create_image_sets(
        ImageRequest(
            cv_path=str(folder / "em"),
            mips=list(_MIPS),
            patch_sizes=list(_PATCH_PX),
            z_start=1,
            z_end=args.num_sections,
            x_offset=_CORNER[0],
            y_offset=_CORNER[1],
            dst_folder=folder / "data",
            normalize=True,
            parallel=args.parallel,
        )
    )
    read = sum(size * times for (_, size), times in sizes.items())
    needed = chunk_bytes(args)
    pixels = args.num_sections * sum(side**2 for side in _PATCH_PX)
    return {
        "bytes_read": read,
        "chunks_read": sum(sizes.values()),
        "read_per_needed": read / needed,
        "read_per_pixel": read / pixels,
    }


def write_volume(path: Path, num_sections: int, chunk_z: int) -> None:
    """Write uint8 sections at two mips, chunks of `chunk_z` sections."""
    chunk = (_CHUNK_PX, _CHUNK_PX, chunk_z)
    info = CloudVolume.create_new_info(
        num_channels=1,
        layer_type="image",
        data_type="uint8",
        encoding="raw",
        resolution=(4, 4, 40),
        voxel_offset=(0, 0, 0),
        chunk_size=chunk,
        volume_size=(_SIDE_PX, _SIDE_PX, num_sections),
    )
    cloud_path = f"file://{path}"
    volume = CloudVolume(cloud_path, info=info, progress=False)
    volume.add_scale((2, 2, 1), chunk_size=chunk)
    volume.commit_info()
    random = np.random.default_rng(0)
    for mip in _MIPS:
        level = CloudVolume(cloud_path, mip=mip, progress=False, compress=False)
        side = _SIDE_PX >> mip
        level[:, :, :] = random.integers(
            1, 255, (side, side, num_sections, 1), dtype=np.uint8
        )


def chunk_bytes(args: argparse.Namespace) -> int:
    """Bytes of all chunks that the patches touch, by the layout alone."""
    num_bytes = 0
    for mip, side in zip(_MIPS, _PATCH_PX, strict=True):
        starts = [corner >> mip for corner in _CORNER]
        chunks = [(at + side - 1) // _CHUNK_PX - at // _CHUNK_PX + 1 for at in starts]
        # All chunks touched are whole ones in x and y; in z the last ends early.
        num_bytes += chunks[0] * chunks[1] * _CHUNK_PX**2 * args.num_sections
    return num_bytes


def count_reads() -> Counter[tuple[str, int]]:
    """From now on, count chunk files read from disk: by path and size, how often."""
    reads: Counter[tuple[str, int]] = Counter()
    original = interfaces.FileInterface.get_file

    def get_file(self, file_path, *args, **kwargs):
        result = original(self, file_path, *args, **kwargs)
        if result[0] is not None and not file_path.endswith("info"):
            reads[file_path, len(result[0])] += 1
        return result

    interfaces.FileInterface.get_file = get_file
    return reads


if __name__ == "__main__":
    cli.run(main)
