"""Count values in narrow bins, so that figures of many tasks can be put together."""

from collections import Counter
from collections.abc import Iterable

import numpy as np


class Histogram:
    """Counts of values, each rounded to a multiple of a step.

    Means and percentiles are those of all values together, in whatever order and from
    however many tasks they came; they are off by at most half a step.

    Attributes:
        step: width of a bin.
    """

    def __init__(self, step: float, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self.step = step
        self._counts = Counter(dict(pairs))

    def add(self, values: np.ndarray) -> None:
        """Count values of any shape; those that are not finite are left out."""
        values = values[np.isfinite(values)]
        bins, counts = np.unique(np.rint(values / self.step), return_counts=True)
        self.merge(zip(bins.astype(int).tolist(), counts.tolist(), strict=True))

    def merge(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Add the counts of another histogram of the same step."""
        for at, count in pairs:
            self._counts[at] += count

    def pairs(self) -> list[tuple[int, int]]:
        """Return multiples of the step and their counts, in rising order."""
        return sorted(self._counts.items())

    @property
    def count(self) -> int:
        """The number of values."""
        return self._counts.total()

    def mean(self) -> float:
        """Return the mean; NaN without values."""
        if not self.count:
            return float("nan")
        total = sum(at * count for at, count in self._counts.items())
        return self.step * total / self.count

    def percentile(self, fraction: float) -> float:
        """Return the value that this fraction of all values lies below; NaN without."""
        left = fraction * self.count
        for at, count in self.pairs():
            left -= count
            if left < 0:
                return self.step * at
        return self.step * max(self._counts) if self.count else float("nan")
