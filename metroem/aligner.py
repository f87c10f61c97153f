"""Apply one module: its network and a prior field give the field of a pair.

A module's `create.py` makes an `Aligner`. `predict` and `align` take and return plain
tensors, (B, C, H, W), any H and W. corgie and code written for the original call
`forward`. It takes keyword arguments of many forms and returns a torchfields `Field`.
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
    """The network of one module, with the options for applying it.

    Attributes:
        net: the network.
        model_folder: folder of `model_spec.json` and the checkpoints. modelhouse loads
            a copy, so it may not exist any more once the module is loaded.
        checkpoint_name: name of the weights, also for `save_checkpoint`.
        pass_field: whether the network gets the prior field (True), or src warped by
            the prior field (False).
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

        If there is no file of weights, the network stays untrained, with a warning.
        corgie and others build such modules, to train them or by mistake.

        Args:
            model_folder: folder of `model_spec.json`.
            pass_field: see `Aligner`.
            checkpoint_name: the weights are `<checkpoint_name>.state.pth.tar`; None:
                untrained weights, to be saved as "checkpoint".
            operators: "corrected" or "stock".
            **options: any of `AlignerOptions`. Fields of modules with stock operators
                (modules of the original) are finetuned unless `finetune` is given, as
                in metroem 0.1.2 and 0.1.3.

        Raises:
            UsageError: an option is unknown, or has a value that is not allowed.
            PyramidError: the spec is missing or cannot be built.
            CheckpointError: the weights do not fit the network.
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
            logger.info("fields are finetuned, as by the original: finetune not given")
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
                "%s: no such file, so the network is UNTRAINED and its fields are "
                "useless; give the checkpoint_name of weights that exist",
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
        """Run the network; gradients flow if enabled.

        Args:
            src: (B, 1, H, W), normalised, 0 = no data.
            tgt: (B, 1, H, W).
            prior: field of the earlier stage, (B, 2, H, W), pixels of src.
            levels: levels of the embeddings to return.

        Returns:
            The whole field, prior included, and embeddings of src and tgt; src is
            not warped for them.
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
        """Return only the field of `align_pair`."""
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
        """Align src to tgt, and finetune the field if the options say so; no gradients.

        Args:
            src: (B, 1, H, W), normalised, 0 = no data.
            tgt: (B, 1, H, W).
            prior: field of the earlier stage, (B, 2, H, W), pixels of src.
            options: the module's own if None.
            defects: masks of src and tgt, (B, 1, H, W) bool, True on defects, for the
                finetuner; it finds defects itself where a mask is None.

        Returns:
            The field, (B, 2, H, W), pixels, and the finetuner's result. For a pair with
            a blank image the field is the prior, or zeros.
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

        With `finetune_both_ways`, each direction is searched once. Each result is the
        mean of its own field and the inverse of the other, so that the two undo each
        other.

        Args:
            src: as in `align_pair`.
            tgt: as in `align_pair`.
            priors: prior fields of src to tgt and of tgt to src.
            options: as in `align_pair`.
            defects: as in `align_pair`.

        Returns:
            (B, 2, H, W) each: the field of `align_pair`, bit by bit, and the field of
            tgt to src. With `finetune_both_ways` the search for the second one starts
            from the inverse of the first prior.
        """
        options = options or self.options
        with _no_inference_mode():
            src, tgt = finite_or_no_data(src), finite_or_no_data(tgt)
            priors = _finite(priors[0]), _finite(priors[1])
        has_data = has_tissue(src) & has_tissue(tgt)
        both = options.finetune and options.finetune_both_ways and bool(has_data.any())
        if not both:
            swapped = defects[1], defects[0]
            forward = self.align(src, tgt, priors[0], options=options, defects=defects)
            backward = self.align(tgt, src, priors[1], options=options, defects=swapped)
            return forward, backward
        with _no_inference_mode():
            found = self._search(src, tgt, priors[0], options, defects)
            assert found.backward is not None
            forward = self._regularize(found.forward, found.backward)
            backward = self._regularize(found.backward, found.forward)
        before = or_zeros(priors[0], src), or_zeros(priors[1], src)
        return (
            torch.where(has_data, forward, before[0]),
            torch.where(has_data, backward, before[1]),
        )

    def forward(
        self,
        src_img: Tensor,
        tgt_img: Tensor,
        src_agg_field: Tensor | None = None,
        tgt_agg_field: Tensor | None = None,
        **given: Any,
    ) -> Any:
        """Align a pair for corgie and for code written for the original.

        Args:
            src_img: (H, W) to (B, 1, H, W), any dtype and layout, tensor or array.
            tgt_img: the same form as src_img.
            src_agg_field: prior field, (2, H, W) or (B, 2, H, W), pixels, or
                None.
            tgt_agg_field: not used, as in the original.
            **given: `src_defects`, `tgt_defects` (masks, not 0 on defects); any
                `AlignerOptions`, for example `finetune`, `finetune_iter`,
                `finetune_lr`, `finetune_sm`, `train`, `normalize`, in place of the
                module's own; `final_stage`, which multiplies the smoothness by 10 if
                neither `finetune_sm` is given nor `finetune_knots` are set;
                `return_state`. Others are ignored: callers pass every layer they have.

        Returns:
            The whole field, prior included, as a torchfields `Field`, (B, 2, H, W),
            pixels. With `return_state` a tuple of the field and the network's state;
            the state is {} for blank pairs.

        Raises:
            UsageError: images or masks are not images or masks, or differ in shape.
            FieldError: the prior is not a field of the images' shape.
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
        """Whether the network has features to finetune fields on; runs it once."""
        blank = torch.zeros(1, 1, 1, 1, device=next(self.net.parameters()).device)
        return has_features(
            self._predict(blank, blank, None, ())[1], self.options.finetune_level
        )

    def get_embeddings(
        self, img: Tensor, level: int = 0, preserve_zeros: bool = False
    ) -> Tensor:
        """Compute the features of one image, without the image itself.

        Args:
            img: (H, W) to (1, 1, H, W).
            level: level of the network.
            preserve_zeros: set features to 0 where a pixel of the image has no data.

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
        """Load `<checkpoint_name>.state.pth.tar` if it exists.

        Args:
            checkpoint_folder: folder of the file.
            map_location: as in torch.load.

        Returns:
            Whether it exists.

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
        """Run `predict`, and return the state of the network too, still padded."""
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
                # That state is for the warped src; embeddings are for src itself.
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
        """Call the network, and remove its state.

        The state refers to every activation. Left in the network, it would keep the
        memory of one call until the end of the next one.
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
        """Find, finetune and regularise the field; blank pairs keep their prior."""
        before, has_data = or_zeros(prior, src), has_tissue(src) & has_tissue(tgt)
        if not bool(has_data.any()):
            return Alignment(before.clone(), None), {}
        found = self._search(src, tgt, prior, options, defects)
        field = self._regularize(found.forward, found.backward)
        return Alignment(torch.where(has_data, field, before), found.tuned), found.state

    def _search(
        self,
        src: Tensor,
        tgt: Tensor,
        prior: Tensor | None,
        options: AlignerOptions,
        defects: Defects,
    ) -> ForwardBackward:
        """Find the field of src to tgt and, if the options say so, of tgt to src."""
        if options.finetune:  # defects are found once, for both directions
            masks = find_pair_masks(src, tgt, defects, options)
            defects = masks.src_defects, masks.tgt_defects
        field, tuned, state = self._search_one_way(src, tgt, prior, options, defects)
        backward = None
        if options.finetune and options.finetune_both_ways:
            back = None if prior is None else invert(prior)
            swapped = defects[1], defects[0]
            backward = self._search_one_way(tgt, src, back, options, swapped)[0]
        return ForwardBackward(field, backward, tuned, state)

    def _regularize(self, field: Tensor, other: Tensor | None) -> Tensor:
        """Make a field agree with the other direction's, and remove its folds."""
        if other is not None:
            field = make_inverse_consistent(field, other)
        if self.operators == "corrected":  # stock modules keep their numbers
            field = remove_folds(field)
        return field

    def _search_one_way(
        self,
        src: Tensor,
        tgt: Tensor,
        prior: Tensor | None,
        options: AlignerOptions,
        defects: Defects,
    ) -> tuple[Tensor, FinetuneResult | None, State]:
        """Find the field from src to tgt, and finetune it if the options say so."""
        level = options.finetune_level
        levels = (level,) if options.finetune else ()
        tiling, state = options.tiling, {}  # no state with tiles: it takes much memory
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
    """Leave torch.inference_mode, which would forbid the finetuner's gradients.

    Args:
        records: whether gradients are recorded outside of the finetuner, too.
    """
    with torch.inference_mode(False), torch.set_grad_enabled(records):
        yield


