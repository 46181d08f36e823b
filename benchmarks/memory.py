"""Peak memory of a call: the GPU's own count, or on a CPU the profiler's book of allocations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], resident: Iterable[Tensor]) -> int:
    """Bytes that tensors take at the peak of ``run``, what lives before it included.

    Args:
        run: called once; call it before to warm up.
        resident: the tensors that live before, each storage counted once. On a GPU the allocator knows them.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in resident}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as book:
        run()
    assert book.profiler is not None
    events = [event for event in book.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return sum(storages.values()) + peak
