"""Write metrics and pictures of a training for TensorBoard.

Each stage is a run of its own, so TensorBoard draws their curves in one plot. The step
is the number of finished epochs of the stage.
"""

from pathlib import Path
from typing import Any

from metroem.geometry.field import warp
from metroem.io.pictures import color_field, overlay
from metroem.training.validate import EpochReport, HeldOut


class TensorBoardWriter:
    """Writes epoch reports.

    Args:
        folder: of the runs, stage_0, stage_1 and so on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[int, Any] = {}

    def __enter__(self) -> "TensorBoardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def write(self, report: EpochReport) -> None:
        """Write the metrics, and pictures of a held-out pair before and after."""
        writer = self._writer(report)
        for name, metrics in (
            ("training", report.training),
            ("validation", report.validation),
        ):
            for key, value in metrics.as_json().items() if metrics else ():
                if value is not None:
                    writer.add_scalar(f"{key}/{name}", value, report.epochs)
        if report.held_out is not None:
            for name, picture in _pictures(report.held_out).items():
                tag = f"held out/{name}"
                writer.add_image(tag, picture, report.epochs, dataformats="HWC")
        writer.flush()

    def _writer(self, report: EpochReport) -> Any:
        """The stage's writer; a resumed run purges the steps that it will repeat."""
        if report.stage not in self._writers:
            # An optional package, so it is imported only when it is needed.
            from torch.utils.tensorboard import SummaryWriter

            self._writers[report.stage] = SummaryWriter(
                str(self._folder / f"stage_{report.stage}"), purge_step=report.epochs
            )
        return self._writers[report.stage]


def _pictures(held_out: HeldOut) -> dict[str, Any]:
    """Draw src (red) over tgt (cyan) before and after, and the field's colours.

    Each picture is (H, W, 3) uint8, rows along y.
    """
    sample, field = held_out
    src, tgt, warped = (
        image[0, 0].float().cpu().numpy()
        for image in (sample.src, sample.tgt, warp(sample.src, field))
    )
    colors = {
        "before": overlay(src, tgt),
        "after": overlay(warped, tgt),
        "field": color_field(field[0].float().cpu().numpy()),
    }
    return {name: picture.swapaxes(0, 1) for name, picture in colors.items()}
