"""Check info files of volumes, and find mips that cannot be read.

A mip cannot be read if cloud-volume does not know its encoding, or if the package for
it is not installed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from cloudvolume import chunks
from cloudvolume.chunks import NEEDS_INSTALL, SUPPORTED_ENCODINGS
from cloudvolume.datasource.precomputed.metadata import PrecomputedMetadata
from cloudvolume.datasource.precomputed.sharding import ShardingSpecification
from cloudvolume.exceptions import SpecViolation

from metroem.errors import UsageError
from metroem.io.cloud_errors import InfoError

_VOLUME = "neuroglancer_multiscale_volume"
_OF_VOLUME = ("type", "data_type", "num_channels", "scales")
_TRIPLES = ("size", "resolution")
_OF_SCALE = ("key", "encoding", "chunk_sizes", *_TRIPLES)
# Data types that these encodings can store; other encodings store any type.
_HOLDS = {
    "jpeg": ("uint8",),
    "jxl": ("uint8",),
    "png": ("uint8",),  # cloud-volume splits 16 bits into two channels
    "fpzip": ("float32", "float64"),
    "kempressed": ("float32", "float64"),
    "zfpc": ("float32", "float64", "int32", "int64"),
    "compressed_segmentation": ("uint32", "uint64"),
}
_PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type


@functools.cache
def check_infos() -> None:
    """Make cloud-volume check each info that it fetches, and each PNG, from now on."""
    chunks.decode_png = _checked_png(chunks.decode_png)
    fetch_info = PrecomputedMetadata.fetch_info

    @functools.wraps(fetch_info)
    def checked(self: PrecomputedMetadata) -> Any:
        info = fetch_info(self)
        # An info that only redirects to another location needs no other keys.
        if not isinstance(info, Mapping) or not info.get("redirect"):
            check_info(info)
        return info

    PrecomputedMetadata.fetch_info = checked  # type: ignore[method-assign]


def check_info(info: Any) -> None:
    """Refuse an info that is not of a volume, or that lacks keys or has wrong values.

    Args:
        info: the decoded file.

    Raises:
        InfoError: the info is refused; the message follows the path of the volume.
    """
    if not isinstance(info, Mapping):
        raise InfoError(f"its info file holds a {type(info).__name__}, not an object")
    kind = str(info.get("@type", _VOLUME))
    if kind != _VOLUME:
        what = kind.removeprefix("neuroglancer_")
        raise InfoError(f"is a layer of {what}; give the path of images or fields")
    if missing := [key for key in _OF_VOLUME if key not in info]:
        raise InfoError(_lacks(missing))
    if info["type"] not in ("image", "segmentation"):
        raise InfoError(
            f"is a layer of type {info['type']!r}; give the path of images or fields"
        )
    try:
        is_number = np.dtype(str(info["data_type"])).kind in "biuf"
    except TypeError:
        is_number = False
    if not is_number:
        raise InfoError(
            f"its info file says data_type {info['data_type']!r}, which is not known; "
            "expected uint8, float32 or another of numpy's numbers"
        )
    if not isinstance(info["num_channels"], int) or info["num_channels"] < 1:
        raise InfoError(
            f"its info file says num_channels {info['num_channels']!r}; expected a "
            "whole number, 1 or more"
        )
    if not isinstance(info["scales"], Sequence) or not info["scales"]:
        raise InfoError("its info file lists no scales; expected one per mip")
    for mip, scale in enumerate(info["scales"]):
        _check_scale(mip, scale)


def unreadable_mips(info: Mapping[str, Any]) -> dict[int, str]:
    """Find the scales that cannot be read because of their encoding.

    Args:
        info: an info that `check_info` accepts.

    Returns:
        By index of the scale, why it cannot be read.
    """
    found = {}
    for mip, scale in enumerate(info["scales"]):
        if problem := _problem(scale, str(info["data_type"])):
            found[mip] = problem
    return found


def check_encoding(encoding: str, data_type: str) -> None:
    """Refuse to write a type in an encoding that cannot hold it.

    Args:
        encoding: as cloud-volume names it.
        data_type: "uint8", ...

    Raises:
        UsageError: it cannot hold the type, is not known, or needs a package.
    """
    if encoding not in SUPPORTED_ENCODINGS:
        raise UsageError(
            f"--encoding {encoding}: expected one of {', '.join(SUPPORTED_ENCODINGS)}"
        )
    holds = _HOLDS.get(encoding, (data_type,))
    if data_type not in holds:
        raise UsageError(
            f"--encoding {encoding}: holds {' or '.join(holds)}, and the volume is "
            f"{data_type}; give --encoding raw"
        )
    if package := _package(encoding):
        raise UsageError(
            f"--encoding {encoding}: needs a package: pip install {package}"
        )


def _check_scale(mip: int, scale: Any) -> None:
    if not isinstance(scale, Mapping):
        raise InfoError(
            f"its info file says {scale!r} of scale {mip}; expected an object"
        )
    if missing := [key for key in _OF_SCALE if key not in scale]:
        raise InfoError(_lacks(missing, f" of scale {mip}"))
    triples = {key: scale[key] for key in _TRIPLES}
    triples["voxel_offset"] = scale.get("voxel_offset", (0, 0, 0))
    sizes = scale["chunk_sizes"]
    triples["chunk_sizes"] = sizes[0] if isinstance(sizes, list) and sizes else sizes
    for key, value in triples.items():
        is_triple = isinstance(value, Sequence) and len(value) == 3
        if not is_triple or not all(isinstance(one, int | float) for one in value):
            raise InfoError(
                f"its info file says {key} {value!r} of scale {mip}; expected three "
                "numbers, along x, y and z"
            )
        if key != "voxel_offset" and not min(value) > 0:
            raise InfoError(
                f"its info file says {key} {value!r} of scale {mip}; expected numbers "
                "above 0"
            )


def _problem(scale: Mapping[str, Any], data_type: str) -> str | None:
    """Say why a scale cannot be read; None if it can."""
    encoding = scale["encoding"]
    if encoding not in (*SUPPORTED_ENCODINGS, "npz"):
        return (
            f"has encoding {encoding!r}, which cloud-volume does not know; expected "
            f"one of {', '.join(SUPPORTED_ENCODINGS)}"
        )
    if package := _package(encoding):
        return f"has encoding {encoding}, which needs a package: pip install {package}"
    if data_type not in _HOLDS.get(encoding, (data_type,)):
        return (
            f"has encoding {encoding} for {data_type}, and cloud-volume reads "
            f"{' or '.join(_HOLDS[encoding])} of it; copy the volume as raw"
        )
    if scale.get("sharding") is not None:
        try:
            ShardingSpecification.from_dict(scale["sharding"])
        except (SpecViolation, LookupError, TypeError, ValueError) as error:
            return f"has a sharding that is not known ({type(error).__name__}: {error})"
    if encoding == "compressed_segmentation":
        if "compressed_segmentation_block_size" not in scale:
            return "lacks compressed_segmentation_block_size in its info file"
    return None


def _package(encoding: str) -> str | None:
    """Name the package that an encoding lacks; None if it lacks none."""
    # cloud-volume does not list kempressed, which needs the package of fpzip.
    return NEEDS_INSTALL.get("fpzip" if encoding == "kempressed" else encoding)


def _checked_png(decode_png: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap cloud-volume's decoder: refuse a PNG that does not match the info.

    cloud-volume would fail on it, or return wrong values.
    """

    @functools.wraps(decode_png)
    def checked(content: bytes, shape: Sequence[int], dtype: Any) -> Any:
        if content[:4] == b"\x89PNG" and len(content) > 25:
            depth, colour = content[24], content[25]
            if (depth, _PNG_CHANNELS.get(colour)) != (8, shape[3]):
                raise InfoError(
                    f"holds PNG of {depth} bits and colour type {colour}, and its info "
                    f"says {shape[3]} channels of {dtype}; copy the volume as raw"
                )
        return decode_png(content, shape, dtype)

    return checked


def _lacks(keys: Sequence[str], where: str = "") -> str:
    return (
        f"its info file lacks {', '.join(keys)}{where}; write it as "
        "CloudVolume.create_new_info does"
    )
