"""Where the time of an evaluation goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_PARTS = {
    "text encoders": ("text_encoder", "text_encoder_2", "text_encoder_3"),
    "transformer": ("transformer",),
}


class StageClock:
    """Seconds of each stage, which do not overlap: a stage inside another stops the outer one's clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time spent in the context goes to ``name``."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        self._settle()
        self._running.append(name)

    def leave(self) -> None:
        self._settle()
        if self._running:
            self._running.pop()

    def _settle(self) -> None:
        """Give the time since the last change to the innermost stage, once a GPU has done its work."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


@contextmanager
def timed_parts(pipe: Any, clock: StageClock) -> Iterator[None]:
    """Time the calls of a pipeline's text encoders, VAE encoder and transformer inside the context."""
    parts: list[tuple[str, nn.Module]] = [
        (stage, part)
        for stage, names in _PARTS.items()
        for name in names
        if isinstance(part := getattr(pipe, name, None), nn.Module)
    ]
    parts.append(("VAE", pipe.vae.encoder))
    handles = []
    try:
        for stage, part in parts:
            handles.append(part.register_forward_pre_hook(lambda *_, stage=stage: clock.enter(stage)))
            handles.append(part.register_forward_hook(lambda *_: clock.leave(), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
