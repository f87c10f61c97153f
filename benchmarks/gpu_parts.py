"""What `gpu.py` times: each part of the work as a function without arguments."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from metroem.aligner import Aligner
from metroem.data.dataset import find_pairs
from metroem.data.epoch import EpochKey, TrainingEpoch
from metroem.data.sample import Sample, stack_samples
from metroem.field_loss import FieldLoss, FinetuneOptions
from metroem.field_search import Search
from metroem.grid import Grid
from metroem.io.h5 import ImageSetMeta, Pair, PairFrame, write_image_set
from metroem.loss import LossTerms
from metroem.masks import PairWeight
from metroem.recording import RecordedStep
from metroem.scaffold import init_pyramid
from metroem.specs.losses import LossSpec
from metroem.specs.schedule import Phase, load_schedule
from metroem.training.compiling import compile_network
from metroem.training.model import TrainingModel
from metroem.training.natural import with_natural_field
from metroem.training.objectives import phase_loss
from metroem.training.step import scores_of, train_step

Part = Callable[[], object]


class Kind(NamedTuple):
    """How a network is run."""

    precision: str  # "fp32" or "bf16"
    is_compiled: bool = False
    is_recorded: bool = False


NUM_FEATURES = 7
_MIP = 2


class Bench:
    """A fresh network and a batch on a device."""

    def __init__(self, folder: Path, device: torch.device, batch: int, size: int):
        """Make them.

        Args:
            folder: for a pyramid and an image set; may have been used before.
            device: where all of it is.
            batch: pairs of a step.
            size: of a side, px.
        """
        pyramid = folder / "pyramid"
        if not pyramid.exists():
            init_pyramid(pyramid, [_MIP])
            _write_pairs(folder, batch=16, size=size)
        (module,) = pyramid.iterdir()
        self.device, self.batch, self.size = device, batch, size
        self._model_folder = module / "model"
        self.aligner = self._fresh_aligner()
        self._compiled: dict[str, Aligner] = {}
        self.phase = Phase(
            lr=1e-4,
            num_epochs=1,
            smoothness=20.0,
            crop_size=size,
            losses=(LossSpec(type="plain"),),
        )
        # Pairs of the default schedule: the network's own field, too, is wanted.
        default = load_schedule("scratch", None).phases[_MIP][1]
        self.default_phase = replace(default, crop_size=size)
        self.pairs = find_pairs(folder, _MIP, stage=0, checkpoint_name="none")
        self.sample: Sample = self._load(self.phase).to(device)
        self.default_sample: Sample = self._load(self.default_phase).to(device)

    def _fresh_aligner(self) -> Aligner:
        torch.manual_seed(0)
        return Aligner(self._model_folder, operators="corrected").to(self.device)

    def _load(self, phase: Phase) -> Sample:
        key = EpochKey(0, 0, 0, 0)
        epoch = TrainingEpoch(self.pairs, phase, key, batch_size=self.batch)
        return stack_samples([epoch[i] for i in range(self.batch)])

    def load(self) -> Part:
        """Read, cut and stack a batch, and bring it to the device."""
        return lambda: self._load(self.phase).to(self.device)

    def load_default(self) -> Part:
        """The same for the default schedule, augmented as it says."""
        return lambda: self._load(self.default_phase).to(self.device)

    def bare_network(self, kind: Kind) -> Part:
        """Forward and backward pass of the network alone."""
        model = self._model(kind)

        def run() -> None:
            model.zero_grad(set_to_none=True)
            model(self.sample, ()).field.square().mean().backward()

        return run

    def train_step(self, kind: Kind) -> Part:
        """A whole step of training by plain loss: network, loss, checks, optimizer."""
        return self._step(kind, self.phase, self.sample)

    def default_step(self, kind: Kind) -> Part:
        """The same by the default schedule: with the network's own field, too."""
        return self._step(kind, self.default_phase, self.default_sample)

    def _step(self, kind: Kind, phase: Phase, given: Sample) -> Part:
        model = self._model(kind).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=phase.lr, fused=True)
        generator = torch.Generator().manual_seed(0)

        def batch() -> tuple[LossTerms, Tensor]:
            sample = with_natural_field(given, model, phase.known_warp)
            found = model(sample, ())
            terms = phase_loss(phase, sample, found, generator)
            return terms, scores_of(found, terms, None)

        clip = phase.max_grad_norm
        return lambda: train_step([batch], optimizer, stop=0, max_grad_norm=clip)

    def forward(self, kind: Kind) -> Part:
        """Forward pass of the network alone, without gradients."""
        model = self._model(kind)

        def run() -> None:
            with torch.no_grad():
                model(self.sample, ())

        return run

    def generate(self, *, finetune: bool) -> Part:
        """A field as it is written between stages, in float32."""
        options = self.aligner.options.updated({"finetune": finetune})
        return lambda: self.aligner.align(
            self.sample.src, self.sample.tgt, options=options
        )

    def search(self) -> tuple[Part, FieldLoss, Tensor]:
        """A step of the finetuner, its loss, and the field it starts from."""
        loss, start = field_loss(self.device, self.batch, self.size)
        search = Search(start, loss.options)
        step = RecordedStep(lambda: search.step(*loss.with_gradient(search.field)))
        return lambda: step(self.device), loss, start

    def search_by_torch(self) -> Part:
        """The same step, each operation of torch started by itself."""
        loss, start = field_loss(self.device, self.batch, self.size)
        search = Search(start, loss.options)

        def run() -> None:
            with (
                patch("metroem.field_loss.has_kernels", return_value=False),
                patch("metroem.field_search.has_kernels", return_value=False),
            ):
                search.step(*loss.with_gradient(search.field))

        return run

    def _model(self, kind: Kind) -> TrainingModel:
        """As `train.py` makes it, but that it need not be recorded."""
        aligner = self.aligner
        if kind.is_compiled:
            if kind.precision not in self._compiled:
                self._compiled[kind.precision] = self._fresh_aligner()
                compile_network(self._compiled[kind.precision])
            aligner = self._compiled[kind.precision]
        return TrainingModel(aligner, kind.precision, is_recorded=kind.is_recorded)


