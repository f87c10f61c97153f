"""A module of a MetroEM pyramid, as modelhouse, corgie and train.py load it."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from metroem.aligner import Aligner


class Module(nn.Module):
    """Holds the aligner where its users look for it."""

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, *images: Tensor, **given: Any) -> Any:
        """A torchfields field, pixels; see `metroem.aligner.Aligner.forward`."""
        return self.aligner(*images, **given)


def create(**params: Any) -> nn.Module:
    """The module with its weights; `params` are those of `Aligner`."""
    # modelhouse runs a copy of this directory and deletes it on return.
    model_folder = Path(__file__).resolve().parent / "model"
    return Module(Aligner(model_folder, operators="corrected", **params)).eval()
