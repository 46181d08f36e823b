"""Model families: what the rest of the library must know of a transformer, one file per family.

A new family is one new file here that offers a `BACKBONE`; nothing else has to name it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from seg4diff.backbones.base import Backbone, BlockList, EncodedText, Layout, Pipeline, TransformerCall
from seg4diff.backbones.refused import REFUSED

__all__ = [
    "Backbone",
    "BlockList",
    "EncodedText",
    "Layout",
    "Pipeline",
    "TransformerCall",
    "families",
    "find_backbone",
    "transformer_of",
]


@cache
def families() -> tuple[Backbone, ...]:
    """All model families, ordered by the names of their files."""
    modules = (import_module(f"{__name__}.{entry.name}") for entry in iter_modules(__path__))
    return tuple(module.BACKBONE for module in modules if hasattr(module, "BACKBONE"))


def transformer_of(target: Pipeline | nn.Module) -> nn.Module:
    """The transformer of a pipeline, or `target` itself; wrappers of `torch.compile` are opened.

    Raises:
        TypeError: `target` is neither.
    """
    transformer = getattr(target, "transformer", None)
    if transformer is None:
        transformer = target
    transformer = getattr(transformer, "_orig_mod", transformer)
    if not isinstance(transformer, nn.Module):
        raise TypeError(
            f"{type(target).__name__} is not a diffusers pipeline with a transformer, nor a transformer; "
            f"supported: pipelines of {_supported()}"
        )
    return transformer


def find_backbone(target: Pipeline | nn.Module) -> Backbone:
    """The model family of a pipeline or transformer.

    Raises:
        TypeError: `target` has no transformer.
        NotImplementedError: its family is not supported; the message names it and, where known, the reason.
    """
    transformer = transformer_of(target)
    reason = None
    for cls in type(transformer).__mro__:
        for backbone in families():
            if cls.__name__ == backbone.transformer:
                return backbone
        reason = reason or REFUSED.get(cls.__name__)
    because = "" if reason is None else f": {reason}"
    raise NotImplementedError(
        f"{type(transformer).__name__} is not supported{because}; supported: {_supported()}"
    )


def _supported() -> str:
    return ", ".join(f"{backbone.name} ({backbone.transformer})" for backbone in families())
