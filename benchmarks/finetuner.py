r"""The finetuner beside that of metroem 0.1.3, and beside the bare warp.

One iteration: a step of `optimize_pre_post_ups` on one pair of 512 px with 7 features
and masks, set-up excluded: a call with more steps less a call with fewer, per step that
is made (ours makes fewer than it is asked for). The bare warp
is `F.grid_sample` of the features and its backward pass to the field. `--whole`: the
whole call of `optimize_pre_post_ups` with 300 steps, both from the same start, and the
original's loss of what each gives, in float64, for each of some seeds.

Example:
    python benchmarks/finetuner.py
    python benchmarks/finetuner.py --whole --seeds 3
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import finetuner_pair
import numpy as np
import side_by_side
import torch
import torch.nn.functional as F
from original import Original
from torch import Tensor

from metroem import cli
from metroem.field_loss import FieldLoss, FinetuneOptions
from metroem.finetuner import optimize_pre_post_ups
from metroem.masks import PairMaps, PairWeight, weigh
from metroem.specs.schedule import parse_mask_rules

FEW, MANY = 3, 9


def bare_warp(pair: dict[str, Tensor]) -> None:
    """Sample the features of src once, and the slopes by the field."""
    src, field = pair["src"], pair["initial_res"]
    size = src.shape[-1]
    with torch.no_grad():
        here = F.affine_grid(torch.eye(2, 3)[None], [1, 1, size, size], False)
    leaf = field.clone().requires_grad_()
    grid = here + leaf.permute(0, 2, 3, 1) * (2 / size)
    warped = F.grid_sample(src, grid, align_corners=False)
    torch.autograd.grad(warped, leaf, pair["tgt"])


def ours(pair: dict[str, Tensor], num_iter: int) -> tuple[float, Tensor]:
    """Seconds of a call, and the field that it gives."""
    given: Any = {name: value.clone() for name, value in pair.items()}
    start = time.perf_counter()
    field = optimize_pre_post_ups(**given, **finetuner_pair.CALL, num_iter=num_iter)
    return time.perf_counter() - start, field.as_subclass(Tensor)


def loss_of(pair: dict[str, Tensor], field: Tensor) -> float:
    """What the original minimises, of one field, in float64."""
    maps = PairMaps(
        *(torch.where(pair[f"{side}_zeros"], 0.0, 1.0) for side in ("src", "tgt")),
        *(pair[f"{side}_defects"][None] != 0 for side in ("src", "tgt")),
    )
    similarity, smoothness = (
        weigh(parse_mask_rules(finetuner_pair.RULES[key], key), maps)
        for key in ("mse_keys_to_apply", "sm_keys_to_apply")
    )
    weights = (
        PairWeight(similarity.src.double(), similarity.tgt.double()),
        PairWeight(smoothness.src.double(), smoothness.tgt.double()),
    )
    options = FinetuneOptions(
        smoothness=finetuner_pair.CALL["sm"], border=finetuner_pair.CALL["crop"], l2=0.0
    )
    features = pair["src"].double(), pair["tgt"].double()
    loss = FieldLoss(features, weights, options)
    return float(loss.with_gradient(field.double())[0])


def time_iterations(args: Any, folder: Path) -> None:
    pair = finetuner_pair.make_pair(0, args.size)
    settings = original_settings(pair, args, folder, [FEW, MANY])
    per_step: dict[str, list[float]] = {"original": [], "ours": [], "bare_warp": []}
    with Original("finetuner_original.py", settings) as original:
        for _ in range(args.rounds + 1):
            few, many = original()["seconds"]
            per_step["original"].append((many - few) / (MANY - FEW))
            # Ours are many more, since they take so much less.
            asked = [10 * n for n in (FEW, MANY)]
            few, many = (ours(pair, num_iter)[0] for num_iter in asked)
            made = [FinetuneOptions(num_iter=n).num_steps for n in asked]
            per_step["ours"].append((many - few) / (made[1] - made[0]))
            start = time.perf_counter()
            for _ in range(MANY):
                bare_warp(pair)
            per_step["bare_warp"].append((time.perf_counter() - start) / MANY)
    seconds = {n: statistics.median(times[1:]) for n, times in per_step.items()}
    figures = {
        "original_per_ours": seconds["original"] / seconds["ours"],
        "ours_per_bare_warp": seconds["ours"] / seconds["bare_warp"],
    }
    side_by_side.report(seconds, figures)


def time_whole(args: Any, folder: Path) -> None:
    found: dict[str, list[float]] = {"loss_ratio": [], "original_per_ours": []}
    seconds: dict[str, list[float]] = {"original": [], "ours": []}
    for seed in range(args.seeds):
        pair = finetuner_pair.make_pair(seed, args.size)
        settings = original_settings(pair, args, folder, [args.num_iter])
        with Original("finetuner_original.py", settings) as original:
            theirs = original()["seconds"][0]
        times, field = zip(*(ours(pair, args.num_iter) for _ in range(3)), strict=True)
        mine = statistics.median(times)
        losses = [
            loss_of(pair, one)
            for one in (
                pair["initial_res"],
                torch.from_numpy(np.load(settings["field"])),
                field[0],
            )
        ]
        print(
            f"seed {seed}: loss {losses[0]:.5f}; original {losses[1]:.5f} in "
            f"{theirs:.1f} s; ours {losses[2]:.5f} in {mine:.2f} s"
        )
        seconds["original"].append(theirs)
        seconds["ours"].append(mine)
        found["loss_ratio"].append(losses[2] / losses[1])
        found["original_per_ours"].append(theirs / mine)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    figures = {
        "original_per_ours": statistics.median(found["original_per_ours"]),
        "largest_loss_ratio": max(found["loss_ratio"]),
        **{f"each_{name}": values for name, values in found.items()},
    }
    side_by_side.report(medians, figures)


def original_settings(
    pair: dict[str, Tensor], args: Any, folder: Path, num_iter: list[int]
) -> dict[str, Any]:
    """Settings of the task of the original; the pair is written for it."""
    path = folder / "pair.npz"
    np.savez(path, **{name: value.numpy() for name, value in pair.items()})
    return {
        "threads": args.threads,
        "pair": str(path),
        "call": finetuner_pair.CALL,
        "num_iter": num_iter,
        "field": str(folder / "field.npy"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--size", type=int, default=512, help="of the pair, px (512)")
    parser.add_argument("--whole", action="store_true", help="time whole calls")
    parser.add_argument("--num_iter", type=int, default=300, help="with --whole (300)")
    parser.add_argument("--seeds", type=int, default=3, help="with --whole (3)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        (time_whole if args.whole else time_iterations)(args, Path(folder))


if __name__ == "__main__":
    cli.run(main)
