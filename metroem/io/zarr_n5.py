"""Zarr and N5: arrays with a file a chunk, whose metadata name the axes.

cloud-volume opens them too. It takes big-endian N5, channels, coarser mips, some orders
of axes and translations for something else, without a word. So their chunks are decoded
here; cloud-files fetches them. A chunk that is not stored holds the fill value.
"""

import bz2
import gzip
import importlib
import itertools
import json
import logging
import lzma
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import crc32c
import numpy as np
import zstandard
from cloudfiles import CloudFiles
from cloudvolume import Bbox

from metroem.io.cloud_errors import InfoError, failed_file, file_address, reading

logger = logging.getLogger(__name__)

FORMATS = ("zarr", "zarr2", "zarr3", "n5")
_AXES = "xyzct"
_NM = {
    **dict.fromkeys(("nanometer", "nm"), 1.0),
    **dict.fromkeys(("angstrom", "Å"), 0.1),
    **dict.fromkeys(("picometer", "pm"), 1e-3),
    **dict.fromkeys(("micrometer", "micron", "um", "µm", "μm"), 1e3),
    **dict.fromkeys(("millimeter", "mm"), 1e6),
    **dict.fromkeys(("centimeter", "cm"), 1e7),
    **dict.fromkeys(("meter", "m"), 1e9),
}
_NUMBERS = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}
# How much a start may lie off a whole voxel: files hold rounded sizes.
_OFF_PX = 0.1

Json = Mapping[str, Any]
Decoder = Callable[[Any], Any]


