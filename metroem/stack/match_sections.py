"""Match two sections that may lie anywhere: find the map from one to the other.

1. Keypoints of both are matched. Two matches that agree in length and angle propose a
   similarity; the one that most other matches agree with is tried.
2. Where that fails or is not sure, the sections are correlated at all angles and
   shifts.
3. A proposal is refined on blocks, coarse to fine, and verified: the edges of both
   sections must correlate better than chance lets any of all possible maps do. Else it
   is refused.

Inverted contrast is found, too: keypoints lie at the same places in the negative, and a
correlation far below 0 is as good as one far above.

Images are (row, col), 0 = no data. Points and matrices are (col, row), indices of pixel
centres.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import cv2
import numpy as np
from scipy import fft, stats

from metroem.errors import UsageError
from metroem.geometry import affine

cv2.setNumThreads(1)

# Longest sides of the levels of a section, px. Angles are searched at the first one,
# keypoints are those of the second one, both verify.
_LEVEL_PX = (192, 512, 1024, 2048, 4096, 8192)
# Edges are details between these two sigmas, px of the level. Finer ones change more
# from section to section, and are lost out of focus.
_BAND_PX = 1.5, 4.5
_MOST_DEVIATIONS = 2.5  # edges are cut here, so that dirt does not outweigh all else
_MIN_TISSUE_PX = 400  # of the first level: a section with less is not matched

# Keypoints.
_MAX_KEYPOINTS = 2000
_MAX_RATIO = 0.92  # of the distances to the nearest and to the next descriptor
_MAX_MATCHES = 400
_MAX_PAIRS = 2000  # pairs of matches that are tried
_MIN_DISTANCE = 0.1  # between the two matches of a pair, fraction of the section
_MAX_SIZE, _MAX_SCALE, _MAX_DEGREES = 1.3, 1.15, 20.0  # a keypoint's, a map's
_TOLERANCE = 0.02  # of matches that agree, fraction of the section
_MIN_AGREEING = 6

# Correlation at all angles.
_STEP_DEGREES = 2.5
_NUM_PROPOSALS = 4
_MIN_OVERLAP = 0.1  # fraction of the smaller section
_SAME_PX = 6  # proposals that are nearer to each other than this are one

# Refining: side of a block and how far it is looked for, px, for each level.
_BLOCKS_PX = (24, 4), (48, 6), (64, 6)
_MIN_BLOCKS, _MAX_BLOCKS = 6, 200
_MIN_BLOCK_TISSUE = 0.6
_FIT_ROUNDS = 15
_FIT_SCALE = 2.0  # distance at which a block counts a quarter, in medians

# Probability that any wrong map of a pair is accepted. It asks for 6.5 standard
# deviations above chance. Of 136 pairs of different tissue, or of parts that do not
# overlap, the best wrong maps reach 5.9 at the first level and at the second.
_CHANCE = 1e-4
# Taken from the score of the second level: blocks were fitted to the same edges.
_FITTED = 1.5
_MIN_FIRST_SCORE = 4.0  # at the first level
# A match of a lower score is compared with all others, and not relied on alone.
SURE_SCORE = 8.0
_MIN_COMMON_PX = 400  # of the level
_INDEPENDENT_PX = 12.0  # area in which correlations at different shifts are alike


class Level(NamedTuple):
    """A section at one scale.

    Attributes:
        edges: (h, w) float32, band-passed, with a standard deviation near 1 everywhere;
            0 where the mask is 0.
        mask: (h, w) float32: 1 where there is tissue, away from its border, else 0.
        to_section: (2, 3): pixels of the level -> pixels of the section.
    """

    edges: np.ndarray
    mask: np.ndarray
    to_section: np.ndarray


class Keypoints(NamedTuple):
    """Keypoints of a section.

    Attributes:
        points: (N, 2) col and row, px of the section.
        angles: (N,) degrees.
        sizes: (N,) px of the section.
        descriptors: (N, 128) float32 of length 1.
    """

    points: np.ndarray
    angles: np.ndarray
    sizes: np.ndarray
    descriptors: np.ndarray


class Section:
    """A section that is to be matched; what is compared of it is computed once.

    Attributes:
        longest_px: longest side of the tissue's bounding box, px of the section.
        extent_px: its diagonal.
        to_image: (2, 3): pixels of the section -> pixels of the image; not the identity
            if the section was mirrored.

    Args:
        image: (H, W) of any type, grey levels; 0 = no data, as are NaN and infinite
            pixels.
        mirrored: reverse the order of cols first.

    Raises:
        UsageError: it is not 2-d, or has no pixels.
    """

    def __init__(self, image: np.ndarray, mirrored: bool = False) -> None:
        image = np.asarray(image)
        if image.ndim != 2 or not image.size:
            raise UsageError(
                f"a section of shape {image.shape}: expected grey levels, [rows, cols]"
            )
        if image.dtype.kind == "f":
            limit = np.finfo(np.float32).max
            image = np.where(np.abs(image) <= limit, image, 0)
        self.to_image = affine.identity()
        if mirrored:
            self.to_image[0] = -1.0, 0.0, image.shape[1] - 1
        self._image = image
        used = image[:, ::-1] if mirrored else image
        top, bottom, left, right = tissue_box(used) or (0, 1, 0, 1)
        self.longest_px = max(bottom - top, right - left)
        self.extent_px = float(np.hypot(bottom - top, right - left))
        self._corner = left, top
        self._grey = used[top:bottom, left:right].astype(np.float32)
        self._tissue = (self._grey != 0).astype(np.float32)
        self._levels: dict[int, Level] = {}
        self._keypoints: dict[int, Keypoints] = {}
        self._mirrored: Section | None = None

    def level(self, factor: int) -> Level:
        """The section with `factor` px of it in a px of the level."""
        if factor not in self._levels:
            reduced, mask = _reduce(self._grey, self._tissue, factor)
            self._levels[factor] = Level(
                *_edges(reduced, mask), _to_section(self._corner, factor)
            )
        return self._levels[factor]

    def keypoints(self, factor: int) -> Keypoints:
        """The keypoints of a level; there may be none."""
        if factor not in self._keypoints:
            reduced, mask = _reduce(self._grey, self._tissue, factor)
            to_section = _to_section(self._corner, factor)
            self._keypoints[factor] = _find_keypoints(reduced, mask, to_section)
        return self._keypoints[factor]

    @property
    def is_blank(self) -> bool:
        """Whether it has hardly any tissue, so that it is not matched."""
        factor = _choose_factors(self.longest_px, _LEVEL_PX[0])[0]
        return float(self.level(factor).mask.sum()) < _MIN_TISSUE_PX

    def mirrored(self) -> "Section":
        """The section with its cols in reverse order."""
        if self._mirrored is None:
            self._mirrored = Section(self._image, mirrored=True)
        return self._mirrored


class Match(NamedTuple):
    """How a section lies on another.

    Attributes:
        matrix: (2, 3) pull: pixels of tgt -> pixels of src.
        how: "keypoints" or "correlation".
        score: by how many standard deviations the correlation exceeds chance.
        src_points: (N, 2) col and row in src, N at most 200.
        tgt_points: (N, 2): the same points in tgt.
        sign: -1 if the contrast of one section is inverted, else 1.
    """

    matrix: np.ndarray
    how: str
    score: float
    src_points: np.ndarray
    tgt_points: np.ndarray
    sign: int


class _Proposal(NamedTuple):
    """A map that may be right."""

    matrix: np.ndarray  # (2, 3) pull: pixels of tgt -> pixels of src
    sign: int  # -1 if the contrast of one section is inverted, else 1


class _Blocks(NamedTuple):
    """Blocks of tgt that were found in src."""

    src_points: np.ndarray  # (N, 2)
    tgt_points: np.ndarray  # (N, 2)
    heights: np.ndarray  # (N,) correlation, 0 to 1


class _Refined(NamedTuple):
    """A map, and the blocks that it was fitted to, px of the sections."""

    matrix: np.ndarray
    blocks: _Blocks | None


def place(
    src: np.ndarray, tgt: np.ndarray, model: str = "similarity", flip: bool = False
) -> np.ndarray | None:
    """Find how a section lies on another, at any angle and shift.

    Args:
        src: (H, W) of any type, grey levels, 0 = no data: the moving section.
        tgt: (h, w), with pixels of the same size: the fixed section.
        model: map to fit: "rigid", "similarity" or "affine".
        flip: whether src may be mirrored.

    Returns:
        (2, 3) pull matrix: (col, row, 1) of a pixel of tgt -> (col, row) in src; None
        if the two have nothing in common that chance could not explain.

    Raises:
        UsageError: an image is not 2-d, or has no pixels.
        FieldError: an unknown model.
    """
    found = match(Section(src), Section(tgt), model, flip)
    return None if found is None else found.matrix


def tissue_box(image: np.ndarray) -> tuple[int, int, int, int] | None:
    """Find the first row, the end row, the first and the end col of all tissue."""
    rows, cols = (np.flatnonzero((image != 0).any(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1


# ------------------------------------------------------------------ levels, keypoints


def _choose_factors(longest_px: int, thumbnail_px: int) -> list[int]:
    """Choose the levels of a pair, by the px of a section in a px, coarse first.

    They are 1, 2, 3, 4, 6, 8, 12 ...: few, so that a section has the same levels in
    most of its pairs.
    """
    sides = [px for px in _LEVEL_PX if px < thumbnail_px] + [thumbnail_px]
    factors = set()
    for side in sides:
        power = 1 << max(-(-longest_px // side) - 1, 0).bit_length()
        smaller = power * 3 // 4
        fits = power >= 4 and smaller * side >= longest_px
        factors.add(smaller if fits else power)
    return sorted(factors, reverse=True)


def _to_section(corner: tuple[int, int], factor: int) -> np.ndarray:
    """Make the map from pixels of a level to pixels of the section."""
    half = (factor - 1) / 2
    return np.array([[factor, 0.0, corner[0] + half], [0.0, factor, corner[1] + half]])


def _reduce(
    grey: np.ndarray, tissue: np.ndarray, factor: int
) -> tuple[np.ndarray, np.ndarray]:
    """Average the tissue of squares; returns grey levels, and a mask of 0 and 1."""
    if factor == 1:
        return grey, tissue
    pad = [(0, -size % factor) for size in grey.shape]
    rows, cols = (-(-size // factor) for size in grey.shape)
    grey, fraction = (
        cv2.resize(np.pad(a, pad), (cols, rows), interpolation=cv2.INTER_AREA)
        for a in (grey, tissue)
    )
    mask = (fraction >= 0.5).astype(np.float32)
    return mask * grey / np.maximum(fraction, 0.5), mask


def _edges(grey: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Band-pass the tissue, and divide by the deviation around each pixel."""
    small, large = _BAND_PX
    grey = grey * mask
    band = mask * (_blur_inside(grey, mask, small) - _blur_inside(grey, mask, large))
    deviation = np.sqrt(_blur_inside(band * band, mask, 2 * large))
    least = 1e-3 * float(deviation.max()) + 1e-6
    edges = np.clip(
        band / np.maximum(deviation, least), -_MOST_DEVIATIONS, _MOST_DEVIATIONS
    )
    inner = _erode(mask, 3)
    return edges * inner, inner


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)


