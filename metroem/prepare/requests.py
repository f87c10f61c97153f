"""Define the flags of the commands that make and inspect data sets."""

import math
from dataclasses import dataclass
from pathlib import Path

from metroem.errors import DatasetError, UsageError
from metroem.geometry.grid import Grid
from metroem.io.cloud_paths import (
    check_dataset,
    check_destination,
    check_exists,
    cloud_path,
    local_folder,
)
from metroem.specs.filenames import (
    FieldSetName,
    ImageSetName,
    check_checkpoint_name,
    check_tag,
)
from metroem.specs.modules import find_modules
from metroem.utils.cli import Request, flag, flags_of_group

_CORNER = "of the patch's corner, mip-0 pixels, a multiple of 2^mip"
_GROUPS = ("data", "grey levels", "format of the volume's values")
_GROUPS += ("location", "files and reading", "defects")
_data, _grey, _values, _location, _files, _defects = map(flags_of_group, _GROUPS)
_WRITTEN, _RUNNING = "what is written", "how it is run"
_written, _running = flags_of_group(_WRITTEN), flags_of_group(_RUNNING)
_VOLUME = "gs://, s3://, https://, file:// or a plain path"


@dataclass(frozen=True, kw_only=True)
class DownloadRequest(Request):
    """Flags that both downloads share."""

    GROUPS = _GROUPS

    x_offset: int = _location(f"x {_CORNER}", 0)
    y_offset: int = _location(f"y {_CORNER}", 0)
    z_start: int = _location("first src section; its tgt is the section before")
    z_end: int = _location("one past the last src section")
    dst_folder: Path = _files("folder for the files", Path("dataset01"))
    overwrite: bool = _files("replace files made with other flags", False)
    parallel: int = _files(
        "layers of chunks read at a time; 4 to 16 for cloud paths", 1, least=1
    )
    cv_path_defects: str | None = _defects(
        "CloudVolume of defects: blank in images, left out of the mean of fields; read "
        "at the same mip, so it must be written there",
        None,
    )
    mask_val: float = _defects("values >= this are defects", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.z_end <= self.z_start:
            raise UsageError(
                f"--z_end {self.z_end}: must be above --z_start {self.z_start}; it is "
                f"one past the last src section, so --z_end {self.z_start + 1} makes "
                "one pair"
            )

    def _check_corner(self, mip: int) -> None:
        """Refuse a corner between the pixels of a mip (UsageError)."""
        for name, value in (("x_offset", self.x_offset), ("y_offset", self.y_offset)):
            if value % (1 << mip):
                below = value - value % (1 << mip)
                raise UsageError(
                    f"--{name} {value}: must be a multiple of 2^{mip} = {1 << mip}, "
                    f"since mip {mip} is asked for; use {below} or {below + (1 << mip)}"
                )

    @property
    def sections(self) -> range:
        """All sections that are read: every src, and the tgt of the first."""
        return range(self.z_start - 1, self.z_end)


@dataclass(frozen=True)
class ImageRequest(DownloadRequest):
    """Flags of download_image.py."""

    HELP = """Make image sets from a volume: pairs of sections, one h5 file per mip.

    In pair i, section z_start + i is src and the section before it is tgt. Files are
    float32, and grey levels stay as stored. Give --normalize unless the volume already
    has mean 0 and std 1 over tissue, and 0 for no data; any uint8 volume needs it.

    The same command resumes a download that was stopped. --field_dset moves the images;
    existing images that were not moved are replaced, at all mips of the location.

    Example:
        %(prog)s --cv_path gs://bucket/em --dst_folder data \\
            --mip 5 3 --patch_size 512 2048 --normalize \\
            --x_offset 200960 --y_offset 136448 --z_start 8175 --z_end 8180
    """

    cv_path: str = _data(f"CloudVolume of the images: {_VOLUME}")
    mips: list[int] = _data(
        "mips to download, one file each", names=("--mip", "--mips")
    )
    patch_sizes: list[int] = _data(
        "side of the square patch, one per mip, pixels of that mip",
        names=("--patch_size", "--patch_sizes"),
        least=1,
    )
    anchor: str = _data(
        "point that the patches of all mips share; with center, --x_offset and "
        "--y_offset are the corner of the largest",
        "corner",
        choices=("corner", "center"),
    )
    suffix: str | None = _data(
        "text in the file names, to tell sets of one location apart", None
    )
    field_dset: Path | None = _data(
        "downloaded field set whose offsets move each patch", None
    )
    normalize: bool = _grey(
        "give each section mean 0 and std 1 over tissue; 0 stays 0", False
    )
    reference_path: str | None = _grey(
        "volume whose mean and std normalise", unset="--cv_path"
    )
    reference_mip: int | None = _grey(
        "mip of the reference area", unset="the patch's", least=0
    )
    reference_size: int | None = _grey(
        "side of the reference area, centred on the patch, pixels of its mip",
        unset="the patch's area",
        least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mips or min(self.mips) < 0 or len(set(self.mips)) < len(self.mips):
            raise UsageError(
                f"--mip {' '.join(map(str, self.mips))}: expected mips >= 0, each once"
            )
        if len(self.patch_sizes) != len(self.mips):
            raise UsageError(
                f"--patch_size: {len(self.patch_sizes)} given for {len(self.mips)} "
                "mips; expected one per mip, in pixels of that mip, for example --mip "
                "5 3 --patch_size 256 1024 for one area"
            )
        self._check_corner(max(self.mips))
        if self.suffix is not None:
            check_tag("--suffix", self.suffix)
        if self.has_reference and not self.normalize:
            raise UsageError(
                "--reference_path, --reference_mip and --reference_size choose the "
                "area that normalises; give --normalize too"
            )

    def check_paths(self) -> None:
        check_exists("--cv_path", self.cv_path)
        check_exists("--cv_path_defects", self.cv_path_defects)
        check_exists("--reference_path", self.reference_path)
        if self.field_dset is not None and not self.field_dset.is_file():
            raise DatasetError(f"--field_dset {self.field_dset}: no such file")

    @property
    def has_reference(self) -> bool:
        """Whether another area than the patch normalises."""
        asked = (self.reference_path, self.reference_mip, self.reference_size)
        return any(value is not None for value in asked)

    def grids(self) -> list[Grid]:
        """The patch of each mip, in the order of `mips`."""
        extent = max(
            size << mip for mip, size in zip(self.mips, self.patch_sizes, strict=True)
        )
        # On pixels of the coarsest mip, so that fields move between mips exactly.
        step = 1 << max(self.mips)
        grids = []
        for mip, size in zip(self.mips, self.patch_sizes, strict=True):
            inset = 0
            if self.anchor == "center":
                inset = (extent - (size << mip)) // 2 // step * step
            x, y = self.x_offset + inset, self.y_offset + inset
            grids.append(Grid(mip, x, y, size, size))
        return grids

    def path(self, mip: int) -> Path:
        """The file of one mip."""
        name = ImageSetName(
            self.x_offset, self.y_offset, self.z_start, mip, self.suffix
        )
        return self.dst_folder / name.filename


@dataclass(frozen=True)
class FieldRequest(DownloadRequest):
    """Flags of download_field.py."""

    HELP = """Make a field set from a volume of fields, for stage 1 to start from.

    The set replaces the fields of stage 0 of the checkpoint --suffix: train with
    --checkpoint_name SUFFIX --train_stages 1 --generate_field_stages 1 uses it.
    Fields are pull (inverse) displacements.

    Channel order and unit differ between volumes. By default channel 0 is the
    displacement along x and channel 1 along y, in mip-0 pixels. For volumes that corgie
    wrote, give --channel_order yx --field_unit relative.

    The same command resumes a download that was stopped.

    Example:
        %(prog)s --cv_path gs://bucket/field --dst_folder data \\
            --src_mip 7 --dst_mip 5 --patch_size 512 --suffix precomputed \\
            --x_offset 200960 --y_offset 136448 --z_start 8175 --z_end 8180
    """

    cv_path: str = _data(f"CloudVolume of the fields, of two channels: {_VOLUME}")
    src_mip: int = _data("mip that is read")
    dst_mip: int = _data("mip of the images that the fields are for, <= src_mip")
    patch_size: int = _data(
        "side of the square patch, pixels of dst_mip",
        names=("--patch_size", "--patch_sizes"),
        least=1,
    )
    suffix: str | None = _data(
        "checkpoint name under which train.py finds the fields", None
    )
    place: str | None = _data(
        "location of the image sets that the fields are for, as in their names: "
        "x<X>_y<Y>_z<Z>[_<suffix>]; needed if those names have a suffix or "
        "another corner (--anchor center)",
        unset="the corner and z_start",
    )
    channel_order: str = _values(
        "axes that channels 0 and 1 displace along", "xy", choices=("xy", "yx")
    )
    field_unit: str = _values(
        "unit of the values: mip0 (mip-0 pixels) or relative (pixels of src_mip)",
        "mip0",
        choices=("mip0", "relative"),
    )
    int16_scale: float | None = _values(
        "length that the int16 value 1 stands for, in that unit", unset="0.25"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dst_mip <= self.src_mip:
            raise UsageError(
                f"--src_mip {self.src_mip} --dst_mip {self.dst_mip}: expected 0 <= "
                "dst_mip <= src_mip, since a field is only resampled to finer mips"
            )
        self._check_corner(self.dst_mip)
        if self.int16_scale is not None and not self.int16_scale > 0:
            raise UsageError(f"--int16_scale {self.int16_scale}: must be > 0")
        if self.suffix is not None:
            check_tag("--suffix", self.suffix)
        if self.place is not None:
            name = ImageSetName.parse(f"{self.place}_MIP{self.dst_mip}.h5")
            if name is None or name.z != self.z_start:
                raise UsageError(
                    f"--place {self.place}: expected x<X>_y<Y>_z{self.z_start}"
                    "[_<suffix>], as in the name of the image sets"
                )

    def check_paths(self) -> None:
        check_exists("--cv_path", self.cv_path)
        check_exists("--cv_path_defects", self.cv_path_defects)

    @property
    def grid(self) -> Grid:
        """The patch, at dst_mip."""
        size = self.patch_size
        return Grid(self.dst_mip, self.x_offset, self.y_offset, size, size)

    @property
    def place_name(self) -> str:
        """Name, without the mip, of the image sets that the fields are for."""
        corner = self.x_offset, self.y_offset, self.z_start
        return self.place or ImageSetName(*corner, self.dst_mip).place

    @property
    def path(self) -> Path:
        """The file."""
        name = FieldSetName(0, self.place_name, self.dst_mip, self.suffix)
        return self.dst_folder / name.filename


@dataclass(frozen=True)
class SpecRequest(Request):
    """Flags of `metroem create-spec`."""

    HELP = """Write a spec of pairs around points, for make-dataset.

    Example:
        %(prog)s --src_spec_path template.json --points_path points.csv \\
            --dst_spec_path spec.json --offsets -1 -2
    """

    src_spec_path: Path = flag("template: a spec (JSON); pairs that it has are kept")
    points_path: Path = flag(
        "CSV: neuroglancer's export of annotations, or columns x0, y0, z0"
    )
    dst_spec_path: Path = flag("spec to write")
    offsets: list[int] = flag(
        "one pair per point for each: src at the point's z, tgt at z + offset", [-1]
    )
    overwrite: bool = flag("replace an existing file", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.offsets or 0 in self.offsets:
            raise UsageError(
                f"--offsets {' '.join(map(str, self.offsets))}: expected distances in "
                "z other than 0, for example --offsets -1 -2: tgt is 1 and 2 sections "
                "below src"
            )

    def check_paths(self) -> None:
        _check_file("--src_spec_path", self.src_spec_path)
        _check_file("--points_path", self.points_path)


@dataclass(frozen=True)
class DatasetRequest(Request):
    """Flags of `metroem make-dataset`."""

    GROUPS = ("", _RUNNING)
    HELP = """Make image and field sets from a spec of pairs.

    The same command resumes a data set that was stopped.

    Example:
        %(prog)s --spec_path spec.json --dst_path data --parallel 8
    """

    spec_path: Path = flag("spec (JSON), from create-spec")
    dst_path: str = flag(
        "folder for h5 files; with a scheme (gs://, file://) CloudVolumes"
    )
    checkpoint_name: str = flag(
        "name of the training whose stage 1 starts from the fields", "precomputed"
    )
    parallel: int = _running(
        "batches of patches read at a time; 4 to 16 for cloud paths", 1, least=1
    )
    overwrite: bool = _running("replace a data set of another spec", False)
    verify: bool = _running(
        "check each pair's checksum in the h5 files at the end, also in files that "
        "already existed; reads them once",
        False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_checkpoint_name(self.checkpoint_name)
        if not self.dst_path:
            raise UsageError("--dst_path: expected a folder or a cloud path")
        check_destination("--dst_path", self.dst_path)
        if self.verify and "://" in self.dst_path:
            raise UsageError(
                f"--verify: {self.dst_path} gets CloudVolumes, which have no "
                "checksums; leave --verify out, or give a folder for h5 files"
            )

    def check_paths(self) -> None:
        _check_file("--spec_path", self.spec_path)


@dataclass(frozen=True)
class InspectRequest(Request):
    """Flags of `metroem inspect`."""

    HELP = """List and check image sets and field sets.

    Example:
        %(prog)s --dataset_path data --pyramid_path pyramid
    """

    dataset_path: Path = flag(
        "folder of image sets and field sets",
        names=("--dataset_path",),
        is_positional=True,
    )
    pyramid_path: Path | None = flag(
        "pyramid whose stages must find their images and prior fields", None
    )
    checkpoint_name: str = flag("tag of the prior fields", "checkpoint")
    fields_path: Path | None = flag("another folder of field sets to check", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_checkpoint_name(self.checkpoint_name)

    def check_paths(self) -> None:
        check_dataset(self.dataset_path)
        if self.fields_path is not None:
            check_dataset(self.fields_path)
        if self.pyramid_path is not None:
            find_modules(self.pyramid_path)


@dataclass(frozen=True)
class ImportRequest(Request):
    """Flags of `metroem import`."""

    GROUPS = ("", _WRITTEN, _RUNNING)
    HELP = """Make a volume with mips of image files, or add mips to a volume.

    SECTIONS is a folder of PNG or TIFF files, one for each section, a TIFF stack, a
    .npy, OME-Zarr, Zarr, N5, or a precomputed volume. Sections of several sizes get one
    canvas, upper left corners on each other. 16 bit and floats become 8 bit, by one
    range for all sections. 0 means no data.

    The same command resumes an import that was stopped.

    Example:
        %(prog)s images em --resolution 4.6 4.6 45 --mips 4
    """

    sections: str = flag(
        "folder of images, TIFF, .npy of (z, rows, cols), OME-Zarr, Zarr, N5, or a "
        "precomputed volume",
        is_positional=True,
        metavar="SECTIONS",
    )
    volume: str | None = flag(
        "volume to write: a local path, gs:// or s3://; left out, mips are added to "
        "the precomputed volume SECTIONS",
        None,
        is_positional=True,
        metavar="VOLUME",
    )
    resolution: list[float] | None = flag(
        "nm of a voxel along x, y, z",
        unset="what the files state: OME-Zarr, OME-TIFF, ImageJ, volumes",
        nargs=3,
        metavar=("X", "Y", "Z"),
    )
    mips: int | None = _written(
        "number of mips: 4 makes mips 0 to 3",
        unset="3, or more until the coarsest is at most 512 px",
        least=1,
    )
    z_start: int | None = _written(
        "z of the first section",
        unset="the number in the name of the first file, or 0; that of a volume",
    )
    grey_range: list[float] | None = _written(
        "grey levels that become 1 and 255; what lies outside is clipped",
        unset="8 bit stays as it is; of other types 0.1 %% to 99.9 %% of the tissue",
        nargs=2,
        metavar=("LOW", "HIGH"),
    )
    allow_missing: bool = _running(
        "leave sections blank that are missing or cannot be read", False
    )
    workers: int = _running("processes, each with one section at a time", 1, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution is not None and not all(
            0 < nm < math.inf for nm in self.resolution
        ):
            raise UsageError(
                f"--resolution {_words(self.resolution)}: must be > 0, in nm"
            )
        if self.grey_range is not None:
            low, high = self.grey_range
            if not -math.inf < low < high < math.inf:
                raise UsageError(
                    f"--grey_range {_words(self.grey_range)}: expected LOW below HIGH"
                )
        if self.volume is not None:
            check_destination("VOLUME", self.volume)
            return
        check_destination("SECTIONS", self.sections)
        for name in ("resolution", "z_start", "grey_range"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"--{name}: without VOLUME, mips are added to {self.sections}, "
                    f"and nothing else changes; give VOLUME, or leave --{name} out"
                )
        if self.allow_missing:
            raise UsageError("--allow_missing: goes with VOLUME")

    def check_paths(self) -> None:
        folder = local_folder(self.sections)
        if folder is not None and not folder.exists():
            raise DatasetError(
                f"SECTIONS {self.sections}: no such file or folder; check the path"
            )
        if self.volume is not None:
            if cloud_path(self.sections) == cloud_path(self.volume):
                raise UsageError(
                    f"VOLUME {self.volume}: is also SECTIONS; name another path to "
                    "write to, or leave VOLUME out to add mips to a volume"
                )
            written = local_folder(self.volume)
            if written is not None and written.is_file():
                raise DatasetError(
                    f"VOLUME {self.volume}: is a file; give the path of a folder"
                )


def _words(values: list[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _check_file(flag: str, path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"{flag} {path}: no such file")
