"""How a task of metroem 0.1.3 talks to the benchmark that started it.

For scripts that `original.py` runs in the environment of the original; they import
this module before metroem, since it makes metroem work on a CPU.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

# The original asks for CUDA types even where it has no use for them.
torch.cuda.FloatTensor = torch.FloatTensor  # type: ignore[attr-defined, misc]

Task = Callable[[], dict[str, Any]]


def serve(prepare: Callable[[dict[str, Any]], Task]) -> None:
    """Prepare a task, then run it once for each line on standard input.

    The answers go to standard output, a line of JSON each; what the original prints
    goes to standard error.

    Args:
        prepare: makes the task from the settings of the command line; "threads" is
            the number of torch's threads.
    """
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        settings = json.loads(sys.argv[1])
        torch.set_num_threads(settings["threads"])
        task = prepare(settings)
        answers.write("{}\n")
        for _ in sys.stdin:
            answers.write(json.dumps(task()) + "\n")
