"""One module at work: a network and a prior field in, a field out.

`Aligner` is what a module's `create.py` makes. `predict` and `align` take and
give plain tensors, (B, C, H, W), any H and W. `forward` is the boundary to
corgie and to other code written for the original: keyword arguments of many
forms in, a torchfields `Field` out.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metroem.errors import FieldError, UsageError
from metroem.finetune.adam import FinetuneResult
from metroem.geometry.field import compose, fill_not_finite, invert, warp
from metroem.geometry.regularize import make_inverse_consistent, remove_folds
from metroem.geometry.torchfields import as_bchw, as_torchfields
from metroem.imaging.masks import has_tissue
from metroem.imaging.normalize import finite_or_no_data, normalize_if_raw
from metroem.models.build import (
    build_net,
    padding,
    size_divisor,
    stock_operators_at_work,
)
from metroem.models.finetuning import Defects, find_pair_masks, finetune
from metroem.models.options import AlignerOptions
from metroem.models.tiling import predict_tiled
from metroem.models.types import (
    Alignment,
    Embedding,
    ForwardBackward,
    Prediction,
    State,
    has_features,
    or_zeros,
)
from metroem.models.weights import checkpoint_path, load_weights, save_weights

logger = logging.getLogger(__name__)


class Aligner(nn.Module):
    """The network of one module and how it is applied.

    Attributes:
        net: the network.
        model_folder: holds `model_spec.json` and the checkpoints. modelhouse
            loads a copy, so this may be gone once the module is loaded.
        checkpoint_name: of the weights, also of those that `save_checkpoint` writes.
        pass_field: whether the network gets the prior field (True), or an src
            already warped by it (False).
        operators: "corrected" or "stock", see `metroem.models.build`.
        options: see `AlignerOptions`.
    """

    def __init__(
        self,
        model_folder: str | Path,
        pass_field: bool = True,
        checkpoint_name: str | None = "checkpoint",
        *,
        operators: str = "stock",
        **options: Any,
    ) -> None:
        """Build the network and load its weights.

        Weights that are not there are fresh ones, with a warning: corgie and others
        build modules that way, to train them or by mistake.

        Args:
            model_folder: folder of `model_spec.json`.
            pass_field: see above.
            checkpoint_name: weights are `<checkpoint_name>.state.pth.tar`; None:
                fresh weights, to be saved as "checkpoint".
            operators: "corrected" or "stock".
            **options: any of `AlignerOptions`. Modules of the original, which have
                stock operators, are finetuned unless `finetune` says otherwise, as
                by metroem 0.1.2 and 0.1.3.

        Raises:
            UsageError: an option that is not known, or cannot be.
            PyramidError: the spec is missing or cannot be built.
            CheckpointError: weights that do not fit the network.
        """
        super().__init__()
        self.model_folder = Path(model_folder)
        self.checkpoint_name = checkpoint_name or "checkpoint"
        self.pass_field = pass_field
        self.operators = operators
        defaults = AlignerOptions(finetune=operators == "stock")
        try:
            self.options = defaults.with_all(options)
        except UsageError as error:
            raise UsageError(f"{self.model_folder}: {error}") from None
        if defaults.finetune and options.get("finetune") is None:
            logger.info("fields are finetuned, as by the original: none said otherwise")
        spec_path = self.model_folder / "model_spec.json"
        # float32, whatever torch's default is.
        self.net: Any = build_net(spec_path, operators=operators).float()
        self.net.name = self.checkpoint_name
        self._multiple = size_divisor(self.net, spec_path)
        path = checkpoint_path(self.model_folder, self.checkpoint_name)
        loaded = checkpoint_name is not None and self.load_checkpoint(path.parent)
        weights = f"weights of {path.name}" if loaded else "fresh weights"
        logger.info("%s operators, %s", operators, weights)
        if checkpoint_name is not None and not loaded:
            logger.warning(
                "%s: not there, so the network is UNTRAINED and its fields are worth "
                "nothing; give the checkpoint_name of weights that are there",
                path,
            )

    def predict(
        self,
        src: Tensor,
        tgt: Tensor,
        prior: Tensor | None = None,
        *,
        levels: tuple[int, ...] = (0,),
    ) -> Prediction:
        """The network's field and embeddings; gradients flow if enabled.

        Args:
            src: (B, 1, H, W), normalised, 0 = no data.
            tgt: (B, 1, H, W).
            prior: field of the stage before, (B, 2, H, W), pixels of src.
            levels: levels of the embeddings wanted.

        Returns:
            The whole field, prior included, and embeddings of src and tgt,
            neither of them warped.
        """
        return self._predict(src, tgt, prior, levels)[0]

    def align(
        self,
        src: Tensor,
        tgt: Tensor,
        prior: Tensor | None = None,
        *,
        options: AlignerOptions | None = None,
        defects: Defects = (None, None),
    ) -> Tensor:
        """The field of `align_pair` alone."""
        return self.align_pair(src, tgt, prior, options=options, defects=defects).field

    def align_pair(
        self,
        src: Tensor,
        tgt: Tensor,
        prior: Tensor | None = None,
        *,
        options: AlignerOptions | None = None,
        defects: Defects = (None, None),
    ) -> Alignment:
        """Align src to tgt, finetuned if the options say so; no gradients.

        Args:
            src: (B, 1, H, W), normalised, 0 = no data.
            tgt: (B, 1, H, W).
            prior: field of the stage before, (B, 2, H, W), pixels of src.
            options: the module's own if None.
            defects: masks of src and tgt, (B, 1, H, W) bool, True on defects;
                for the finetuner, which finds its own where they are None.

        Returns:
            (B, 2, H, W), pixels; the prior (or zeros) for a pair of which
            one side is blank.
        """
        options = options or self.options
        with _no_inference_mode():
            images = finite_or_no_data(src), finite_or_no_data(tgt)
            prior = _finite(prior)
            return self._align(*images, prior, options=options, defects=defects)[0]

    def align_both_ways(
        self,
        src: Tensor,
        tgt: Tensor,
        priors: tuple[Tensor | None, Tensor | None] = (None, None),
        *,
        options: AlignerOptions | None = None,
        defects: Defects = (None, None),
    ) -> tuple[Tensor, Tensor]:
        """Align src to tgt, and tgt to src; no gradients.

        Modules finetuned both ways search once a direction: the two fields are the
        means of one and the inverse of the other, so that they undo each other.

        Args:
            src: as `align_pair` takes it, and all others.
            tgt: likewise.
            priors: of src to tgt and of tgt to src.
            options: likewise.
            defects: likewise.

        Returns:
            (B, 2, H, W) each: the field of `align_pair`, bit by bit, and that of tgt
            to src; modules finetuned both ways start it from the first prior's inverse.
        """
        options = options or self.options
        with _no_inference_mode():
            src, tgt = finite_or_no_data(src), finite_or_no_data(tgt)
            priors = _finite(priors[0]), _finite(priors[1])
        alive = has_tissue(src) & has_tissue(tgt)
        both = options.finetune and options.finetune_both_ways and bool(alive.any())
        if not both:
            swapped = defects[1], defects[0]
            there = self.align(src, tgt, priors[0], options=options, defects=defects)
            back = self.align(tgt, src, priors[1], options=options, defects=swapped)
            return there, back
        with _no_inference_mode():
            found = self._search(src, tgt, priors[0], options, defects)
            assert found.backward is not None
            there = self._finished(found.forward, found.backward)
            back = self._finished(found.backward, found.forward)
        before = or_zeros(priors[0], src), or_zeros(priors[1], src)
        return torch.where(alive, there, before[0]), torch.where(alive, back, before[1])

    def forward(
        self,
        src_img: Tensor,
        tgt_img: Tensor,
        src_agg_field: Tensor | None = None,
        tgt_agg_field: Tensor | None = None,
        **given: Any,
    ) -> Any:
        """The boundary to corgie and to code written for the original.

        Args:
            src_img: (H, W) to (B, 1, H, W), any dtype and layout, tensor or array.
            tgt_img: likewise.
            src_agg_field: prior field, (2, H, W) or (B, 2, H, W), pixels, or
                None.
            tgt_agg_field: not used, as in the original.
            **given: `src_defects`, `tgt_defects` (masks, not 0 on defects);
                `finetune`, `finetune_iter`, `finetune_lr`, `finetune_sm`,
                `train`, `normalize` instead of the module's own;
                `final_stage` makes the field 10 times as stiff where
                `finetune_sm` is not given and modules are finetuned as the
                original's; `return_state`. Others are ignored: callers pass
                every layer they have.

        Returns:
            The whole field, prior included, as a torchfields `Field`,
            (B, 2, H, W), pixels; with `return_state` a tuple of it and the
            network's state, {} for blank pairs.

        Raises:
            UsageError: images, or masks, that are none or differ in shape.
            FieldError: a prior that is no field of the images.
        """
        with _no_inference_mode(torch.is_grad_enabled()):
            options, (src, tgt), prior, defects = parse_forward_args(
                self.options, (src_img, tgt_img), src_agg_field, given
            )
            self.to(src.device)
            with torch.set_grad_enabled(options.train and torch.is_grad_enabled()):
                alignment, state = self._align(
                    src, tgt, _finite(prior), options=options, defects=defects
                )
        result = as_torchfields(alignment.field)
        return (result, state) if given.get("return_state") else result

    @torch.no_grad()
    def has_features(self) -> bool:
        """Whether the network gives what fields can be finetuned on; runs it once."""
        blank = torch.zeros(1, 1, 1, 1, device=next(self.net.parameters()).device)
        return has_features(
            self._predict(blank, blank, None, ())[1], self.options.finetune_level
        )

    def get_embeddings(
        self, img: Tensor, level: int = 0, preserve_zeros: bool = False
    ) -> Tensor:
        """The features of one image, without the image itself.

        Args:
            img: (H, W) to (1, 1, H, W).
            level: level of the network.
            preserve_zeros: 0 where a pixel of the image has no data.

        Returns:
            (C - 1, H / 2**level, W / 2**level), rounded up.
        """
        image = read_image(img, "img").float()
        with torch.no_grad():
            embeddings = self.predict(image, image, levels=(level,)).embeddings
        features = embeddings[level].src[0, 1:]
        if preserve_zeros:
            blank = F.max_pool2d((image == 0).float(), 2**level, ceil_mode=True)
            features = torch.where(blank[0] > 0, 0.0, features)
        return features

    def save_checkpoint(self, checkpoint_folder: str | Path) -> None:
        """Write the weights as `<checkpoint_name>.state.pth.tar`."""
        path = checkpoint_path(Path(checkpoint_folder), self.checkpoint_name)
        save_weights(self.net, path)

    def load_checkpoint(
        self, checkpoint_folder: str | Path, map_location: Any = "cpu"
    ) -> bool:
        """Load `<checkpoint_name>.state.pth.tar` if it is there.

        Args:
            checkpoint_folder: where it lies.
            map_location: as torch.load takes it.

        Returns:
            Whether it was there.

        Raises:
            CheckpointError: it does not fit the network.
        """
        path = checkpoint_path(Path(checkpoint_folder), self.checkpoint_name)
        if not path.is_file():
            return False
        load_weights(self.net, path, device=map_location)
        return True

    def _predict(
        self,
        src: Tensor,
        tgt: Tensor,
        prior: Tensor | None,
        levels: tuple[int, ...],
        tile_px: int | None = None,
    ) -> tuple[Prediction, State]:
        """`predict`, and the state of the network, padded as it ran."""
        rows, cols = src.shape[-2:]
        pad = padding((rows, cols), self._multiple, square=self.operators == "stock")
        src, tgt = F.pad(src, pad), F.pad(tgt, pad)
        if prior is not None:
            prior = F.pad(prior, pad, mode="replicate")
        if prior is None or self.pass_field:
            field, state = self._run(src, tgt, prior, tile_px)
        else:
            found, state = self._run(warp(src, prior), tgt, None, tile_px)
            field = compose(found, prior)
            if levels:
                # That state is of the warped src; the embeddings are not.
                state = self.net.up_path(torch.cat((src, tgt), 1), 0, False, {})
        embeddings = {
            level: Embedding.of(state, (rows, cols), level) for level in levels
        }
        coarse, confidence = {}, None
        if getattr(self.net, "gives_whole_fields", False) and self.pass_field:
            coarse, confidence = Prediction.coarse_and_confidence(state, (rows, cols))
        field = field[..., :rows, :cols].float()
        return Prediction(field, embeddings, coarse, confidence), state

    def _run(
        self, src: Tensor, tgt: Tensor, prior: Tensor | None, tile_px: int | None
    ) -> tuple[Tensor, State]:
        """Call the network, and take its state off it.

        The state holds every activation: left there, it would keep the memory
        of one call until the next one is done.
        """
        quiet = stock_operators_at_work if self.operators == "stock" else nullcontext
        given = {} if tile_px is None else {"tile_px": tile_px}
        with quiet():
            field = self.net(x=torch.cat((src, tgt), 1), in_field=prior, **given)
        state, self.net.state = self.net.state, {}
        return field, state

    def _align(
        self,
        src: Tensor,
        tgt: Tensor,
        prior: Tensor | None,
        *,
        options: AlignerOptions,
        defects: Defects,
    ) -> tuple[Alignment, State]:
        before, alive = or_zeros(prior, src), has_tissue(src) & has_tissue(tgt)
        if not bool(alive.any()):
            return Alignment(before.clone(), None), {}
        found = self._search(src, tgt, prior, options, defects)
        field = self._finished(found.forward, found.backward)
        return Alignment(torch.where(alive, field, before), found.tuned), found.state

    def _search(
        self,
        src: Tensor,
        tgt: Tensor,
        prior: Tensor | None,
        options: AlignerOptions,
        defects: Defects,
    ) -> ForwardBackward:
        """The field of each direction that the options want, by itself."""
        if options.finetune:  # found once, for both ways
            maps = find_pair_masks(src, tgt, defects, options)
            defects = maps.src_defects, maps.tgt_defects
        field, tuned, state = self._directed(src, tgt, prior, options, defects)
        backward = None
        if options.finetune and options.finetune_both_ways:
            back = None if prior is None else invert(prior)
            swapped = defects[1], defects[0]
            backward = self._directed(tgt, src, back, options, swapped)[0]
        return ForwardBackward(field, backward, tuned, state)

    def _finished(self, field: Tensor, other: Tensor | None) -> Tensor:
        """A field of one direction made to agree with the other, without folds."""
        if other is not None:
            field = make_inverse_consistent(field, other)
        if self.operators == "corrected":  # stock modules keep their numbers
            field = remove_folds(field)
        return field

    def _directed(
        self,
        src: Tensor,
        tgt: Tensor,
        prior: Tensor | None,
        options: AlignerOptions,
        defects: Defects,
    ) -> tuple[Tensor, FinetuneResult | None, State]:
        """The field from src to tgt alone, finetuned if the options say so."""
        level = options.finetune_level
        levels = (level,) if options.finetune else ()
        tiling, state = options.tiling, {}  # tiles leave no state: it takes much memory
        if tiling is None or not tiling.splits(src.shape[-2:]):
            found, state = self._predict(src, tgt, prior, levels)
        elif self.pass_field and getattr(self.net, "supports_tiling", False):
            found = self._predict(src, tgt, prior, levels, tiling.tile_px)[0]
        else:
            found = predict_tiled(self.predict, (src, tgt), prior, tiling, levels)
        if not options.finetune:
            return found.field, None, state
        masks = find_pair_masks(src, tgt, defects, options)
        result = finetune(
            found.field,
            found.embeddings.pop(level),  # dropped here: they take much memory
            masks,
            options,
            confidence=found.confidence,
        )
        return result.field, result, state


@contextmanager
def _no_inference_mode(records: bool = False) -> Iterator[None]:
    """Let the finetuner take gradients, which torch.inference_mode forbids.

    Args:
        records: whether gradients are recorded outside of the finetuner too.
    """
    with torch.inference_mode(False), torch.set_grad_enabled(records):
        yield


def _finite(prior: Tensor | None) -> Tensor | None:
    """A prior field, finite, that gradients may be taken beside."""
    if prior is None:
        return None
    return fill_not_finite(prior.clone() if prior.is_inference() else prior)


class ForwardArgs(NamedTuple):
    """One call of a module, as plain tensors."""

    options: AlignerOptions
    images: list[Tensor]  # src and tgt, (B, 1, H, W) float32
    prior: Tensor | None  # (B, 2, H, W), pixels
    defects: Defects  # of src and tgt, (B, 1, H, W) bool


def parse_forward_args(
    options: AlignerOptions,
    images: tuple[Any, Any],
    prior: Any,
    given: dict[str, Any],
) -> ForwardArgs:
    """The arguments of `metroem.aligner.Aligner.forward`, in the forms it works on.

    Args:
        options: the module's own.
        images: src and tgt.
        prior: field, or None.
        given: keyword arguments.

    Raises:
        UsageError: images, or masks, that are none or differ in shape.
        FieldError: a prior that is no field of the images.
    """
    options = options.updated(given)
    is_default = given.get("finetune_sm") is None and not options.finetune_knots
    if given.get("final_stage") and is_default:
        options = replace(options, finetune_sm=10 * options.finetune_sm)
    src, tgt = (
        read_image(image, name)
        for image, name in zip(images, ("src_img", "tgt_img"), strict=True)
    )
    if src.shape != tgt.shape:
        raise UsageError(
            f"src_img {tuple(src.shape)} and tgt_img {tuple(tgt.shape)}: expected "
            "images of the same shape"
        )
    return ForwardArgs(
        options,
        normalize_if_raw([src, tgt], options.normalize),
        None if prior is None else _prior(prior, src),
        tuple(  # type: ignore[arg-type]
            _mask(given.get(name), name, src) for name in ("src_defects", "tgt_defects")
        ),
    )


def read_image(image: Any, name: str) -> Tensor:
    """An image as (B, 1, H, W), what is not finite 0 ("no data").

    Args:
        image: (H, W) to (B, 1, H, W), of any kind of numbers and any layout; a tensor,
            an array, or what numpy makes one of.
        name: for messages.

    Raises:
        UsageError: no image.
    """
    if not isinstance(image, Tensor):
        image = torch.from_numpy(as_array(image, name))
    if image.dtype == torch.bool or image.is_complex():
        raise UsageError(_not_grey_levels(name, image.dtype))
    batch = as_bchw(image)
    if batch.ndim != 4 or batch.shape[1] != 1 or 0 in batch.shape:
        raise UsageError(
            f"{name} {tuple(image.shape)}: expected an image of one channel, (H, W) to "
            "(B, 1, H, W), with pixels"
        )
    if batch.dtype in (torch.uint16, torch.uint32, torch.uint64):
        batch = batch.long()  # torch cannot do much with those
    return finite_or_no_data(batch)


def as_array(image: Any, name: str) -> np.ndarray:
    """What somebody takes for an image as an array that torch takes.

    Args:
        image: array, masked array (masked: 0, "no data"), tensor, PIL image, or list;
            any byte order and layout.
        name: for messages.

    Returns:
        Contiguous, writable, in native byte order; uint8, int8, int16, int32 (of
        uint16), int64, float32 or float64.

    Raises:
        UsageError: no grey levels.
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image
    elif isinstance(image, np.ma.MaskedArray):
        image = image.filled(0)
    elif getattr(image, "mode", None) in ("P", "PA"):
        raise UsageError(
            f"{name}: a PIL image of mode {image.mode} holds numbers of colours, not "
            "grey levels; give image.convert('L')"
        )
    try:
        values = np.asarray(image)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: cannot be made an array ({error})") from error
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind not in "uif":
        raise UsageError(_not_grey_levels(name, values.dtype))
    if kind == "f":
        dtype = np.float32 if size <= 4 else np.float64
    elif size == 1:
        dtype = values.dtype
    elif size == 2:
        dtype = np.int32 if kind == "u" else np.int16
    else:
        dtype = np.int64
    return np.require(values, dtype, ["C", "W"])


def _not_grey_levels(name: str, dtype: Any) -> str:
    return (
        f"{name}: is {dtype}, which are no grey levels; expected whole numbers or "
        "floats, 0 = no data"
    )


def _prior(prior: Any, image: Tensor) -> Tensor:
    if not isinstance(prior, Tensor):
        prior = torch.from_numpy(as_array(prior, "src_agg_field")).to(image.device)
    field, (batch, _, *size) = as_bchw(prior).float(), image.shape
    if field.shape != (batch, 2, *size):
        raise FieldError(
            f"src_agg_field {tuple(prior.shape)}: expected the field of images of "
            f"{tuple(image.shape)}, {(batch, 2, *size)}"
        )
    return field


def _mask(mask: Any, name: str, image: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        mask = torch.from_numpy(np.array(mask) != 0).to(image.device)
    marked = as_bchw(mask) != 0
    if marked.ndim != 4 or marked.shape[-2:] != image.shape[-2:]:
        raise UsageError(
            f"{name} {tuple(mask.shape)}: expected a mask of images of "
            f"{tuple(image.shape)}"
        )
    return marked