def field_loss(device: torch.device, batch: int, size: int) -> tuple[FieldLoss, Tensor]:
    """A loss of random features with masks, and a smooth field of some pixels."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, batch, NUM_FEATURES, size, size, generator=generator)
    start = 3 * torch.nn.functional.interpolate(
        torch.randn(batch, 2, 4, 4, generator=generator), (size, size), mode="bicubic"
    )
    weight = torch.ones(batch, 1, size, size)
    weight[..., size // 4 : size // 3, :] = 0
    pair = PairWeight(weight.to(device), weight.mT.contiguous().to(device))
    src, tgt = features.to(device)
    options = FinetuneOptions(l2=0.0, border=2)
    return FieldLoss((src, tgt), (pair, pair), options), start.to(device)


def bare_warp(loss: FieldLoss, start: Tensor) -> Part:
    """`F.grid_sample` of as many features, and its backward pass to the field."""
    size = start.shape[-1]
    src = torch.randn(len(start), NUM_FEATURES, size, size, device=start.device)
    theta = torch.eye(2, 3, device=start.device).expand(len(start), -1, -1)
    here = torch.nn.functional.affine_grid(theta, [len(start), 1, size, size], False)

    def run() -> None:
        leaf = start.clone().requires_grad_()
        grid = here + leaf.permute(0, 2, 3, 1) * (2 / size)
        warped = torch.nn.functional.grid_sample(src, grid, align_corners=False)
        torch.autograd.grad(warped, leaf, src)

    return run


def differences_from_cpu(bench: "Bench") -> dict[str, float]:
    """How far the device is from a CPU, as shares of the CPU's largest value.

    Returns:
        Of the network's field, of the finetuner's loss, and of its gradient.
    """
    sample = bench.sample
    images = sample.src[:1], sample.tgt[:1]
    there = bench.aligner.predict(*images).field.detach().cpu()
    bench.aligner.to("cpu")
    here = bench.aligner.predict(*(image.cpu() for image in images)).field.detach()
    bench.aligner.to(bench.device)
    loss, start = field_loss(bench.device, 1, bench.size)
    found = [value.cpu() for value in loss.with_gradient(start)]
    loss, start = field_loss(torch.device("cpu"), 1, bench.size)
    pairs = zip((here, *loss.with_gradient(start)), (there, *found), strict=True)
    shares = [float((a - b).abs().max() / a.abs().max()) for a, b in pairs]
    return dict(zip(("field", "loss", "gradient"), shares, strict=True))


def host_syncs(part: Part, device: torch.device) -> list[str] | None:
    """What in a part makes the host wait for the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    part()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            part()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [
        f"{Path(one.filename).name}:{one.lineno}"
        for one in caught
        if "synchroniz" in str(one.message)
    ]


def _write_pairs(folder: Path, *, batch: int, size: int) -> None:
    """An image set of noise, normalised."""
    rng = np.random.default_rng(0)
    sections = rng.normal(size=(batch + 1, size, size)).astype(np.float32)
    pairs = [Pair(sections[i + 1], sections[i]) for i in range(batch)]
    frames = [PairFrame(Grid(_MIP, 0, 0, size, size), (i + 1, i)) for i in range(batch)]
    meta = ImageSetMeta(frames, "noise", "", {}, normalization={"kind": "tissue"})
    write_image_set(folder / f"x0_y0_z0_MIP{_MIP}.h5", pairs, meta)
