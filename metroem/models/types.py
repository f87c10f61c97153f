"""Hold the results of a network and of an aligner for a pair."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from metroem.errors import PyramidError
from metroem.finetune.adam import FinetuneResult

State = dict[str, dict[str, dict[str, Tensor]]]  # of a network


def has_features(state: State, level: int) -> bool:
    """Whether a level has features, i.e. more than the channel of the image."""
    level_state = state["up"].get(str(level))
    return level_state is None or level_state["output"].shape[1] > 2


class Embedding(NamedTuple):
    """Features of a pair at one level; channel 0 is the image itself."""

    src: Tensor  # (B, C, H / 2**level, W / 2**level), rounded up
    tgt: Tensor  # of the same shape

    @classmethod
    def of(cls, state: State, shape: tuple[int, int], level: int) -> "Embedding":
        """Read the embeddings of a pair from a network's state.

        Args:
            state: state of the network; its features are src half, then tgt half.
            shape: (H, W) of the pair, unpadded.
            level: level of the features.

        Raises:
            PyramidError: the network does not have this level, or no features there.
        """
        up = state["up"]
        if str(level) not in up:
            raise PyramidError(
                f"features of level {level} are asked for (`finetune_level` of the "
                f"module's create.py); its network has levels {', '.join(up)}: name "
                "one of them"
            )
        output = up[str(level)]["output"]
        if not has_features(state, level):
            others = [key for key in up if has_features(state, int(key))]
            raise PyramidError(
                f"level {level} of the network gives the image alone, no features to "
                f"compare; levels with features: {', '.join(others) or 'none'}. Name "
                "one of them (`finetune_level` with `finetune_knots` in the module's "
                "create.py, `levels` of a metric loss), or do not finetune "
                "(finetune=False, --no_finetune)"
            )
        rows, cols = (-(-size // 2**level) for size in shape)
        return cls(*output[..., :rows, :cols].chunk(2, dim=1))


class Prediction(NamedTuple):
    """The result of a network for a pair."""

    field: Tensor  # (B, 2, H, W), pixels; the whole field, prior included
    embeddings: dict[int, Embedding]  # by level
    # The whole field of each level, (B, 2, >= H / 2**level, >= W / 2**level), pixels of
    # the level; empty if the network does not give it.
    coarse: dict[int, Tensor] = {}
    # Weight of each pixel of tgt in a comparison, (B, 1, H, W), 0 to 1; None if the
    # network does not learn it.
    confidence: Tensor | None = None

    @staticmethod
    def coarse_and_confidence(
        state: State, shape: tuple[int, int]
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Read both from a network's state.

        Args:
            state: state with "down", of a network that gives whole fields there.
            shape: (H, W) of the pair, unpadded.
        """
        coarse = {int(key): level["output"] for key, level in state["down"].items()}
        finest = min(coarse)
        confidence = state["down"][str(finest)]["trust"]
        confidence = F.interpolate(confidence, scale_factor=2**finest, mode="nearest")
        return coarse, confidence[..., : shape[0], : shape[1]]


class Alignment(NamedTuple):
    """The field of a pair, and the finetuner's result from src to tgt."""

    field: Tensor  # (B, 2, H, W), pixels
    # Taken before both directions are made to agree and blank pairs get their prior.
    finetuned: FinetuneResult | None


class ForwardBackward(NamedTuple):
    """Fields of both directions, each found without the other."""

    forward: Tensor  # (B, 2, H, W), pixels
    backward: Tensor | None  # (B, 2, H, W), pixels; None unless both ways are asked for
    tuned: FinetuneResult | None
    state: State


def or_zeros(prior: Tensor | None, image: Tensor) -> Tensor:
    """Give the prior field, (B, 2, H, W), or zeros if there is none."""
    if prior is None:
        return image.new_zeros(image.shape[0], 2, *image.shape[-2:])
    return prior
