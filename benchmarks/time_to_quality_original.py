"""Training of metroem 0.1.3 for `time_to_quality.py`, some seconds at a time.

Its own loop and its `scratch` schedule of mip 3: 100 epochs of the plain loss, then
the metric one.
"""

import contextlib
import time
from typing import Any

from original_worker import Task, serve  # before metroem

# isort: split
import numpy as np
import torch
from metroem.alignment import aligner_train_loop
from train_step_original import bundle_of

from metroem.aligner import Aligner
from metroem.loss import multilevel_metric_loss, unsupervised_loss

SMOOTHNESS, RATE, PLAIN_EPOCHS = 15, 3e-5, 100
_ZERO = {"binarization": {"strat": "eq", "value": 0}}
MASKS = {
    "mse_keys_to_apply": {
        side: [{"name": f"{side}_zeros", **_ZERO}] for side in ("src", "tgt")
    },
    "sm_keys_to_apply": {"src": [{"name": "src_zeros", "mask_value": 1e-5, **_ZERO}]},
}


def prepare(settings: dict[str, Any]) -> Task:
    """Load the module and the pairs that the settings name."""
    with contextlib.redirect_stdout(None):
        aligner = Aligner(settings["model"], True, "checkpoint", finetune=False)
    bundles = [bundle_of(*pair) for pair in np.load(settings["train"])]
    scored = [bundle_of(*pair) for pair in np.load(settings["scored"])]
    plain = unsupervised_loss(SMOOTHNESS, use_defect_mask=True, **MASKS)
    metric = multilevel_metric_loss(
        [0], 0, plain, pre_align_sample=32, pre_align_weight=0.7
    )
    steps = 0
    optimizer = torch.optim.Adam(aligner.parameters(), lr=RATE, weight_decay=0)

    def train() -> dict[str, Any]:
        nonlocal steps, optimizer
        started = time.perf_counter()
        while time.perf_counter() - started < settings["seconds"]:
            num_plain = PLAIN_EPOCHS * len(bundles)
            if steps == num_plain:  # each phase begins with a new one
                optimizer = torch.optim.Adam(aligner.parameters(), lr=RATE)
            loss = plain if steps < num_plain else metric
            one = [bundles[steps % len(bundles)]]
            # Rank 1: rank 0 would validate, too.
            aligner_train_loop(
                1, aligner, 0, one, None, optimizer, num_epochs=1, loss_fn=loss
            )
            steps += 1
        seconds = time.perf_counter() - started
        fields = [
            aligner(bundle["src"][None], bundle["tgt"][None], train=False)
            for bundle in scored
        ]
        plain_fields = [field.as_subclass(torch.Tensor).numpy() for field in fields]
        np.save(settings["fields"], np.concatenate(plain_fields))
        return {"seconds": seconds, "steps": steps}

    return train


if __name__ == "__main__":
    serve(prepare)
