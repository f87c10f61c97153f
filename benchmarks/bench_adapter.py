"""Offer a pyramid as methods of the bench: align(src, tgt) -> field, on one thread.

src and tgt are (H, W) float32, 0 = no data; the field is (2, H, W) float32, pull,
px, channel 0 along cols. Each function is one method. `pyramid` is the path of a
pyramid with weights named "checkpoint".

Example:
    python run.py --adapter bench_adapter.py:align --adapter-params '{"pyramid": "p"}'
"""

from dataclasses import replace
from functools import cache

import numpy as np
import torch

from metroem import Pyramid


def align(src: np.ndarray, tgt: np.ndarray, pyramid: str) -> np.ndarray:
    """Align by all stages, each finetuned on the pair."""
    return load(pyramid).align(src, tgt)


def networks(src: np.ndarray, tgt: np.ndarray, pyramid: str) -> np.ndarray:
    """Align by all stages, without finetuning."""
    return load(pyramid).align(src, tgt, finetune=False)


def first_stage(src: np.ndarray, tgt: np.ndarray, pyramid: str) -> np.ndarray:
    """Align by stage 0 alone, without finetuning."""
    whole = load(pyramid)
    first = replace(whole, mips=whole.mips[:1], aligners=whole.aligners[:1])
    return first.align(src, tgt, finetune=False)


def untrained(src: np.ndarray, tgt: np.ndarray, pyramid: str) -> np.ndarray:
    """Align by all stages with fresh weights, each finetuned on the pair."""
    return fresh(pyramid).align(src, tgt)


def finetuned_for(
    src: np.ndarray, tgt: np.ndarray, pyramid: str, steps: int
) -> np.ndarray:
    """Align by all stages, each finetuned by at most `steps` steps; 0: none."""
    whole = load(pyramid)
    if steps == 0:
        return networks(src, tgt, pyramid)
    original = [aligner.options for aligner in whole.aligners]
    try:
        for aligner, options in zip(whole.aligners, original, strict=True):
            limit = min(steps, options.finetune_iter)
            aligner.options = replace(options, finetune_iter=limit)
        return whole.align(src, tgt)
    finally:
        for aligner, options in zip(whole.aligners, original, strict=True):
            aligner.options = options


@cache
def fresh(pyramid: str) -> Pyramid:
    """Load the pyramid untrained, always with the same fresh weights."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Pyramid.load(pyramid, None)


@cache
def load(pyramid: str) -> Pyramid:
    """Load the pyramid once, and limit torch to one thread."""
    torch.set_num_threads(1)
    return Pyramid.load(pyramid)
