"""Read and check paths of volumes, without cloud-volume, which is slow to import."""

import re
import shlex
from pathlib import Path

from metroem.errors import DatasetError, UsageError

_ENDPOINT = re.compile(r"(?:\w+://)?s3://(https?://[^/]+)/?(.*)")
# As neuroglancer has it: gs://bucket/em/|zarr2:
_FORMAT_LAST = re.compile(r"(.+?)/*\|([\w-]+):")
# What cloud-volume takes for the first folder of a path, less the rest of its name.
_FIRST_FOLDER = re.compile(r"[\w~.-]*\w")
_READ = ("precomputed", "zarr", "zarr2", "zarr3", "n5")
# The formats of cloud-files, for which tests/io/test_paths.py compares the two.
FORMATS = (*_READ, "graphene", "boss", "brainmaps", "deepzoom", "nggraph", "render")
FORMATS += ("vtk", "nifti", "dvid")
_SCHEMES = ("file", "gs", "s3", "http", "https", "mem")
HOW_TO_WRITE = (
    "make a CloudVolume of them: metroem.io.volume_write.write_volume takes them as an "
    "array (docs/troubleshooting.md shows how)"
)


def split_format(path: str) -> tuple[str, str]:
    """The format that a path names, "" if it names none, and the path without it."""
    if match := _FORMAT_LAST.fullmatch(path):
        path = f"{match[2].removeprefix('neuroglancer-')}://{match[1]}"
    form, separator, place = path.partition("://")
    known = separator and form in FORMATS
    return (form, place) if known else ("", path)


def local_folder(path: str) -> Path | None:
    """The folder on this machine that a path means; None for other storage."""
    place = split_format(path)[1].removeprefix("file://")
    return None if "://" in place else Path(place).expanduser().absolute()


def cloud_path(path: str) -> str:
    """A path as cloud-volume opens it: without a scheme it is a local one.

    Raises:
        DatasetError: s3:// followed by the server's address, or a local folder that
            cloud-volume takes for another.
    """
    path = path.rstrip("/")
    if match := _ENDPOINT.fullmatch(path):
        raise DatasetError(
            f"{path}: cloud-volume does not take the server's address in the path; "
            f"set AWS_ENDPOINT_URL_S3={match[1]} and give s3://{match[2]}"
        )
    form, place = split_format(path)
    if "://" not in place and form != "precomputed":
        place = f"file://{Path(place).expanduser().resolve()}"
    if (folder := local_folder(place)) is not None:
        first, *others = folder.parts[1:] or ("",)
        if not others or not _FIRST_FOLDER.fullmatch(first):
            raise DatasetError(
                f"{path}: cloud-volume takes it for another path, since its first "
                f"folder, {first!r}, is all of it or has other characters than letters "
                f"and digits; link to it from a path that is not there yet and begins "
                f"otherwise (ln -s {shlex.quote(str(folder))} PATH), and give file://"
                "PATH, all of it"
            )
    return f"{form}://{place}" if form else place


def check_source(flag: str, path: str) -> None:
    """Refuse a path that cannot be that of a volume that is read.

    Args:
        flag: where the path came from.
        path: from `cloud_path`.

    Raises:
        DatasetError: another format, an unknown scheme, or a file.
    """
    form, place = split_format(path)
    if form not in ("", *_READ):
        kind = "a segmentation for proofreading" if form == "graphene" else "not read"
        raise DatasetError(
            f"{flag} {path}: {form}:// is {kind}; expected images, fields or a mask as "
            f"{', '.join(_READ)}"
        )
    _check_scheme(flag, path)
    folder = local_folder(path)
    if folder is not None and folder.is_file():
        raise DatasetError(
            f"{flag} {path}: is a file; expected a CloudVolume, which is a folder with "
            f"an info file. If it holds images, {HOW_TO_WRITE}"
        )


def check_exists(flag: str, path: str | None) -> None:
    """Refuse a path, if one is given, that no volume can be read from.

    Raises:
        DatasetError: see `cloud_path` and `check_source`; or no such local folder.
    """
    if path is None:
        return
    path = cloud_path(path)
    check_source(flag, path)
    folder = local_folder(path)
    if folder is not None and not folder.exists():
        raise DatasetError(f"{flag} {path}: no such folder; check the path")


def check_dataset(folder: Path) -> None:
    """Refuse a data set that is not there (DatasetError)."""
    if not folder.is_dir():
        raise DatasetError(
            f"{folder}: no such folder; download_image.py makes one with image sets"
        )


def check_destination(flag: str, path: str) -> None:
    """Refuse to write anything but a precomputed volume, or where nobody can.

    Raises:
        DatasetError: see `cloud_path`; or an unknown scheme.
        UsageError: another format, or a web server.
    """
    form, place = split_format(path)
    if form not in ("", "precomputed"):
        raise UsageError(
            f"{flag} {path}: {form} is not written, only read; expected a path of a "
            "precomputed volume: gs://, s3:// or a local folder"
        )
    if place.startswith(("http://", "https://")):
        raise UsageError(
            f"{flag} {path}: web servers take no files; give a local path, gs:// or "
            "s3://"
        )
    _check_scheme(flag, path)
    if "://" in path:
        cloud_path(path)


def _check_scheme(flag: str, path: str) -> None:
    scheme, separator, _ = split_format(path)[1].partition("://")
    if not separator or scheme in _SCHEMES:
        return
    import cloudfiles.paths  # slow; it knows the user's own aliases too

    cloudfiles.paths.update_aliases_from_file()
    known = cloudfiles.paths.ALLOWED_PROTOCOLS
    if scheme not in known:
        raise DatasetError(
            f"{flag} {path}: {scheme}:// is not known; expected one of "
            f"{', '.join(known)}, or a local folder"
        )
