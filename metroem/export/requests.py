"""Define the flags of export-fields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metroem.errors import UsageError
from metroem.io.cloud_paths import check_dataset, check_destination, check_exists
from metroem.specs.filenames import check_checkpoint_name
from metroem.utils.cli import Request, flag, flags_of_group

_FIELDS, _VALUES, _BOUNDS = "which fields", "values", "where they lie"
_AREA = "which area"
_fields, _values = flags_of_group(_FIELDS), flags_of_group(_VALUES)
_bounds, _area = flags_of_group(_BOUNDS), flags_of_group(_AREA)

# Length that the int16 value 1 stands for in corgie and download_field.py.
QUARTER = 0.25


@dataclass(frozen=True)
class ExportRequest(Request):
    """Flags of export-fields."""

    GROUPS = ("", _FIELDS, _VALUES, _BOUNDS)
    HELP = """Write fields as a volume, or for SOFIMA or ITK.

    Example:
        %(prog)s --dataset_path data --dst_path fields --warped images
    """

    dataset_path: Path = flag(
        "folder of image sets and, without --fields_path, of field sets"
    )
    dst_path: str = flag(
        "volume to write: gs://, s3:// or a local path; with other formats a folder"
    )
    fields_path: Path | None = _fields("folder of field sets", unset="--dataset_path")
    checkpoint_name: str = _fields(
        'tag of the field sets: checkpoint, or --suffix of a download; "" for '
        "downloads without one",
        "checkpoint",
    )
    stage: int | None = _fields("stage of the fields", unset="the last that has any")
    mip: int | None = _fields(
        "mip of the fields, if they have several", unset="their only mip"
    )
    format: str = _values(
        "format to write", "cloudvolume", choices=("cloudvolume", "sofima", "itk")
    )
    dtype: str = _values(
        "type of the volume's values; int16 holds quarter pixels",
        "float32",
        choices=("float32", "int16"),
    )
    channel_order: str = _values(
        "axes that channels 0 and 1 displace along; corgie uses yx",
        "yx",
        choices=("yx", "xy"),
    )
    field_unit: str = _values(
        "unit of the values: relative (pixels of the fields' mip, as in corgie) or "
        "mip0 (mip-0 pixels)",
        "relative",
        choices=("relative", "mip0"),
    )
    warped: str | None = flag(
        "folder for two more volumes: the images before and after alignment", None
    )
    like: str | None = _bounds(
        "volume whose bounds and resolution the new volumes get",
        unset="those of the sets",
    )
    resolution: list[float] | None = _bounds(
        "nm of a mip-0 voxel, if the sets do not state it",
        None,
        nargs=3,
        metavar=("X", "Y", "Z"),
    )
    tgt_offset: int | None = _fields(
        "only fields of pairs with this z of tgt minus z of src, for example -1",
        unset="all",
    )
    overlap: str | None = _fields(
        "pair whose values are written where several cover a pixel",
        unset="they must be equal",
        choices=("first", "last"),
    )
    overwrite: bool = flag("replace existing files and values", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_name:
            check_checkpoint_name(self.checkpoint_name)
        chosen = (self.dtype, self.channel_order, self.field_unit)
        if self.format != "cloudvolume":
            if chosen != ("float32", "yx", "relative"):
                raise UsageError(
                    f"--format {self.format}: defines the values itself; leave "
                    "out --dtype, --channel_order and --field_unit"
                )
            if "://" in self.dst_path:
                raise UsageError(
                    f"--dst_path {self.dst_path}: --format {self.format} writes "
                    "files; give a local folder"
                )
            if self.warped is not None:
                raise UsageError(
                    f"--warped {self.warped}: only goes with --format cloudvolume"
                )
        if self.resolution is not None and not min(self.resolution) > 0:
            raise UsageError(f"--resolution {self.resolution}: must be > 0, in nm")
        check_destination("--dst_path", self.dst_path)
        if self.warped is not None:
            check_destination("--warped", self.warped)

    def check_paths(self) -> None:
        check_dataset(self.fields_folder)
        check_dataset(self.dataset_path)
        check_exists("--like", self.like)

    @property
    def fields_folder(self) -> Path:
        """The folder of the field sets."""
        return self.fields_path or self.dataset_path

    @property
    def notes(self) -> dict[str, Any]:
        """Format of the field volume, in the flags and values of download_field.py."""
        notes: dict[str, Any] = {
            "kind": "fields",
            "direction": "pull",
            "channel_order": self.channel_order,
            "field_unit": self.field_unit,
        }
        if self.dtype == "int16":
            notes["int16_scale"] = QUARTER
        if self.tgt_offset is not None:
            notes["tgt_offset"] = self.tgt_offset
        return notes


@dataclass(frozen=True)
class ExportImagesRequest(Request):
    """Flags of export-images."""

    GROUPS = ("", _AREA)
    HELP = """Write the sections of a volume as PNG or TIFF files.

    The same command resumes an export that was stopped.

    Example:
        %(prog)s --cv_path stack/image --dst_folder aligned
    """

    cv_path: str = flag("volume of grey levels: gs://, s3://, https:// or a local path")
    dst_folder: Path = flag("folder for the files, one for each section: z0007.png")
    format: str = flag("format of the files", "png", choices=("png", "tiff"))
    mip: int = flag("mip to write", 0, least=0)
    z_start: int | None = _area("first section", unset="the volume's first")
    z_end: int | None = _area("one past the last section", unset="the volume's end")
    x_offset: int | None = _area(
        "x of the area's corner, mip-0 pixels, a multiple of 2^mip",
        unset="the volume's corner",
    )
    y_offset: int | None = _area("y of the area's corner", unset="the volume's corner")
    patch_size: int | None = _area(
        "side of a square area, pixels of the mip",
        unset="all up to the volume's end",
        least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        start, end = self.z_start, self.z_end
        if start is not None and end is not None and end <= start:
            raise UsageError(
                f"--z_start {start} --z_end {end}: expected a section or more; --z_end "
                "is one past the last"
            )
        for name in ("x_offset", "y_offset"):
            value, step = getattr(self, name), 1 << self.mip
            if value is not None and value % step:
                raise UsageError(
                    f"--{name} {value}: must be a multiple of 2^{self.mip} = {step}, "
                    f"since mip {self.mip} is asked for"
                )

    def check_paths(self) -> None:
        check_exists("--cv_path", self.cv_path)
