"""Define the flags of `metroem init` and `metroem fetch`, without torch."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from metroem.errors import PyramidError, UsageError
from metroem.utils.cli import Request, flag

TEMPLATES = resources.files("metroem") / "models" / "templates"
# Weights of two modules: `stage0`, without a prior field, and `stage1`, with one.
PRETRAINED = Path(str(resources.files("metroem"))) / "models" / "pretrained"
PRETRAINED_TEMPLATE = "correlation"


def templates() -> list[str]:
    """List the names of networks that a module can be made with, sorted."""
    names = (entry.name for entry in TEMPLATES.iterdir())
    return sorted(name[: -len(".json")] for name in names if name.endswith(".json"))


@dataclass(frozen=True)
class InitRequest(Request):
    """Flags of `metroem init`.

    Raises:
        UsageError: no mips, a negative or increasing mip, an unknown template, or
            `pretrained` with another network than that of the weights.
    """

    HELP = """Make a pyramid of modules, untrained or with general weights.

    With --pretrained the modules get the weights that come with the package, see
    docs/pretrained.md. They align most tissues as they are. To go on from them:
    metroem train --train_mode finetune.

    Example:
        %(prog)s --pyramid_path pyramid --mip 2 1 0 --pretrained
    """

    pyramid_path: Path = flag(
        "directory to make", names=("--pyramid_path",), is_positional=True
    )
    mips: list[int] = flag("mip of each stage, coarse first", names=("--mip", "--mips"))
    template: str = flag("network of the modules", "correlation")
    pretrained: bool = flag(
        "give the modules the general weights of the package", False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        mips = list(self.mips)
        if not mips or min(mips) < 0 or mips != sorted(mips, reverse=True):
            raise UsageError(
                f"--mip {' '.join(map(str, mips))}: expected one mip >= 0 for each "
                "stage, coarsest (largest) first, for example --mip 5 3"
            )
        if self.template not in templates():
            raise UsageError(
                f"--template {self.template}: expected one of {templates()}"
            )
        if self.pretrained and self.template != PRETRAINED_TEMPLATE:
            raise UsageError(
                f"--pretrained --template {self.template}: the weights are of "
                f"{PRETRAINED_TEMPLATE}; leave one of the two out"
            )

    def check_paths(self) -> None:
        path = self.pyramid_path
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise PyramidError(
                f"{path}: exists already; name a new directory, or delete this one"
            )


@dataclass(frozen=True)
class FetchRequest(Request):
    """Flags of `metroem fetch`."""

    HELP = """Copy a pyramid or a module from a folder or any cloud path.

    Modules contain code. If it is unknown it is shown, and you are asked to keep it.

    Example:
        %(prog)s gs://bucket/pyramid --pyramid_path pyramid
    """

    source: str = flag("gs://, s3://, https:// or local path", is_positional=True)
    pyramid_path: Path = flag(
        "directory to copy into", names=("--pyramid_path",), is_positional=True
    )
    trust: bool = flag("keep the code of the fetched modules without asking", False)

    @property
    def is_local(self) -> bool:
        """Whether the source is on this machine."""
        return "://" not in self.source.removeprefix("file://")

    def check_paths(self) -> None:
        local = Path(self.source.removeprefix("file://")).expanduser()
        if self.is_local and not local.is_dir():
            raise PyramidError(f"{self.source}: no such directory")
