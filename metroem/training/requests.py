"""Define the flags of train.py and of `metroem write-fields`."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from metroem.errors import UsageError
from metroem.specs.filenames import check_checkpoint_name
from metroem.specs.modules import find_modules, select_stages
from metroem.specs.schedule import MODES, check_decay, load_schedule
from metroem.utils import ranks
from metroem.utils.cli import Request, flags_of_group

_GROUPS = ("pyramid and data", "what is trained", "how it is run")
_data, _trained, _run = map(flags_of_group, _GROUPS)


@dataclass(frozen=True)
class RunRequest(Request):
    """The flags that train.py and write-fields share."""

    GROUPS = _GROUPS

    pyramid_path: Path = _data("directory of modules")
    dataset_path: Path = _data("folder of image sets, of every mip of the pyramid")
    fields_path: Path | None = _data(
        "folder of field sets, written and read", unset="--dataset_path"
    )
    checkpoint_name: str = _data("name of the weights", "checkpoint")
    verify: bool = _data(
        "check each pair's checksum before its first read: each worker of each rank "
        "reads each of its pairs completely once more",
        False,
    )
    gpu: str | None = _run(
        "GPUs, for example 3 or 0,1,2; one rank for each",
        unset="the first, if there is one",
    )
    device: str = _run(
        "auto uses a GPU if there is one", "auto", choices=("auto", "cpu", "cuda")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_checkpoint_name(self.checkpoint_name)
        named = [] if self.gpu is None else self.gpu.split(",")
        if not all(index.strip().isdigit() for index in named):
            raise UsageError(f"--gpu {self.gpu!r}: expected numbers, such as 0 or 0,1")
        if len(set(self.gpus)) < len(named):
            raise UsageError(f"--gpu {self.gpu}: names a GPU twice; name each once")
        if not self.dataset_path.is_dir():
            raise UsageError(
                f"--dataset_path {self.dataset_path}: no such folder; make one with "
                "download_image.py --dst_folder"
            )

    @property
    def gpus(self) -> list[int]:
        """The GPUs of --gpu, each for one rank; empty without it."""
        return [] if self.gpu is None else [int(n) for n in self.gpu.split(",")]

    @property
    def ranks_to_launch(self) -> int:
        """Number of ranks to start; 0 if this process is the only one."""
        is_alone = len(self.gpus) < 2 or ranks.is_launched()
        return 0 if is_alone else len(self.gpus)


@dataclass(frozen=True)
class TrainRequest(RunRequest):
    """The flags of train.py."""

    HELP = """Train the modules of a pyramid, coarse to fine, on downloaded pairs.

    For each stage in order: train its module, then write its fields for every image set
    at the next stage's mip, as the start of the next stage. The same command resumes a
    run that was stopped.

    Example:
        %(prog)s --pyramid_path pyramid --dataset_path data --train_mode scratch
    """

    train_mode: str = _trained(
        "which schedule", "scratch", choices=MODES, read=str.lower
    )
    train_params_path: Path | None = _trained(
        "schedule (JSON) of --train_mode custom", None
    )
    train_stages: list[int] | None = _trained(
        "stages to train; none if no number is given", unset="all", nargs="*"
    )
    generate_field_stages: list[int] | None = _trained(
        "stages to write fields of; none if no number is given",
        unset="all that can",
        nargs="*",
    )
    val_pairs: int = _trained("pairs held out for validation", 2, least=0)
    max_epochs: int | None = _trained("cap on the epochs of each phase", None, least=1)
    max_minutes: float | None = _trained(
        "minutes after which this command saves and stops; the same command resumes",
        None,
    )
    budget_minutes: float | None = _trained(
        "minutes for all stages and their fields: the schedule is shortened to fit, "
        "with its learning rates to their end. A resumed run goes on within what is "
        "left. The weights depend on the speed of the machine, so they are not the "
        "same each time",
        None,
    )
    restart: bool = _trained(
        "discard the training of the stages to train, and begin again", False
    )
    port: int | None = _run(
        "port over which the ranks of --gpu connect", unset="any free one"
    )
    seed: int = _run("random seed", 0)
    batch_size: int | None = _run(
        "pairs of a batch over all ranks",
        unset="the schedule's, else one per rank",
        least=1,
    )
    num_workers: int | None = _run(
        "data-loading processes per rank", unset="up to 8 with a GPU, else 0"
    )
    precision: str = _run(
        "number format inside the network", "fp32", choices=("fp32", "bf16")
    )
    ema: float | None = _run(
        "decay of a moving average of the weights, for all phases; the average is what "
        "is saved",
        unset="the schedule's",
        metavar="DECAY",
    )
    compile: bool = _run(
        "torch.compile the network: takes minutes per stage and sample size",
        False,
    )
    checkpoint_activations: bool = _run(
        "compute activations twice instead of keeping them: less memory, more time",
        False,
    )
    tensorboard: bool = _run(
        "write curves and pictures for TensorBoard into <pyramid>/.train", False
    )
    redirect_stdout: bool = _run(
        "do not write the log to <pyramid>/<checkpoint_name>.log",
        True,
        names=("--no_redirect_stdout",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.port is not None and not 0 < self.port < 2**16:
            raise UsageError(f"--port {self.port}: expected 1 to 65535")
        if not (self.trains or self.generate_field_stages != []):
            raise UsageError(
                "--train_stages and --generate_field_stages without a stage: there is "
                "nothing to do; leave one of them out for all stages"
            )
        if self.restart and not self.trains:
            raise UsageError(
                "--restart with --train_stages without a stage: there is no training "
                "to begin again; name its stage, or leave one of them out"
            )
        if self.restart and ranks.restarts_allowed():
            raise UsageError(
                "--restart with torchrun --max_restarts: each restart of torchrun "
                "would begin the training again; leave --max_restarts out, or begin "
                "again by a first run with --restart and without it"
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UsageError(f"--max_minutes {self.max_minutes}: expected more than 0")
        if self.budget_minutes is not None:
            self._check_budget(self.budget_minutes)
        if self.ema is not None:
            check_decay(self.ema, "--ema")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UsageError(
                "--tensorboard: the package tensorboard is not installed; get it with "
                "pip install tensorboard, or leave the flag out"
            )

    def _check_budget(self, minutes: float) -> None:
        """Refuse a --budget_minutes that cannot be kept or means nothing."""
        if not 0 < minutes < float("inf"):
            raise UsageError(f"--budget_minutes {minutes}: expected more than 0")
        if not self.trains:
            raise UsageError(
                f"--budget_minutes {minutes:g} with --train_stages without a stage: "
                "there is no training to shorten; leave one of them out"
            )

    def check_paths(self) -> None:
        modules = find_modules(self.pyramid_path)
        select_stages(modules, self.train_stages, "--train_stages")
        load_schedule(self.train_mode, self.train_params_path)

    @property
    def trains(self) -> bool:
        """Whether any stage is trained; otherwise only fields are written."""
        return self.train_stages != []

    @property
    def fields_folder(self) -> Path:
        """Folder that the field sets are written to."""
        return self.fields_path or self.dataset_path


@dataclass(frozen=True)
class WriteFieldsRequest(RunRequest):
    """The flags of `metroem write-fields`."""

    HELP = """Write the fields of a trained pyramid.

    The same command resumes a run that was stopped.

    Example:
        %(prog)s --pyramid_path pyramid --dataset_path data
    """

    stages: list[int] | None = _data(
        "stages to write fields of; the first starts from the fields of the previous "
        "stage",
        unset="all",
    )

    def check_paths(self) -> None:
        select_stages(find_modules(self.pyramid_path), self.stages, "--stages")

    def as_training(self) -> TrainRequest:
        """Make the request of a training that only writes these fields."""
        return TrainRequest(
            pyramid_path=self.pyramid_path,
            dataset_path=self.dataset_path,
            fields_path=self.fields_path,
            checkpoint_name=self.checkpoint_name,
            verify=self.verify,
            gpu=self.gpu,
            device=self.device,
            train_stages=[],
            generate_field_stages=self.stages,
            redirect_stdout=False,
        )
