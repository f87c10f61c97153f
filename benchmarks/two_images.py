r"""Measure how far `metroem align` reaches, and what its confidence is worth.

Sections of a stack must be aligned by the imaging itself (FIB-SEM), so that the truth
is exact. Pairs are neighbours, z and z - 1, away from those that the pyramid was
trained on. Three tables are printed:

- reach: src is shifted, turned, scaled, or gets another contrast. Median error, px,
  over the pixels of tgt that src shows, as `metroem align` finds it, and by the pyramid
  alone, without placing src first; "refused" where it writes nothing.
- confidence: by classes of it, the share of pixels, and of them the shares that are off
  by less than 2 and 4 px, over cases with known warps of the bench.
- refused: pairs that have nothing in common: sections of --other_stacks, and a section
  turned beside another part of the stack.

Example:
    python benchmarks/two_images.py --stack fib25_a.npy:50: --pyramid work/pyramid \
        --bench ../shared/bench --other_stacks vnc_stack1.npy atum_cortex_a.npy

The last line printed is a JSON object: all figures.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from quality_cases import load_bench
from scipy import ndimage

from metroem import Pyramid
from metroem.geometry import affine
from metroem.geometry.field import pixel_positions, warp
from metroem.geometry.grid import Grid
from metroem.stack.align_images import align_pair
from metroem.utils import cli

PARTS = ("reach", "confidence", "refused")
_BORDER_PX = 16
_CLASSES = (0.0, 0.2, 0.5, 0.8, 1.0)
_SHIFTS_PX, _TURNS = (8, 16, 32, 64, 128, 192), (2, 5, 10, 20, 45, 90, 180)
_SCALES = (0.8, 0.9, 0.95, 1.05, 1.1, 1.2)
_WARPS = [("A", 12), ("A", 60), ("B", 12), ("B", 30), ("B", 60)]
_WARPS += [("C", defect) for defect in ("fold", "crack", "stain", "blur")]


class Change(NamedTuple):
    """What is done to src: a map of its pixels, and another contrast."""

    name: str
    matrix: np.ndarray  # (2, 3) pull: pixels of the changed src -> pixels of src
    regrade: Callable[[np.ndarray], np.ndarray] = lambda image: image


def build_parser() -> argparse.ArgumentParser:
    """Define the flags."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--stack", required=True, help="FILE.npy[:FIRST:LAST], uint8 [z, rows, cols]")
    add("--pyramid", type=Path, required=True, help="a trained pyramid")
    add("--bench", type=Path, required=True, help="folder of the bench")
    add("--other_stacks", nargs="*", default=[], help="stacks of other tissue")
    parts = {"nargs": "+", "choices": PARTS, "default": PARTS}
    add("--parts", help="tables to print", **parts)
    add("--sections", nargs="+", type=int, default=[4, 10], help="tgt, in the stack")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print all tables."""
    args = build_parser().parse_args(argv)
    cases, _ = load_bench(args.bench)
    stack, _ = cases.load_stack(args.stack)
    pyramid = Pyramid.load(args.pyramid)
    figures: dict[str, Any] = {}
    if "reach" in args.parts:
        figures["reach"] = _measure_reach(pyramid, stack, args.sections)
    if "confidence" in args.parts:
        figures["confidence"] = _measure_confidence(
            pyramid, stack, args.sections, cases
        )
    if "refused" in args.parts:
        others = [cases.load_stack(path)[0] for path in args.other_stacks]
        figures["refused"] = _count_refused(pyramid, stack, others, args.sections)
    print(json.dumps(figures))


def _changes(shape: tuple[int, int]) -> Iterator[Change]:
    """List what is done to src."""
    middle = (np.array(shape[::-1], float) - 1) / 2

    def around(linear: np.ndarray) -> np.ndarray:
        return np.column_stack([linear, middle - linear @ middle])

    none = affine.identity()
    yield Change("none", none)
    for px in _SHIFTS_PX:
        matrix = none.copy()
        matrix[:, 2] = 0.8 * px, -0.6 * px
        yield Change(f"shift {px} px", matrix)
    for degrees in _TURNS:
        turn = np.deg2rad(degrees)
        linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        yield Change(f"turn {degrees} degrees", around(linear))
    for factor in _SCALES:
        yield Change(f"scale {factor}", around(np.eye(2) / factor))
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    yield Change("gamma 0.5", none, lambda image: image**0.5)
    yield Change("gamma 2", none, lambda image: image**2)
    yield Change("negative", none, lambda image: 1.01 - image)
    yield Change("half the contrast", none, lambda image: 0.25 + image / 2)
    yield Change("noise 0.1", none, lambda image: np.clip(image + noise / 10, 0.01, 1))
    yield Change("noise 0.2", none, lambda image: np.clip(image + noise / 5, 0.01, 1))
    yield Change("blur 2 px", none, lambda image: ndimage.gaussian_filter(image, 2.0))


def _measure_reach(
    pyramid: Pyramid, stack: Sequence[np.ndarray], sections: Sequence[int]
) -> dict[str, Any]:
    """Align changed neighbours; the median error of each change, px."""
    found = {}
    shape = stack[0].shape
    grid = Grid(0, 0, 0, *shape)
    print(f"{'reach: error, px':<22}{'align':>10}{'pyramid alone':>16}")
    for change in _changes(shape):
        truth = affine.as_field(affine.invert(change.matrix), grid)
        errors: list[list[float]] = [[], []]
        for z in sections:
            src = torch.from_numpy(change.regrade(stack[z - 1]))[None, None].float()
            field = affine.as_field(change.matrix, grid)
            is_inside = warp(torch.ones_like(src), field) > 0.999
            src = torch.where(is_inside, warp(src, field), 0.0)[0, 0].numpy()
            at = (pixel_positions(truth) + truth)[0].numpy()
            ends = np.array(shape[::-1]).reshape(2, 1, 1) - 1 - _BORDER_PX
            valid = ((at >= _BORDER_PX) & (at <= ends)).all(0)
            valid[:_BORDER_PX] = valid[-_BORDER_PX:] = False
            valid[:, :_BORDER_PX] = valid[:, -_BORDER_PX:] = False
            aligned = align_pair(src, stack[z], pyramid)
            fields = aligned and aligned.field, pyramid.align(src, stack[z])
            for kept, one in zip(errors, fields, strict=True):
                if one is not None:
                    off = np.hypot(*(one - truth[0].numpy()))
                    kept.append(float(np.median(off[valid])))
        row = [float(np.mean(kept)) if kept else None for kept in errors]
        found[change.name] = row
        words = ["refused" if value is None else f"{value:.2f}" for value in row]
        print(f"{change.name:<22}{words[0]:>10}{words[1]:>16}", flush=True)
    return found


def _measure_confidence(
    pyramid: Pyramid, stack: Sequence[np.ndarray], sections: Sequence[int], cases: Any
) -> dict[str, Any]:
    """Compare confidence with the true error, by families of the bench's cases."""
    kept: dict[str, list[np.ndarray]] = {}
    for family, label in _WARPS:
        for z in sections:
            case = cases.make_case(stack, family, label, z, 0)
            truth, valid, _ = case.truth()
            field, sure = pyramid.align(case.src, case.tgt, confidence=True)
            off = np.hypot(*(field - truth))
            kept.setdefault(family, []).append(np.stack([off[valid], sure[valid]]))
    found: dict[str, Any] = {}
    print(f"\n{'confidence':<14}{'pixels':>10}{'off < 2 px':>14}{'off < 4 px':>14}")
    for family, parts in kept.items():
        off, sure = np.concatenate(parts, 1)
        for low, high in zip(_CLASSES[:-1], _CLASSES[1:], strict=True):
            inside = (sure >= low) & ((sure < high) | (high == 1.0))
            if not inside.any():
                continue
            row = [inside.mean(), (off[inside] < 2).mean(), (off[inside] < 4).mean()]
            found[f"{family} {low}-{high}"] = [float(value) for value in row]
            words = "".join(f"{value:>14.3f}" for value in row)
            print(f"{family} {low:.1f}-{high:.1f}   {words}", flush=True)
    return found


def _count_refused(
    pyramid: Pyramid,
    stack: Sequence[np.ndarray],
    others: Sequence[Sequence[np.ndarray]],
    sections: Sequence[int],
) -> dict[str, int]:
    """Count pairs of unrelated images, and how many of them are refused."""
    rows, cols = (
        min(one[0].shape[axis] for one in (stack, *others)) for axis in (0, 1)
    )
    pairs = [(stack[z], np.rot90(stack[z - 4])) for z in sections]  # no such turn
    pairs = [(one, np.ascontiguousarray(other[::-1])) for one, other in pairs]
    for number, other in enumerate(others):
        pairs += [(stack[z], other[z]) for z in sections]
        for more in others[number + 1 :]:
            pairs += [(more[z], other[z]) for z in sections]
    refused = sum(
        align_pair(src[:rows, :cols], tgt[:rows, :cols], pyramid) is None
        for src, tgt in pairs
    )
    print(f"\nunrelated pairs: {len(pairs)}, refused: {refused}")
    return {"pairs": len(pairs), "refused": refused}


if __name__ == "__main__":
    cli.run(main)
