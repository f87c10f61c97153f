"""Say what export-fields is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metroem.errors import UsageError
from metroem.io.cloud_paths import check_dataset, check_destination, check_exists
from metroem.specs.filenames import check_checkpoint_name
from metroem.utils.cli import Request, flag

# What 1 of an int16 volume stands for, as corgie and download_field.py take it.
QUARTER = 0.25


@dataclass(frozen=True)
class ExportRequest(Request):
    """What export-fields is asked for."""

    dataset_path: Path = flag(
        "folder of image sets and, without --fields_path, of field sets"
    )
    dst_path: str = flag(
        "the volume: gs://, s3:// or a local path; of other formats the folder"
    )
    fields_path: Path | None = flag("folder of field sets", unset="--dataset_path")
    checkpoint_name: str = flag(
        'tag of the field sets: checkpoint, or --suffix of a download; "" for '
        "downloads without one",
        "checkpoint",
    )
    stage: int | None = flag("stage of the fields", unset="the last that has any")
    mip: int | None = flag(
        "mip of the fields, where there are several", unset="the one there is"
    )
    format: str = flag(
        "what is written", "cloudvolume", choices=("cloudvolume", "sofima", "itk")
    )
    dtype: str = flag(
        "type of the volume's values; int16 holds quarter pixels",
        "float32",
        choices=("float32", "int16"),
    )
    channel_order: str = flag(
        "axes that channel 0 and 1 displace along; yx as corgie has it",
        "yx",
        choices=("yx", "xy"),
    )
    field_unit: str = flag(
        "relative: pixels of the fields' mip, as corgie has it; or mip-0 pixels",
        "relative",
        choices=("relative", "mip0"),
    )
    warped: str | None = flag(
        "folder for two volumes more: the images before and after", None
    )
    like: str | None = flag(
        "volume whose bounds and resolution new ones get",
        unset="those of what is written",
    )
    resolution: list[float] | None = flag(
        "nm of a mip-0 voxel, if the sets do not say",
        None,
        nargs=3,
        metavar=("X", "Y", "Z"),
    )
    tgt_offset: int | None = flag(
        "only fields onto the section so far from src, for example -1", unset="all"
    )
    overlap: str | None = flag(
        "whose values count where several pairs cover a pixel",
        unset="they must be equal",
        choices=("first", "last"),
    )
    overwrite: bool = flag("replace what is there", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_name:
            check_checkpoint_name(self.checkpoint_name)
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

    def check_paths(self) -> None:
        check_dataset(self.fields_folder)
        check_dataset(self.dataset_path)
        check_exists("--like", self.like)

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
