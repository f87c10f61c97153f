"""Read from the environment which rank of a run this process is; without torch."""

import os


def is_launched() -> bool:
    """Whether this process was started as one rank of a run, as torchrun does.

    Cluster schedulers set RANK=0 and WORLD_SIZE=1 also for single processes.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False
    return "LOCAL_RANK" in os.environ or os.environ["WORLD_SIZE"] != "1"


def rank() -> int:
    """Rank of this process among all processes of the run; 0 without torchrun."""
    return int(os.environ["RANK"]) if is_launched() else 0


def world_size() -> int:
    """Number of processes of the run; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def ranks_of_machine() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restarts_allowed() -> int:
    """How often torchrun may restart the ranks after one has failed."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
