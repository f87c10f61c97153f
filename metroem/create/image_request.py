"""What download_image.py is asked for."""

from dataclasses import dataclass
from pathlib import Path

from metroem.create.download import check_offset, check_range
from metroem.errors import UsageError
from metroem.grid import Grid
from metroem.specs.filenames import ImageSetName, check_tag

ANCHORS = ("corner", "center")


@dataclass(frozen=True)
class ImageRequest:
    """What download_image.py is asked for, one field a flag.

    Attributes:
        cv_path: volume of the images.
        mips: one file each.
        patch_sizes: side of the square patch of each mip, pixels of that mip.
        z_start: first src section; its tgt is the section before.
        z_end: one past the last src section.
        dst_folder: for the files.
        x_offset: corner of the (largest) patch, mip-0 pixels.
        y_offset: likewise.
        anchor: what the patches of all mips share: "corner" or "center".
        normalize: mean 0 and std 1 over tissue; else as stored.
        reference_path: volume whose statistics normalise; None: cv_path.
        reference_mip: mip of the reference area; None: that of the patch.
        reference_size: side of the reference area, pixels of its mip, centred on
            the patch; None: the area of the patch.
        cv_path_defects: volume of defects, which become 0; the mask is kept too.
        mask_val: values of it >= this are defects.
        field_dset: field set whose offsets move each cut-out.
        suffix: free text in the names of the files.
        parallel: layers of chunks read at a time.
        overwrite: replace files made from other arguments.

    Raises:
        UsageError: flags that cannot work.
    """

    cv_path: str
    mips: list[int]
    patch_sizes: list[int]
    z_start: int
    z_end: int
    dst_folder: Path = Path("dataset01")
    x_offset: int = 0
    y_offset: int = 0
    anchor: str = "corner"
    normalize: bool = False
    reference_path: str | None = None
    reference_mip: int | None = None
    reference_size: int | None = None
    cv_path_defects: str | None = None
    mask_val: float = 1
    field_dset: Path | None = None
    suffix: str | None = None
    parallel: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_range(self.z_start, self.z_end, self.parallel)
        self._check_patches()
        if self.anchor not in ANCHORS:
            raise UsageError(f"--anchor {self.anchor}: expected {' or '.join(ANCHORS)}")
        if self.suffix is not None:
            check_tag("--suffix", self.suffix)
        if self.has_reference and not self.normalize:
            raise UsageError(
                "--reference_path, --reference_mip and --reference_size say what to "
                "normalise by; give --normalize too"
            )
        if (self.reference_mip or 0) < 0:
            raise UsageError(f"--reference_mip {self.reference_mip}: must be >= 0")
        if self.reference_size is not None and self.reference_size < 1:
            raise UsageError(f"--reference_size {self.reference_size}: must be >= 1")

    def _check_patches(self) -> None:
        if not self.mips or min(self.mips) < 0 or len(set(self.mips)) < len(self.mips):
            raise UsageError(
                f"--mip {' '.join(map(str, self.mips))}: expected mips >= 0, each once"
            )
        if len(self.patch_sizes) != len(self.mips):
            raise UsageError(
                f"--patch_size: {len(self.patch_sizes)} given for {len(self.mips)} "
                "mips; expected one a mip, in pixels of that mip, for example --mip 5 "
                "3 --patch_size 256 1024 for one area"
            )
        if min(self.patch_sizes) < 1:
            raise UsageError(f"--patch_size {min(self.patch_sizes)}: must be >= 1")
        for flag, value in (
            ("--x_offset", self.x_offset),
            ("--y_offset", self.y_offset),
        ):
            check_offset(flag, value, max(self.mips))

    @property
    def has_reference(self) -> bool:
        """Whether another area than the patch was asked for to normalise by."""
        asked = (self.reference_path, self.reference_mip, self.reference_size)
        return any(value is not None for value in asked)

    @property
    def sections(self) -> range:
        """All sections needed: the src ones and the tgt of the first."""
        return range(self.z_start - 1, self.z_end)

    def grids(self) -> list[Grid]:
        """The patch of each mip, in the order of `mips`."""
        extent = max(
            size << mip for mip, size in zip(self.mips, self.patch_sizes, strict=True)
        )
        # On the grid of the coarsest mip, so that fields move between mips exactly.
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