def _blur_inside(grey: np.ndarray, mask: np.ndarray, sigma: float) -> np.ndarray:
    """Average grey levels, which are 0 outside of the mask, over the mask alone."""
    return _blur(grey, sigma) / np.maximum(_blur(mask, sigma), 1e-3)


def _erode(mask: np.ndarray, width: int) -> np.ndarray:
    kernel = np.ones((width, width), np.uint8)
    return cv2.erode(mask, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)


def _find_keypoints(
    grey: np.ndarray, mask: np.ndarray, to_section: np.ndarray
) -> Keypoints:
    """Find the keypoints of a level, inside the tissue.

    Source: Lowe 2004, doi:10.1023/B:VISI.0000029664.99615.94 (SIFT).
    """
    low, high = np.percentile(grey[mask > 0], [1, 99])
    filled = np.where(mask > 0, grey, _blur_inside(grey * mask, mask, 16.0))
    levels = (filled - low) * (255 / max(float(high - low), 1e-6))
    image = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    sift = cv2.SIFT.create(
        _MAX_KEYPOINTS, contrastThreshold=0.01, edgeThreshold=20, sigma=2.0
    )
    found, descriptors = sift.detectAndCompute(image, _erode(mask, 9).astype(np.uint8))
    if descriptors is None:
        found, descriptors = (), np.zeros((0, 128), np.float32)
    points = np.array([one.pt for one in found]).reshape(-1, 2)
    length = np.linalg.norm(descriptors, axis=1, keepdims=True)
    return Keypoints(
        affine.apply(to_section, points),
        np.array([one.angle for one in found]),
        np.array([one.size for one in found]) * to_section[0, 0],
        (descriptors / np.maximum(length, 1e-6)).astype(np.float32),
    )


