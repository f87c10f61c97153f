"""Say what a training, or the writing of fields, is asked for."""

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
        "reads all of its pairs once more, whole",
        False,
    )
    gpu: str | None = _run(
        "GPUs, as 3 or 0,1,2: that many ranks", unset="the first, if there is one"
    )
    device: str = _run(
        "auto takes a GPU if there is one", "auto", choices=("auto", "cpu", "cuda")
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
        """The GPUs of --gpu, none without it; as many ranks are started."""
        return [] if self.gpu is None else [int(n) for n in self.gpu.split(",")]

    @property
    def ranks_to_launch(self) -> int:
        """Ranks that are still to be started: 0 for this process alone."""
        is_alone = len(self.gpus) < 2 or ranks.is_launched()
        return 0 if is_alone else len(self.gpus)


@dataclass(frozen=True)
class TrainRequest(RunRequest):
    """What train.py is asked for."""

    train_mode: str = _trained(
        "which schedule", "scratch", choices=MODES, read=str.lower
    )
    train_params_path: Path | None = _trained(
        "schedule (JSON) of --train_mode custom", None
    )
    train_stages: list[int] | None = _trained(
        "stages to train; without a number: none", unset="all", nargs="*"
    )
    generate_field_stages: list[int] | None = _trained(
        "stages to write fields of; without a number: none",
        unset="all that can",
        nargs="*",
    )
    val_pairs: int = _trained("pairs held out for validation", 2, least=0)
    max_epochs: int | None = _trained("cap on the epochs of each phase", None, least=1)
    max_minutes: float | None = _trained("minutes after which to stop cleanly", None)
    restart: bool = _trained(
        "discard the training of the stages to train, and begin again", False
    )
    port: int | None = _run("where the ranks of --gpu meet", unset="any that is free")
    seed: int = _run("random seed", 0)
    batch_size: int | None = _run(
        "pairs of a step over all ranks",
        unset="the schedule's, else one a rank",
        least=1,
    )
    num_workers: int | None = _run(
        "data-loading processes per rank", unset="up to 8 beside a GPU, else 0"
    )
    precision: str = _run(
        "number format inside the network", "fp32", choices=("fp32", "bf16")
    )
    ema: float | None = _run(
        "decay of a moving average of the weights, which is what is saved; of all "
        "phases",
        unset="the schedule's",
        metavar="DECAY",
    )
    compile: bool = _run(
        "torch.compile the network: minutes a stage, for each size of its samples",
        False,
    )
    checkpoint_activations: bool = _run(
        "compute activations again instead of keeping them: less memory, more time",
        False,
    )
    tensorboard: bool = _run(
        "curves and pictures for TensorBoard in <pyramid>/.train", False
    )
    redirect_stdout: bool = _run(
        "do not keep the log in <pyramid>/<checkpoint_name>.log",
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
                "to begin anew; name its stage, or leave one of them out"
            )
        if self.restart and ranks.restarts_allowed():
            raise UsageError(
                "--restart with torchrun --max_restarts: each restart of torchrun "
                "would begin the training anew; leave --max_restarts out, or begin "
                "anew by a first run with --restart and without it"
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UsageError(f"--max_minutes {self.max_minutes}: expected more than 0")
        if self.ema is not None:
            check_decay(self.ema, "--ema")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UsageError(
                "--tensorboard: the package tensorboard is not installed; get it with "
                "pip install tensorboard, or leave the flag out"
            )

    def check_paths(self) -> None:
        modules = find_modules(self.pyramid_path)
        select_stages(modules, self.train_stages, "--train_stages")
        load_schedule(self.train_mode, self.train_params_path)

    @property
    def trains(self) -> bool:
        """Whether any stage is to be trained; else fields are written alone."""
        return self.train_stages != []

    @property
    def fields_folder(self) -> Path:
        """Where the field sets are written."""
        return self.fields_path or self.dataset_path


@dataclass(frozen=True)
class WriteFieldsRequest(RunRequest):
    """What `metroem write-fields` is asked for."""

    stages: list[int] | None = _data(
        "stages to write the fields of; the first starts from the fields of the stage "
        "before",
        unset="all",
    )

    def check_paths(self) -> None:
        select_stages(find_modules(self.pyramid_path), self.stages, "--stages")

    def as_training(self) -> TrainRequest:
        """The training that writes these fields and trains no stage."""
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
