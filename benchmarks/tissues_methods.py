"""Methods that `tissues.py` measures: align(src, tgt) -> field.

src and tgt are (H, W) float32, 0 to 1, 0 = no data. The field is (2, H, W) float32,
pull, px, channel 0 along cols. Each classical method works on images that are averaged
down, with equalised contrast, as it does best on tissue. Its settings were tuned on
`vnc_stack1.npy`, and it starts where an affine map that is found first leaves it,
unless it is better without. Libraries are imported by the method that needs them:
`pip install -r benchmarks/requirements-peers.txt` brings all.
"""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch

from metroem import Pyramid
from metroem.models.module_folders import init_pyramid

Method = Callable[[np.ndarray, np.ndarray], np.ndarray]
Engine = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Factors by which images are averaged down, coarse first, and px of the Gaussian that
# smooths the field at each.
_FACTORS = (16, 8, 4)


def unaligned(src: np.ndarray, tgt: np.ndarray) -> np.ndarray:
    """Leave src where it is."""
    return np.zeros((2, *tgt.shape), np.float32)


def affine(src: np.ndarray, tgt: np.ndarray) -> np.ndarray:
    """Find an affine map by correlation (ECC of OpenCV), at two scales."""
    matrix = np.eye(2, 3, dtype=np.float32)
    for factor in (8, 4):
        small = [_band(_reduce(_fill(one), factor), 1, 8) for one in (src, tgt)]
        mask = (_reduce((src > 0).astype(np.float32), factor) > 0.99).astype(np.uint8)
        middle = (factor - 1) / 2  # a pixel of the small image, of the large one
        there = matrix.copy()
        shift = matrix[:, :2] @ np.array([middle, middle]) - middle
        there[:, 2] = (matrix[:, 2] + shift) / factor
        stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 200, 1e-6)
        try:
            _, there = cv2.findTransformECC(
                *(small[1], small[0], there, cv2.MOTION_AFFINE, stop, mask, 5)
            )
        except cv2.error:  # it did not converge
            continue
        matrix = there.copy()
        shift = there[:, :2] @ np.array([middle, middle]) - middle
        matrix[:, 2] = there[:, 2] * factor - shift
    cols, rows = _positions(tgt.shape)
    moved = [one[0] * cols + one[1] * rows + one[2] for one in matrix]
    return np.stack([moved[0] - cols, moved[1] - rows]).astype(np.float32)


def dis(src: np.ndarray, tgt: np.ndarray) -> np.ndarray:
    """Run DIS optical flow of OpenCV (Kroeger et al. 2016)."""
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow.setPatchSize(16)
    flow.setPatchStride(4)
    flow.setFinestScale(0)
    flow.setGradientDescentIterations(25)
    flow.setVariationalRefinementIterations(5)

    def engine(src: np.ndarray, tgt: np.ndarray) -> np.ndarray:
        images = [(one * 255).round().astype(np.uint8) for one in (tgt, src)]
        return np.moveaxis(flow.calc(*images, None), 2, 0)  # type: ignore[arg-type]

    return _coarse_to_fine(src, tgt, engine, (8, 8, 6))


def tvl1(src: np.ndarray, tgt: np.ndarray) -> np.ndarray:
    """Run TV-L1 optical flow of scikit-image (Zach et al. 2007)."""
    from skimage.registration import optical_flow_tvl1

    def engine(src: np.ndarray, tgt: np.ndarray) -> np.ndarray:
        rows, cols = optical_flow_tvl1(
            tgt, src, attachment=5, tightness=0.3, num_warp=5, num_iter=20
        )
        return np.stack([cols, rows]).astype(np.float32)

    return _coarse_to_fine(src, tgt, engine, (5, 5, 5))


