"""A module of a MetroEM pyramid, as modelhouse, corgie and train.py load it."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from metroem.aligner import Aligner

MIP = 0  # of the images; `metroem init` writes it here
# How fields are finetuned: measured up to mip 2, at about 10 nm (FIB-SEM, 2026-11).
_FINER = min(MIP, 2)
OPTIONS: dict[str, Any] = {
    "finetune_knots": tuple(px >> _FINER for px in (64, 32, 16)),
    "finetune_sm": 16.0 / 2**_FINER,
    "finetune_level": 1,
    "finetune_both_ways": True,
    "normalize": "raw",  # what is not normalised yet, as corgie hands it over
}


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
    options = OPTIONS | params
    return Module(Aligner(model_folder, operators="corrected", **options)).eval()
