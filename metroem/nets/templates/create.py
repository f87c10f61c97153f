"""A module of a MetroEM pyramid, as modelhouse, corgie and train.py load it."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from metroem.aligner import Aligner

# So that a finetuned field follows the tissue and not its noise: with 3 held-out
# pairs were 1.55 mip-0 px off, with 0 1.84 (FIB-SEM of 10 nm, mip 2, 2026-11).
OPTIONS: dict[str, Any] = {"finetune_coarseness": 3}


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
