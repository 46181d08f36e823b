"""From a kernel's arguments to its launch, on the device the tensors are on."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..types import STREAMS, Inputs
from .primitives import Strided
from .tuning import Config

# Offsets of tokens from the first are 32-bit, and a tile, whose last tokens may not exist, has at most 256.
_LARGEST_OFFSET = 2**31
_LARGEST_TILE = 256


@dataclass(frozen=True)
class Launch:
    """A kernel, how many programs run it, its arguments by name, and its configuration.

    An object rather than a call, so that the host code can be asked what it *would* launch: the compile test
    and the tuning sweep replace :meth:`start`.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    config: Config

    def start(self) -> None:
        """Launch on the current stream of the device that the tensors are on."""
        tensors = [value.data for value in self.arguments.values() if isinstance(value, Strided)]
        device = next(tensor.device for tensor in tensors if tensor is not None)
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with guard:
            self.kernel[(self.programs,)](**self.arguments, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": True}
        if self.config.registers is not None:
            options["maxnreg"] = self.config.registers
        return options


def readable(tensor: Tensor) -> Tensor:
    """The tensor if the kernels can read its layout, [B, tokens, H, D] at any strides but the last; else a
    copy, which is contiguous as [B, H, tokens, D].

    A head vector must be contiguous, and the tokens of a head close enough for 32-bit offsets.
    """
    if tensor.stride(3) == 1 and max(tensor.shape[1], _LARGEST_TILE) * tensor.stride(1) < _LARGEST_OFFSET:
        return tensor
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def readable_inputs(inputs: Inputs) -> Inputs:
    """All tensors :func:`readable`."""
    tensors = dict(zip(STREAMS, inputs.tensors(), strict=True))
    bias = inputs.text_bias
    return dataclasses.replace(
        inputs,
        **{name: readable(tensor) for name, tensor in tensors.items() if tensor is not None},
        text_bias=None if bias is None else bias.contiguous(),
    )


def strided(tensor: Tensor | None) -> Strided:
    """A tensor [B, tokens, H, ...] as a kernel's argument; None for one that the kernel will not read.

    Axes of length one get stride 0: PyTorch leaves theirs arbitrary, and each would be a new specialisation.
    """
    if tensor is None:
        return Strided(None, 0, 0, 0)
    return Strided(tensor, *(tensor.stride(axis) if tensor.shape[axis] > 1 else 0 for axis in range(3)))


def strided_bias(bias: Tensor | None) -> Strided:
    """The same for the bias of the text columns [B, T], one for all heads."""
    return strided(None if bias is None else bias.unsqueeze(2))


def strided_by_head(tensor: Tensor | None) -> Strided:
    """The same for a tensor [B, H, tokens, ...]."""
    return strided(None if tensor is None else tensor.transpose(1, 2))
