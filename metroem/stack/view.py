"""Show a volume in neuroglancer, beside what it was made of, at its worst places.

Neuroglancer runs in the browser, and this process serves it: the page, and the chunks
of volumes on this machine. Volumes elsewhere are read by the browser itself.

Sections are shown as they lie, and cut along z: where sections do not fit, borders that
run through the cut have steps. A list holds the worst places of a check.
"""

import json
import logging
import os
import signal
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import neuroglancer
import neuroglancer.server
from tornado.web import StaticFileHandler

from metroem.errors import DatasetError, StorageError
from metroem.io.cloud_paths import local_folder, split_format
from metroem.io.volume import Volume
from metroem.stack.check_summary import describe_place
from metroem.stack.requests import ViewRequest

logger = logging.getLogger(__name__)

# Names of the layers.
_VOLUME, _BEFORE, _WORST = "volume", "before", "worst places"
# cloud-volume stores chunks under these names, too; browsers only decode the first.
_GZIP, _OTHERS = ".gz", (".br", ".zstd", ".xz", ".bz2")
_LOOKED_AT = 1000  # files of a volume whose names are looked at


def view(request: ViewRequest) -> None:
    """Serve a volume until Ctrl-C.

    Raises:
        DatasetError: a volume or a check cannot be read.
        StorageError: the port is in use.
    """
    viewer = make_viewer(request)
    logger.info("open %s in a browser; Ctrl-C ends", viewer.get_viewer_url())
    try:
        signal.pause()
    except KeyboardInterrupt:
        logger.info("ended")
    finally:
        neuroglancer.stop()


def make_viewer(request: ViewRequest) -> neuroglancer.Viewer:
    """Start the server, with all layers.

    Returns:
        The viewer. It is served until `neuroglancer.stop()`.

    Raises:
        DatasetError: a volume or a check cannot be read.
        StorageError: the port is in use.
    """
    paths = {_VOLUME: request.cv_path}
    if (before := request.before or _raw_volume(request.cv_path)) is not None:
        paths[_BEFORE] = before
    flags = {_VOLUME: "--cv_path", _BEFORE: "--before"}
    volumes = {name: Volume(path, flag=flags[name]) for name, path in paths.items()}
    check = request.check or _file_beside(request.cv_path, "check.json")
    places = [] if check is None else _read_places(check)
    area, sections = volumes[_VOLUME].extent()
    position = [area.x + area.rows / 2, area.y + area.cols / 2]
    position.append(sections.start + len(sections) // 2)
    if places:
        position = [places[0][axis] for axis in "xyz"]
    if request.place is not None:
        position = request.place
    _say(request, paths, check, places, position)
    neuroglancer.set_server_bind_address("127.0.0.1", request.port or 0)
    try:
        viewer = neuroglancer.Viewer()
    except OSError as error:
        raise StorageError(
            f"--port {request.port}: cannot be used ({error.strerror}); name another, "
            "or leave the flag out"
        ) from error
    sources = {name: _source(name, volume) for name, volume in volumes.items()}
    _show(viewer, volumes[_VOLUME].resolution, sources, places, position)
    return viewer


def _file_beside(cv_path: str, name: str) -> Path | None:
    """Find a file beside the folder of a local volume; None if there is none."""
    folder = local_folder(cv_path)
    path = None if folder is None else folder.parent / name
    return path if path is not None and path.is_file() else None


def _raw_volume(cv_path: str) -> str | None:
    """Find the volume that align-stack made an aligned volume of; None if unknown."""
    path = _file_beside(cv_path, "stack.json")
    if path is None or Path(cv_path).name != "image":
        return None
    return _read_json(path)["request"]["cv_path"]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read as JSON ({error})") from error


def _read_places(path: Path) -> list[dict[str, Any]]:
    """Read the worst places of a check, worst first."""
    found = _read_json(path)
    if not isinstance(found, dict) or "worst" not in found:
        raise DatasetError(
            f"--check {path}: has no worst places; expected check.json of metroem check"
        )
    return found["worst"]


def _say(
    request: ViewRequest,
    paths: dict[str, str],
    check: Path | None,
    places: Sequence[dict[str, Any]],
    position: Sequence[float],
) -> None:
    """Log what is shown."""
    for name, path in paths.items():
        logger.info("%s: %s", name, path)
    if check is None:
        logger.info(
            "no check.json: metroem check --cv_path %s makes one", paths[_VOLUME]
        )
    elif places:
        logger.info("%d worst places of %s:", len(places), check)
        for place in places:
            logger.info("  %s", describe_place(place))
    if request.place is not None or not places:
        x, y, z = position
        logger.info("the view begins at x %d, y %d, z %d", x, y, z)


class _VolumeFiles(StaticFileHandler):
    """The files of a volume, also those that are stored with gzip."""

    def validate_absolute_path(self, root: str, absolute_path: str) -> str | None:
        """Find a file, or its compressed form."""
        if not os.path.exists(absolute_path) and os.path.exists(absolute_path + _GZIP):
            self.set_header("Content-Encoding", "gzip")
            absolute_path += _GZIP
        return super().validate_absolute_path(root, absolute_path)


def _source(name: str, volume: Volume) -> str:
    """Return the address of a volume for neuroglancer, and serve it if it is local."""
    form, location = split_format(volume.path)
    form = form or "precomputed"
    folder = local_folder(location)
    if folder is None:
        return f"{form}://{location}"
    # A volume has millions of files, nearly always compressed in one way.
    for file in islice(folder.glob("*/*"), _LOOKED_AT):
        if file.suffix in _OTHERS:
            raise DatasetError(
                f"{file}: browsers do not read chunks that are compressed like this; "
                f"copy the volume first: metroem import {folder} COPY"
            )
    server = cast(Any, neuroglancer.server.global_server)
    route = f"/files/{server.token}/{name}"
    server.app.add_handlers(
        ".*", [(f"{route}/(.*)", _VolumeFiles, {"path": str(folder)})]
    )
    return f"{form}://{neuroglancer.server.get_server_url()}{route}"


def _show(
    viewer: neuroglancer.Viewer,
    resolution: tuple[float, float, float],
    sources: dict[str, str],
    places: Sequence[dict[str, Any]],
    position: Sequence[float],
) -> None:
    """Lay out the layers: sections above, cuts along z below, one column a volume."""
    space = neuroglancer.CoordinateSpace(
        names=["x", "y", "z"], units="nm", scales=list(resolution)
    )
    points = [
        neuroglancer.PointAnnotation(
            id=str(number),
            point=[place["x"], place["y"], place["z"] + 0.5],
            description=describe_place(place),
        )
        for number, place in enumerate(places, start=1)
    ]
    with viewer.txn() as state:
        state.dimensions = space
        x, y, z = position
        state.position = [x, y, z + 0.5]
        state.cross_section_scale = 1.0  # a pixel of the screen is one of mip 0
        for name, source in sources.items():
            state.layers[name] = neuroglancer.ImageLayer(source=source)
        columns = []
        for name in sources:
            shown = [name]
            if points and name == _VOLUME:
                state.layers[_WORST] = neuroglancer.LocalAnnotationLayer(
                    dimensions=space, annotations=points, tab="annotations"
                )
                shown.append(_WORST)
            views = [
                neuroglancer.LayerGroupViewer(layers=shown, layout=layout)
                for layout in ("xy", "xz")
            ]
            columns.append(neuroglancer.column_layout(views))
        state.layout = neuroglancer.row_layout(columns)
        if points:
            state.selected_layer.layer = _WORST
            state.selected_layer.visible = True
