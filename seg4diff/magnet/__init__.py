"""MAGNET: mask-aligned low-rank fine-tuning of a transformer's attention (Seg4Diff, section 4.3).

>>> from seg4diff import magnet
>>> result = magnet.train(magnet.read_settings("magnet.toml"))        # doctest: +SKIP
>>> pipe = seg4diff.load_lora(pipe, result.lora)                      # doctest: +SKIP

The modules, in the order in which a run uses them: `settings`, `sources` and `encoding` (images, masks and
captions, encoded once), `adapters` and `objective` (what is trained, on which loss; `losses` and `matching`),
`trainer` and `checkpoints`, `weights` (in and out), `estimate` (memory, without running).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # with `as`, which makes them public to type checkers
    from seg4diff.magnet import losses as losses
    from seg4diff.magnet import matching as matching
    from seg4diff.magnet.estimate import Estimate as Estimate
    from seg4diff.magnet.estimate import estimate_memory as estimate_memory
    from seg4diff.magnet.settings import TrainSettings as TrainSettings
    from seg4diff.magnet.settings import build_settings as build_settings
    from seg4diff.magnet.settings import read_settings as read_settings
    from seg4diff.magnet.trainer import TrainResult as TrainResult
    from seg4diff.magnet.trainer import train as train
    from seg4diff.magnet.weights import load_lora as load_lora
    from seg4diff.magnet.weights import save_lora as save_lora

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
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _PUBLIC[name]:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