# ------------------------------------------------------------------ match


def match(
    src: Section,
    tgt: Section,
    model: str = "similarity",
    flip: bool = False,
    *,
    guess: np.ndarray | None = None,
    thumbnail_px: int = 1024,
) -> Match | None:
    """Find how a section lies on another.

    Args:
        src: the moving section.
        tgt: the fixed section, with pixels of the same size.
        model: map to fit: "rigid", "similarity" or "affine".
        flip: whether src may be mirrored.
        guess: (2, 3) pull matrix that is tried first, if one is known. It is verified
            like all others, and counts as found by keypoints.
        thumbnail_px: longest side of what is compared.

    Returns:
        The match; None if chance explains all that is found.
    """
    factors = _choose_factors(max(src.longest_px, tgt.longest_px), thumbnail_px)
    coarse = src.level(factors[0]), tgt.level(factors[0])
    if min(level.mask.sum() for level in coarse) < _MIN_TISSUE_PX:
        return None
    if guess is not None:
        one = src.mirrored() if affine.determinant(guess) < 0 else src
        pair = _Pair(one, tgt, factors, model)
        matrix = affine.compose(guess, affine.invert(one.to_image))
        tried = [_Proposal(matrix, 1), _Proposal(matrix, -1)]
        if found := _best(pair, tried, "keypoints"):
            return found
    pairs = [_Pair(src, tgt, factors, model)]
    if flip:
        pairs.append(pairs[0]._replace(src=src.mirrored()))
    best = None
    for how, propose in (
        ("keypoints", _propose_by_keypoints),
        ("correlation", _propose_by_correlation),
    ):
        for pair in pairs:
            found = _best(pair, propose(pair), how)
            if found and (best is None or found.score > best.score):
                best = found
            if best and best.score >= SURE_SCORE:
                return best
    return best


