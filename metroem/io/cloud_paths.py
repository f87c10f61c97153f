"""Parse and check paths of volumes without importing cloud-volume, which is slow."""

import re
import shlex
from pathlib import Path

from metroem.errors import DatasetError, UsageError

_ENDPOINT = re.compile(r"(?:\w+://)?s3://(https?://[^/]+)/?(.*)")
# Neuroglancer's notation: gs://bucket/em/|zarr2:
_FORMAT_LAST = re.compile(r"(.+?)/*\|([\w-]+):")
# The part of a path's first folder that cloud-volume reads as its name.
_FIRST_FOLDER = re.compile(r"[\w~.-]*\w")
_READ = ("precomputed", "zarr", "zarr2", "zarr3", "n5")
# The formats of cloud-files; tests/io/test_paths.py compares the two lists.
FORMATS = (*_READ, "graphene", "boss", "brainmaps", "deepzoom", "nggraph", "render")
FORMATS += ("vtk", "nifti", "dvid")
_SCHEMES = ("file", "gs", "s3", "http", "https", "mem")
HOW_TO_WRITE = (
    "make a volume of them: metroem import SECTIONS VOLUME --resolution X Y "
    "Z (docs/import.md)"
)


def split_format(path: str) -> tuple[str, str]:
    """Split a path into its format ("" if it names none) and the rest."""
    if match := _FORMAT_LAST.fullmatch(path):
        path = f"{match[2].removeprefix('neuroglancer-')}://{match[1]}"
    form, separator, location = path.partition("://")
    known = separator and form in FORMATS
    return (form, location) if known else ("", path)


def local_folder(path: str) -> Path | None:
    """Return the folder on this machine that a path names; None for other storage."""
    location = split_format(path)[1].removeprefix("file://")
    return None if "://" in location else Path(location).expanduser().absolute()


def cloud_path(path: str) -> str:
    """Convert a path to the form that cloud-volume opens; no scheme means local.

    Raises:
        DatasetError: the path is s3:// followed by the server's address, or a local
            folder that cloud-volume would take for another one.
    """
    path = path.rstrip("/")
    if match := _ENDPOINT.fullmatch(path):
        raise DatasetError(
            f"{path}: cloud-volume does not take the server's address in the path; "
            f"set AWS_ENDPOINT_URL_S3={match[1]} and give s3://{match[2]}"
        )
    form, location = split_format(path)
    if "://" not in location and form != "precomputed":
        location = f"file://{Path(location).expanduser().resolve()}"
    if (folder := local_folder(location)) is not None:
        first, *others = folder.parts[1:] or ("",)
        if not others or not _FIRST_FOLDER.fullmatch(first):
            raise DatasetError(
                f"{path}: cloud-volume takes it for another path, since its first "
                f"folder, {first!r}, is all of it or has other characters than letters "
                f"and digits; link to it from a path that is not there yet and begins "
                f"otherwise (ln -s {shlex.quote(str(folder))} PATH), and give file://"
                "PATH, all of it"
            )
    return f"{form}://{location}" if form else location


def check_source(flag: str, path: str) -> None:
    """Refuse a path that cannot lead to a readable volume.

    Args:
        flag: the flag that gave the path.
        path: as returned by `cloud_path`.

    Raises:
        DatasetError: the format or the scheme is not read, or the path is a file.
    """
    form, _ = split_format(path)
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
    """Refuse a path that no volume can be read from; None passes.

    Raises:
        DatasetError: see `cloud_path` and `check_source`; or the local folder does
            not exist.
    """
    if path is None:
        return
    path = cloud_path(path)
    check_source(flag, path)
    folder = local_folder(path)
    if folder is not None and not folder.exists():
        raise DatasetError(f"{flag} {path}: no such folder; check the path")


def check_dataset(folder: Path) -> None:
    """Raise DatasetError if the folder of a data set does not exist."""
    if not folder.is_dir():
        raise DatasetError(
            f"{folder}: no such folder; download_image.py makes one with image sets"
        )


def check_destination(flag: str, path: str) -> None:
    """Refuse a path at which no precomputed volume can be written.

    Raises:
        DatasetError: see `cloud_path`; or the scheme is not known.
        UsageError: the path names another format, or a web server.
    """
    form, location = split_format(path)
    if form not in ("", "precomputed"):
        raise UsageError(
            f"{flag} {path}: {form} is not written, only read; expected a path of a "
            "precomputed volume: gs://, s3:// or a local folder"
        )
    if location.startswith(("http://", "https://")):
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
    import cloudfiles.paths  # slow to import; it also knows the user's own aliases

    cloudfiles.paths.update_aliases_from_file()
    known = cloudfiles.paths.ALLOWED_PROTOCOLS
    if scheme not in known:
        raise DatasetError(
            f"{flag} {path}: {scheme}:// is not known; expected one of "
            f"{', '.join(known)}, or a local folder"
        )
