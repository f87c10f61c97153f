"""Read the results of the bench, ours and the peers', and compare ours with bars."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from metroem.errors import DatasetError

# Our methods: the function of bench_adapter.py, and the name on the page.
METHODS = {
    "metroem": ("align", "MetroEM"),
    "metroem_networks": ("networks", "MetroEM, networks alone"),
    "metroem_stage0": ("first_stage", "MetroEM, stage 0 alone"),
    # Shows the finetuner alone; the difference to "metroem" is due to training.
    "metroem_untrained": ("untrained", "MetroEM untrained, finetuned"),
}
FULL, NETWORKS, STAGE0, UNTRAINED = METHODS
NONE = "identity"
UNWARPED = "00px"  # unwarped pairs of B: their true field is exactly 0
Record = dict[str, Any]

MINUTES = 30  # of training
EQUAL_EPE = 1.03  # errors with a smaller ratio count as equal


@dataclass(frozen=True)
class Results:
    """The content of a results file.

    Attributes:
        meta: facts about the run.
        records: one per method and case.
        failed: peers that failed, which are left out.
    """

    meta: dict[str, Any]
    records: tuple[Record, ...]
    failed: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a results file; a peer that failed in any case is left out.

        Raises:
            DatasetError: the file is missing, or a method of ours failed.
        """
        if not path.is_file():
            raise DatasetError(f"{path}: no such results; make them with the bench")
        content = json.loads(path.read_text())
        records = content["records"]
        failed = {r["method"]: r["error"] for r in records if "error" in r}
        failed |= content["skipped"]
        if not records or failed.keys() & {NONE, *METHODS}:
            raise DatasetError(f"{path}: methods failed: {failed or 'all of them'}")
        kept = tuple(r for r in records if r["method"] not in failed)
        return cls(content["meta"], kept, tuple(failed))

    def with_peers(self, peers: "Results") -> "Results":
        """Add the results of the peers on the same cases.

        Raises:
            DatasetError: the peers were run on other cases.
        """
        for key in ("stack_sha256", "seed"):
            if self.meta[key] != peers.meta[key]:
                raise DatasetError(
                    f"the peers' {key} is {peers.meta[key]!r}, ours "
                    f"{self.meta[key]!r}; run them on the same stack and seed"
                )
        cases = {record["case"] for record in self.records}
        same = tuple(record for record in peers.records if record["case"] in cases)
        missing = cases - {record["case"] for record in same}
        if missing or NONE not in {record["method"] for record in same}:
            raise DatasetError(
                f"the peers' results lack {sorted(missing) or NONE}; run them with the "
                "same --cases, --magnitudes and --limit, and identity among them"
            )
        return Results(self.meta, self.records + same, peers.failed)

    @property
    def methods(self) -> list[str]:
        """All methods, in order."""
        return list(dict.fromkeys(record["method"] for record in self.records))

    @property
    def peers(self) -> list[str]:
        """The methods of others, without "no alignment"."""
        return [m for m in self.methods if m != NONE and m not in METHODS]

    def of(self, method: str, families: str, label: str | None = None) -> list[Record]:
        """Return the records of a method; unwarped pairs of B only by their label."""
        return [
            record
            for record in self.records
            if record["method"] == method
            and record["family"] in families
            and (record["label"] != UNWARPED if label is None else True)
            and label in (None, record["label"])
        ]

    def mean(
        self, method: str, key: str, families: str = "ABC", label: str | None = None
    ) -> float:
        """Average a figure over the cases that have it; NaN if none has."""
        found = [r[key] for r in self.of(method, families, label) if key in r]
        return statistics.fmean(found) if found else float("nan")

    def best_peer(self, key: str, families: str) -> tuple[str, float]:
        """Return the peer with the smallest mean, and this mean."""
        means = {peer: self.mean(peer, key, families) for peer in self.peers}
        best = min(means, key=means.__getitem__)
        return best, means[best]

    def worse_than_none(self, method: str, families: str = "ABC") -> list[str]:
        """List the cases with a larger error than without alignment."""
        none = {r["case"]: r["epe_mean"] for r in self.of(NONE, families)}
        return [
            record["case"]
            for record in self.of(method, families)
            if not record["epe_mean"] <= none[record["case"]]
        ]


class Checks(NamedTuple):
    """Figures by method that the bench does not measure."""

    identity_px: dict[str, float]  # largest mean field of a section with itself
    folds_ppm: dict[str, float]  # of the pixels off defects; mean over all cases


class Bar(NamedTuple):
    """One demand: the figure found may not be above `limit`."""

    what: str
    bar: str  # how the limit is defined
    limit: float
    found: float | None  # None where it was not measured
    networks: float | None = None  # the networks alone, for comparison
    best: float | None = None  # the best peer
    digits: int = 2

    @property
    def is_met(self) -> bool | None:
        """Whether the demand is met; None if it was not measured."""
        return None if self.found is None else self.found <= self.limit


def bars_of_cases(results: Results, checks: Checks) -> list[Bar]:
    """Compute the demands on the cases A, B and C of the stack, in the page's order."""
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
    """Compute the demand on a stack of a very different tissue."""
    what = "mean EPE on another tissue, px"
    return _beside_peers(other, what, "epe_mean", "A", 0.8)


def bar_of_training(seconds: float | None) -> Bar:
    """Compute the demand on the time of train.py."""
    minutes = None if seconds is None else seconds / 60
    return Bar("training, minutes of wall time", "", MINUTES, minutes, digits=1)


def bar_of_distilling(
    without: Mapping[int, float], distilled: Mapping[int, float]
) -> Bar:
    """Compute the demand on `distil`: at most a third of the finetuning.

    Args:
        without: mean EPE by the limit of finetuning steps per stage, for the pyramid
            that was not distilled.
        distilled: the same for the distilled pyramid.
    """
    wanted = EQUAL_EPE * without[max(without)]
    steps = [
        min((limit for limit, epe in epes.items() if epe <= wanted), default=None)
        for epes in (without, distilled)
    ]
    found = None
    if steps[0]:  # else the networks alone are as good, and there is nothing to save
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
    """Compute a demand relative to the error of the best peer."""
    peer, best = results.best_peer(key, family)
    factor_text = f"{factor:g} of " if factor != 1 else ""
    found, networks = (scale * results.mean(m, key, family) for m in (FULL, NETWORKS))
    best *= scale
    return Bar(what, f"{factor_text}{peer}", factor * best, found, networks, best)


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