class _Pair(NamedTuple):
    """Two sections, the levels at which they are compared, and the map to fit."""

    src: Section
    tgt: Section
    factors: list[int]
    model: str

    def levels(self, index: int) -> tuple[Level, Level]:
        """A level of src and of tgt, 0 the coarsest."""
        return self.src.level(self.factors[index]), self.tgt.level(self.factors[index])


def _best(pair: _Pair, proposals: list[_Proposal], how: str) -> Match | None:
    """Refine and verify proposals, and finish the best of those that pass."""
    best, best_score, best_sign = None, _least_score(*pair.levels(0)), 1
    for matrix, sign in proposals:
        refined, score = _Refined(matrix, None), 0.0
        for index in range(min(2, len(pair.factors))):
            for _ in range(2):
                refined = _refine(pair, refined, sign, index)
            one, other = pair.levels(index)
            pull = _between_levels(refined.matrix, one, other)
            reached = sign * correlation_score(one, other, pull)
            score = max(score, reached - (_FITTED if index else 0.0))
            if score < _MIN_FIRST_SCORE:
                break
        if refined.blocks is not None and score >= best_score:
            best, best_score, best_sign = refined, score, sign
    if best is None:
        return None
    for index in range(2, len(pair.factors)):
        best = _refine(pair, best, best_sign, index)
    assert best.blocks is not None
    matrix, inlier = _fit(best.blocks, pair.model)
    to_src = pair.src.to_image
    return Match(
        affine.compose(matrix, to_src),
        how,
        best_score,
        affine.apply(to_src, best.blocks.src_points[inlier]),
        best.blocks.tgt_points[inlier],
        best_sign,
    )


