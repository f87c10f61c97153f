"""What a network, and an aligner, make of a pair."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from metroem.errors import PyramidError
from metroem.finetune.adam import FinetuneResult

State = dict[str, dict[str, dict[str, Tensor]]]  # of a network


def has_features(state: State, level: int) -> bool:
    """Whether a level gives src and tgt more than a channel each, the image's."""
    level_state = state["up"].get(str(level))
    return level_state is None or level_state["output"].shape[1] > 2


class Embedding(NamedTuple):
    """Features of a pair at one level; channel 0 is the image itself."""

    src: Tensor  # (B, C, H / 2**level, W / 2**level), rounded up
    tgt: Tensor  # likewise

    @classmethod
    def of(cls, state: State, shape: tuple[int, int], level: int) -> "Embedding":
        """The features of both, which lie one after the other in the channels.

        Args:
            state: of the network.
            shape: (H, W) of the pair, unpadded.
            level: of the features.

        Raises:
            PyramidError: the network has no such level, or no features there.
        """
        up = state["up"]
        if str(level) not in up:
            raise PyramidError(
                f"features of level {level} are wanted (`finetune_level` of the "
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
    """What the network makes of a pair."""

    field: Tensor  # (B, 2, H, W), pixels; the whole field, prior included
    embeddings: dict[int, Embedding]  # by level
    # The whole field by level, (B, 2, >= H / 2**level, >= W / 2**level), pixels of
    # the level, of networks that leave it there; else empty.
    coarse: dict[int, Tensor] = {}
    # What a pixel of tgt is worth in a comparison, (B, 1, H, W), 0 to 1, of networks
    # that have learned it.
    trust: Tensor | None = None

    @staticmethod
    def coarse_and_trust(
        state: State, shape: tuple[int, int]
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Both, as a network's state has them.

        Args:
            state: with "down", of a network that leaves whole fields there.
            shape: (H, W) of the pair, unpadded.
        """
        coarse = {int(key): level["output"] for key, level in state["down"].items()}
        finest = min(coarse)
        trust = state["down"][str(finest)]["trust"]
        trust = F.interpolate(trust, scale_factor=2**finest, mode="nearest")
        return coarse, trust[..., : shape[0], : shape[1]]


class Alignment(NamedTuple):
    """The field of a pair, and what the finetuner gained from src to tgt alone."""

    field: Tensor  # (B, 2, H, W), pixels
    finetuned: (
        FinetuneResult | None
    )  # before both ways agree and blank pairs are restored


class ForwardBackward(NamedTuple):
    """What the search of each direction gave by itself."""

    forward: Tensor  # (B, 2, H, W), pixels
    backward: Tensor | None  # likewise, where both ways are wanted
    tuned: FinetuneResult | None
    state: State


def or_zeros(prior: Tensor | None, image: Tensor) -> Tensor:
    """The prior field, (B, 2, H, W), or that of no displacement."""
    if prior is None:
        return image.new_zeros(image.shape[0], 2, *image.shape[-2:])
    return prior