def demons(src: np.ndarray, tgt: np.ndarray) -> np.ndarray:
    """Run diffeomorphic demons of SimpleITK (Vercauteren et al. 2009)."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    field = affine(src, tgt)
    filled = _fill(src), _fill(tgt)
    for factor, steps in zip(_FACTORS, (100, 100, 60), strict=True):
        small = [_equalize(_reduce(one, factor)) for one in filled]
        start = _resize(field, small[1].shape, 1 / factor)
        search = sitk.DiffeomorphicDemonsRegistrationFilter()
        search.SetUseGradientType(0)  # symmetric
        search.SetNumberOfIterations(steps)
        search.SetSmoothDisplacementField(True)
        search.SetStandardDeviations(5.0)
        search.SetSmoothUpdateField(True)
        search.SetUpdateFieldStandardDeviations(1.0)
        search.SetMaximumUpdateStepLength(2.0)
        found = search.Execute(
            # Its forces depend on the scale of the grey levels.
            sitk.GetImageFromArray(small[1] * 100),
            sitk.GetImageFromArray(small[0] * 100),
            sitk.GetImageFromArray(
                np.moveaxis(start, 0, 2).astype(np.float64), isVector=True
            ),
        )
        found = np.moveaxis(sitk.GetArrayFromImage(found), 2, 0).astype(np.float32)
        field = _resize(found, tgt.shape, factor)
    return field


def elastix(src: np.ndarray, tgt: np.ndarray) -> np.ndarray:
    """Run B-splines with bending energy, by itk-elastix (Klein et al. 2010)."""
    import itk

    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(1)
    factor, levels = 4, 4
    small = [_equalize(_reduce(_fill(one), factor)) for one in (src, tgt)]
    moving, fixed = (itk.image_from_array(one * np.float32(255)) for one in small)
    options = itk.ParameterObject.New()
    chosen = dict(options.GetDefaultParameterMap("bspline", levels))
    chosen.pop("FinalGridSpacingInPhysicalUnits", None)
    halves = [2**level for level in reversed(range(levels))]
    chosen |= {
        "Registration": ["MultiMetricMultiResolutionRegistration"],
        "Metric": ["AdvancedMattesMutualInformation", "TransformBendingEnergyPenalty"],
        "Metric0Weight": ["1.0"],
        "Metric1Weight": ["300.0"],
        "Transform": ["BSplineTransform"],
        "FinalGridSpacingInVoxels": ["16"],
        "GridSpacingSchedule": [str(float(half)) for half in halves],
        "ImagePyramidSchedule": [str(half) for half in halves for _ in range(2)],
        "Optimizer": ["AdaptiveStochasticGradientDescent"],
        "MaximumNumberOfIterations": ["300"],
        "NumberOfSpatialSamples": ["8192"],
        "ImageSampler": ["RandomCoordinate"],
        "NewSamplesEveryIteration": ["true"],
        "AutomaticTransformInitialization": ["false"],
        "NumberOfResolutions": [str(levels)],
        "RequiredRatioOfValidSamples": ["0.05"],
        "RandomSeed": ["121212"],
        "WriteResultImage": ["false"],
    }
    options.AddParameterMap(chosen)
    _, found = itk.elastix_registration_method(
        fixed, moving, parameter_object=options, log_to_console=False
    )
    with tempfile.TemporaryDirectory() as folder:  # it also writes a file
        field = itk.transformix_deformation_field(
            moving, found, log_to_console=False, output_directory=folder
        )
    field = np.moveaxis(np.asarray(itk.array_from_image(field)), 2, 0)
    return _resize(field.astype(np.float32), tgt.shape, factor)


def ants(src: np.ndarray, tgt: np.ndarray) -> np.ndarray:
    """Run SyN of ANTs with local cross-correlation (Avants et al. 2008)."""
    import ants as antspy

    factor = 4
    start = affine(src, tgt)
    small = [_equalize(_reduce(_fill(one), factor)) for one in (src, tgt)]
    start = _resize(start, small[1].shape, 1 / factor)
    moving = _warp(small[0], start)
    result = antspy.registration(
        # Its first axis is along cols.
        antspy.from_numpy(np.ascontiguousarray(small[1].T)),
        antspy.from_numpy(np.ascontiguousarray(moving.T)),
        type_of_transform="SyNOnly",
        initial_transform="identity",
        syn_metric="CC",
        syn_sampling=6,
        grad_step=0.2,
        flow_sigma=4,
        total_sigma=0,
        reg_iterations=(80, 60, 40),
        random_seed=1,
    )
    names = [name for name in result["fwdtransforms"] if name.endswith(".nii.gz")]
    found = antspy.image_read(names[0]).numpy()  # (cols, rows, 2)
    found = np.moveaxis(found, 2, 0).transpose(0, 2, 1).astype(np.float32)
    return _resize(_compose(found, start), tgt.shape, factor)


def block_matching(src: np.ndarray, tgt: np.ndarray) -> np.ndarray:
    """Match blocks by correlation, coarse to fine, and average what is sure."""
    field = unaligned(src, tgt)
    filled = _fill(src), _fill(tgt)
    has_data = (src > 0).astype(np.float32)
    for factor, side, radius, step in ((8, 33, 12, 6), (4, 33, 8, 8), (2, 41, 6, 12)):
        small_src, small_tgt = (_band(_reduce(one, factor), 1, 6) for one in filled)
        data = _reduce(has_data, factor)
        current = _resize(field, small_tgt.shape, 1 / factor)
        for _ in range(2):
            found = _match_blocks(
                *(_warp(small_src, current), small_tgt, _warp(data, current, 0.0)),
                *(side, radius, step),
            )
            current = _compose(found, current)
        field = _resize(current, tgt.shape, factor)
    return field


# Named as in the tables.
PEERS: dict[str, Method] = {
    "not aligned": unaligned,
    "affine (ECC)": affine,
    "DIS": dis,
    "TV-L1": tvl1,
    "block matching": block_matching,
    "SimpleITK demons": demons,
    "elastix": elastix,
    "ANTs SyN": ants,
}


def pyramid_method(pyramid: Pyramid, finetune: bool = True) -> Method:
    """Make a method of a pyramid; `finetune`: improve each field on its pair."""
    return lambda src, tgt: pyramid.align(src, tgt, finetune=finetune)


@cache
def untrained_pyramid() -> Pyramid:
    """Make a pyramid of fresh networks, the same every time."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        init_pyramid(Path(folder) / "pyramid", [2, 1, 0])
        torch.manual_seed(0)
        return Pyramid.load(Path(folder) / "pyramid", None)


