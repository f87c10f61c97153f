"""A training step of metroem 0.1.3, for `train_step_against_original.py`.

Its own loop, `aligner_train_loop`, with one pair that is in memory already.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from original_worker import Task, serve  # before metroem

# isort: split
import numpy as np
import torch
from metroem.alignment import aligner_train_loop

from metroem.aligner import Aligner
from metroem.loss import multilevel_metric_loss, unsupervised_loss


def prepare(settings: dict[str, Any]) -> Task:
    """Load the module and the pair that the settings name."""
    with contextlib.redirect_stdout(None):
        aligner = Aligner(settings["model"], True, "checkpoint", finetune=False)
    phase = json.loads(Path(settings["phase"]).read_text())
    losses: list[float] = []

    loss = unsupervised_loss(
        phase["smoothness"],
        use_defect_mask=True,
        sm_keys_to_apply=phase["sm_keys_to_apply"],
        mse_keys_to_apply=phase["mse_keys_to_apply"],
    )
    if phase["loss_spec"]["type"] == "metric":
        loss = multilevel_metric_loss(
            loss_fn=loss, mip_in=0, **phase["loss_spec"]["params"]
        )

    def noted(bundle: dict[str, Any]) -> dict[str, Any]:
        terms = loss(bundle)
        losses.append(float(terms["result"]))
        return terms

    optimizer = torch.optim.Adam(aligner.parameters(), lr=phase["lr"], weight_decay=0)
    bundles = [bundle_of(*np.load(settings["images"]))]

    def step() -> dict[str, Any]:
        if settings["bare"]:
            return bare_step(aligner, bundles[0])
        # Rank 1: rank 0 would validate, too.
        aligner_train_loop(
            1, aligner, 0, bundles, None, optimizer, num_epochs=1, loss_fn=noted
        )
        return {"loss": losses[-1]}

    return step


def bundle_of(src: np.ndarray, tgt: np.ndarray) -> dict[str, torch.Tensor]:
    """A batch of one (H, W) pair as its loader makes it."""
    src, tgt = torch.from_numpy(src)[None], torch.from_numpy(tgt)[None]
    zeros = {"src_zeros": src == 0, "tgt_zeros": tgt == 0}
    return {"src": src, "tgt": tgt, "id": torch.tensor([0]), **zeros}


def bare_step(aligner: Aligner, bundle: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Forward and backward of its network alone."""
    aligner.zero_grad()
    images = torch.stack((bundle["src"], bundle["tgt"]), 1)
    loss = aligner.net(x=images).square().mean()
    loss.backward()
    return {"loss": float(loss)}


if __name__ == "__main__":
    serve(prepare)
