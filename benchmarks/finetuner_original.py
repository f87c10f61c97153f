"""Task of metroem 0.1.3: finetune a pair so often (see `original.py`)."""

import time
from typing import Any

import numpy as np
import original_worker
import torch

from metroem.finetuner import optimize_pre_post_ups


def prepare(settings: dict[str, Any]) -> original_worker.Task:
    """Finetune once for each number of "num_iter".

    The settings: "pair", a .npz file of tensors by the names of the arguments;
    "call", the other arguments; "field", a .npy file for the field found last.
    """
    with np.load(settings["pair"]) as file:
        pair = {name: torch.from_numpy(value) for name, value in file.items()}

    def task() -> dict[str, Any]:
        seconds = []
        for num_iter in settings["num_iter"]:
            given = {name: value.clone() for name, value in pair.items()}
            start = time.perf_counter()
            field = optimize_pre_post_ups(
                **given, **settings["call"], num_iter=num_iter
            )
            seconds.append(time.perf_counter() - start)
        np.save(settings["field"], field.detach().as_subclass(torch.Tensor).numpy())
        return {"seconds": seconds}

    return task


if __name__ == "__main__":
    original_worker.serve(prepare)
