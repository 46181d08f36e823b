"""MAGNET: mask-aligned low-rank fine-tuning of a transformer's attention (Seg4Diff, section 4.3).

>>> from seg4diff import training
>>> result = training.train(training.read_settings("magnet.toml"))    # doctest: +SKIP
>>> pipe = seg4diff.load_lora(pipe, result.lora)                      # doctest: +SKIP

The modules, in the order in which a run uses them: `settings`; `data` (images, masks and captions, encoded
once); `objective` (the losses and what they are computed from); `trainer`, `optimizers` and `checkpoints`;
`tracking` (what a run shows of itself); `memory` (an estimate, without running). The adapters are in
`seg4diff.lora`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # with `as`, which makes them public to type checkers
    from seg4diff.training.memory import Estimate as Estimate
    from seg4diff.training.memory import estimate_memory as estimate_memory
    from seg4diff.training.run import TrainResult as TrainResult
    from seg4diff.training.settings import TrainSettings as TrainSettings
    from seg4diff.training.settings import build_settings as build_settings
    from seg4diff.training.settings import read_settings as read_settings
    from seg4diff.training.trainer import train as train

# name -> module that defines it; loaded on first use
_PUBLIC = {
    "Estimate": "memory",
    "TrainResult": "run",
    "TrainSettings": "settings",
    "build_settings": "settings",
    "estimate_memory": "memory",
    "read_settings": "settings",
    "train": "trainer",
}
__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
