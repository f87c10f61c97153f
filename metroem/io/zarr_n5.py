"""Read Zarr and N5 volumes: arrays with one file per chunk, whose metadata name axes.

cloud-volume opens them as well. But without any error it misreads big-endian N5,
channels, coarser mips, translations and some orders of axes. So chunks are decoded
here; cloud-files fetches them. A chunk that is not stored has the fill value.
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
# Voxels that a start may differ from a whole number, since files state rounded sizes.
_OFF_PX = 0.1

Json = Mapping[str, Any]
Decoder = Callable[[Any], Any]


class ArrayVolume:
    """The arrays of a Zarr or N5 as the mips of a volume.

    Attributes:
        form: "zarr" or "n5".
        location: its path, without the format.
        info: metadata in the form of a CloudVolume's info. Names of chunks do not
            follow from it.
        unreadable: by mip, why it cannot be read.
    """

    def __init__(self, form: str, location: str, arrays: Sequence["_Array"]) -> None:
        self.form, self.location, self._arrays = form, location, arrays
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
            logger.warning("%s: states no voxel size, or 1 nm; 1 nm is taken", location)

    def read(self, mip: int, box: Bbox) -> np.ndarray:
        """Read voxels.

        Args:
            mip: index of the array.
            box: voxels of the array, inside the bounds.

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
        files: Any = CloudFiles(self.location, progress=False).get(
            list(names), return_dict=True
        )
        shape = [high - low for low, high in spans]
        found = np.full(shape, array.fill, array.dtype.newbyteorder("="))
        for name, index in names.items():
            if files[name] is not None:
                with reading(file_address(self.location, name)):
                    chunk = array.decode(files[name])
                    _paste(chunk, array.corner(index), found, spans)
        in_order = [array.axes.index(axis) for axis in _AXES if axis in array.axes]
        size = [high - low for low, high in corner.values()]
        return found.transpose(in_order).reshape(*size, array.size("c"))

    def _scale(self, mip: int) -> dict[str, Any]:
        """Make the info's entry for a mip; list it in `unreadable` if need be."""
        array, first = self._arrays[mip], self._arrays[0]
        offsets = []
        for axis in "xyz":
            nm = first.scale.get(axis, 1.0)
            factor = max(round(array.scale.get(axis, 1.0) / nm), 1)
            start = first.start.get(axis, 0.0) / nm
            corner = int(np.floor(start + _OFF_PX))
            # Some programs state the corner of the first voxel, some its centre.
            if mip == 0 and min(abs(start - corner - at) for at in (0, 0.5)) > _OFF_PX:
                logger.warning(
                    "%s: begins at %s %.2f, between its voxels; %d is taken",
                    *(self.location, axis, start, corner),
                )
            mip_start = array.start.get(axis, 0.0) / nm
            largest = (factor - 1) / 2 + _OFF_PX
            if corner % factor or not -_OFF_PX <= mip_start - start <= largest:
                self.unreadable[mip] = (
                    f"begins at {axis} {mip_start:g}, mip 0 at {start:g} (mip-0 "
                    f"voxels); expected the same for both, a multiple of {factor}"
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
    """One array; its axes have the order of its shape and of the names of its chunks.

    Attributes:
        folder: its folder inside the volume; "" if the volume is the array.
        axes: one letter per axis: x, y, z, c, t.
        shape: size of the array along `axes`.
        chunks: size of a chunk along `axes`.
        dtype: data type in files, with its byte order.
        fill: value where no chunk is stored.
        prefix: begin of the names of chunks.
        separator: text between the numbers in the names of chunks.
        layout: order of the axes in memory, the slowest first.
        decoders: functions that undo the compression, in the order of their calls.
        has_header: whether each chunk begins with its shape, as in N5.
        scale: by axis, nm of a voxel.
        start: by axis, position of the first voxel in nm.
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
        """Return the size of the array along an axis; 1 if it lacks the axis."""
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1

    def chunk(self, axis: str) -> int:
        """Return the size of a chunk along an axis; 1 if the array lacks the axis."""
        return self.chunks[self.axes.index(axis)] if axis in self.axes else 1

    def name(self, index: Sequence[int]) -> str:
        """Return the name of a chunk's file."""
        return self.prefix + self.separator.join(map(str, index))

    def corner(self, index: Sequence[int]) -> list[int]:
        """Return the first voxel of a chunk."""
        return [at * size for at, size in zip(index, self.chunks, strict=True)]

    def decode(self, content: bytes) -> np.ndarray:
        """Decode a chunk; the result has the axes of the array, in their order."""
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


def open_arrays(form: str, location: str) -> ArrayVolume | None:
    """Open a Zarr or N5; None if there is none.

    Args:
        form: one of FORMATS; "" to look for any of them.
        location: its path, without the format.

    Raises:
        InfoError: it exists but cannot be read; the message says why.
    """
    files = _Metadata(location)
    # Ask for one file at a time, since stores may answer 403 for missing files.
    try:
        if form in ("", "zarr", "zarr3"):
            if (root := files.read("zarr.json")) is not None:
                return ArrayVolume("zarr", location, _zarr3(files, root))
        if form in ("", "zarr", "zarr2"):
            root = files.read(".zattrs") or {}
            array = None if "multiscales" in root else files.read(".zarray")
            if root or array:
                return ArrayVolume("zarr", location, _zarr2(files, root, array))
        if form in ("", "n5"):
            if (root := files.read("attributes.json")) is not None:
                return ArrayVolume("n5", location, _n5(files, root))
        return None
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
    ) as error:
        if failed_file(error):  # an error of storage, not of the metadata
            raise
        raise InfoError(
            f"its metadata cannot be understood ({type(error).__name__}: {error})"
        ) from error


