"""Define and check the flags of `metroem evaluate`."""

from dataclasses import dataclass
from pathlib import Path

from metroem.errors import UsageError
from metroem.io.cloud_paths import check_dataset
from metroem.specs.filenames import check_checkpoint_name
from metroem.specs.modules import find_modules
from metroem.utils.cli import Request, flags_of_group

_GROUPS = ("pyramid and data", "results", "what is run")
_data, _results, _work = map(flags_of_group, _GROUPS)


@dataclass(frozen=True)
class EvaluateRequest(Request):
    """The flags of `metroem evaluate`.

    Raises:
        UsageError: a checkpoint name that cannot be a file name, a folder for `json`
            or `report`, the same file for both, a file for `predictions`, or `stages`
            that leave out an earlier one.
    """

    GROUPS = _GROUPS
    HELP = """Measure how well a pyramid aligns a data set, and list the worst pairs.

    Example:
        %(prog)s --pyramid_path pyramid --dataset_path data --known_warps \\
            --report report.html
    """

    pyramid_path: Path = _data("the pyramid")
    dataset_path: Path = _data("folder of image sets, of every mip of the pyramid")
    checkpoint_name: str = _data("name of the weights", "checkpoint")
    json: Path | None = _results("file for all figures, also those of each pair", None)
    report: Path | None = _results("HTML file that shows all pairs", None)
    known_warps: bool = _work("also align sections warped by known fields", False)
    no_finetune: bool = _work("evaluate the networks alone", False)
    verify: bool = _data(
        "check the checksum of each pair before it is used: reads it twice", False
    )
    stages: list[int] | None = _work(
        "run only these stages, from 0 on: 0, or 0 1; figures are in pixels of the "
        "last of them",
        unset="all",
        least=0,
    )
    max_pairs: int | None = _work(
        "align at most this number of pairs, spread evenly over the image sets and "
        "within each",
        unset="all",
        least=1,
    )
    workers: int | None = _work(
        "processes on this machine, one thread each",
        unset="one per core, as far as each has 4 pairs; 1 on a GPU",
        least=1,
    )
    predictions: Path | None = _results(
        "folder that keeps the fields, so that another call does not run the networks "
        "again",
        unset="<pyramid_path>/.evaluate/<checkpoint_name>",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_checkpoint_name(self.checkpoint_name)
        for name, path, example in (
            ("--json", self.json, "figures.json"),
            ("--report", self.report, "report.html"),
        ):
            if path is not None and path.is_dir():
                raise UsageError(
                    f"{name} {path}: is a folder; name a file, for example "
                    f"{path / example}"
                )
        if self.json is not None and self.json == self.report:
            raise UsageError(
                f"--report {self.report}: --json names the same file; name another, "
                f"for example {self.json.with_name('report.html')}"
            )

        if self.predictions is not None and self.predictions.is_file():
            raise UsageError(
                f"--predictions {self.predictions}: is a file; name a folder"
            )
        if self.stages is not None:
            first = range(max(self.stages, default=0) + 1)
            if set(self.stages) != set(first):
                raise UsageError(
                    f"--stages {' '.join(map(str, self.stages))}: a stage starts from "
                    "the fields of the stage before it; expected all up to the last, "
                    f"--stages {' '.join(map(str, first))}"
                )

    def check_paths(self) -> None:
        find_modules(self.pyramid_path)
        check_dataset(self.dataset_path)