def _finite(prior: Tensor | None) -> Tensor | None:
    """Make a prior field finite, and copy it if it is an inference tensor."""
    if prior is None:
        return None
    return fill_not_finite(prior.clone() if prior.is_inference() else prior)


class ForwardArgs(NamedTuple):
    """The arguments of one call of a module, as plain tensors."""

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
    """Convert the arguments of `Aligner.forward` to plain tensors.

    Args:
        options: options of the module.
        images: src and tgt.
        prior: prior field, or None.
        given: keyword arguments.

    Raises:
        UsageError: images or masks are not images or masks, or differ in shape.
        FieldError: the prior is not a field of the images' shape.
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
    """Make an image a tensor (B, 1, H, W); pixels that are not finite become 0.

    Args:
        image: (H, W) to (B, 1, H, W), numbers of any type, any layout; a tensor, or
            anything that `as_array` takes.
        name: name of the image, for messages.

    Raises:
        UsageError: it is not an image.
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
        batch = batch.long()  # torch has few operators for these types
    return finite_or_no_data(batch)


def as_array(image: Any, name: str) -> np.ndarray:
    """Make an image of any form an array that torch can read.

    Args:
        image: array, masked array (masked pixels become 0, "no data"), tensor, PIL
            image, or list; any byte order and layout.
        name: name of the image, for messages.

    Returns:
        Contiguous, writable, in native byte order; uint8, int8, int16, int32 (from
        uint16), int64, float32 or float64.

    Raises:
        UsageError: its values are not grey levels.
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
    """Write the message for values that are not grey levels."""
    return (
        f"{name}: is {dtype}, which are not grey levels; expected whole numbers or "
        "floats, 0 = no data"
    )


def _prior(prior: Any, image: Tensor) -> Tensor:
    """Read a prior field, (2, H, W) or (B, 2, H, W), for images (B, 1, H, W)."""
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
    """Read a mask of an image, (B, 1, H, W); not 0 is masked."""
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
