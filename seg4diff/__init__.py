"""See, use and train what a text-to-image transformer attends to."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seg4diff import demo
    from seg4diff.analysis import analyze, expert_layers
    from seg4diff.capturing import Capture, Record, capture
    from seg4diff.guidance import guide
    from seg4diff.kernels.types import MapRequest
    from seg4diff.magnet.weights import load_lora
    from seg4diff.patching import is_patched, patch, unpatch
    from seg4diff.perturbation import edit, perturb
    from seg4diff.segmentation import Segmentation, segment
    from seg4diff.segmentation.unsupervised import segment_unsupervised

# name -> module that defines it; loaded on first use, so that `import seg4diff` stays light
_PUBLIC = {
    "Capture": "seg4diff.capturing",
    "MapRequest": "seg4diff.kernels.types",
    "Record": "seg4diff.capturing",
    "Segmentation": "seg4diff.segmentation",
    "analyze": "seg4diff.analysis",
    "capture": "seg4diff.capturing",
    "demo": "",
    "edit": "seg4diff.perturbation",
    "expert_layers": "seg4diff.analysis",
    "guide": "seg4diff.guidance",
    "is_patched": "seg4diff.patching",
    "load_lora": "seg4diff.magnet.weights",
    "load_pipeline": "seg4diff.loading",
    "patch": "seg4diff.patching",
    "perturb": "seg4diff.perturbation",
    "segment": "seg4diff.segmentation",
    "segment_unsupervised": "seg4diff.segmentation.unsupervised",
    "unpatch": "seg4diff.patching",
}
__all__ = [
    "Capture",
    "MapRequest",
    "Record",
    "Segmentation",
    "analyze",
    "capture",
    "demo",
    "edit",
    "expert_layers",
    "guide",
    "is_patched",
    "load_lora",
    "patch",
    "perturb",
    "segment",
    "segment_unsupervised",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _PUBLIC[name]
    return getattr(import_module(module), name) if module else import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
