"""Make a data set from a spec: pairs at any locations and distances in z."""

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from metroem.errors import DatasetError
from metroem.geometry.grid import Grid
from metroem.io.cloud_paths import local_folder
from metroem.io.field_volume import FieldVolume
from metroem.io.files import lock, lock_path
from metroem.io.image_volume import ImageVolume
from metroem.io.volume import Volume
from metroem.prepare.dataset_spec import (
    AreaSpec,
    Center,
    DatasetSpec,
    FieldSpec,
    load_spec,
)
from metroem.prepare.pair_files import PairFiles, PairSet, Words
from metroem.prepare.pair_volumes import PairVolumes
from metroem.prepare.patches import FieldSource, ImageSource, Key, PatchReader
from metroem.prepare.requests import DatasetRequest
from metroem.prepare.sources import DefectMask, ReferenceArea, warn_if_integers
from metroem.specs.filenames import FieldSetName, ImageSetName

logger = logging.getLogger(__name__)

_WORDS = Words(
    normalize='a "reference" of the "image" to normalise by',
    reference_mip="src_mip",
    masks='"masks"',
    threshold="threshold",
    counted="pairs",
)


def make_dataset(request: DatasetRequest) -> None:
    """Make the data set of a spec, unless it already exists.

    Each patch is stored as soon as it is read. A run that was killed resumes, and ends
    with the same bytes.

    Raises:
        DatasetError: a volume lacks something that is asked for, all pixels are blank,
            or a data set of another spec exists; with --verify, a pair differs from
            its checksum.
        UsageError: the spec cannot be read.
        StorageError: another run is making it, or the disk is full.
    """
    spec = load_spec(request.spec_path)
    reader = _open(spec)
    # Everything is checked before anything is read.
    _check(spec, reader)
    is_volume, overwrite = "://" in request.dst_path, request.overwrite
    pair_set = _pair_set(spec, Path(request.dst_path).expanduser(), request)
    assert pair_set.image_path is not None
    folder = local_folder(request.dst_path)
    run_lock: AbstractContextManager[None] = nullcontext()  # none in cloud storage
    if folder is not None:
        run_lock = lock(lock_path(folder if is_volume else pair_set.image_path))
    with run_lock:
        if is_volume:
            volumes = PairVolumes(
                reader, pair_set, request.dst_path, overwrite=overwrite
            )
            reader.make(volumes, request.dst_path, parallel=request.parallel)
            return
        files = PairFiles(reader, pair_set, overwrite=overwrite)
        reader.make(files, request.dst_path, parallel=request.parallel)
        if request.verify:
            files.check()
    if pair_set.field_path is not None:
        logger.info(
            "%s: train.py finds it under --checkpoint_name %s",
            *(pair_set.field_path, request.checkpoint_name),
        )


def _pair_set(spec: DatasetSpec, folder: Path, request: DatasetRequest) -> PairSet:
    """Describe the pairs and their files.

    Files are named after the centre of the first src, which all mips of the same
    pairs share.
    """
    name = ImageSetName(*spec.pairs[0][0], spec.dst_mip)
    fields = FieldSetName(0, name.place, name.mip, request.checkpoint_name)
    return PairSet(
        spec.pairs,
        spec.as_request(),
        image_path=folder / name.filename,
        field_path=folder / fields.filename if spec.field else None,
        field_source=spec.field.path if spec.field else "",
        anchor="center",
        normalization=_normalization(spec.image.reference),
        tag=request.checkpoint_name,
        words=_WORDS,
    )


def _normalization(reference: AreaSpec | None) -> dict:
    """How the images are normalised, in the form that image sets state it."""
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