class _Metadata:
    """Reads the JSON files of a Zarr or N5."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._files = CloudFiles(location, progress=False)

    def read(self, name: str) -> Any:
        """Read a JSON file; None if it does not exist."""
        with reading(file_address(self._location, name)):
            content: Any = self._files.get(name)
            try:
                return None if content is None else json.loads(content)
            except ValueError as error:
                raise InfoError(f"its {name} is not JSON: {error}") from error

    def of(self, folder: str, name: str) -> Any:
        """Read the JSON file `name` of one array; InfoError if it does not exist."""
        path = _joined(folder, name)
        if (found := self.read(path)) is None:
            raise InfoError(f"its {path} does not exist")
        return found


def _zarr2(files: _Metadata, attributes: Json, array: Json | None) -> list[_Array]:
    """List the arrays of a Zarr 2: OME-Zarr up to 0.4, or a single array."""
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
    """List the arrays of a Zarr 3: OME-Zarr 0.5, or a single array."""
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
    """Return layout in memory, byte order, and decoders of the compression."""
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
    """List the arrays of an N5: s0, s1 ..., or a single array."""
    if "dimensions" in root:
        found, folders = [root], [""]
    else:
        factors = root.get("downsamplingFactors", root.get("scales"))
        folders = [f"s{level}" for level in range(len(factors or ()))]
        found = [files.of(folder, "attributes.json") for folder in folders]
        while factors is None:  # read s0, s1 ... until one does not exist
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
        nm, start = _n5_scale_and_start(root, found, level, axes)
        arrays.append(_n5_array(folder, array, axes, nm, start))
    return arrays


def _n5_array(folder: str, array: Json, axes: str, scale: Json, start: Json) -> _Array:
    compression = array.get("compression", array.get("compressionType", "raw"))
    if isinstance(compression, str):
        compression = {"type": compression}
    kind = compression["type"]
    if kind == "gzip" and compression.get("useZlib"):
        kind = "zlib"
    if kind == "lz4":  # in a block format that numcodecs does not know
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


def _n5_scale_and_start(
    root: Json, levels: Sequence[Json], level: int, axes: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Return, by axis, nm of a voxel and the position of the first voxel in nm."""
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
    """Map axes to values, of which there is one per axis, or one each for x, y, z."""
    return dict(zip(axes if len(values) == len(axes) else "xyz", values, strict=True))


