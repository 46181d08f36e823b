"""Results of an evaluation, picture by picture, on disk as they come, and their sum.

A line of JSON for each picture, in one file for each process. Lines are small (only what was counted), so
that a run that was killed goes on where it stopped, on as many processes as one likes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seg4diff.data.prefetch import Failure
from seg4diff.files import no_space
from seg4diff.metrics import Counts, Rates, counts_of, rates_of

logger = logging.getLogger(__name__)

_FILES = "results-*.jsonl"


@dataclass(frozen=True, eq=False)
class Tally:
    """What was counted in one picture under one protocol.

    Attributes:
        confusion: int64 [classes, labels], sparse for one picture and dense for a sum; None where regions
            were matched with classes instead.
        matched: counts of matched regions, None where there is a confusion matrix.
        boundary: counts near boundaries, None if not counted.
    """

    confusion: Tensor | None = None
    matched: Counts | None = None
    boundary: Counts | None = None

    @property
    def counts(self) -> Counts:
        if self.confusion is not None:
            return counts_of(self.confusion.to_dense())
        assert self.matched is not None
        return self.matched

    def __add__(self, other: Tally) -> Tally:
        def total(mine: Any, theirs: Any) -> Any:
            return theirs if mine is None else mine if theirs is None else mine + theirs

        def dense(confusion: Tensor | None) -> Tensor | None:
            return None if confusion is None else confusion.to_dense()

        return Tally(
            total(dense(self.confusion), dense(other.confusion)),
            total(self.matched, other.matched),
            total(self.boundary, other.boundary),
        )

    @property
    def rates(self) -> Rates:
        return rates_of(self.counts, self.boundary)


@dataclass(frozen=True, eq=False)
class Result:
    """What became of one picture.

    Attributes:
        index: position in the data set.
        name: of the sample.
        tallies: by protocol; empty if no pixel counts, or ``failure`` is given.
        failure: why the picture could not be evaluated.
        group: how many pictures were evaluated together with it, itself included; its numbers can depend on
            that in their last bits.
    """

    index: int
    name: str
    tallies: Mapping[str, Tally] = field(default_factory=dict)
    failure: str | None = None
    group: int = 1

    def to_line(self) -> str:
        """One line of JSON."""
        entry: dict[str, Any] = {"index": self.index, "name": self.name, "group": self.group}
        if self.failure is not None:
            entry["failure"] = self.failure
        for protocol, tally in self.tallies.items():
            kept: dict[str, Any] = {}
            if tally.confusion is not None:
                counted = tally.confusion.to_dense().to_sparse()
                kept["shape"] = list(counted.shape)
                kept["confusion"] = torch.cat([counted.indices(), counted.values()[None]]).T.tolist()
            if tally.matched is not None:
                kept["matched"] = _sparse(tally.matched)
            if tally.boundary is not None:
                kept["boundary"] = _sparse(tally.boundary)
            entry.setdefault("tallies", {})[protocol] = kept
        return json.dumps(entry, separators=(",", ":"), ensure_ascii=False)

    @staticmethod
    def from_line(line: str, classes: int) -> Result:
        """The result that :meth:`to_line` wrote.

        Raises:
            ValueError, KeyError, TypeError, IndexError, RuntimeError: the line is damaged.
        """
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise TypeError(f"{line!r} is no result")
        tallies = {}
        for protocol, kept in entry.get("tallies", {}).items():
            confusion = None
            if "confusion" in kept:
                rows, columns, pixels = torch.tensor(kept["confusion"], dtype=torch.int64).reshape(-1, 3).T
                confusion = torch.zeros(kept["shape"], dtype=torch.int64)
                confusion[rows, columns] = pixels
                confusion = confusion.to_sparse()
            tallies[protocol] = Tally(
                confusion,
                _dense(kept["matched"], classes) if "matched" in kept else None,
                _dense(kept["boundary"], classes) if "boundary" in kept else None,
            )
        return Result(
            int(entry["index"]), str(entry["name"]), tallies, entry.get("failure"), int(entry["group"])
        )


def read_results(folder: Path, classes: int) -> dict[int, Result]:
    """All results in a folder by index, of a picture evaluated more than once the one to keep.

    Lines that were cut off while they were written are left out.
    """
    found: dict[int, Result] = {}
    for path in sorted(folder.glob(_FILES)):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if not line.strip():
                continue
            try:
                result = Result.from_line(line, classes)
            except (ValueError, KeyError, TypeError, IndexError, RuntimeError):
                logger.warning("line %d of %s was cut off; that picture is evaluated again", number, path)
                continue
            found[result.index] = preferred(found.get(result.index), result)
    return found


def preferred(known: Result | None, other: Result) -> Result:
    """Of two results of one picture that of the larger group, and then the one without failure."""
    if known is None or other.group > known.group:
        return other
    return other if other.group == known.group and known.failure is not None else known


def append_results(folder: Path, process: int, results: Iterable[Result]) -> None:
    """Add results to the file of a process, and wait until they are on the disk.

    Raises:
        OSError: they cannot be written; the message says that earlier results are kept.
    """
    path = folder / f"results-{process:05d}.jsonl"
    text = "".join(result.to_line() + "\n" for result in results)
    try:
        cut_off = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n" + text if cut_off else text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise no_space(error, path) from error


def remove_results(folder: Path) -> None:
    """Forget all results in a folder."""
    for path in folder.glob(_FILES):
        path.unlink()


def add_up(results: Iterable[Result], protocols: Sequence[str]) -> dict[str, Tally]:
    """Tallies of all pictures by protocol; protocols under which nothing was counted are left out."""
    total: dict[str, Tally] = {}
    for result in results:
        for protocol in protocols:
            if protocol in result.tallies:
                total[protocol] = total.get(protocol, Tally()) + result.tallies[protocol]
    return total


def failures_of(results: Iterable[Result]) -> tuple[Failure, ...]:
    """The pictures that could not be evaluated, by position."""
    failed = [r for r in results if r.failure is not None]
    return tuple(
        Failure(r.index, r.name, r.failure or "") for r in sorted(failed, key=lambda result: result.index)
    )


def _sparse(counts: Counts) -> list[list[int]]:
    table = torch.stack([counts.true_positive, counts.false_positive, counts.false_negative], dim=1)
    return [[c, *table[c].tolist()] for c in table.sum(dim=1).nonzero().flatten().tolist()]


def _dense(entries: list[list[int]], classes: int) -> Counts:
    table = torch.zeros(3, classes, dtype=torch.int64)
    for label, *numbers in entries:
        table[:, label] = torch.tensor(numbers)
    return Counts(*table)
