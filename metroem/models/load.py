"""Modules loaded through modelhouse, as corgie loads them, without its traces."""

import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from metroem.errors import MetroEMError, PyramidError

logger = logging.getLogger(__name__)


def load_module(
    path: str | Path, *, checkpoint_name: str | None = "checkpoint", **params: Any
) -> nn.Module:
    """Load a module directory: run its `create.py` on a copy, by modelhouse.

    Not cached (modelhouse's own cache returns the object of the first call,
    trained or not). Working directory, `sys.path`, `sys.modules` and
    modelhouse's temporary files are left as they were, whatever happens. Not
    for threads: modelhouse changes the working directory of the process.

    Args:
        path: module directory, local or any path cloud-files opens.
        checkpoint_name: which weights; fresh ones, with a warning, where they are not
            there, and without one for None.
        **params: further arguments of its `create`.

    Returns:
        The module; its `aligner` is what is trained and applied.

    Raises:
        PyramidError: no `create.py`, one that fails, or a module without
            `aligner`.
        CheckpointError: weights that do not fit.
    """
    local = Path(path)
    if local.is_dir() and not (local / "create.py").is_file():
        raise PyramidError(f"{path}: no create.py; expected a module directory")
    _check_files(local)
    logger.info("loading %s", path)
    with _modelhouse_traces_removed() as copies:
        import modelhouse.loading  # after HOME is known to be writable

        try:
            module = modelhouse.loading.uncached_load_model(
                str(path), checkpoint_name=checkpoint_name, **params
            )
        except MetroEMError as error:
            # It names the copy, which is gone soon.
            told = re.sub(
                rf"{re.escape(copies)}/[^/]+", lambda _: str(path), str(error)
            )
            raise type(error)(told) from error
        except BaseException as error:  # create.py may raise anything
            if _is_asked_to_end(error):
                raise
            raise PyramidError(
                f"{path}: its create.py does not make a module: {error!r}"
            ) from error
    aligner = getattr(module, "aligner", None)
    if not (isinstance(aligner, nn.Module) and hasattr(aligner, "align_both_ways")):
        raise PyramidError(
            f"{path}: create() returned {type(module).__name__} without an "
            "`aligner` of metroem; expected a module whose `aligner` is a "
            "metroem.aligner.Aligner"
        )
    return module


def _check_files(folder: Path) -> None:
    """Refuse what cannot be copied: a pipe would be waited for, for ever."""
    for at, _, names in os.walk(folder):
        for name in names:
            path = Path(at, name)
            if not path.is_file():
                raise PyramidError(
                    f"{path}: is a pipe, a device or a link that leads nowhere; "
                    "expected the files of a module alone; delete it"
                )


def _is_asked_to_end(error: BaseException) -> bool:
    """Whether it is Ctrl-C or SIGTERM, not a create.py that ends the process."""
    if isinstance(error, SystemExit):
        return error.code == 128 + signal.SIGTERM
    return isinstance(error, KeyboardInterrupt)


@contextmanager
def _modelhouse_traces_removed() -> Iterator[str]:
    """The folder below which modelhouse copies the module, on its way out."""
    try:
        import modelhouse
    except OSError as error:
        raise PyramidError(
            f"modelhouse cannot write below the home directory ({error}); set HOME "
            "to a folder that can be written"
        ) from error
    folder, search_path = modelhouse.MODELHOUSE_TMP_FILES_DIR, list(sys.path)
    working_directory = os.getcwd()
    with tempfile.TemporaryDirectory(dir=folder) as private:
        modelhouse.MODELHOUSE_TMP_FILES_DIR = private
        try:
            yield private
        finally:
            modelhouse.MODELHOUSE_TMP_FILES_DIR = folder
            os.chdir(working_directory)
            sys.path[:] = search_path
            _forget_modules_below(private)


def _forget_modules_below(folder: str) -> None:
    """Drop helpers that a create.py imported from its own directory.

    Another module's helper of the same name would be taken for it.
    """
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and file.startswith(folder + os.sep):
            del sys.modules[name]
