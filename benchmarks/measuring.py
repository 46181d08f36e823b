"""Time as a ratio against rivals in the same run: variants take turns, medians are compared.

The variant of interest is timed by pytest-benchmark; its rivals run between its rounds, so that whatever the
machine does meanwhile happens to all of them.
"""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch


def synchronize() -> None:
    """Wait until the GPU, if there is one, is done: a host clock means nothing before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(
    benchmark: Any, ours: Callable[[], object], rivals: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, float]:
    """Time ``ours`` and its rivals in turns.

    Args:
        benchmark: the fixture of pytest-benchmark; ``extra_info`` receives medians, ratios and versions.
        ours: what is to be measured.
        rivals: name -> what it is measured against.
        rounds: how often each runs, after one run to warm up.

    Returns:
        Median seconds, under the names of the rivals and ``"ours"``.
    """
    times: dict[str, list[float]] = {name: [] for name in ("ours", *rivals)}

    def timed(name: str, run: Callable[[], object]) -> None:
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        times[name].append(time.perf_counter() - started)

    def rivals_first() -> None:
        # In another order each round: who frees gigabytes slows down whoever comes next.
        order = deque(rivals.items())
        order.rotate(len(times["ours"]))
        for name, run in order:
            timed(name, run)

    for run in (ours, *rivals.values()):
        run()
    benchmark.pedantic(lambda: timed("ours", ours), setup=rivals_first, rounds=rounds, iterations=1)
    medians = {name: median(seconds) for name, seconds in times.items()}
    gpu = torch.cuda.is_available()
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name()
        if gpu
        else f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
        torch=torch.__version__,
        milliseconds={name: round(1e3 * seconds, 3) for name, seconds in medians.items()},
        ratio={f"ours / {name}": round(medians["ours"] / medians[name], 3) for name in rivals},
    )
    return medians
