"""Who computes the attention of which shape: a table of measurements, ours and those of this machine's user.

No entry is a guess: what nobody measured is computed by our own kernels. ``seg4diff kernels tune`` measures
on a GPU and writes the user's table. A process reads it once, when the kernels are imported; no forward
measures.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

_FARTHEST = 2.0
"""A measurement serves token counts up to this factor away, and no farther than half-way to the next."""


@dataclass(frozen=True)
class Row:
    """The fastest providers of one shape, in 16-bit precision.

    Attributes:
        architecture: such as ``"sm_90"``, or AMD's name of it.
        head_dim: D.
        tokens: N + T.
        forward: fastest without gradients, the name of a provider or ``"triton"``.
        training: fastest in forward and backward together.
        evidence: device, versions and median milliseconds by provider; for the reader.

    Raises:
        ValueError: a field is not what it should be.
    """

    architecture: str
    head_dim: int
    tokens: int
    forward: str
    training: str
    evidence: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("architecture", "forward", "training"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a name")
        for name in ("head_dim", "tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive integer")
        if not isinstance(self.evidence, dict):
            raise ValueError(f"evidence={self.evidence!r} is not an object")

    @property
    def shape(self) -> tuple[str, int, int]:
        return self.architecture, self.head_dim, self.tokens


COMMITTED: tuple[Row, ...] = ()
"""Nothing has been measured on a GPU yet."""


def user_table() -> Path:
    """Where the measurements of this user are, in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "seg4diff" / "attention.json"


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a table; none where there is no file.

    Raises:
        ValueError: the file is damaged; the message names it and what is wrong.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("version") != 1:
            raise ValueError('"version" is not 1')
        return tuple(Row(**row) for row in content["rows"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} is not a table of measured attention ({error}); delete it and run "
            "`seg4diff kernels tune` again"
        ) from error


def with_rows(old: Iterable[Row], new: Iterable[Row]) -> tuple[Row, ...]:
    """All rows, in order; a new one replaces an old one of the same shape."""
    rows = {row.shape: row for row in (*old, *new)}
    return tuple(rows[shape] for shape in sorted(rows))


def as_text(rows: Iterable[Row]) -> str:
    """The content of a file that :func:`read_rows` reads."""
    return json.dumps({"version": 1, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"


Ranges = dict[tuple[str, int], tuple[tuple[float, float, str, str], ...]]


def ranges_of(rows: Iterable[Row]) -> Ranges:
    """For an architecture and a head dim: from how many tokens to how many, forward and training provider."""
    by_kind: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.shape):
        by_kind.setdefault((row.architecture, row.head_dim), []).append(row)
    found: Ranges = {}
    for kind, group in by_kind.items():
        between = [math.sqrt(a.tokens * b.tokens) for a, b in pairwise(group)]
        lows, highs = [0.0, *between], [*between, math.inf]
        found[kind] = tuple(
            (max(low, row.tokens / _FARTHEST), min(high, row.tokens * _FARTHEST), row.forward, row.training)
            for low, high, row in zip(lows, highs, group, strict=True)
        )
    return found


def _load() -> tuple[Row, ...]:
    try:
        return with_rows(COMMITTED, read_rows(user_table()))
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: there is no home
        log.warning("measurements of attention are ignored: %s", error)
        return COMMITTED


TABLE = ranges_of(_load())


@functools.cache
def architecture(device: torch.device) -> str | None:
    """Of a GPU; None for other devices."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def fastest(device: torch.device, head_dim: int, tokens: int, training: bool) -> str | None:
    """The provider measured fastest for such a shape, or None where nothing near it was measured."""
    if not TABLE:
        return None
    for low, high, forward, with_backward in TABLE.get((architecture(device) or "", head_dim), ()):
        if low <= tokens <= high:
            return with_backward if training else forward
    return None


def summary(device: torch.device) -> str | None:
    """What the table changes on a device, a line; None where it changes nothing."""
    lines = [
        f"head dim {head_dim}, {low:.0f} to {high:.0f} tokens: {forward}, training {training}"
        for (name, head_dim), ranges in TABLE.items()
        for low, high, forward, training in ranges
        if name == architecture(device) and (forward, training) != ("triton", "triton")
    ]
    return "; ".join(lines) or None
