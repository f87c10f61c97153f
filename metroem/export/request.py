"""What export-fields is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metroem.errors import UsageError
from metroem.io.cloud_paths import check_destination
from metroem.specs.filenames import check_checkpoint_name

FORMATS = ("cloudvolume", "sofima", "itk")
DTYPES = ("float32", "int16")
# What 1 of an int16 volume stands for, as corgie and download_field.py take it.
QUARTER = 0.25


@dataclass(frozen=True)
class ExportRequest:
    """What export-fields is asked for, one field a flag.

    Attributes:
        dataset_path: folder of the image sets.
        dst_path: the volume; of other formats the folder.
        checkpoint_name: tag of the field sets: checkpoint, or suffix of a download;
            "" for downloads without one.
        stage: whose fields; None: the last stage that has any.
        mip: of the fields; None: the one there is.
        format: "cloudvolume", "sofima" or "itk".
        dtype: of the volume; int16 holds quarter pixels.
        channel_order: axes of the volume that channel 0 and 1 displace along.
        field_unit: "relative": pixels of the fields' mip; "mip0": mip-0 pixels.
        warped: folder for two volumes, the images before and after; None: none.
        like: volume whose bounds and resolution the new ones get; None: the bounds
            of what is written.
        resolution: nm of a mip-0 voxel along x, y, z; None: as the sets say.
        tgt_offset: only pairs whose tgt lies so many sections above src (-1: one
            below); None: all, which a volume cannot hold where one section has fields
            onto several.
        overlap: whose values count where several pairs cover a pixel: of the "first"
            or of the "last"; None: such pairs are refused if they differ.
        overwrite: replace what is there.
        fields_path: folder of the field sets; None: `dataset_path`.

    Raises:
        UsageError: flags that cannot work.
    """

    dataset_path: Path
    dst_path: str
    checkpoint_name: str = "checkpoint"
    stage: int | None = None
    mip: int | None = None
    format: str = "cloudvolume"
    dtype: str = "float32"
    channel_order: str = "yx"
    field_unit: str = "relative"
    warped: str | None = None
    like: str | None = None
    resolution: list[float] | None = None
    tgt_offset: int | None = None
    overlap: str | None = None
    overwrite: bool = False
    fields_path: Path | None = None

    def __post_init__(self) -> None:
        if self.checkpoint_name:
            check_checkpoint_name(self.checkpoint_name)
        for flag, value, known in (
            ("--format", self.format, FORMATS),
            ("--dtype", self.dtype, DTYPES),
            ("--channel_order", self.channel_order, ("yx", "xy")),
            ("--field_unit", self.field_unit, ("relative", "mip0")),
            ("--overlap", self.overlap or "first", ("first", "last")),
        ):
            if value not in known:
                raise UsageError(f"{flag} {value}: expected one of {', '.join(known)}")
        chosen = (self.dtype, self.channel_order, self.field_unit)
        if self.format != "cloudvolume":
            if chosen != ("float32", "yx", "relative"):
                raise UsageError(
                    f"--format {self.format}: says itself what its values are; leave "
                    "out --dtype, --channel_order and --field_unit"
                )
            if "://" in self.dst_path:
                raise UsageError(
                    f"--dst_path {self.dst_path}: --format {self.format} writes "
                    "files; give a local folder"
                )
            if self.warped is not None:
                raise UsageError(
                    f"--warped {self.warped}: goes with --format cloudvolume alone"
                )
        if self.resolution is not None and not min(self.resolution) > 0:
            raise UsageError(f"--resolution {self.resolution}: must be > 0, in nm")
        check_destination("--dst_path", self.dst_path)
        if self.warped is not None:
            check_destination("--warped", self.warped)

    @property
    def fields_folder(self) -> Path:
        """Where the field sets are."""
        return self.fields_path or self.dataset_path

    @property
    def notes(self) -> dict[str, Any]:
        """What the values of the field volume are, in words of download_field.py."""
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