def _least_score(src: Level, tgt: Level) -> float:
    """Return the score that the best of all wrong maps reaches with `_CHANCE`."""
    area = (src.mask.shape[0] + tgt.mask.shape[0]) * (
        src.mask.shape[1] + tgt.mask.shape[1]
    )
    num_maps = 2 * (360 / _STEP_DEGREES) * area / _INDEPENDENT_PX
    return float(stats.norm.isf(_CHANCE / num_maps))


def correlation_score(src: Level, tgt: Level, pull: np.ndarray) -> float:
    """Compare the correlation under a map with that under all shifts of the map.

    Args:
        src: the moving section.
        tgt: the fixed section.
        pull: (2, 3), pixels of tgt's level -> pixels of src's level.

    Returns:
        The correlation, in standard deviations of the correlations at all shifts that
        leave at least half as much in common; negative for inverted contrast. 0 if
        hardly anything is in common.
    """
    edges, mask = _pull(src, tgt, pull)
    rows, cols = (_fast_length(2 * size) for size in mask.shape)
    heights, common = (
        _correlation(
            _spectrum(a, (rows, cols)), _spectrum(b, (rows, cols)), (rows, cols)
        )
        for a, b in ((edges, tgt.edges), (mask, tgt.mask))
    )
    if common[0, 0] < _MIN_COMMON_PX:
        return 0.0
    enough = common > common[0, 0] / 2
    # A sum of n independent products has a deviation that grows like sqrt(n).
    heights = heights[enough] / np.sqrt(common[enough])
    deviation = np.sqrt(np.mean(np.square(heights, dtype=np.float64)))
    return float(heights[0] / max(deviation, 1e-9))  # 0, 0 is the first of them


def _fast_length(least: int) -> int:
    """The next length whose Fourier transform is fast."""
    return cast(int, fft.next_fast_len(least, real=True))