def _open(spec: DatasetSpec) -> PatchReader:
    """Open the volumes of a spec.

    Raises:
        DatasetError: a volume cannot be used.
        UsageError: a scale for int16 is given and fields are float.
    """
    image, mip = ImageVolume(spec.image.path, flag="image"), spec.image.src_mip
    image.check_channels(1, "an image")
    image.check_mip("image: src_mip", mip)
    reference = None
    if spec.image.reference is None:
        warn_if_integers(image, _WORDS.normalize)
    masks = [
        DefectMask(
            _volume(Volume, mask.path, mask.src_mip, "masks", image),
            mask.threshold,
            mask.src_mip,
        )
        for mask in spec.masks
    ]
    if spec.image.reference is not None:
        reference = _area(ImageVolume, spec.image.reference, "image: reference", image)
    patches: dict[Key, Grid] = {
        center: spec.patch(center) for pair in spec.pairs for center in pair
    }
    source = ImageSource(image, mip, reference is not None, reference)
    field = _field_source(spec, spec.field, image) if spec.field else None
    return PatchReader(patches, source, field, masks)


def _field_source(spec: DatasetSpec, field: FieldSpec, image: Volume) -> FieldSource:
    """Open the volumes of the fields and of their translations."""
    volume = _volume(Volume, field.path, field.src_mip, "field", image)
    stored = FieldVolume(volume, field.src_mip, field.form)
    area = _area(Volume, field.reference, "field: reference", image)
    profiled = FieldVolume(area.volume, area.mip, field.form)
    return FieldSource(stored, spec.translation_mip, profiled, area)


def _area(kind: type, area: AreaSpec, flag: str, image: Volume) -> ReferenceArea:
    """Open the volume of a reference area."""
    volume = _volume(kind, area.path, area.src_mip, flag, image)
    size = Grid(area.dst_mip, 0, 0, area.x_size, area.y_size).cover(area.src_mip)
    return ReferenceArea(volume, area.src_mip, *size.shape)


def _volume(kind: type, path: str, mip: int, flag: str, image: Volume) -> Volume:
    """Open a reference, mask or field volume, which must lie on the images."""
    volume = kind(path, flag=flag, resolution=image.resolution)
    is_field = flag.startswith("field")
    volume.check_channels(1 + is_field, "a field" if is_field else "an image")
    volume.check_mip(f"{flag}: src_mip", mip)
    volume.check_lies_on(image, mip)
    return volume


def _check(spec: DatasetSpec, reader: PatchReader) -> None:
    """Refuse centres outside the volumes.

    Raises:
        DatasetError: a section is outside one of them, or a whole patch is outside
            image or field; the message names the pair.
    """
    assert reader.image_source is not None
    image, field = reader.image_source.volume, reader.field_source
    volumes = reader.volumes
    beyond = set()
    for index, pair in enumerate(spec.pairs):
        for center in pair:
            for volume, mip in volumes:
                _check_section(volume, mip, index, center)
            patch = reader.patches[center]
            inside = image.clip(patch)
            if inside != patch:
                beyond.add(index)
            _check_overlap(image, patch, index)
            for mask in reader.masks:
                what = f"the patch of pairs {index}"
                mask.volume.check_covers(inside or patch, what, at=mask.mip)
            if field is not None:
                window = patch.cover(field.stored.mip)
                _check_overlap(field.stored.volume, window, index)
    if beyond:
        logger.warning(
            "image %s: %d pairs reach beyond the volume, and are blank there: %s",
            *(image.path, len(beyond), sorted(beyond)),
        )


def _check_section(volume: Volume, mip: int, index: int, center: Center) -> None:
    """Refuse a section that a volume lacks."""
    here = volume.sections_at(mip)
    if center.z not in here:
        raise DatasetError(
            f"pairs {index}: section {center.z} is needed, {volume.flag} {volume.path} "
            f"holds {here.start}...{here.stop - 1}; take the pair out of the spec, or "
            "choose other --offsets"
        )


def _check_overlap(volume: Volume, patch: Grid, index: int) -> None:
    """Refuse a patch that lies wholly outside a volume."""
    if volume.clip(patch) is None:
        raise DatasetError(
            f"pairs {index}: its patch (x {patch.x}...{patch.end[0]}, y {patch.y}..."
            f"{patch.end[1]}, mip-0 pixels) lies outside of {volume.flag} "
            f"{volume.path}; coordinates in the spec are mip-0 pixels"
        )
