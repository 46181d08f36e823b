"""Model families: what the rest of the library must know of a transformer, one file a family.

A new family is one new file here that offers a :class:`Backbone`, and one line in ``_FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from seg4diff.tokens import TextEncoding

# transformer class -> file of this folder; resolved by name so that diffusers loads only when it is needed
_FAMILIES = {"SD3Transformer2DModel": "sd3"}
_PLANNED = ("FluxTransformer2DModel", "Flux2Transformer2DModel")


@dataclass(frozen=True)
class CallInputs:
    """What a transformer call was given.

    Attributes:
        grid: height and width of the image tokens.
        text_length: number T of text tokens.
        batch: number of rows.
        timestep: one a row, or one for all; None if not given.
        skipped_layers: layers that are left out.
    """

    grid: tuple[int, int]
    text_length: int
    batch: int
    timestep: Tensor | None
    skipped_layers: frozenset[int]


class Backbone(Protocol):
    """One model family. All methods are stateless; ``transformer`` is the diffusers model."""

    @property
    def name(self) -> str: ...

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """Transformer blocks with joint attention, in the order they run; the index is the layer."""
        ...

    def joint_attention(self, block: nn.Module) -> nn.Module:
        """The attention module of ``block`` that joins image and text tokens."""
        ...

    def unneeded_for_maps(self, block: nn.Module) -> Mapping[str, nn.Module]:
        """Submodules of ``block``, by attribute name, whose output its I2T map does not depend on."""
        ...

    def read_call(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> CallInputs: ...

    def stop_after(self, transformer: nn.Module, kwargs: dict[str, Any], layer: int) -> dict[str, Any]:
        """Arguments that make a forward of ``transformer`` leave out the blocks after ``layer``."""
        ...

    def expert_layers(self, transformer: nn.Module) -> tuple[int, ...]:
        """The layers whose I2T maps segment best: from the model's metadata, else measured for this family.

        Raises:
            ValueError: nothing is known for this model.
        """
        ...

    def check_supported(self, transformer: nn.Module) -> None:
        """Raise ValueError, with the remedy, if ``transformer`` is in a state that cannot be patched."""
        ...

    def latents(self, pipe: Any, pixels: Tensor) -> Tensor:
        """Clean latents (posterior mean, scaled) of pictures [B, 3, height, width] in [-1, 1]."""
        ...

    def add_noise(
        self, pipe: Any, latents: Tensor, noise: Tensor, steps: int, index: int
    ) -> tuple[Tensor, Tensor]:
        """Noisy latents and timestep [1] at position ``index`` of a schedule of ``steps`` steps."""
        ...

    def encode_text(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """Transformer arguments that stand for ``prompts``, first axis len(prompts)."""
        ...

    def text_encodings(self, pipe: Any, text_length: int) -> tuple[TextEncoding, ...]:
        """The text encoders whose tokens make up the ``text_length`` text tokens, in their order."""
        ...

    def pixel_multiple(self, pipe: Any) -> int:
        """Pixels a token covers along each axis; sizes are multiples of it."""
        ...

    def native_size(self, pipe: Any) -> int:
        """Side in pixels of the square picture the model was made for."""
        ...

    def largest_size(self, pipe: Any) -> int:
        """Largest side in pixels that the position embedding covers."""
        ...


def transformer_of(target: Any) -> nn.Module:
    """The transformer of a pipeline, or ``target`` itself; wrappers of ``torch.compile`` are opened.

    Raises:
        TypeError: ``target`` is neither.
    """
    transformer = getattr(target, "transformer", None)
    if transformer is None:
        transformer = target
    transformer = getattr(transformer, "_orig_mod", transformer)
    if not isinstance(transformer, nn.Module):
        raise TypeError(
            f"{type(target).__name__} is not a diffusers pipeline with a transformer, nor a transformer; "
            f"supported: pipelines of {', '.join(_FAMILIES)}"
        )
    return transformer


def find_backbone(target: Any) -> Backbone:
    """The model family of a pipeline or transformer.

    Raises:
        TypeError: ``target`` has no transformer.
        NotImplementedError: its family is not supported; the message names it.
    """
    transformer = transformer_of(target)
    for cls in type(transformer).__mro__:
        if cls.__name__ in _FAMILIES:
            return import_module(f"{__name__}.{_FAMILIES[cls.__name__]}").BACKBONE
    name = type(transformer).__name__
    planned = " (planned, not built yet)" if name in _PLANNED else ""
    raise NotImplementedError(
        f"{name} is not supported{planned}; supported: {', '.join(_FAMILIES)} (SD3, SD3.5)"
    )
