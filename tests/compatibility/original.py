"""What the original computed, as `make_fixtures.py` wrote it down."""

from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "fixtures"


def arrays(name: str) -> dict[str, torch.Tensor]:
    """The arrays of one fixture, by name."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {
            key: torch.from_numpy(value)
            for key, value in file.items()
            if value.dtype.kind != "U"
        }


def text(name: str, key: str) -> str:
    """A text kept in a fixture."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return str(file[key])
