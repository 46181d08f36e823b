"""See, use and train what a text-to-image transformer attends to."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # with `as`, which makes them public to type checkers
    from seg4diff import demo as demo
    from seg4diff.analysis import analyze as analyze
    from seg4diff.analysis import rank_layers as rank_layers
    from seg4diff.analysis.rank_layers import Ranking as Ranking
    from seg4diff.analysis.report import AnalysisReport as AnalysisReport
    from seg4diff.analysis.report import Measures as Measures
    from seg4diff.attention.capture import Capture as Capture
    from seg4diff.attention.capture import Record as Record
    from seg4diff.attention.capture import capture as capture
    from seg4diff.attention.patch import is_patched as is_patched
    from seg4diff.attention.patch import patch as patch
    from seg4diff.attention.patch import unpatch as unpatch
    from seg4diff.backbones import Pipeline as Pipeline
    from seg4diff.backbones.text import Special as Special
    from seg4diff.editing.blur import Blur as Blur
    from seg4diff.editing.blur import perturb as perturb
    from seg4diff.editing.guidance import guide as guide
    from seg4diff.editing.words import edit as edit
    from seg4diff.kernels.types import MapRequest as MapRequest
    from seg4diff.loading import load_pipeline as load_pipeline
    from seg4diff.lora.files import load_lora as load_lora
    from seg4diff.segmentation.discover import discover as discover
    from seg4diff.segmentation.instances import Instances as Instances
    from seg4diff.segmentation.regions import segment_unsupervised as segment_unsupervised
    from seg4diff.segmentation.result import Segmentation as Segmentation
    from seg4diff.segmentation.zero_shot import segment as segment

    __version__: str

# name -> module that defines it; loaded on first use, so that `import seg4diff` stays light
_PUBLIC = {
    "AnalysisReport": "seg4diff.analysis.report",
    "Blur": "seg4diff.editing.blur",
    "Capture": "seg4diff.attention.capture",
    "Instances": "seg4diff.segmentation.instances",
    "MapRequest": "seg4diff.kernels.types",
    "Measures": "seg4diff.analysis.report",
    "Pipeline": "seg4diff.backbones",
    "Ranking": "seg4diff.analysis.rank_layers",
    "Record": "seg4diff.attention.capture",
    "Segmentation": "seg4diff.segmentation.result",
    "Special": "seg4diff.backbones.text",
    "analyze": "seg4diff.analysis",
    "capture": "seg4diff.attention.capture",
    "demo": "",
    "discover": "seg4diff.segmentation.discover",
    "edit": "seg4diff.editing.words",
    "guide": "seg4diff.editing.guidance",
    "is_patched": "seg4diff.attention.patch",
    "load_lora": "seg4diff.lora.files",
    "load_pipeline": "seg4diff.loading",
    "patch": "seg4diff.attention.patch",
    "perturb": "seg4diff.editing.blur",
    "rank_layers": "seg4diff.analysis",
    "segment": "seg4diff.segmentation.zero_shot",
    "segment_unsupervised": "seg4diff.segmentation.regions",
    "unpatch": "seg4diff.attention.patch",
}
__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # as of the installed package

        return version(__name__)
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _PUBLIC[name]
    return getattr(import_module(module), name) if module else import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
