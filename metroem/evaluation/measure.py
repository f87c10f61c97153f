"""Align one pair, or take its kept fields; then score and draw it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from metroem.data.dataset import PairRef, read_sample
from metroem.data.known_warp import Warped, warp_section
from metroem.data.photometric import augment_photometric
from metroem.data.sample import Sample, seeded_generator, with_defects
from metroem.evaluation.plan import Location, Task
from metroem.evaluation.predictions import (
    Fields,
    load_fields,
    prediction_key,
    put_fields,
)
from metroem.evaluation.report.pair_pictures import Drawn, draw_pair
from metroem.evaluation.scores import (
    NO_WARP_SCORE,
    RING_FRACTION,
    AlignedPair,
    Chunk,
    Spot,
    WarpedSection,
    Where,
    can_be_compared,
    score_aligned,
    score_known,
)
from metroem.geometry.field import resample_field
from metroem.io.h5 import ImageSet
from metroem.io.resume import ResumeStore
from metroem.pyramid import Pyramid, StageInput
from metroem.specs.augmentations import KnownWarp, Photometric
from metroem.synthetic.distortion import GroundTruth

# The known warps, and the new noise and contrast that each side gets.
_WARP, _IMAGING = KnownWarp(), Photometric()
_SEED = 0  # of the weights of untrained networks: the same in all processes


class Measured(NamedTuple):
    """The figures of a task, and its pictures."""

    figures: AlignedPair | WarpedSection
    drawn: Drawn | None  # None without a page


@dataclass(frozen=True)
class Measurer:
    """Does the tasks of one evaluation; each process has its own.

    Attributes:
        pyramid_path: directory of the pyramid.
        checkpoint_name: of the weights; None for untrained networks.
        num_stages: how many stages are run.
        device: of the networks.
        finetune: whether each stage improves its field on the pair itself.
        locations: the image sets that tasks refer to.
        store: keeps the fields.
        draws: whether there is a page to draw for.
    """

    pyramid_path: Path
    checkpoint_name: str | None
    num_stages: int
    device: torch.device
    finetune: bool
    locations: list[Location]
    store: ResumeStore
    draws: bool

    @cached_property
    def pyramid(self) -> Pyramid:
        """The networks, loaded when the first pair needs them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return Pyramid.load(
                self.pyramid_path, self.checkpoint_name, self.device, self.num_stages
            )

    def run(self, task: Task) -> Measured:
        """Do a task: fields that are not kept are found and kept first."""
        location = self.locations[task.location]
        key = prediction_key(location, task)
        fields = load_fields(self.store, key, location, task)
        run = self._run_section if task.is_known else self._run_pair
        return run(location, task, key, fields)

    def _run_pair(
        self, location: Location, task: Task, key: str, fields: Fields | None
    ) -> Measured:
        inputs = []
        for images in location.sets:
            grid = images.grid(task.index)
            sample = read_sample(PairRef(images, None, task.index), grid)
            inputs.append(StageInput(sample, grid))
        if fields is None:
            forward, backward = self.pyramid.run_both_ways(inputs, self.finetune)
            fields = Fields([f.cpu() for f in forward], backward[-1].cpu())
            put_fields(self.store, key, fields)
        sample = with_defects(inputs[-1].sample)
        score, worst = score_aligned(sample, fields.forward[-1], fields.backward)
        sections = location.finest.sections(task.index)
        where = _where(location.finest, task.index, sections, worst)
        drawn = None
        if self.draws:
            on_finest = [
                resample_field(field, stage.grid, inputs[-1].grid)
                for field, stage in zip(fields.forward, inputs, strict=True)
            ]
            drawn = draw_pair(sample, on_finest)
        return Measured(AlignedPair(where, score, task.role), drawn)

    def _run_section(
        self, location: Location, task: Task, key: str, fields: Fields | None
    ) -> Measured:
        """Align a tgt section with itself: warped by a known field, and unchanged.

        With the known field, both sides get new noise and contrast. Coarser stages see
        the section averaged to their mips, not the image sets of those mips.
        """
        images = location.finest
        section = torch.from_numpy(images.read(task.index).tgt)[None, None]
        z = images.sections(task.index)[1]
        warped, sample = _warp_section(images, section, z)
        if fields is None:
            field, identity = (
                torch.from_numpy(
                    self.pyramid.fields(
                        a[0, 0].numpy(), b[0, 0].numpy(), images.mip, self.finetune
                    )[-1]
                )[None]
                for a, b in ((sample.src, sample.tgt), (section, section))
            )
            fields = Fields([field], identity)
            put_fields(self.store, key, fields)
        truth = GroundTruth(warped.field, warped.valid)
        score, worst = NO_WARP_SCORE, None
        on_itself = Sample(section, section, None, ())
        if can_be_compared(on_itself, min_fraction=RING_FRACTION):  # EPE is per pixel
            score, worst = score_known(
                fields.forward[0], truth, warped.near, fields.backward
            )
        where = _where(images, task.index, (z, z), worst)
        drawn = draw_pair(with_defects(sample), fields.forward) if self.draws else None
        return Measured(WarpedSection(where, score, task.role), drawn)


def _warp_section(
    images: ImageSet, section: torch.Tensor, z: int
) -> tuple[Warped, Sample]:
    """Warp a section by a field that depends on where it lies; give both new noise."""
    name = images.name
    generator = seeded_generator(name.x, name.y, z, images.mip)
    warped = warp_section(section, _WARP, generator)
    src = augment_photometric(warped.image, _IMAGING, generator)
    tgt = augment_photometric(section, _IMAGING, generator)
    return warped, Sample(src, tgt, None, ())


def _where(
    images: ImageSet, index: int, sections: tuple[int, int], worst: Chunk | None
) -> Where:
    """Name the pair, and place its worst chunk in the volume, where tgt was read."""
    spot = None
    if worst is not None:
        x, y, *_ = images.box(index, 1)
        scale = 2**images.mip
        spot = Spot(worst.figure, x + worst.row * scale, y + worst.col * scale)
    return Where(images.path.name, index, *sections, spot)
