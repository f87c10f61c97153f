"""What is demanded of a pyramid, beside what was found."""

from collections.abc import Mapping
from typing import NamedTuple

from quality_results import FULL, NETWORKS, STAGE0, Results

MINUTES = 30
EQUAL_EPE = 1.03  # an error of so many times another is taken for the same


class Checks(NamedTuple):
    """What the bench does not measure, by method."""

    identity_px: dict[str, float]  # largest mean length, a section onto itself
    folds_ppm: dict[str, float]  # of the pixels off defects; mean over all cases


class Bar(NamedTuple):
    """One demand: what is found may not be above `limit`."""

    what: str
    bar: str  # how the limit comes about
    limit: float
    found: float | None  # None where it was not measured
    networks: float | None = None  # of the networks alone, for comparison
    best: float | None = None  # of the best peer
    digits: int = 2

    @property
    def is_met(self) -> bool | None:
        """Whether it is met; None where it was not measured."""
        return None if self.found is None else self.found <= self.limit


def bars_of_cases(results: Results, checks: Checks) -> list[Bar]:
    """The demands on the cases A, B and C of the stack, in the issue's order."""
    return [
        _beside_peers(results, "mean EPE in B, px", "epe_mean", "B", 0.6),
        _beside_peers(results, "mean EPE in C, px", "epe_mean", "C", 0.6),
        _beside_peers(results, "mean EPE near defects, px", "near_mean", "C", 0.6),
        _beside_peers(results, "mean EPE in A, px", "epe_mean", "A", 0.8),
        *(_outliers(results, family) for family in "ABC"),
        _correlation(results),
        _checked("folds off defects, ppm", 0, checks.folds_ppm, digits=1),
        _beside_peers(results, "cycle error p95, px", "cycle_p95", "B", 1.0),
        _checked("section onto itself, mean px", 0.05, checks.identity_px, digits=4),
        _worse(results),
        _first_stage(results),
        *_seconds(results),
    ]


def bar_of_other_tissue(other: Results) -> Bar:
    """The demand on a stack that is nothing like the one trained on."""
    what = "mean EPE on another tissue, px"
    return _beside_peers(other, what, "epe_mean", "A", 0.8)


def bar_of_training(seconds: float | None) -> Bar:
    """The demand on the time of train.py."""
    minutes = None if seconds is None else seconds / 60
    return Bar("training, minutes of wall time", "", MINUTES, minutes, digits=1)


def bar_of_distilling(
    without: Mapping[int, float], distilled: Mapping[int, float]
) -> Bar:
    """The demand on `distil`: at most a third of the finetuning.

    Args:
        without: mean EPE by the steps of finetuning that each stage may make, of
            the pyramid that was not distilled.
        distilled: likewise, of the one that was.
    """
    wanted = EQUAL_EPE * without[max(without)]
    steps = [
        min((most for most, epe in epes.items() if epe <= wanted), default=None)
        for epes in (without, distilled)
    ]
    found = None
    if steps[0]:  # else the networks alone are as good: there is nothing to save
        found = float("inf") if steps[1] is None else steps[1] / steps[0]
    text = f"finetuning to {wanted:.2f} px, of {steps[0]} steps without `distil`"
    return Bar("distil: share of the finetuning", text, 1 / 3, found)


def _beside_peers(
    results: Results,
    what: str,
    key: str,
    family: str,
    factor: float,
    scale: float = 1.0,
) -> Bar:
    """A demand that is a factor of what the best peer leaves."""
    peer, best = results.best_peer(key, family)
    share = f"{factor:g} of " if factor != 1 else ""
    found, networks = (scale * results.mean(m, key, family) for m in (FULL, NETWORKS))
    best *= scale
    return Bar(what, f"{share}{peer}", factor * best, found, networks, best)


def _outliers(results: Results, family: str) -> Bar:
    what = f"off by more than 8 px in {family}, %"
    bar = _beside_peers(results, what, "epe_outliers", family, 1.0, 100)
    return bar._replace(digits=3)


def _correlation(results: Results) -> Bar:
    truth = results.mean("identity", "cpc64_truth", "B")
    off = [abs(results.mean(m, "cpc64", "B") - truth) for m in (FULL, NETWORKS)]
    what = "CPC 64 in B, off the true field's"
    return Bar(what, f"true field {truth:.3f}", 0.02, *off, digits=3)


def _checked(
    what: str, limit: float, found: Mapping[str, float], *, digits: int
) -> Bar:
    return Bar(what, "", limit, found[FULL], found[NETWORKS], digits=digits)


def _worse(results: Results) -> Bar:
    found = [float(len(results.worse_than_none(m))) for m in (FULL, NETWORKS)]
    text = f"of {len(results.of(FULL, 'ABC'))} that are displaced"
    return Bar("pairs worse than no alignment", text, 0, *found, digits=0)


def _first_stage(results: Results) -> Bar:
    peer, best = results.best_peer("epe_mean", "B")
    found = results.mean(STAGE0, "epe_mean", "B")
    what = "stage 0 alone, not finetuned: mean EPE in B, px"
    return Bar(what, peer, best, found, best=best)


def _seconds(results: Results) -> list[Bar]:
    full, networks = (results.mean(m, "wall_s") for m in (FULL, NETWORKS))
    return [
        Bar("seconds a pair, networks alone", "one thread", 1.0, networks, networks),
        Bar("seconds a pair, finetuned", "one thread", 5.0, full),
    ]
