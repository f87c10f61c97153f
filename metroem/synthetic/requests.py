"""Define the flags of the demo."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from metroem.errors import UsageError
from metroem.utils.cli import Request, flag

GAP = 2  # sections between the last one for training and the first that is scored
MARKER = ".metroem-demo"
SCHEDULE = Path(str(resources.files("metroem") / "specs" / "schedules" / "demo.json"))


@dataclass(frozen=True)
class DemoRequest(Request):
    """Flags of `metroem demo`; all but the folder can be set only in Python.

    Attributes:
        num_sections: how many sections to make.
        rows: height of a section, px, a multiple of 4.
        cols: width of a section, px, a multiple of 4.
        num_held_out: how many of the last pairs are scored and not trained on.
        seed: random seed of the tissue, the distortions and the training.
        train_params_path: the schedule.

    Raises:
        UsageError: too few sections, or sizes that mip 2 does not divide.
    """

    HELP = """Run the main job on sections made for it, in about two minutes.

    Example:
        %(prog)s --folder demo
    """

    folder: Path = flag(
        "folder for all files; those of an earlier demo are removed",
        Path("demo"),
    )
    num_sections: int = 28
    rows: int = 512
    cols: int = 448
    num_held_out: int = 5
    seed: int = 0
    train_params_path: Path = SCHEDULE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_held_out < 1 or self.num_train < 3:
            raise UsageError(
                f"--num_sections {self.num_sections} --num_held_out "
                f"{self.num_held_out}: leaves {self.num_train} sections for "
                f"training, with {GAP} between them and the scored ones; at least 3 "
                "are needed, and one pair to score"
            )
        if self.rows % 4 or self.cols % 4 or min(self.rows, self.cols) < 64:
            raise UsageError(
                f"--rows {self.rows} --cols {self.cols}: expected multiples of 4, "
                "64 or more"
            )

    def check_paths(self) -> None:
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--folder {folder}: is a file; name a new folder")
        is_empty = not folder.exists() or not any(folder.iterdir())
        if not is_empty and not (folder / MARKER).is_file():
            raise UsageError(
                f"--folder {folder}: contains files that no demo wrote; name a new "
                "folder"
            )

    @property
    def num_train(self) -> int:
        """How many of the first sections are trained on."""
        return self.num_sections - self.num_held_out - 1 - GAP
