"""Make pyramids from a template, or copy them from another place."""

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from metroem.errors import PyramidError
from metroem.io.files import make_folder, writing
from metroem.models.fetched_code import describe_code, find_code
from metroem.models.requests import (
    PRETRAINED,
    TEMPLATES,
    FetchRequest,
    InitRequest,
)
from metroem.models.weights import checkpoint_path
from metroem.specs.modules import ModuleSpec

logger = logging.getLogger(__name__)

Files = dict[str, dict[str, bytes]]  # module name -> path inside it -> content


def init_pyramid(
    path: Path,
    mips: Sequence[int],
    template: str = "correlation",
    pretrained: bool = False,
) -> list[Path]:
    """Make a pyramid of modules, untrained or with the weights of the package.

    Args:
        path: directory of the pyramid; must not exist, or be empty.
        mips: mip of each stage, in processing order; they must not increase.
        template: one of `metroem.models.requests.templates()`.
        pretrained: give the modules the weights of docs/pretrained.md, under the name
            `checkpoint`. The first stage gets those of a network without a prior
            field, every other stage those of one with a prior field.

    Returns:
        The module directories, `<STAGE>_mip<MIP>in_<template>`.

    Raises:
        UsageError: no mips, a negative or increasing mip, an unknown template, or no
            pretrained weights for it.
        PyramidError: `path` already exists.
    """
    InitRequest(path, list(mips), template, pretrained).check_paths()
    names = [f"{stage}_mip{mip}in_{template}" for stage, mip in enumerate(mips)]
    with _built_beside(path) as folder:
        for stage, (name, mip) in enumerate(zip(names, mips, strict=True)):
            _write_module(folder / name, mip, template)
            if pretrained:
                weights = checkpoint_path(PRETRAINED, f"stage{min(stage, 1)}")
                to = checkpoint_path(folder / name / "model", "checkpoint")
                to.write_bytes(weights.read_bytes())
    with_weights = "with pretrained weights" if pretrained else "untrained"
    logger.info("made %s, %s: %s", path, with_weights, ", ".join(names))
    return [path / name for name in names]


def fetch(
    source: str, path: Path, is_trusted: Callable[[str], bool] = lambda code: True
) -> list[Path]:
    """Copy a pyramid or one module into a local pyramid.

    Args:
        source: a directory, local or at any path that cloud-files opens
            (gs://, s3://, https://, file://).
        path: pyramid to copy into; created if it is missing.
        is_trusted: called once with the code of the modules as text; says whether to
            keep them.

    Returns:
        The copied module directories.

    Raises:
        PyramidError: `source` cannot be read or contains no module, `path` already has
            one of its modules, or it is not trusted; then nothing is copied.
    """
    FetchRequest(source, path).check_paths()
    modules = _modules_of(source, _read_files(source))
    existing = [name for name in modules if (path / name).exists()]
    if existing:
        raise PyramidError(
            f"{path}: has {', '.join(existing)} already; fetch into another "
            "directory, or delete it first"
        )
    if not is_trusted(describe_code(find_code(modules), known=_create_py(0))):
        raise PyramidError(
            f"{source}: not trusted, nothing is copied; a module's code runs whenever "
            "it is loaded. Look at it, then answer y or give --trust"
        )
    make_folder(path)
    for name, files in modules.items():
        with _built_beside(path / name) as folder:
            for inside, content in files.items():
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                (folder / inside).write_bytes(content)
        size = sum(map(len, files.values()))
        logger.info("copied %s: %d files, %.1f MB", path / name, len(files), size / 1e6)
        if not any(inside.endswith(".state.pth.tar") for inside in files):
            logger.warning(
                "%s: came without weights, so it is untrained; expected "
                "model/<checkpoint_name>.state.pth.tar in %s",
                *(path / name, source),
            )
    return [path / name for name in modules]


def _write_module(folder: Path, mip: int, template: str) -> None:
    """Write the files of an untrained module."""
    (folder / "model").mkdir(parents=True)
    (folder / "create.py").write_text(_create_py(mip))
    spec = (TEMPLATES / f"{template}.json").read_bytes()
    (folder / "model" / "model_spec.json").write_bytes(spec)


def _create_py(mip: int) -> str:
    """Make the text of a create.py for a mip."""
    text = (TEMPLATES / "create.py").read_text()
    return text.replace("MIP = 0", f"MIP = {mip}", 1)


@contextmanager
def _built_beside(path: Path) -> Iterator[Path]:
    """Make a temporary folder that becomes `path` once it is complete."""
    make_folder(path.parent)
    # Named before it is made, so that a signal at any moment leaves nothing behind.
    folder = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with writing(path):
            folder.mkdir()
            yield folder
        os.rename(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_files(source: str) -> list[tuple[str, bytes]]:
    """Read all files below a path: their paths and contents."""
    from modelhouse.storage import get_files_and_contents  # writes below HOME

    from metroem.io.cloud_retry import prepare_storage  # slow; init does not need it

    prepare_storage()
    try:
        return get_files_and_contents(source)
    except Exception as error:  # each store has its own errors
        raise PyramidError(
            f"{source}: cannot be read ({type(error).__name__}: {error}); check the "
            "path and the credentials of that store. Plain web servers cannot list "
            "directories"
        ) from error


def _modules_of(source: str, files: list[tuple[str, bytes]]) -> Files:
    """Sort the files of `source` by module; leave out all others."""
    paths = {PurePosixPath(name): content for name, content in files}
    unsafe = [str(p) for p in paths if p.is_absolute() or ".." in p.parts]
    if unsafe:
        raise PyramidError(f"{source}: refusing paths that lead out of it: {unsafe}")
    if PurePosixPath("create.py") in paths:
        name = _module_name(source, source.rstrip("/").rsplit("/", 1)[-1])
        return {name: {str(p): content for p, content in paths.items()}}
    names = sorted(p.parts[0] for p in paths if p.parts[1:] == ("create.py",))
    if not names:
        raise PyramidError(
            f"{source}: holds no module; expected a create.py in it or in "
            "directories such as 0_mip5in_rigid"
        )
    modules: Files = {_module_name(source, name): {} for name in names}
    for path, content in paths.items():
        if path.parts[0] in modules:
            modules[path.parts[0]]["/".join(path.parts[1:])] = content
        else:
            logger.info("left out %s: belongs to no module", path)
    return modules


def _module_name(source: str, name: str) -> str:
    try:
        return ModuleSpec.from_path(Path(name)).path.name
    except PyramidError as error:
        raise PyramidError(f"{source}: {error}") from None
