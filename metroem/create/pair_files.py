"""A data set from points as h5 files: an image set and, with fields, a field set."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from metroem import cli
from metroem.create.cutouts import REFERENCE, Cutout, Cutter
from metroem.create.download import (
    already_there,
    open_parts,
    report_blank,
    warn_unless_normalized,
)
from metroem.create.spec import Center, DatasetSpec
from metroem.errors import DatasetError
from metroem.io.h5 import (
    FieldSetMeta,
    ImageSetMeta,
    Pair,
    PairFrame,
    verify,
    write_field_set,
    write_image_set,
)
from metroem.io.parts import PartStore, parts_folder
from metroem.specs.filenames import FieldSetName, ImageSetName

logger = logging.getLogger(__name__)


class PairFiles:
    """The h5 files of a spec in the making.

    They are named after the centre of the first src, which all mips of the same
    pairs share. Each pair's box says where it lies.

    Attributes:
        image_path: the image set.
        field_path: the field set; None without fields.
    """

    def __init__(
        self, cutter: Cutter, folder: Path, checkpoint_name: str, *, overwrite: bool
    ) -> None:
        """Go on with what is there.

        Raises:
            DatasetError: files or parts that another request made, and `overwrite`
                is not given.
        """
        self._cutter, self._tag = cutter, checkpoint_name
        self._request = cutter.spec.as_request()
        name = _name_of(cutter.spec)
        self.image_path = image_path(cutter.spec, folder)
        self.field_path: Path | None = None
        if cutter.spec.field is not None:
            fields = FieldSetName(0, name.place, name.mip, checkpoint_name)
            self.field_path = folder / fields.filename
        paths = [path for path in (self.image_path, self.field_path) if path]
        there = [already_there(p, self._request, overwrite=overwrite) for p in paths]
        self.is_finished = all(there)
        if self.is_finished:
            # Those of a run killed at its end.
            PartStore.discard(parts_folder(self.image_path))
            return
        self._store = open_parts(self.image_path, self._request, overwrite=overwrite)

    def check(self) -> None:
        """Check the checksum of each pair of the files that are there.

        Raises:
            DatasetError: a pair is not what was written.
        """
        for path in filter(None, (self.image_path, self.field_path)):
            if problems := verify(path):
                listed = "\n  ".join(problems)
                raise DatasetError(
                    f"{path}: damaged after it was written; the same command with "
                    f"--overwrite makes it again:\n  {listed}"
                )

    def has(self, center: Center) -> bool:
        """Whether a cut-out is there from a run that was killed."""
        return self._store.has(_key("image", center))

    def put(self, center: Center, cutout: Cutout) -> None:
        """Keep a cut-out; the image comes last, and so tells that all is there."""
        self._store.put(_key("translation", center), np.array(cutout.translation))
        if cutout.defects is not None:
            self._store.put(_key("defects", center), cutout.defects)
        if cutout.field is not None:
            self._store.put(_key("field", center), cutout.field)
        self._store.put(_key("image", center), cutout.image)

    def finish(self) -> None:
        """Write the files from all cut-outs and drop these.

        Raises:
            DatasetError: every pair has a side that is all blank.
        """
        spec = self._cutter.spec
        try:
            self._report()
        except DatasetError:
            # So that a second try, with credentials, reads again.
            self._store.remove()
            raise
        frames = [self._frame(*pair) for pair in spec.pairs]
        if self.field_path is not None:
            write_field_set(self.field_path, self._fields(), self._field_meta(frames))
            logger.info(
                "%s: train.py finds it under --checkpoint_name %s",
                *(self.field_path, self._tag),
            )
        write_image_set(
            self.image_path,
            (Pair(*images) for images in self._sides("image")),
            self._image_meta(frames),
            defects=(Pair(*masks) for masks in self._sides("defects"))
            if self._cutter.has_masks
            else None,
        )
        self._store.remove()
        logger.info("%s: %d pairs", self.image_path, len(frames))

    def _report(self) -> None:
        shares = {
            index: max(float(np.mean(image == 0)) for image in images)
            for index, images in enumerate(self._sides("image"))
        }
        report_blank(self.image_path, self._cutter.image.path, shares, "pairs")
        spec, is_float = self._cutter.spec, self._cutter.image.dtype.kind == "f"
        if spec.image.reference is None and is_float:
            images = (image for images in self._sides("image") for image in images)
            warn_unless_normalized(self.image_path, images, REFERENCE)
        if not self._cutter.has_masks:
            return
        masked = np.mean([np.mean(masks) for masks in self._sides("defects")])
        logger.info("%s: %.2f%% masked", self.image_path.name, 100 * masked)
        if not masked:
            logger.warning(
                "%s: the masks mark nothing here; are they written at their src_mip, "
                "and is threshold right?",
                self.image_path.name,
            )

    def _frame(self, src: Center, tgt: Center) -> PairFrame:
        """Where a pair lies: on the patch of src, from which tgt is off by the
        distance of the two centres, too.
        """
        spec = self._cutter.spec
        grid, other = spec.patch(src), spec.patch(tgt)
        apart = other.x - grid.x, other.y - grid.y
        src_moved, tgt_moved = (
            self._store.load(_key("translation", center)).tolist()
            for center in (src, tgt)
        )
        return PairFrame(
            grid,
            (src.z, tgt.z),
            (
                (src_moved[0], src_moved[1]),
                (tgt_moved[0] + apart[0], tgt_moved[1] + apart[1]),
            ),
        )

    def _sides(self, kind: str) -> Iterator[list[np.ndarray]]:
        """What is kept of src and tgt of each pair."""
        for pair in self._cutter.spec.pairs:
            yield [self._store.load(_key(kind, center)) for center in pair]

    def _fields(self) -> Iterator[np.ndarray]:
        return (np.stack(fields) for fields in self._sides("field"))

    def _image_meta(self, frames: list[PairFrame]) -> ImageSetMeta:
        return ImageSetMeta(
            frames,
            source=self._cutter.image.path,
            command=cli.command_line(),
            request=self._request,
            resolution=self._cutter.image.resolution,
            anchor="center",
            normalization=normalization(self._cutter.spec),
        )

    def _field_meta(self, frames: list[PairFrame]) -> FieldSetMeta:
        assert self._cutter.spec.field is not None
        return FieldSetMeta(
            frames,
            source=self._cutter.spec.field.path,
            command=cli.command_line(),
            request=self._request,
            resolution=self._cutter.image.resolution,
            stage=0,
            tag=self._tag,
            num_sides=2,
        )


def image_path(spec: DatasetSpec, folder: Path) -> Path:
    """The image set that is made of a spec."""
    return folder / _name_of(spec).filename


def _name_of(spec: DatasetSpec) -> ImageSetName:
    return ImageSetName(*spec.pairs[0][0], spec.dst_mip)


def normalization(spec: DatasetSpec) -> dict:
    """How the images are normalised, as image sets say it."""
    reference = spec.image.reference
    if reference is None:
        return {"kind": "raw"}
    return {
        "kind": "tissue",
        "reference": {
            "area": "around the patch",
            "path": reference.path,
            "mip": reference.src_mip,
            "size_px_of_mip": [reference.x_size, reference.y_size, reference.dst_mip],
        },
    }


def _key(kind: str, center: Center) -> str:
    return f"{kind}-{center.x}_{center.y}_{center.z}"
