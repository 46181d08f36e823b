"""Time as a ratio against rivals in the same run: variants take turns, medians are compared."""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median

import torch


def synchronize() -> None:
    """Wait until the GPU, if there is one, is done: a host clock means nothing before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name() -> str:
    """The GPU's name, or the CPU's architecture and the threads that PyTorch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()} {torch.get_num_threads()} threads"


def compare(
    ours: Callable[[], object], rivals: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, float]:
    """Time ``ours`` and its rivals in turns, and print the medians.

    Args:
        ours: what is to be measured.
        rivals: name -> what it is measured against.
        rounds: how often each runs, after one run to warm up.

    Returns:
        Median seconds, under the names of the rivals and ``"ours"``.
    """
    runs = {"ours": ours, **rivals}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for turn in range(rounds):
        # In another order each round: who frees gigabytes slows down whoever comes next.
        order = deque(runs.items())
        order.rotate(turn)
        for name, run in order:
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            times[name].append(time.perf_counter() - started)
    medians = {name: median(seconds) for name, seconds in times.items()}
    shown = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in medians.items())
    print(f"\n{device_name()}, median of {rounds}: {shown}")
    return medians
