"""Record the data that fields were made from, and find fields whose data changed.

The request of a field set that a pyramid wrote has the key `data`. It maps the file
name of each image set, and of downloaded fields, that the fields depend on to a digest.
Sets of version 1.0.0 lack this key.
"""

import hashlib
import json
import shlex
from pathlib import Path

from metroem.errors import DatasetError
from metroem.io.h5_read import FieldSet, ImageSet
from metroem.specs.filenames import FieldSetName, ImageSetName


def data_digest(pairs: ImageSet | FieldSet) -> str:
    """Hash the content and the locations of all pairs of a set."""
    return _sha256([pairs.identity(index) for index in range(len(pairs))])


def place_digest(pairs: ImageSet | FieldSet) -> str:
    """Hash the locations of all pairs of a set: areas and sections, not content."""
    locations = []
    for index in range(len(pairs)):
        grid = pairs.grid(index)
        corner = (grid.mip, grid.x, grid.y)
        locations.append([*corner, *grid.shape, *pairs.sections(index)])
    return _sha256(locations)


def origins(images: ImageSet, prior: FieldSet | None) -> dict[str, str]:
    """Return the digests of the sets that a stage's fields depend on: their `data`.

    Args:
        images: images that the stage reads.
        prior: its prior fields; None if it has none. If a pyramid wrote them, the
            sets that they depend on are included.

    Returns:
        Digests by file name.
    """
    data = {images.path.name: data_digest(images)}
    if prior is None:
        return data
    if prior.is_of_pyramid:
        return _data_of(prior) | data
    return {prior.path.name: data_digest(prior)} | data


def origin_digest(prior: FieldSet) -> str:
    """Hash prior fields: their request if a pyramid wrote them, else their content.

    So fields that are made again in the same way have the same digest, although their
    values may differ slightly: another device sums in another order.
    """
    return _sha256(prior.request) if prior.is_of_pyramid else data_digest(prior)


def why_stale(fields: FieldSet, dataset: Path) -> str | None:
    """Say why fields do not match the current data; None if they match.

    Sets that no longer exist are ignored.

    Args:
        fields: a field set.
        dataset: folder of the image sets.

    Returns:
        A text with the name of the set that changed, and how to make the fields again.

    Raises:
        DatasetError: `data` of the fields is damaged, or a set cannot be read.
    """
    for name, digest in _data_of(fields).items():
        is_field = FieldSetName.parse(name) is not None
        paths = {folder / name for folder in (fields.path.parent, dataset)}
        found = [
            data_digest(FieldSet(path) if is_field else ImageSet(path))
            for path in paths
            if path.is_file()
        ]
        if found and digest not in found:
            return (
                f"made from other data than {name} holds now; "
                f"{how_to_make_again(fields, dataset)}"
            )
    return None


def _data_of(fields: FieldSet) -> dict[str, str]:
    """Return the `data` that fields state in their request; {} if they state none."""
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
    """Say how to make fields, and the prior fields before them, from the current data.

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
    words = ["metroem", "write-fields"]
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