def _coarse_to_fine(
    src: np.ndarray, tgt: np.ndarray, engine: Engine, smooth_px: tuple[float, ...]
) -> np.ndarray:
    """Find a field from scale to scale; each step adds the flow of what is left."""
    field = affine(src, tgt)
    filled = _fill(src), _fill(tgt)
    for factor, sigma in zip(_FACTORS, smooth_px, strict=True):
        small = [_equalize(_reduce(one, factor)) for one in filled]
        current = _resize(field, small[1].shape, 1 / factor)
        for _ in range(2):
            found = engine(_warp(small[0], current), small[1])
            current = _compose(found, current)
            current = np.stack(
                [cv2.GaussianBlur(one, (0, 0), sigma) for one in current]
            )
        field = _resize(current, tgt.shape, factor)
    return field


def _match_blocks(
    src: np.ndarray,
    tgt: np.ndarray,
    data: np.ndarray,
    side: int,
    radius: int,
    step: int,
) -> np.ndarray:
    """Match the blocks of tgt in src, at nodes `step` px apart; a field of pixels."""
    pad = side // 2 + radius
    reflected = [
        cv2.copyMakeBorder(one, pad, pad, pad, pad, cv2.BORDER_REFLECT)
        for one in (src, tgt)
    ]
    data = cv2.copyMakeBorder(data, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0.0)
    rows, cols = (np.arange(0, px + step, step) for px in tgt.shape)
    shift = np.zeros((2, len(rows), len(cols)), np.float32)
    sure = np.zeros((len(rows), len(cols)), np.float32)
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            at = min(row, tgt.shape[0] - 1), min(col, tgt.shape[1] - 1)
            block = tuple(slice(p + radius, p + radius + side) for p in at)
            window = tuple(slice(p, p + side + 2 * radius) for p in at)
            if data[block].mean() < 0.7:
                continue
            scores = cv2.matchTemplate(
                reflected[0][window], reflected[1][block], cv2.TM_CCOEFF_NORMED
            )
            best, peak = _peak(scores)
            if best is not None and scores.max() >= 0.15:
                shift[:, i, j] = best[1] - radius, best[0] - radius
                sure[i, j] = peak
    rough = _weighted_mean(shift, sure, 3.0)
    sure = sure * (np.hypot(*(shift - rough)) < 8)  # what differs from its neighbours
    mean = _weighted_mean(shift, sure, 1.5)
    weight = cv2.GaussianBlur(sure, (0, 0), 1.5)
    least = 0.02 * np.median(sure[sure > 0]) if sure.any() else 1.0
    return _at_pixels(mean * weight / (weight + least), tgt.shape, step)


