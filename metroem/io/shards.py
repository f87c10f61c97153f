"""Read chunks of sharded volumes, whose files hold many chunks and an index each.

cloud-volume takes an empty shard for a missing one, and a truncated index for a shorter
one. Chunks then become black, or tissue of another location. Here all data that an
index lists must exist and be complete.

Source: neuroglancer, src/datasource/precomputed/sharded.md
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cloudfiles import CloudFiles, compression
from cloudvolume import Bbox, chunks
from cloudvolume.datasource.precomputed.common import compressed_morton_code
from cloudvolume.datasource.precomputed.image.common import gridpoints, shade
from cloudvolume.datasource.precomputed.sharding import ShardingSpecification

from metroem.io.cloud_errors import (
    BrokenFileError,
    failed_file,
    file_address,
    range_ignored,
    reading,
    refuse_packed,
    status_of,
)

_COPY_AGAIN = (
    "copy it again from where the volume was made, or, if the network cut it, give the "
    "same command again, which resumes where it stopped"
)


class _Range(NamedTuple):
    """A range of bytes of a shard, the end not included."""

    shard: str
    start: int
    end: int


def download(volume: Any, box: Bbox) -> np.ndarray:
    """Read a box of a mip, sharded or not.

    Args:
        volume: cloud-volume's object, opened at that mip.
        box: voxels, inside the volume.

    Returns:
        (X, Y, Z, C), the dtype of the volume; 0 in chunks that do not exist, or that
        no shard lists.

    Raises:
        BrokenFileError: a shard does not match its index.
        Exception: an error of storage or of cloud-volume.
    """
    if volume.scale.get("sharding") is None:
        # For a single voxel, cloud-volume puts the channels first.
        whole = *box.size3(), volume.num_channels
        return np.asarray(volume.download(box)).reshape(whole)
    meta, mip = volume.meta, volume.mip
    bounds, size = meta.bounds(mip), meta.chunk_size(mip)
    hull = box.expand_to_chunk_size(size, offset=bounds.minpt)
    points = list(gridpoints(Bbox.clamp(hull, bounds), bounds, size))
    block = meta.compressed_segmentation_block_size(mip)
    grid = np.ceil(bounds.size3() / size).astype(np.uint32)
    codes = [int(code) for code in compressed_morton_code(points, grid)]
    shards = _Shards(meta, mip)
    found = shards.read(codes)
    out = np.zeros((*box.size3(), meta.num_channels), meta.dtype, order="F")
    for code, point in zip(codes, points, strict=True):
        if code not in found:
            continue
        start = bounds.minpt + point * size
        chunk_box = Bbox.clamp(Bbox(start, start + size), bounds)
        shard, content = found[code]
        with reading(file_address(shards.folder, shard)):
            chunk = chunks.decode(
                content,
                encoding=meta.encoding(mip),
                shape=(*chunk_box.size3(), meta.num_channels),
                dtype=meta.dtype,
                block_size=(8, 8, 8) if block is None else block,
            )
        shade(out, box, chunk, chunk_box)
    return out


class _Shards:
    """The shards of one mip.

    Attributes:
        folder: address of their folder.
    """

    def __init__(self, meta: Any, mip: int) -> None:
        self.folder = file_address(meta.cloudpath, meta.key(mip))
        with reading(file_address(meta.cloudpath, "info")):
            sharding = meta.scale(mip)["sharding"]
            self._spec = ShardingSpecification.from_dict(sharding)
        self._length = self._spec.index_length()
        self._files = CloudFiles(self.folder, progress=False)
        self._is_local = self._files.protocol == "file"

    def read(self, codes: Iterable[int]) -> dict[int, tuple[str, bytes]]:
        """Read chunks.

        Args:
            codes: their compressed Morton codes.

        Returns:
            By code, the name of the shard and the encoded chunk. Chunks that no shard
            lists are left out.

        Raises:
            BrokenFileError: a shard does not match its index.
        """
        locations = {code: self._location(code) for code in codes}
        lists = self._lists(set(locations.values()))
        ranges = {
            code: lists[location][code]
            for code, location in locations.items()
            if code in lists.get(location, {})
        }
        found = self._fetch(ranges.values())
        packing = self._spec.data_encoding
        return {
            code: (span.shard, self._unpacked(span.shard, found[span], packing))
            for code, span in ranges.items()
        }

    def _location(self, code: int) -> tuple[str, int]:
        """Return the shard and the minishard of a chunk."""
        location = self._spec.compute_shard_location(code)
        return f"{location.shard_number}.shard", int(location.minishard_number)

    def _lists(
        self, minishards: set[tuple[str, int]]
    ) -> dict[tuple[str, int], dict[int, _Range]]:
        """Read the indices of minishards.

        Args:
            minishards: name of the shard and number of the minishard.

        Returns:
            By minishard, the range of each of its chunks by code. Minishards without
            chunks are left out.
        """
        indices = self._indices({shard for shard, _ in minishards})
        ranges = {}
        for shard, number in minishards:
            if shard not in indices:
                continue
            start, end = (self._length + int(at) for at in indices[shard][number])
            if start != end:
                ranges[shard, number] = _Range(shard, start, end)
        found = self._fetch(ranges.values())
        packing = self._spec.minishard_index_encoding
        lists = {}
        for (shard, number), span in ranges.items():
            content = self._unpacked(shard, found[span], packing)
            entries = np.frombuffer(content[: len(content) // 24 * 24], "<u8")
            codes, gaps, sizes = entries.reshape(3, -1)
            codes, ends = np.cumsum(codes), np.cumsum(gaps + sizes)
            are_rising = (codes[1:] > codes[:-1]).all() and (ends >= sizes).all()
            if len(content) % 24 or not are_rising or not sizes.all():
                raise self._broken(shard, f"the index of minishard {number} is broken")
            if self._location(int(codes[0])) != (shard, number):
                raise self._broken(shard, "lists chunks that belong to other shards")
            lists[shard, number] = {
                int(code): _Range(shard, self._length + end - size, self._length + end)
                for code, end, size in zip(
                    codes.tolist(), ends.tolist(), sizes.tolist(), strict=True
                )
            }
        return lists

    def _indices(self, shards: Iterable[str]) -> dict[str, np.ndarray]:
        """Read the start and end of each minishard's index, by shard that exists."""
        spans = [_Range(shard, 0, self._length) for shard in shards]
        indices = {}
        for (shard, *_), content in self._fetch(spans, may_lack=True).items():
            index = np.frombuffer(content, "<u8").reshape(-1, 2)
            if (index[:, 0] > index[:, 1]).any():
                raise self._broken(shard, "its index is broken")
            if not index.any() and self._files.size(shard) != self._length:
                raise self._broken(shard, "its index is all zeros, but more follows")
            indices[shard] = index
        return indices

    def _fetch(
        self, ranges: Iterable[_Range], *, may_lack: bool = False
    ) -> dict[_Range, bytes]:
        """Read ranges of shards, adjacent ones in one request.

        Args:
            ranges: ranges to read.
            may_lack: leave out ranges of shards that do not exist, instead of raising
                an error.
        """
        runs: list[list[_Range]] = []
        for span in sorted(set(ranges)):
            if runs and span[:2] == (runs[-1][-1].shard, runs[-1][-1].end):
                runs[-1].append(span)
            else:
                runs.append([span])
        asked = []
        for number, run in enumerate(runs):
            shard, start, end = run[0].shard, run[0].start, run[-1].end
            path = Path(self.folder.removeprefix("file://"), shard)
            if self._is_local and path.exists():
                size = path.stat().st_size
                if size < end:  # `end` of a broken index may be far too large to read
                    raise self._short(shard, start, end, max(size - start, 0))
            asked.append({"path": shard, "start": start, "end": end, "tags": number})
        found = {}
        for answer in self._answers(asked):
            shard, content = answer["path"], answer["content"]
            start, end = answer["byte_range"]
            if content is None:
                if not may_lack:
                    raise self._broken(shard, "no longer exists")
                refuse_packed(self.folder, shard)
                continue
            if answer["compress"]:
                advice = "shards are read in parts: decompress them where they are"
                what = f"is compressed as a whole ({answer['compress']})"
                raise self._broken(shard, what, advice)
            if len(content) > end - start:
                raise range_ignored(file_address(self.folder, shard))
            if len(content) < end - start:
                raise self._short(shard, start, end, len(content))
            for span in runs[answer["tags"]]:
                found[span] = content[span.start - start : span.end - start]
        return found

    def _answers(self, asked: Any) -> Any:
        """Send requests to storage and return the answers of cloud-files."""
        if self._is_local:  # starting the threads of cloud-files would cost 0.1 s
            return [self._files.get([one], raw=True)[0] for one in asked]
        try:
            return self._files.get(asked, raw=True)
        except Exception as error:
            if status_of(error) != 416:  # 416: the range starts beyond the end
                raise
            file = failed_file(error)
            what = "is shorter than its index says, or empty"
            raise BrokenFileError(what, _COPY_AGAIN, file=file) from error

    def _unpacked(self, shard: str, content: bytes, packing: str) -> bytes:
        """Decompress a part of a shard."""
        with reading(file_address(self.folder, shard)):
            if packing == "gzip":
                content = compression.gunzip(content)
            if not content:
                raise ValueError("some of it unpacks to nothing")
        return content

    def _short(self, shard: str, start: int, end: int, there: int) -> BrokenFileError:
        what = f"is cut short: {end - start} bytes from byte {start} on are needed, "
        return self._broken(shard, what + f"{there} are there")

    def _broken(
        self, shard: str, what: str, advice: str = _COPY_AGAIN
    ) -> BrokenFileError:
        return BrokenFileError(what, advice, file=file_address(self.folder, shard))