def _mips(
    files: _Metadata, attributes: Json, name: str
) -> list[tuple[str, Json, str, dict[str, float], dict[str, float]]]:
    """Read the metadata of each mip of an OME-Zarr.

    Args:
        files: reads the metadata of the arrays.
        attributes: attributes of the OME-Zarr.
        name: name of an array's metadata file.

    Returns:
        For each mip: folder, metadata, axes, nm of a voxel by axis, and position of
        the first voxel in nm by axis.
    """
    if not attributes.get("multiscales"):
        raise InfoError(
            "holds no multiscales and is no array; give the path of an array or of "
            "an OME-Zarr image in it (it may be 0)"
        )
    multiscale = attributes["multiscales"][0]
    folders = [level["path"].strip("/") for level in multiscale["datasets"]]
    arrays = [files.of(folder, name) for folder in folders]
    geometry = _axes_scale_and_start(multiscale, [array["shape"] for array in arrays])
    return [
        (*both, *where) for *both, where in zip(folders, arrays, geometry, strict=True)
    ]


def _axes_scale_and_start(
    multiscale: Json, shapes: Sequence[Sequence[int]]
) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """Return axes, nm of a voxel and of the first voxel, for each OME-Zarr mip."""
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
    """Return one letter per axis; the order of OME-Zarr if there are no names."""
    if axes and all(isinstance(axis, str) and len(axis) == 1 for axis in axes):
        return "".join(axes).lower()
    return "tczyx"[-len(shape) :]


def _axis(axis: Any) -> str:
    """Return the letter of an axis of an OME-Zarr."""
    about = axis if isinstance(axis, Mapping) else {"name": axis}
    known = {"channel": "c", "time": "t"}
    letter = known.get(about.get("type", ""), str(about["name"]).lower())
    if len(letter) != 1:
        raise InfoError(f"has an axis {about['name']!r}; expected x, y, z, c or t")
    return letter


def _is_space(axis: Any) -> bool:
    return isinstance(axis, Mapping) and axis["name"].lower() in "xyz"


def _nm(unit: str | None) -> float:
    """Return the nm of a unit; 1 if none is stated."""
    if unit is None:
        return 1.0
    if unit not in _NM:
        raise InfoError(f"has sizes in {unit!r}; expected nanometer, micrometer ...")
    return _NM[unit]


def _factors(first: Json, this: Json, key: str) -> list[int]:
    """Return by what factors an array is coarser than the first, from their shapes."""
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
    """Return the function that undoes a compression or a filter.

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
        if module == "blosc":  # the package that cloud-volume uses
            return codecs.decompress
        # Blosc's data state their own compression, so no settings are needed.
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
    # `decompress` needs the length of a frame, which not all frames state.
    frames = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)
    return frames.decompress(content)


def _without_crc32c(content: bytes) -> bytes:
    """Check the CRC-32C at the end of a chunk, and return the rest."""
    body, stored = content[:-4], content[-4:]
    if crc32c.crc32c(body) != int.from_bytes(stored, "little"):
        raise ValueError("its checksum does not match the data received")
    return body


_DECODERS: dict[str, Decoder] = {
    "gzip": gzip.decompress,
    "zlib": zlib.decompress,
    "bz2": bz2.decompress,
    "bzip2": bz2.decompress,
    "xz": lzma.decompress,
    "zstd": _unzstd,
    "crc32c": _without_crc32c,
}


def _without_header(content: bytes) -> tuple[tuple[int, ...], bytes]:
    """Split a chunk of an N5 into its shape and its compressed values."""
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
    """Copy the part of a chunk within `spans` to `into`, which covers them."""
    target, source = [], []
    for size, first, (low, high) in zip(chunk.shape, corner, spans, strict=True):
        start, end = max(first, low), min(first + size, high)
        target.append(slice(start - low, end - low))
        source.append(slice(start - first, end - first))
    into[tuple(target)] = chunk[tuple(source)]
