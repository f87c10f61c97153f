"""What the bench found, by ours and by the peers, on the same cases."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metroem.errors import DatasetError

# Our methods: the function of bench_adapter.py, and what it is.
METHODS = {
    "metroem": ("align", "MetroEM"),
    "metroem_networks": ("networks", "MetroEM, networks alone"),
    "metroem_stage0": ("first_stage", "MetroEM, stage 0 alone"),
    # What the finetuner does by itself: the rest is what training gives.
    "metroem_untrained": ("untrained", "MetroEM untrained, finetuned"),
}
FULL, NETWORKS, STAGE0, UNTRAINED = METHODS
NONE = "identity"
UNWARPED = "00px"  # B's pairs as they came: their true field is exactly 0
Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What the bench wrote.

    Attributes:
        meta: of the run.
        records: one a method and case.
        failed: peers that are left out.
    """

    meta: dict[str, Any]
    records: tuple[Record, ...]
    failed: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a results file; a peer that failed in any case is left out.

        Raises:
            DatasetError: no such file, or one of ours failed.
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
        """These results and those of the peers on the same cases.

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
        """The methods that are neither ours nor no alignment."""
        return [m for m in self.methods if m != NONE and m not in METHODS]

    def of(self, method: str, families: str, label: str | None = None) -> list[Record]:
        """The records of a method; those of B's unwarped pairs only by label."""
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
        """Mean of a figure over the cases that have it; NaN where none has."""
        found = [r[key] for r in self.of(method, families, label) if key in r]
        return statistics.fmean(found) if found else float("nan")

    def best_peer(self, key: str, families: str) -> tuple[str, float]:
        """The peer with the smallest mean, and that mean."""
        means = {peer: self.mean(peer, key, families) for peer in self.peers}
        best = min(means, key=means.__getitem__)
        return best, means[best]

    def worse_than_none(self, method: str, families: str = "ABC") -> list[str]:
        """Cases that a method leaves further off than no alignment does."""
        none = {r["case"]: r["epe_mean"] for r in self.of(NONE, families)}
        return [
            record["case"]
            for record in self.of(method, families)
            if not record["epe_mean"] <= none[record["case"]]
        ]
