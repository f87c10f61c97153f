"""What benchmarks/quality.py is asked for."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from quality_cases import load_bench

from metroem import cli
from metroem.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("train", "score", "other", "distil", "page")


@dataclass(frozen=True)
class QualityRequest:
    """A call of this script, one field a flag.

    Raises:
        UsageError: files that are not there, or parts that lack what they need.
    """

    stack: Path
    bench: Path
    peers_json: Path
    out: Path
    mips: list[int]
    other_stack: Path | None = None
    other_peers_json: Path | None = None
    peers_python: Path | None = None
    pyramid_path: Path | None = None
    distilled_path: Path | None = None
    parts: list[str] | None = None
    page: Path = ROOT / "benchmarks" / "quality.md"
    train_mode: str = "aligned"
    train_params_path: Path | None = None
    num_train: int = 45
    score_from: int = 50
    limit: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for flag in ("stack", "peers_json", "other_stack", "other_peers_json"):
            path = getattr(self, flag)
            if path is not None and not path.is_file():
                raise UsageError(f"--{flag} {path}: no such file")
        load_bench(self.bench)
        for part, flag in (("other", "other_stack"), ("distil", "distilled_path")):
            if part in (self.parts or ()) and getattr(self, flag) is None:
                raise UsageError(f"--parts {part}: expected --{flag} beside it")
        if "train" in (self.parts or ()) and self.pyramid_path is not None:
            raise UsageError("--parts train: expected no --pyramid_path beside it")

    @property
    def todo(self) -> list[str]:
        """The parts to do, in order; all that is possible where none are named."""
        missing = {
            "train": self.pyramid_path is not None,
            "other": self.other_stack is None,
            "distil": self.distilled_path is None,
        }
        if self.parts is None:
            return [part for part in PARTS if not missing.get(part)]
        return [part for part in PARTS if part in self.parts]

    @property
    def pyramid(self) -> str:
        """The pyramid that is scored."""
        return str((self.pyramid_path or self.out / "pyramid").resolve())

    @property
    def pictures(self) -> Path:
        """The folder of the page's pictures."""
        return self.page.with_suffix("")

    @property
    def held_out(self) -> str:
        """The sections that are scored, as the bench takes them."""
        return f"{self.stack}:{self.score_from}:"


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of `QualityRequest`."""
    parser = cli.parser(description)
    add = parser.add_argument
    add("--stack", type=Path, required=True, help=".npy, uint8 [section, rows, cols]")
    add("--bench", type=Path, required=True, help="folder of the bench")
    add("--peers_json", type=Path, required=True, help="the peers' results")
    add("--out", type=Path, required=True, help="folder that keeps everything")
    add("--other_stack", type=Path, help="sections of another tissue (.npy)")
    add("--other_peers_json", type=Path, help="the peers' results on them")
    add("--peers_python", type=Path, help="python that has the peers: runs them there")
    add("--pyramid_path", type=Path, help="a trained pyramid (trains one in --out)")
    add("--distilled_path", type=Path, help="a pyramid trained with `distil`")
    parts = "what to do (all that is possible); earlier parts are read from --out"
    add("--parts", nargs="+", choices=PARTS, help=parts)
    page = Path("benchmarks/quality.md")
    add("--page", type=Path, default=ROOT / page, help=f"page to write ({page})")
    add = parser.add_argument_group("training and cases").add_argument
    add("--mips", type=int, nargs="+", default=[1, 0], help="of the stages (1 0)")
    add("--train_mode", default="aligned", help="as train.py has it (aligned)")
    add("--train_params_path", type=Path, help="as train.py has it")
    add("--num_train", type=int, default=45, help="sections to train on (45)")
    add("--score_from", type=int, default=50, help="first section to score (50)")
    add("--limit", type=int, default=6, help="pairs per family and kind (6)")
    add("--seed", type=int, default=0, help="of the training and the cases (0)")
    return parser
