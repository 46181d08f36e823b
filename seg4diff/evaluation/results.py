"""The result of each image, and sums over images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seg4diff.jobs import results_in
from seg4diff.metrics import Counts


@dataclass(frozen=True, eq=False)
class Result:
    """Result for one image.

    Attributes:
        index: position in the data set.
        name: of the image.
        counts: pixels of each class by protocol; empty if no pixel counts or there is a failure.
        boundary: the same of pixels near boundaries, for protocols with names.
        failure: why the image could not be evaluated.
        group: images of the batches that it was in, itself included, since the last bits of its numbers can
            depend on them; 0 for a failure.
        predicted: label map by protocol, uint8 [height, width], of the part that the preset sees; not stored.
    """

    index: int
    name: str
    counts: Mapping[str, Counts] = field(default_factory=dict)
    boundary: Mapping[str, Counts] = field(default_factory=dict)
    failure: str | None = None
    group: int = 0
    predicted: Mapping[str, Tensor] = field(default_factory=dict)

    def to_entry(self) -> dict[str, Any]:
        """What is stored, as JSON can hold it; classes without pixels are left out."""
        entry: dict[str, Any] = {"index": self.index, "name": self.name, "group": self.group}
        if self.failure is not None:
            return {**entry, "failure": self.failure}
        tables = {"counts": self.counts, "boundary": self.boundary}
        return entry | {key: {name: _rows(c) for name, c in table.items()} for key, table in tables.items()}

    @staticmethod
    def from_entry(entry: Mapping[str, Any], classes: int) -> Result:
        """The result of `to_entry`."""
        counts, boundary = (
            {name: _counts(rows, classes) for name, rows in entry.get(key, {}).items()}
            for key in ("counts", "boundary")
        )
        return Result(entry["index"], entry["name"], counts, boundary, entry.get("failure"), entry["group"])


def read_results(folder: Path, classes: int) -> dict[int, Result]:
    """All results in the folder of an evaluation by index."""
    return latest(Result.from_entry(entry, classes) for entry in results_in(folder))


def latest(results: Iterable[Result]) -> dict[int, Result]:
    """Of each image the result of the largest group, and of equal groups the last; by index."""
    found: dict[int, Result] = {}
    for result in results:
        if result.index not in found or result.group >= found[result.index].group:
            found[result.index] = result
    return dict(sorted(found.items()))


def add_up(counts: Iterable[Mapping[str, Counts]]) -> dict[str, Counts]:
    """Sums by protocol; protocols under which nothing was counted are left out."""
    total: dict[str, Counts] = {}
    for by_protocol in counts:
        for name, more in by_protocol.items():
            total[name] = total[name] + more if name in total else more
    return total


def _rows(counts: Counts) -> list[list[int]]:
    table = torch.stack([counts.true_positive, counts.false_positive, counts.false_negative], dim=1)
    return [[c, *table[c].tolist()] for c in table.sum(dim=1).nonzero().flatten().tolist()]


def _counts(rows: list[list[int]], classes: int) -> Counts:
    table = torch.zeros(3, classes, dtype=torch.int64)
    for label, *numbers in rows:
        table[:, label] = torch.tensor(numbers)
    return Counts(*table)