def _spectrum(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.asarray(fft.rfft2(image, shape))


def _correlation(
    src: np.ndarray, tgt: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Correlate two images by their spectra; [0, 0] is that without a shift of src."""
    return np.asarray(fft.irfft2(src.conj() * tgt, shape))


def _pull(src: Level, tgt: Level, pull: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Warp the edges and the mask of src to the pixels of tgt."""
    rows, cols = tgt.mask.shape
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    edges = cv2.warpAffine(src.edges, pull, (cols, rows), flags=flags)
    return edges, cv2.warpAffine(src.mask, pull, (cols, rows), flags=flags)


def _between_levels(matrix: np.ndarray, src: Level, tgt: Level) -> np.ndarray:
    """Express a map between sections in pixels of the levels."""
    to_src = affine.compose(tgt.to_section, matrix)
    return affine.compose(to_src, affine.invert(src.to_section))


def _between_sections(pull: np.ndarray, src: Level, tgt: Level) -> np.ndarray:
    """Express a map between levels in pixels of the sections."""
    to_src = affine.compose(affine.invert(tgt.to_section), pull)
    return affine.compose(to_src, src.to_section)


# ------------------------------------------------------------------ refining


def _refine(pair: _Pair, last: _Refined, sign: int, index: int) -> _Refined:
    """Refine a map at one level; returns `last` if too few blocks are found."""
    one, other = pair.levels(index)
    pull = _between_levels(last.matrix, one, other)
    block_px, reach_px = _BLOCKS_PX[min(index, len(_BLOCKS_PX) - 1)]
    blocks = _find_blocks(one, other, pull, sign, block_px, reach_px)
    if len(blocks.heights) < _MIN_BLOCKS:
        return last
    blocks = blocks._replace(
        src_points=affine.apply(one.to_section, blocks.src_points),
        tgt_points=affine.apply(other.to_section, blocks.tgt_points),
    )
    tracked = "affine" if pair.model == "affine" and index > 0 else "similarity"
    return _Refined(_fit(blocks, tracked)[0], blocks)


def _find_blocks(
    src: Level, tgt: Level, pull: np.ndarray, sign: int, block_px: int, reach_px: int
) -> _Blocks:
    """Look for blocks of tgt in src, some px around the place that a map says.

    Args:
        src: the moving section.
        tgt: the fixed section.
        pull: (2, 3), pixels of tgt's level -> pixels of src's level.
        sign: -1 if the contrast of one is inverted, else 1.
        block_px: side of a block.
        reach_px: how far it is looked for.

    Returns:
        The blocks whose correlation has its maximum inside, px of the levels.
    """
    edges, mask = _pull(src, tgt, pull)
    edges, common = np.pad(sign * edges, reach_px), mask * tgt.mask
    rows, cols = common.shape
    step = max(block_px // 3, int(np.sqrt(common.sum() / _MAX_BLOCKS)))
    found, centers, heights = [], [], []
    for row in range(0, max(rows - block_px, 0) + 1, step):
        for col in range(0, max(cols - block_px, 0) + 1, step):
            square = np.s_[row : row + block_px, col : col + block_px]
            if common[square].mean() < _MIN_BLOCK_TISSUE:
                continue
            block = tgt.edges[square]
            height, width = block.shape
            around = edges[
                row : row + height + 2 * reach_px, col : col + width + 2 * reach_px
            ]
            likeness = cv2.matchTemplate(around, block, cv2.TM_CCORR_NORMED)
            down, right = np.unravel_index(likeness.argmax(), likeness.shape)
            if not (0 < down < 2 * reach_px and 0 < right < 2 * reach_px):
                continue
            center = np.array([col + (width - 1) / 2, row + (height - 1) / 2])
            shift = (
                right - reach_px + _peak(likeness[down, right - 1 : right + 2]),
                down - reach_px + _peak(likeness[down - 1 : down + 2, right]),
            )
            centers.append(center)
            found.append(center + shift)
            heights.append(max(float(likeness[down, right]), 1e-3))
    src_points = affine.apply(pull, np.array(found).reshape(-1, 2))
    return _Blocks(src_points, np.array(centers).reshape(-1, 2), np.array(heights))


def _peak(three: np.ndarray) -> float:
    """Where the parabola through three values, the middle one largest, is largest."""
    bend = three[0] - 2 * three[1] + three[2]
    return float((three[0] - three[2]) / (2 * bend)) if bend < 0 else 0.0


def _fit(blocks: _Blocks, model: str) -> tuple[np.ndarray, np.ndarray]:
    """Fit a map to blocks; those that disagree with the others hardly count.

    Returns:
        (2, 3) pull matrix, and (N,) bool: the blocks that agree with it.

    Source: iteratively reweighted least squares with the weights of Geman and McClure
    1985.
    """
    src_points, tgt_points, heights = blocks
    weights = heights
    matrix, distance, scale = affine.identity(), np.zeros(len(heights)), 1.0
    for _ in range(_FIT_ROUNDS):
        matrix = affine.fit(tgt_points, src_points, model, weights)
        distance = np.hypot(*(affine.apply(matrix, tgt_points) - src_points).T)
        scale = max(_FIT_SCALE * float(np.median(distance)), 1e-3)
        weights = heights / (1 + (distance / scale) ** 2) ** 2
    return matrix, distance < 1.5 * scale


# ------------------------------------------------------------------ proposals


def _propose_by_keypoints(pair: _Pair) -> list[_Proposal]:
    """Propose the best similarity for each sign of the contrast, the better one first.

    The gradients of a negative point the other way. So do the angles of its keypoints,
    and a descriptor turns by half a turn: the order of its 4 x 4 cells is reversed.
    """
    factor = pair.factors[min(1, len(pair.factors) - 1)]
    keypoints, fixed = pair.src.keypoints(factor), pair.tgt.keypoints(factor)
    cells = keypoints.descriptors.reshape(-1, 16, 8)
    negative = keypoints._replace(
        angles=keypoints.angles + 180,
        descriptors=cells[:, ::-1].reshape(-1, 128),
    )
    agreed = []
    for sign, like in ((1, keypoints), (-1, negative)):
        count, matrix = _most_agreed(like, fixed, pair.tgt.extent_px)
        if matrix is not None:
            agreed.append((count, _Proposal(matrix, sign)))
    agreed.sort(key=lambda one: -one[0])
    return [proposal for _, proposal in agreed]


def _most_agreed(
    src: Keypoints, tgt: Keypoints, extent_px: float
) -> tuple[int, np.ndarray | None]:
    """Find the similarity that most matches of keypoints agree with.

    All pairs of matches are tried whose lengths and angles agree with each other and
    with the angles of the keypoints: few pairs of wrong matches do. So nothing is drawn
    at random.

    Returns:
        How many agree, and the (2, 3) pull matrix; None if they are too few.
    """
    if min(len(src.points), len(tgt.points)) < _MIN_AGREEING:
        return 0, None
    alike = tgt.descriptors @ src.descriptors.T
    nearest = alike.argmax(1)
    first = np.take_along_axis(alike, nearest[:, None], 1)[:, 0]
    np.put_along_axis(alike, nearest[:, None], -1, 1)
    ratio = np.sqrt((1 - first).clip(0) / (1 - alike.max(1)).clip(1e-6))
    growth = np.log(src.sizes[nearest] / tgt.sizes)
    usable = np.flatnonzero((ratio < _MAX_RATIO) & (abs(growth) < np.log(_MAX_SIZE)))
    kept = usable[np.argsort(ratio[usable], kind="stable")][:_MAX_MATCHES]
    turn = _difference(src.angles[nearest[kept]], tgt.angles[kept])
    src_points, tgt_points = src.points[nearest[kept]], tgt.points[kept]
    # A point is a complex number here: a similarity multiplies it, and adds to it.
    q, p = src_points @ [1, 1j], tgt_points @ [1, 1j]
    i, j = np.triu_indices(len(kept), 1)
    used = np.abs(p[i] - p[j]) > _MIN_DISTANCE * extent_px
    used &= np.abs(_difference(turn[i], turn[j])) < _MAX_DEGREES
    i, j = i[used], j[used]
    factor = (q[j] - q[i]) / (p[j] - p[i])
    angle = np.degrees(np.angle(factor))
    used = np.abs(np.log(np.abs(factor).clip(1e-9))) < np.log(_MAX_SCALE)
    used &= np.abs(_difference(angle, turn[i])) < _MAX_DEGREES
    i, factor, angle = (a[used][:_MAX_PAIRS] for a in (i, factor, angle))
    if not len(i):
        return 0, None
    distance = np.abs(factor[:, None] * (p - p[i, None]) + q[i, None] - q)
    agrees = distance < _TOLERANCE * extent_px
    agrees &= np.abs(_difference(angle[:, None], turn)) < _MAX_DEGREES
    counts = agrees.sum(1)
    best = agrees[counts.argmax()]
    if counts.max() < _MIN_AGREEING:
        return 0, None
    matrix = affine.fit(tgt_points[best], src_points[best], "similarity")
    return int(counts.max()), matrix


def _difference(one: Any, other: Any) -> Any:
    """Subtract angles, or arrays of them: degrees, -180 to 180."""
    return (one - other + 180) % 360 - 180


class _Peak(NamedTuple):
    """The highest correlation at one angle."""

    height: float  # standard deviations
    degrees: float
    sign: int
    push: np.ndarray  # (2, 3): pixels of src's level -> pixels of tgt's level


def _propose_by_correlation(pair: _Pair) -> list[_Proposal]:
    """Propose the turns and shifts at which the edges correlate best, best first."""
    one, other = pair.levels(0)
    peaks = sorted(_correlate(one, other), key=lambda peak: -peak.height)
    middle = (np.array([one.mask.shape[::-1]]) - 1) / 2
    kept: list[_Peak] = []
    for peak in peaks:
        at = affine.apply(peak.push, middle)
        if all(
            peak.sign != better.sign
            or abs(_difference(peak.degrees, better.degrees)) > 2 * _STEP_DEGREES
            or np.linalg.norm(at - affine.apply(better.push, middle)) > _SAME_PX
            for better in kept
        ):
            kept.append(peak)
        if len(kept) == _NUM_PROPOSALS:
            break
    return [
        _Proposal(_between_sections(affine.invert(peak.push), one, other), peak.sign)
        for peak in kept
    ]


def _correlate(src: Level, tgt: Level) -> Iterator[_Peak]:
    """Correlate two sections at all shifts, at one angle after the other.

    A correlation is divided by the square root of the area in common, so that its
    deviation does not depend on the shift. Areas are smooth: they are computed at a
    quarter of the resolution. Angles that differ by quarter turns share a spectrum of
    src, since tgt can be turned by them instead.
    """
    rows, cols = src.edges.shape
    side = 4 * int(np.ceil((np.hypot(rows, cols) + 2) / 4))  # holds src turned
    # Shifts repeat after `size` px. Less overlap than a quarter of a side is not told
    # apart from a shift to the other side.
    overlap_px = min(*src.edges.shape, *tgt.edges.shape) // 4
    size = 4 * _fast_length(-(-(side + max(tgt.edges.shape) - overlap_px) // 4))
    shape, small = (size, size), (size // 4, size // 4)
    least = _MIN_OVERLAP * min(float(src.mask.sum()), float(tgt.mask.sum()))
    quarters = [
        (
            _quarter_turn(num, *tgt.mask.shape),
            _spectrum(np.rot90(tgt.edges, num), shape),
            _spectrum(_sum_squares(np.rot90(tgt.mask, num)), small),
        )
        for num in range(4)
    ]
    for degrees in np.arange(0, 90, _STEP_DEGREES):
        cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        linear = np.array([[cos, -sin], [sin, cos]])
        middle = np.array([(cols - 1) / 2, (rows - 1) / 2])
        turned = np.column_stack([linear, (side - 1) / 2 - linear @ middle])
        edges, mask = (
            cv2.warpAffine(a, turned, (side, side)) for a in (src.edges, src.mask)
        )
        spectra = _spectrum(edges, shape), _spectrum(_sum_squares(mask), small)
        for num, (back, tgt_edges, tgt_mask) in enumerate(quarters):
            common = _correlation(spectra[1], tgt_mask, small) / 16
            weight = (common > least) / np.sqrt(np.maximum(common, least))
            heights = _correlation(spectra[0], tgt_edges, shape)
            heights *= cv2.resize(weight, shape)
            num_shifts = 16 * max(np.count_nonzero(weight), 1)
            deviation = max(float(np.linalg.norm(heights)) / num_shifts**0.5, 1e-9)
            least_height, most_height, at_least, at_most = cv2.minMaxLoc(heights)
            for sign, height, at in (
                (1, most_height, at_most),
                (-1, -least_height, at_least),
            ):
                shift = [px - size * (px > size - side) for px in at]
                push = np.column_stack([linear, turned[:, 2] + shift])
                yield _Peak(
                    height / deviation,
                    float(degrees) + 90 * num,
                    sign,
                    affine.compose(push, back),
                )


def _sum_squares(mask: np.ndarray) -> np.ndarray:
    """Sum squares of 4 x 4 px."""
    padded = np.pad(mask, [(0, -size % 4) for size in mask.shape])
    rows, cols = padded.shape
    return padded.reshape(rows // 4, 4, cols // 4, 4).sum((1, 3))


def _quarter_turn(num: int, rows: int, cols: int) -> np.ndarray:
    """Make the map from pixels of np.rot90(image, num) to those of the image."""
    turns = (
        [[1, 0, 0], [0, 1, 0]],
        [[0, -1, cols - 1], [1, 0, 0]],
        [[-1, 0, cols - 1], [0, -1, rows - 1]],
        [[0, 1, 0], [-1, 0, rows - 1]],
    )
    return np.array(turns[num], float)
