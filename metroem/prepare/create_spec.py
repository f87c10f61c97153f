"""Write the spec of a data set: pairs of sections around each point of a list."""

import csv
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path

from metroem.errors import UsageError
from metroem.io.files import make_folder, replace_file
from metroem.prepare.dataset_spec import Center, parse_spec
from metroem.prepare.requests import SpecRequest
from metroem.specs.parse_json import read_json

logger = logging.getLogger(__name__)

# Columns of points: in neuroglancer's export of annotations, and in plain tables.
_EXPORTED, _PLAIN = "Coordinate 1", ("x0", "y0", "z0")


def create_spec(request: SpecRequest) -> Path:
    """Write a spec: the template, and a pair for each point and offset.

    Centres are rounded down to pixels of the template's max_mip, so that patches
    of all mips lie on the same grid. Pairs that already exist are left out.

    Returns:
        The file.

    Raises:
        UsageError: the template or the points cannot be read, or another file
            exists and `overwrite` is not given.
    """
    where = f"--src_spec_path {request.src_spec_path}"
    tree = read_json(request.src_spec_path, where)
    template = parse_spec(tree, where)
    step = 1 << template.max_mip
    points = read_points(request.points_path)
    all_pairs = list(template.pairs)
    for x, y, z in points:
        x, y = x // step * step, y // step * step
        all_pairs += [(Center(x, y, z), Center(x, y, z + dz)) for dz in request.offsets]
    pairs = list(dict.fromkeys(all_pairs))
    tree["pairs"] = [[side._asdict() for side in pair] for pair in pairs]
    _write(request, json.dumps(tree, indent=1) + "\n")
    logger.info(
        "%s: %d points, %d pairs in all%s",
        request.dst_spec_path,
        len(points),
        len(pairs),
        f", {len(all_pairs) - len(pairs)} left out that already exist"
        if len(pairs) < len(all_pairs)
        else "",
    )
    return request.dst_spec_path


def read_points(path: Path) -> list[Center]:
    """Read the points of a CSV, in its order, fractions rounded down.

    Raises:
        UsageError: no such file, no columns of points, no rows, or a row without
            a point (the message names its line).
    """
    if not path.is_file():
        raise UsageError(f"--points_path {path}: no such file")
    # Spreadsheets begin a CSV with a byte order mark.
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        try:
            points = list(_points(rows, f"--points_path {path}"))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UsageError(f"--points_path {path}: not CSV: {error}") from None
    if not points:
        raise UsageError(f"--points_path {path}: has no points")
    return points


def _points(rows: csv.DictReader, where: str) -> Iterator[Center]:
    """Read the point of each row; warn of annotations that are not points."""
    columns = rows.fieldnames or ()
    if _EXPORTED not in columns and not set(_PLAIN) <= set(columns):
        raise UsageError(
            f"{where}: expected a column {_EXPORTED!r} (neuroglancer's export) or "
            f"columns {', '.join(_PLAIN)}, got {list(columns)}"
        )
    num_others = 0
    for row in rows:
        if _EXPORTED in columns:
            text = row[_EXPORTED] or ""
            num_others += (row.get("Type") or "Point").lower() != "point"
        else:
            text = ",".join(row[key] or "" for key in _PLAIN)
        yield _point(text, f"{where}, line {rows.line_num}")
    if num_others:
        logger.warning(
            "%s: %d annotations are not points; their %s is used",
            *(where, num_others, _EXPORTED),
        )


def _point(text: str, where: str) -> Center:
    """Read "(x, y, z)" or "x,y,z"."""
    match = re.fullmatch(r"\s*\(?([^()]*)\)?\s*", text)
    try:
        x, y, z = (
            math.floor(float(number)) for number in (match or [""])[1].split(",")
        )
    except (ValueError, IndexError, OverflowError):
        raise UsageError(
            f"{where}: expected a point such as (1200, 340, 17), got {text!r}"
        ) from None
    return Center(x, y, z)


def _write(request: SpecRequest, text: str) -> None:
    """Write the spec; refuse to replace another file without --overwrite."""
    path = request.dst_spec_path
    if path.exists() and path.read_text() != text and not request.overwrite:
        raise UsageError(
            f"--dst_spec_path {path}: already exists, with other content; give "
            "--overwrite to replace it"
        )
    make_folder(path.parent)
    replace_file(path, text.encode())
