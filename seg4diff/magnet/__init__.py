"""MAGNET: mask-aligned low-rank fine-tuning of a transformer's attention (Seg4Diff, section 4.3).

>>> from seg4diff import magnet
>>> result = magnet.train(magnet.read_settings("magnet.toml"))        # doctest: +SKIP
>>> pipe = seg4diff.load_lora(pipe, result.lora)                      # doctest: +SKIP

The files, in the order in which a run meets them: ``settings`` (what it is told), ``sources`` and
    ``encoding`` (pictures, masks and captions, encoded once), ``adapters`` and ``objective`` (what is
    trained, on which loss; ``losses`` and ``matching`` below it), ``trainer`` and ``checkpoints``,
    ``weights`` (in and out), ``estimate`` (memory, without running).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seg4diff.magnet import losses, matching
    from seg4diff.magnet.estimate import Estimate, estimate_memory
    from seg4diff.magnet.settings import TrainSettings, build_settings, read_settings
    from seg4diff.magnet.trainer import TrainResult, train
    from seg4diff.magnet.weights import load_lora, save_lora

# name -> module that defines it ("" for a module itself); loaded on first use
_PUBLIC = {
    "Estimate": "estimate",
    "TrainResult": "trainer",
    "TrainSettings": "settings",
    "build_settings": "settings",
    "estimate_memory": "estimate",
    "load_lora": "weights",
    "losses": "",
    "matching": "",
    "read_settings": "settings",
    "save_lora": "weights",
    "train": "trainer",
}
__all__ = [
    "Estimate",
    "TrainResult",
    "TrainSettings",
    "build_settings",
    "estimate_memory",
    "load_lora",
    "losses",
    "matching",
    "read_settings",
    "save_lora",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _PUBLIC[name]:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
