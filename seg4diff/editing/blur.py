"""The paper's blur of what image tokens read from the text.

A linear change of the image-to-text probabilities P along the text axis is a matrix on the right, and
(P G) V = P (G V): attention itself does not change, and image rows read the text values G V. So such a change
costs one small matrix product per layer, is exact on every backend, and leaves the text rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from seg4diff.attention.observer import attach
from seg4diff.attention.patch import patch_of
from seg4diff.attention.requests import LayerRequest
from seg4diff.backbones import Pipeline
from seg4diff.kernels.types import MapRequest, wide_dtype

Padding = Literal["symmetric", "reflect"]


@dataclass(frozen=True, eq=False)
class Blur:
    """A Gaussian blur of the image-to-text probabilities along the text axis (Seg4Diff, appendix A.3).

    Attributes:
        sigma: standard deviation in text tokens. With the default 9 and a kernel of 5 it is nearly a box.
        kernel_size: number of weights, odd.
        padding: what lies beyond the first and last token. `"symmetric"` is `b a | a b c` and preserves
            every row's mass. `"reflect"` is `c b | a b c` and does not: of 0.8 on the first token and 0.2
            spread over the others, about 0.68 in all are left.
        text: the text columns to blur, a contiguous range; the padding applies at its ends.

    Raises:
        ValueError: sigma is not above 0, the kernel size is not odd, or the padding is unknown.
        TypeError: an argument of another type.
    """

    sigma: float = 9.0
    kernel_size: int = 5
    padding: Padding = "symmetric"
    text: slice = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        if isinstance(self.sigma, bool) or not isinstance(self.sigma, (int, float)):
            raise TypeError(f"sigma={self.sigma!r} must be a number of text tokens")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma={self.sigma!r} must be above 0 (text tokens)")
        if isinstance(self.kernel_size, bool) or not isinstance(self.kernel_size, int):
            raise TypeError(f"kernel_size={self.kernel_size!r} must be an odd integer")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd and at least 1, such as 5")
        if self.padding not in get_args(Padding):
            accepted = ", ".join(map(repr, get_args(Padding)))
            raise ValueError(f"padding={self.padding!r} is unknown; accepted: {accepted}")
        MapRequest(columns=("text", self.text))  # checks the range

    def matrix(
        self, text_length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """G [T, T]: blurred probabilities are P G. The identity outside `text`.

        A row of probabilities p, as a column vector, becomes A p, where row i of A holds the kernel around
        token i with its ends folded back into the range. So G is the transpose of A, which is not A itself
        where the padding is `"reflect"`.
        """
        first, last = MapRequest(columns=("text", self.text)).text_range(text_length)
        length, reach = last - first, self.kernel_size // 2
        offsets = torch.arange(-reach, reach + 1, device=device)
        weights = torch.exp(-(offsets.to(dtype) ** 2) / (2 * self.sigma**2))
        weights = weights / weights.sum()
        position = torch.arange(length, device=device)[:, None] + offsets  # [T', kernel_size]
        if self.padding == "symmetric":
            folded = position.remainder(2 * length)
            folded = torch.where(folded < length, folded, 2 * length - 1 - folded)
        else:
            period = max(2 * (length - 1), 1)
            folded = position.remainder(period)
            folded = torch.where(folded < length, folded, period - folded)
        blur = weights.new_zeros(length, length).scatter_add_(1, folded, weights.expand_as(folded))
        matrix = torch.eye(text_length, dtype=dtype, device=device)
        matrix[first:last, first:last] = blur.T
        return matrix

    def __call__(self, text_value: Tensor) -> Tensor:
        """The text values that blurred image rows read, from the text values [B, T, H, D]."""
        matrix = self.matrix(text_value.shape[1], text_value.device, wide_dtype(text_value.dtype))
        return edited_text_value(matrix, text_value)


def edited_text_value(matrix: Tensor, text_value: Tensor) -> Tensor:
    """G V, rounded once: `matrix` [T, T] or [B, T, T] times `text_value` [B, T, H, D], in its dtype."""
    wide = wide_dtype(text_value.dtype)
    with torch.autocast(text_value.device.type, enabled=False):
        edited = matrix.to(wide) @ text_value.flatten(2).to(wide)
    return edited.unflatten(2, text_value.shape[2:]).to(text_value.dtype)


@contextmanager
def perturb(
    target: Pipeline | nn.Module,
    layers: Sequence[int] | int | None,
    *,
    sigma: float = 9.0,
    kernel_size: int = 5,
    padding: Padding = "symmetric",
    text: slice = slice(None),
) -> Iterator[None]:
    """Blur the image-to-text attention of some layers while a pipeline or a transformer runs.

    Applies after the softmax, to all rows (both branches under classifier-free guidance). Contexts nest:
    layers of several are changed by each in the order they were opened. Maps and statistics captured
    meanwhile are those of the softmax, before the blur, so only layers after the first blurred one feel it.
    The model is stock again when the context ends, also after an exception.

    Args:
        target: a pipeline or transformer.
        layers: the layers to blur; the paper takes one at a time. None for all.
        sigma, kernel_size, padding, text: see `Blur`; by default the paper's values on all text
            columns, with a padding that preserves the mass, as its text says.

    Raises:
        NotImplementedError, TypeError: `target` is not of a supported model family.
        ValueError: a layer out of range, sigma, kernel size or padding that is not accepted; when the model
            runs, `text` outside its text tokens.
    """
    blur = Blur(sigma, kernel_size, padding, text)
    with attach(target, patch_of(target).layers(layers), LayerRequest(edit_text_value=blur)):
        yield