def _peak(scores: np.ndarray) -> tuple[tuple[float, float] | None, float]:
    """Find the best place, (row, col) to parts of a pixel, and how sure it is."""
    row, col = np.unravel_index(int(scores.argmax()), scores.shape)
    last = scores.shape[0] - 1
    if row in (0, last) or col in (0, last):
        return None, 0.0
    others = scores.copy()
    width = max(2, last // 6)
    others[
        max(0, row - width) : row + width + 1, max(0, col - width) : col + width + 1
    ] = -1
    best = float(scores[row, col])
    place = []
    for three, at in (
        (scores[row - 1 : row + 2, col], row),
        (scores[row, col - 1 : col + 2], col),
    ):
        bend = three[0] - 2 * three[1] + three[2]
        place.append(at + (0.5 * (three[0] - three[2]) / bend if bend < 0 else 0.0))
    return (place[0], place[1]), best - max(float(others.max()), 0.0)


def _weighted_mean(values: np.ndarray, weight: np.ndarray, sigma: float) -> np.ndarray:
    total = cv2.GaussianBlur(weight, (0, 0), sigma) + 1e-9
    return np.stack(
        [cv2.GaussianBlur(v * weight, (0, 0), sigma) / total for v in values]
    )


def _at_pixels(values: np.ndarray, shape: tuple[int, ...], step: int) -> np.ndarray:
    """Interpolate values at nodes `step` px apart to all pixels."""
    cols, rows = _positions(shape)
    return np.stack(
        [
            cv2.remap(
                *(np.ascontiguousarray(one, np.float32), cols / step, rows / step),
                interpolation=cv2.INTER_CUBIC,
                borderMode=cv2.BORDER_REPLICATE,
            )
            for one in values
        ]
    )


def _fill(image: np.ndarray) -> np.ndarray:
    """Give pixels without data the mean of the tissue around them."""
    data = (image > 0).astype(np.float32)
    if data.all():
        return image
    weight = cv2.GaussianBlur(data, (0, 0), 24)
    around = cv2.GaussianBlur(image * data, (0, 0), 24) / np.maximum(weight, 1e-2)
    mean = float(image[data > 0].mean()) if data.any() else 0.5
    around = np.where(weight > 1e-2, around, mean)
    return np.where(data > 0, image, around).astype(np.float32)


def _reduce(image: np.ndarray, factor: int) -> np.ndarray:
    size = image.shape[1] // factor, image.shape[0] // factor
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _equalize(image: np.ndarray) -> np.ndarray:
    """Equalise the contrast locally (CLAHE)."""
    grey = np.clip(np.round(image * 255), 0, 255).astype(np.uint8)
    return cv2.createCLAHE(2.0, (4, 4)).apply(grey).astype(np.float32) / 255


def _band(image: np.ndarray, fine: float, coarse: float) -> np.ndarray:
    """Keep structure between two widths, px, of even contrast, 0 to 1."""
    values = cv2.GaussianBlur(image, (0, 0), fine)
    values = values - cv2.GaussianBlur(image, (0, 0), coarse)
    power = np.sqrt(cv2.GaussianBlur(values * values, (0, 0), 2 * coarse)) + 0.02
    return np.clip(0.5 + values / power / 6, 0, 1).astype(np.float32)


def _resize(field: np.ndarray, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Bring a field to images of another size, with values in their pixels."""
    size = shape[1], shape[0]
    resized = [cv2.resize(one, size, interpolation=cv2.INTER_CUBIC) for one in field]
    return np.stack(resized) * np.float32(scale)


def _positions(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Cols and rows of all pixels, each (H, W) float32."""
    rows, cols = np.indices(shape, np.float32)
    return cols, rows


def _warp(
    image: np.ndarray, field: np.ndarray, outside: float | None = None
) -> np.ndarray:
    """Pull an image by a field; beyond it lie its border's values, or `outside`."""
    cols, rows = _positions(field.shape[1:])
    mode = cv2.BORDER_REPLICATE if outside is None else cv2.BORDER_CONSTANT
    return cv2.remap(
        *(image, cols + field[0], rows + field[1]),
        interpolation=cv2.INTER_LINEAR,
        borderMode=mode,
        borderValue=outside or 0.0,  # type: ignore[arg-type]
    )


def _compose(f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Compute f(p) + g(p + f(p)): warps by g first, then by f."""
    return np.stack([f[k] + _warp(g[k], f) for k in (0, 1)])