class ArrayVolume:
    """The arrays of a Zarr or N5 as the mips of a volume.

    Attributes:
        form: "zarr" or "n5".
        place: where it is, without the format.
        info: the same as the info file of a CloudVolume; chunks are not named by it.
        unreadable: by mip, why it cannot be read.
    """

    def __init__(self, form: str, place: str, arrays: Sequence["_Array"]) -> None:
        self.form, self.place, self._arrays = form, place, arrays
        self.unreadable: dict[int, str] = {}
        first = arrays[0]
        for array in arrays:
            if (array.dtype.name, array.size("c")) != (
                first.dtype.name,
                first.size("c"),
            ):
                raise InfoError(
                    f"{array.folder} holds {array.size('c')} channels of "
                    f"{array.dtype.name}, {first.folder} {first.size('c')} of "
                    f"{first.dtype.name}; expected the same in all mips"
                )
        self.info = {
            "type": "image",
            "data_type": first.dtype.name,
            "num_channels": first.size("c"),
            "scales": [self._scale(mip) for mip in range(len(arrays))],
        }
        if self.info["scales"][0]["resolution"] == [1, 1, 1]:
            logger.warning(
                "%s: says no size of its voxels, or 1 nm; that is what is taken", place
            )

    def read(self, mip: int, box: Bbox) -> np.ndarray:
        """Read voxels.

        Args:
            mip: which array.
            box: of its voxels, inside the bounds.

        Returns:
            (x, y, z, C), native byte order.
        """
        array = self._arrays[mip]
        offset = self.info["scales"][mip]["voxel_offset"]
        corner = {
            axis: (int(box.minpt[i]) - offset[i], int(box.maxpt[i]) - offset[i])
            for i, axis in enumerate("xyz")
        }
        spans = [corner.get(axis, (0, array.size(axis))) for axis in array.axes]
        chunks = itertools.product(
            *(
                range(low // size, -(-high // size))
                for (low, high), size in zip(spans, array.chunks, strict=True)
            )
        )
        names = {array.name(index): index for index in chunks}
        files: Any = CloudFiles(self.place, progress=False).get(
            list(names), return_dict=True
        )
        shape = [high - low for low, high in spans]
        found = np.full(shape, array.fill, array.dtype.newbyteorder("="))
        for name, index in names.items():
            if files[name] is not None:
                with reading(file_address(self.place, name)):
                    chunk = array.decode(files[name])
                    _paste(chunk, array.corner(index), found, spans)
        in_order = [array.axes.index(axis) for axis in _AXES if axis in array.axes]
        size = [high - low for low, high in corner.values()]
        return found.transpose(in_order).reshape(*size, array.size("c"))

    def _scale(self, mip: int) -> dict[str, Any]:
        """What the info says of a mip; notes what keeps it from being read."""
        array, first = self._arrays[mip], self._arrays[0]
        offsets = []
        for axis in "xyz":
            nm = first.scale.get(axis, 1.0)
            factor = max(round(array.scale.get(axis, 1.0) / nm), 1)
            start = first.start.get(axis, 0.0) / nm
            corner = int(np.floor(start + _OFF_PX))
            # Some say where the corner of the first voxel is, some where its middle.
            if mip == 0 and min(abs(start - corner - at) for at in (0, 0.5)) > _OFF_PX:
                logger.warning(
                    "%s: begins at %s %.2f, between its voxels; %d is taken",
                    *(self.place, axis, start, corner),
                )
            begins = array.start.get(axis, 0.0) / nm
            most = (factor - 1) / 2 + _OFF_PX
            if corner % factor or not -_OFF_PX <= begins - start <= most:
                self.unreadable[mip] = (
                    f"begins at {axis} {begins:g}, mip 0 at {start:g} (mip-0 voxels); "
                    f"expected the same for both, a multiple of {factor}"
                )
            offsets.append(corner // factor)
        return {
            "key": array.folder or ".",
            "size": [array.size(axis) for axis in "xyz"],
            "voxel_offset": offsets,
            "resolution": [round(array.scale.get(axis, 1.0), 6) for axis in "xyz"],
            "chunk_sizes": [[array.chunk(axis) for axis in "xyz"]],
            "encoding": "raw",
        }


@dataclass(frozen=True)
class _Array:
    """One array, its axes in the order of its shape and of the names of its chunks.

    Attributes:
        folder: inside the volume; "" if the volume is the array.
        axes: a letter each: x, y, z, c, t.
        shape: of the whole, in that order.
        chunks: of a chunk, likewise.
        dtype: in files, with its byte order.
        fill: value where no chunk is stored.
        prefix: of the names of chunks.
        separator: of the numbers in them.
        layout: the axes in memory, the slowest first.
        decoders: undo the compression, one after the other.
        has_header: each chunk begins with its shape, as N5 has it.
        scale: nm of a voxel by axis.
        start: nm of the first voxel by axis.
    """

    folder: str
    axes: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    fill: Any
    prefix: str
    separator: str
    layout: tuple[int, ...]
    decoders: tuple[Decoder, ...]
    has_header: bool
    scale: Mapping[str, float]
    start: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.dtype.kind not in "biuf":
            raise InfoError(f"holds {self.dtype}; expected numbers")
        try:
            np.full((), self.fill, self.dtype)
        except (ValueError, TypeError, OverflowError) as error:
            raise InfoError(
                f"has fill_value {self.fill!r}, which {self.dtype.name} does not hold"
            ) from error
        known = set(self.axes) <= set(_AXES) and {"x", "y"} <= set(self.axes)
        if not known or len(set(self.axes)) < len(self.axes):
            raise InfoError(
                f"has axes {', '.join(self.axes)}; expected x and y, and at most z, c "
                "and t beside them"
            )
        if not len(self.axes) == len(self.shape) == len(self.chunks):
            raise InfoError(
                f"has axes {', '.join(self.axes)} for shape {self.shape} and chunks "
                f"{self.chunks}"
            )
        if self.size("t") != 1:
            raise InfoError(
                f"has {self.size('t')} times; copy the one that you want into a "
                "volume of its own"
            )

    def size(self, axis: str) -> int:
        """How many voxels there are along an axis."""
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1

    def chunk(self, axis: str) -> int:
        """How many voxels of a chunk there are along an axis."""
        return self.chunks[self.axes.index(axis)] if axis in self.axes else 1

    def name(self, index: Sequence[int]) -> str:
        """The file of a chunk."""
        return self.prefix + self.separator.join(map(str, index))

    def corner(self, index: Sequence[int]) -> list[int]:
        """The first voxel of a chunk."""
        return [at * size for at, size in zip(index, self.chunks, strict=True)]

    def decode(self, content: bytes) -> np.ndarray:
        """The values of a chunk, its axes in the order of the array."""
        if not content:
            raise ValueError("the file is empty")
        shape = self.chunks
        if self.has_header:
            shape, content = _without_header(content)
        values: Any = content
        for decode in self.decoders:
            values = decode(values)
        stored = [shape[axis] for axis in self.layout]
        array = np.frombuffer(values, self.dtype).reshape(stored)
        return array.transpose(np.argsort(self.layout))


def open_arrays(form: str, place: str) -> ArrayVolume | None:
    """Open a Zarr or N5; None if there is nothing of that kind.

    Args:
        form: one of FORMATS; "" for whichever is there.
        place: its path, without the format.

    Raises:
        InfoError: it is there and is not read; the message says why.
    """
    files = _Metadata(place)
    # One after the other: stores may answer 403 for what is not there.
    try:
        if form in ("", "zarr", "zarr3"):
            if (root := files.read("zarr.json")) is not None:
                return ArrayVolume("zarr", place, _zarr3(files, root))
        if form in ("", "zarr", "zarr2"):
            root = files.read(".zattrs") or {}
            array = None if "multiscales" in root else files.read(".zarray")
            if root or array:
                return ArrayVolume("zarr", place, _zarr2(files, root, array))
        if form in ("", "n5"):
            if (root := files.read("attributes.json")) is not None:
                return ArrayVolume("n5", place, _n5(files, root))
        return None
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
    ) as error:
        if failed_file(error):  # the storage's
            raise
        raise InfoError(
            f"its metadata cannot be understood ({type(error).__name__}: {error})"
        ) from error


class _Metadata:
    """The JSON files of a Zarr or N5."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._files = CloudFiles(place, progress=False)

    def read(self, name: str) -> Any:
        """What a file holds; None if it is not there."""
        with reading(file_address(self._place, name)):
            content: Any = self._files.get(name)
            try:
                return None if content is None else json.loads(content)
            except ValueError as error:
                raise InfoError(f"its {name} is not JSON: {error}") from error

    def of(self, folder: str, name: str) -> Any:
        """What the file of one array holds."""
        path = _joined(folder, name)
        if (found := self.read(path)) is None:
            raise InfoError(f"its {path} is not there")
        return found


def _zarr2(files: _Metadata, attributes: Json, array: Json | None) -> list[_Array]:
    """The arrays of Zarr 2: OME-Zarr up to 0.4, or one array alone."""
    if array is not None:
        axes = attributes.get("_ARRAY_DIMENSIONS")
        return [_zarr2_array("", array, _names(axes, array["shape"]), {}, {})]
    return [_zarr2_array(*mip) for mip in _mips(files, attributes, ".zarray")]


def _zarr2_array(
    folder: str, array: Json, axes: str, scale: Json, start: Json
) -> _Array:
    codecs = [*(array.get("filters") or ()), array.get("compressor")]
    layout = range(len(array["shape"]))
    if array.get("order", "C") not in ("C", "F"):
        raise InfoError(f"has order {array['order']!r}; expected C or F")
    return _Array(
        folder=folder,
        axes=axes,
        shape=tuple(array["shape"]),
        chunks=tuple(array["chunks"]),
        dtype=_dtype(array["dtype"]),
        fill=_fill(array.get("fill_value")),
        prefix=_joined(folder, ""),
        separator=array.get("dimension_separator", "."),
        layout=tuple(layout if array.get("order", "C") == "C" else reversed(layout)),
        decoders=tuple(_decoder(one["id"], one) for one in reversed(codecs) if one),
        has_header=False,
        scale=scale,
        start=start,
    )


def _zarr3(files: _Metadata, root: Json) -> list[_Array]:
    """The arrays of Zarr 3: OME-Zarr 0.5, or one array alone."""
    if root.get("node_type", "array") == "array":
        axes = root.get("dimension_names")
        return [_zarr3_array("", root, _names(axes, root["shape"]), {}, {})]
    attributes = root.get("attributes") or {}
    attributes = attributes.get("ome", attributes)
    return [_zarr3_array(*mip) for mip in _mips(files, attributes, "zarr.json")]


def _zarr3_array(
    folder: str, array: Json, axes: str, scale: Json, start: Json
) -> _Array:
    grid, naming = array["chunk_grid"], array["chunk_key_encoding"]
    is_v2 = naming["name"] == "v2"
    if grid["name"] != "regular" or naming["name"] not in ("default", "v2"):
        raise InfoError(
            f"has chunk_grid {grid['name']!r} and chunk_key_encoding "
            f"{naming['name']!r}; expected regular, and default or v2"
        )
    if array.get("storage_transformers"):
        raise InfoError("has storage_transformers, which are not known")
    separator = naming.get("configuration", {}).get("separator", "." if is_v2 else "/")
    layout, endian, decoders = _zarr3_codecs(array)
    return _Array(
        folder=folder,
        axes=axes,
        shape=tuple(array["shape"]),
        chunks=tuple(grid["configuration"]["chunk_shape"]),
        dtype=_dtype(array["data_type"]).newbyteorder(endian),
        fill=_fill(array.get("fill_value")),
        prefix=_joined(folder, "") + ("" if is_v2 else f"c{separator}"),
        separator=separator,
        layout=layout,
        decoders=decoders,
        has_header=False,
        scale=scale,
        start=start,
    )


def _zarr3_codecs(array: Json) -> tuple[tuple[int, ...], Any, tuple[Decoder, ...]]:
    """Layout in memory, byte order, and what undoes the compression."""
    layout, endian = tuple(range(len(array["shape"]))), None
    decoders: list[Decoder] = []
    for codec in array["codecs"]:
        name, settings = codec["name"], codec.get("configuration") or {}
        if name == "sharding_indexed":
            raise InfoError(
                "is sharded, which is not read; copy it without shards, or as a "
                "CloudVolume"
            )
        if name == "transpose" and not endian:
            layout = tuple(layout[axis] for axis in settings["order"])
        elif name == "bytes" and not endian:
            endian = ">" if settings.get("endian") == "big" else "<"
        elif endian:
            decoders.insert(0, _decoder(name, settings))
        else:
            raise InfoError(f"is stored with the codec {name}, which {_NOT}")
    if endian is None:
        raise InfoError("is stored without the codec bytes, which is not known")
    return layout, endian, tuple(decoders)


def _n5(files: _Metadata, root: Json) -> list[_Array]:
    """The arrays of an N5: s0, s1 ..., or one alone."""
    if "dimensions" in root:
        found, folders = [root], [""]
    else:
        factors = root.get("downsamplingFactors", root.get("scales"))
        folders = [f"s{level}" for level in range(len(factors or ()))]
        found = [files.of(folder, "attributes.json") for folder in folders]
        while factors is None:  # as many as there are
            one = files.read(f"s{len(found)}/attributes.json")
            if one is None:
                break
            folders.append(f"s{len(found)}")
            found.append(one)
    if not found:
        raise InfoError(
            "holds no s0 and is no array; give the path of an array, or of the folder "
            "of s0, s1 ..."
        )
    arrays = []
    for level, (folder, array) in enumerate(zip(folders, found, strict=True)):
        axes = array.get("axes", root.get("axes"))
        axes = "".join(axes) if axes else _AXES[: len(array["dimensions"])]
        nm, start = _n5_place(root, found, level, axes)
        arrays.append(_n5_array(folder, array, axes, nm, start))
    return arrays


def _n5_array(folder: str, array: Json, axes: str, scale: Json, start: Json) -> _Array:
    compression = array.get("compression", array.get("compressionType", "raw"))
    if isinstance(compression, str):
        compression = {"type": compression}
    kind = compression["type"]
    if kind == "gzip" and compression.get("useZlib"):
        kind = "zlib"
    if kind == "lz4":  # in blocks of its own, which numcodecs does not know
        raise InfoError(f"is compressed with lz4, which {_NOT}")
    dims = range(len(array["dimensions"]))
    return _Array(
        folder=folder,
        axes=axes,
        shape=tuple(array["dimensions"]),
        chunks=tuple(array["blockSize"]),
        dtype=_dtype(array["dataType"]).newbyteorder(">"),
        fill=0,
        prefix=_joined(folder, ""),
        separator="/",
        layout=tuple(reversed(dims)),
        decoders=() if kind == "raw" else (_decoder(kind, {}),),
        has_header=True,
        scale=scale,
        start=start,
    )


def _n5_place(
    root: Json, levels: Sequence[Json], level: int, axes: str
) -> tuple[dict[str, float], dict[str, float]]:
    """nm of a voxel, and of the first one, by axis."""
    first, this = levels[0], levels[level]
    if transform := this.get("transform"):
        nm = dict(zip(transform["axes"], map(_nm, transform["units"]), strict=True))
        scale = zip(nm.items(), transform["scale"], strict=True)
        start = zip(nm.items(), transform["translate"], strict=True)
        return (
            {axis: value * unit for (axis, unit), value in scale},
            {axis: value * unit for (axis, unit), value in start},
        )
    both = {**first, **root}
    unit: Any = both.get("units", "nm")
    nm = both.get("pixelResolution", both.get("resolution", (1, 1, 1)))
    if isinstance(nm, Mapping):
        nm, unit = nm["dimensions"], nm.get("unit", "nm")
    units = [unit] * len(nm) if isinstance(unit, str) else unit
    sizes = [value * _nm(one) for value, one in zip(nm, units, strict=True)]
    factors = this.get("downsamplingFactors")
    if factors is None or not isinstance(factors[0], int | float):
        listed = root.get("downsamplingFactors", root.get("scales"))
        factors = listed[level] if listed else _factors(first, this, "dimensions")
    fine, times = _by_axis(sizes, axes), _by_axis(factors, axes)
    return {axis: fine[axis] * times[axis] for axis in "xyz" if axis in axes}, {}


def _by_axis(values: Sequence[float], axes: str) -> dict[str, float]:
    """One number an axis, or one each for x, y and z."""
    return dict(zip(axes if len(values) == len(axes) else "xyz", values, strict=True))


def _mips(
    files: _Metadata, attributes: Json, name: str
) -> list[tuple[str, Json, str, dict[str, float], dict[str, float]]]:
    """Of each mip of an OME-Zarr: folder, metadata, axes, nm of a voxel and the first.

    Args:
        files: where the arrays are.
        attributes: of the whole.
        name: of the file of an array.
    """
    if not attributes.get("multiscales"):
        raise InfoError(
            "holds no multiscales and is no array; give the path of an array or of "
            "an OME-Zarr image in it (it may be 0)"
        )
    multiscale = attributes["multiscales"][0]
    folders = [level["path"].strip("/") for level in multiscale["datasets"]]
    arrays = [files.of(folder, name) for folder in folders]
    placed = _placed(multiscale, [array["shape"] for array in arrays])
    return [
        (*both, *where) for *both, where in zip(folders, arrays, placed, strict=True)
    ]


def _placed(
    multiscale: Json, shapes: Sequence[Sequence[int]]
) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """Axes, nm of a voxel, and nm of the first one, of each mip of an OME-Zarr."""
    axes = multiscale.get("axes")
    names = "".join(map(_axis, axes)) if axes else _names(None, shapes[0])
    units = [_nm(axis.get("unit")) if _is_space(axis) else 1.0 for axis in axes or ()]
    found = []
    for level, shape in zip(multiscale["datasets"], shapes, strict=True):
        if len(shape) != len(names):
            raise InfoError(f"has axes {', '.join(names)} for shape {tuple(shape)}")
        scale, start = np.ones(len(shape)), np.zeros(len(shape))
        steps = level.get("coordinateTransformations")
        if steps is None:  # before OME-Zarr 0.4
            scale = np.round(np.divide(shapes[0], shape))
        for step in [*(steps or ()), *multiscale.get("coordinateTransformations", ())]:
            if step["type"] == "scale":
                scale, start = scale * step["scale"], start * step["scale"]
            elif step["type"] == "translation":
                start = start + step["translation"]
            elif step["type"] != "identity":
                raise InfoError(
                    f"has a coordinateTransformation {step['type']!r}, which {_NOT}"
                )
        nm = np.array(units) if units else np.ones(len(shape))
        found.append(
            (
                names,
                dict(zip(names, (scale * nm).tolist(), strict=True)),
                dict(zip(names, (start * nm).tolist(), strict=True)),
            )
        )
    return found


def _names(axes: Sequence[str] | None, shape: Sequence[int]) -> str:
    """A letter an axis; those of OME-Zarr where there are no names."""
    if axes and all(isinstance(axis, str) and len(axis) == 1 for axis in axes):
        return "".join(axes).lower()
    return "tczyx"[-len(shape) :]


def _axis(axis: Any) -> str:
    """The letter of an axis of an OME-Zarr."""
    about = axis if isinstance(axis, Mapping) else {"name": axis}
    known = {"channel": "c", "time": "t"}
    letter = known.get(about.get("type", ""), str(about["name"]).lower())
    if len(letter) != 1:
        raise InfoError(f"has an axis {about['name']!r}; expected x, y, z, c or t")
    return letter


def _is_space(axis: Any) -> bool:
    return isinstance(axis, Mapping) and axis["name"].lower() in "xyz"


def _nm(unit: str | None) -> float:
    if unit is None:
        return 1.0
    if unit not in _NM:
        raise InfoError(f"has sizes in {unit!r}; expected nanometer, micrometer ...")
    return _NM[unit]


def _factors(first: Json, this: Json, key: str) -> list[int]:
    """How many times coarser an array is than the first, by its shape."""
    pairs = zip(first[key], this[key], strict=True)
    return [round(fine / coarse) for fine, coarse in pairs]


def _dtype(name: Any) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError as error:
        raise InfoError(f"holds {name!r}, which {_NOT}") from error


def _fill(value: Any) -> Any:
    if isinstance(value, str):
        if value not in _NUMBERS:
            raise InfoError(f"has fill_value {value!r}, which {_NOT}")
        return _NUMBERS[value]
    return 0 if value is None else value


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


_NOT = "is not known; copy the array with another compression, or as a CloudVolume"


def _decoder(name: str, settings: Json) -> Decoder:
    """What undoes a compression or a filter.

    Raises:
        InfoError: it is not known, or a package for it is missing.
    """
    name = name.removeprefix("numcodecs.")
    if name in _DECODERS:
        return _DECODERS[name]
    for module in ("numcodecs", "blosc") if name == "blosc" else ("numcodecs",):
        try:
            codecs = importlib.import_module(module)
        except ImportError:
            continue
        if module == "blosc":  # as cloud-volume has it
            return codecs.decompress
        # Blosc's bytes say themselves how they are packed.
        about = {} if name == "blosc" else settings
        try:
            return codecs.get_codec({**about, "id": name}).decode
        except (ValueError, TypeError) as error:
            raise InfoError(f"is stored with {name}, which {_NOT}") from error
    raise InfoError(
        f"is stored with {name}, for which a package is missing: pip install "
        "metroem[zarr]"
    )


def _unzstd(content: bytes) -> bytes:
    # Not all frames say how long they are, which `decompress` asks for.
    frames = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)
    return frames.decompress(content)


def _checked(content: bytes) -> bytes:
    body, stored = content[:-4], content[-4:]
    if crc32c.crc32c(body) != int.from_bytes(stored, "little"):
        raise ValueError("its checksum is not that of what came")
    return body


_DECODERS: dict[str, Decoder] = {
    "gzip": gzip.decompress,
    "zlib": zlib.decompress,
    "bz2": bz2.decompress,
    "bzip2": bz2.decompress,
    "xz": lzma.decompress,
    "zstd": _unzstd,
    "crc32c": _checked,
}


def _without_header(content: bytes) -> tuple[tuple[int, ...], bytes]:
    """Shape and compressed values of a chunk of an N5."""
    mode, num_axes = struct.unpack_from(">HH", content)
    if mode != 0:
        raise ValueError(f"a chunk of mode {mode}; expected 0")
    shape = struct.unpack_from(f">{num_axes}I", content, 4)
    return shape, content[4 + 4 * num_axes :]


def _paste(
    chunk: np.ndarray,
    corner: Sequence[int],
    into: np.ndarray,
    spans: Sequence[tuple[int, int]],
) -> None:
    """Write the part of a chunk that lies within `spans`, which `into` covers."""
    target, source = [], []
    for size, first, (low, high) in zip(chunk.shape, corner, spans, strict=True):
        start, end = max(first, low), min(first + size, high)
        target.append(slice(start - low, end - low))
        source.append(slice(start - first, end - first))
    into[tuple(target)] = chunk[tuple(source)]
