"""Which data fields were made from, and whether the same data are there now.

The request of a field set that a pyramid wrote has `data`: by file name, a digest of
each set of images, or of downloaded fields, that the fields depend on. Sets that
version 1.0.0 wrote have none.
"""

import hashlib
import json
import shlex
from pathlib import Path

from metroem.errors import DatasetError
from metroem.io.h5_read import FieldSet, ImageSet
from metroem.specs.filenames import FieldSetName, ImageSetName


def data_digest(pairs: ImageSet | FieldSet) -> str:
    """What tells all pairs of a set from others: what they hold and where they lie."""
    return _sha256([pairs.identity(index) for index in range(len(pairs))])


def place_digest(pairs: ImageSet | FieldSet) -> str:
    """Where the pairs of a set lie, whatever they hold: frames and sections."""
    places = []
    for index in range(len(pairs)):
        grid = pairs.grid(index)
        corner = (grid.mip, grid.x, grid.y)
        places.append([*corner, *grid.shape, *pairs.sections(index)])
    return _sha256(places)


def origins(images: ImageSet, prior: FieldSet | None) -> dict[str, str]:
    """`data` of fields: digests by the names of the sets that they depend on.

    Args:
        images: that a stage reads.
        prior: fields that it starts from; what those that a pyramid wrote depend on
            is taken over.
    """
    data = {images.path.name: data_digest(images)}
    if prior is None:
        return data
    if prior.is_of_pyramid:
        return _data_of(prior) | data
    return {prior.path.name: data_digest(prior)} | data


def origin_digest(prior: FieldSet) -> str:
    """What prior fields are: how a pyramid made them, or what was downloaded.

    Fields that are made again the same way count as the same, though another device
    sums in another order.
    """
    return _sha256(prior.request) if prior.is_of_pyramid else data_digest(prior)


def why_stale(fields: FieldSet, dataset: Path) -> str | None:
    """Why fields are not those of the data that are there now; None if they are.

    What is no longer there is not missed.

    Args:
        fields: a field set.
        dataset: folder of the image sets.

    Returns:
        The set that holds other data, and the command that makes the fields again.
    """
    for name, digest in _data_of(fields).items():
        is_field = FieldSetName.parse(name) is not None
        there = {folder / name for folder in (fields.path.parent, dataset)}
        found = [
            data_digest(FieldSet(path) if is_field else ImageSet(path))
            for path in there
            if path.is_file()
        ]
        if found and digest not in found:
            return (
                f"made from other data than {name} holds now; "
                f"{how_to_make_again(fields, dataset)}"
            )
    return None


def _data_of(fields: FieldSet) -> dict[str, str]:
    """What fields say that they were made from; {} where they do not say it."""
    data = fields.request.get("data", {}) if fields.is_of_pyramid else {}
    if not isinstance(data, dict) or not all(
        ImageSetName.parse(name) or FieldSetName.parse(name) for name in data
    ):
        raise DatasetError(
            f"{fields.path}: says that it was made from {data!r}, expected names of "
            "image sets and field sets; write the fields again"
        )
    return data


def how_to_make_again(fields: FieldSet, dataset: Path) -> str:
    """What makes fields, and those that they start from, from the data of now.

    Args:
        fields: a field set.
        dataset: folder of the image sets.
    """
    if not fields.is_of_pyramid:
        return (
            "download the fields for these images, with download_field.py --overwrite"
        )
    weights = Path(str(fields.attributes.get("source_path")).split(" sha256 ")[0])
    names = map(FieldSetName.parse, _data_of(fields))
    first = max((name.stage + 1 for name in names if name is not None), default=0)
    words = ["python", "-m", "metroem", "write-fields"]
    words += ["--pyramid_path", str(weights.parent.parent.parent)]
    words += ["--dataset_path", str(dataset)]
    words += ["--checkpoint_name", fields.name.tag or ""]
    words += ["--stages", *map(str, range(first, fields.name.stage + 1))]
    if fields.path.parent != dataset:
        words += ["--fields_path", str(fields.path.parent)]
    return f"write the fields again: {shlex.join(words)}"


def _sha256(value: list | dict) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
