"""Flags of the commands that train and write fields."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from metroem.errors import UsageError
from metroem.specs.filenames import check_checkpoint_name
from metroem.specs.schedule import check_decay
from metroem.training import distributed

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainRequest:
    """A call of train.py, one field a flag.

    Raises:
        UsageError: values that cannot work, each named with its flag.
    """

    pyramid_path: Path
    dataset_path: Path
    fields_path: Path | None = None
    checkpoint_name: str = "checkpoint"
    train_mode: str = "scratch"
    train_params_path: Path | None = None
    gpu: str | None = None
    train_stages: list[int] | None = None
    generate_field_stages: list[int] | None = None
    port: int | None = None
    redirect_stdout: bool = True
    device: str = "auto"
    seed: int = 0
    batch_size: int | None = None
    num_workers: int | None = None
    precision: str = "fp32"
    max_epochs: int | None = None
    max_minutes: float | None = None
    val_pairs: int = 2
    restart: bool = False
    tensorboard: bool = False
    ema: float | None = None
    compile: bool = False
    checkpoint_activations: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        check_checkpoint_name(self.checkpoint_name)
        named = [] if self.gpu is None else self.gpu.split(",")
        if not all(index.strip().isdigit() for index in named):
            raise UsageError(f"--gpu {self.gpu!r}: expected numbers, such as 0 or 0,1")
        if len(set(self.gpus)) < len(named):
            raise UsageError(f"--gpu {self.gpu}: names a GPU twice; name each once")
        if self.port is not None and not 0 < self.port < 2**16:
            raise UsageError(f"--port {self.port}: expected 1 to 65535")
        for flag, least in (("batch_size", 1), ("max_epochs", 1), ("val_pairs", 0)):
            value = getattr(self, flag)
            if value is not None and value < least:
                raise UsageError(f"--{flag} {value}: expected at least {least}")
        if not (self.trains or self.generate_field_stages != []):
            raise UsageError(
                "--train_stages and --generate_field_stages without a stage: there is "
                "nothing to do; leave one of them out for all stages"
            )
        if self.restart and not self.trains:
            raise UsageError(
                "--restart with --train_stages without a stage: there is no training "
                "to begin anew; name its stage, or leave one of them out"
            )
        if self.restart and distributed.restarts_allowed():
            raise UsageError(
                "--restart with torchrun --max_restarts: each restart of torchrun "
                "would begin the training anew; leave --max_restarts out, or begin "
                "anew by a first run with --restart and without it"
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UsageError(f"--max_minutes {self.max_minutes}: expected more than 0")
        if self.ema is not None:
            check_decay(self.ema, "--ema")
        if not self.dataset_path.is_dir():
            raise UsageError(
                f"--dataset_path {self.dataset_path}: no such folder; make one with "
                "download_image.py --dst_folder"
            )
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UsageError(
                "--tensorboard: the package tensorboard is not installed; get it with "
                "pip install tensorboard, or leave the flag out"
            )

    @property
    def trains(self) -> bool:
        """Whether any stage is to be trained; else fields are written alone."""
        return self.train_stages != []

    @property
    def fields_folder(self) -> Path:
        """Where the field sets are written."""
        return self.fields_path or self.dataset_path

    @property
    def gpus(self) -> list[int]:
        """The GPUs of --gpu, none without it; as many ranks are started."""
        return [] if self.gpu is None else [int(n) for n in self.gpu.split(",")]

    @property
    def ranks_to_launch(self) -> int:
        """Ranks that are still to be started: 0 for this process alone."""
        is_alone = len(self.gpus) < 2 or distributed.is_launched()
        return 0 if is_alone else len(self.gpus)
