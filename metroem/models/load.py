"""Load modules through modelhouse, as corgie does, and undo its side effects."""

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

    The result is not cached: modelhouse's own cache returns the object of the first
    call, even if that was trained since. The working directory, `sys.path`,
    `sys.modules` and modelhouse's temporary files are restored in any case. Not for
    threads: modelhouse changes the working directory of the process.

    Args:
        path: module directory, local or any path cloud-files opens.
        checkpoint_name: name of the weights. If they do not exist, the network is
            untrained, with a warning; for None, without one.
        **params: further arguments of its `create`.

    Returns:
        The module; its `aligner` is the part to train and apply.

    Raises:
        PyramidError: there is no `create.py`, it fails, or its module does not have an
            `aligner`.
        CheckpointError: the weights do not fit.
    """
    local = Path(path)
    if local.is_dir() and not (local / "create.py").is_file():
        raise PyramidError(f"{path}: no create.py; expected a module directory")
    _check_files(local)
    logger.info("loading %s", path)
    with _modelhouse_side_effects_undone() as copies:
        import modelhouse.loading  # after HOME is known to be writable

        try:
            module = modelhouse.loading.uncached_load_model(
                str(path), checkpoint_name=checkpoint_name, **params
            )
        except MetroEMError as error:
            # The message names the copy, which is deleted soon: name the module
            # instead.
            message = re.sub(
                rf"{re.escape(copies)}/[^/]+", lambda _: str(path), str(error)
            )
            raise type(error)(message) from error
        except BaseException as error:  # create.py may raise anything
            if _is_stop_request(error):
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
    """Refuse files that cannot be copied: reading a pipe would wait for ever."""
    for at, _, names in os.walk(folder):
        for name in names:
            path = Path(at, name)
            if not path.is_file():
                raise PyramidError(
                    f"{path}: is a pipe, a device or a link that leads nowhere; "
                    "expected the files of a module alone; delete it"
                )


def _is_stop_request(error: BaseException) -> bool:
    """Whether Ctrl-C or SIGTERM raised it, not a create.py that exits."""
    if isinstance(error, SystemExit):
        return error.code == 128 + signal.SIGTERM
    return isinstance(error, KeyboardInterrupt)


@contextmanager
def _modelhouse_side_effects_undone() -> Iterator[str]:
    """Let modelhouse copy modules below a temporary folder; restore all afterwards."""
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
    """Remove helpers that a create.py imported from its own directory.

    Otherwise another module would get them for its own helpers of the same name.
    """
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and file.startswith(folder + os.sep):
            del sys.modules[name]
