"""Find the modules of a pyramid, and parse their directory names."""

import re
from dataclasses import dataclass
from pathlib import Path

from metroem.errors import PyramidError

_MODULE_NAME = re.compile(
    r"(?P<stage>[0-9]{1,2})_mip(?P<in_mip>[0-9]{1,2})in_(?P<suffix>.+)"
)
_RULE = "<STAGE>_mip<IN_MIP>in_<SUFFIX>, for example 0_mip8in_rigid"


@dataclass(frozen=True)
class ModuleSpec:
    """One aligner of a pyramid, as its directory name states it.

    Attributes:
        stage: index in the processing order, 0 first (coarsest mip).
        in_mip: mip of the images that it reads, and of its field.
        suffix: description for people; nothing depends on it.
        path: the module's directory.
    """

    stage: int
    in_mip: int
    suffix: str
    path: Path

    @classmethod
    def from_path(cls, path: Path) -> "ModuleSpec":
        """Parse the name of a module directory; PyramidError if it is not one."""
        match = _MODULE_NAME.fullmatch(path.name)
        if match is None:
            raise PyramidError(f"{path}: not a module directory; expected {_RULE}")
        return cls(int(match["stage"]), int(match["in_mip"]), match["suffix"], path)

    @property
    def name(self) -> str:
        """The directory name of a module with these properties."""
        return f"{self.stage}_mip{self.in_mip}in_{self.suffix}"

    @property
    def weights_folder(self) -> Path:
        """Folder of the module's network spec and checkpoints."""
        return self.path / "model"

    def spec(self) -> str | None:
        """Read the text of the module's network spec; None if it has none."""
        path = self.weights_folder / "model_spec.json"
        return path.read_text(errors="replace") if path.is_file() else None


def find_modules(pyramid: Path) -> list[ModuleSpec]:
    """Find the modules of a pyramid, in processing order.

    Hidden folders and plain files (logs) are skipped; every other folder must be a
    module.

    Args:
        pyramid: directory of modules.

    Returns:
        Stages 0, 1, 2, ... once each, with mips that do not rise.

    Raises:
        PyramidError: no such directory, no module in it, a folder that is not a module,
            a stage that is missing or occurs twice, or a mip that rises.
    """
    if not pyramid.is_dir():
        raise PyramidError(
            f"{pyramid}: no such pyramid directory; make one with "
            f"`metroem init --pyramid_path {pyramid} --mip 5 3`"
        )
    folders = sorted(p for p in pyramid.iterdir() if p.is_dir())
    modules = sorted(
        (ModuleSpec.from_path(p) for p in folders if not p.name.startswith(".")),
        key=lambda module: module.stage,
    )
    if not modules:
        raise PyramidError(f"{pyramid}: holds no module directory; expected {_RULE}")
    found = [module.path.name for module in modules]
    if [module.stage for module in modules] != list(range(len(modules))):
        raise PyramidError(
            f"{pyramid}: stages must be 0, 1, 2, ... once each, found {found}"
        )
    mips = [module.in_mip for module in modules]
    if mips != sorted(mips, reverse=True):
        raise PyramidError(
            f"{pyramid}: mips must not rise from one stage to the next, found {found}"
        )
    return modules


def select_stages(
    modules: list[ModuleSpec], stages: list[int] | None, flag: str
) -> list[ModuleSpec]:
    """Select the modules that a flag such as --train_stages names; None selects all.

    Raises:
        PyramidError: a stage that the pyramid does not have.
    """
    if stages is None:
        return modules
    known = {module.stage for module in modules}
    missing = sorted(set(stages) - known)
    if missing:
        raise PyramidError(
            f"{flag}: the pyramid has no stage {missing}, only {sorted(known)}"
        )
    return [module for module in modules if module.stage in stages]
