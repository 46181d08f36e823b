"""AdamW in the variants that trade time for memory, and its learning rate.

Called by the trainer and, for its sizes, by the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from seg4diff.magnet.settings import OptimizerSettings


def make_optimizer(weights: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that the settings name.

    Raises:
        ImportError: 8-bit states are asked for and bitsandbytes is missing.
    """
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw8bit":
        import bitsandbytes.optim as quantised

        optimizer: torch.optim.Optimizer = quantised.AdamW8bit(weights, **arguments)
        return optimizer
    if settings.offload:
        return OffloadedAdamW(weights, **arguments)
    return torch.optim.AdamW(weights, **arguments)


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW that keeps its states, and does its step, on the CPU.

    Gradients travel to the CPU and new weights back; the arithmetic is that of AdamW on the CPU.
    """

    def __init__(self, weights: list[nn.Parameter], **arguments: Any) -> None:
        self._trained = weights
        super().__init__([nn.Parameter(weight.detach().cpu().clone()) for weight in weights], **arguments)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("closure is given, but this optimizer takes gradients as they are")
        mine = self.param_groups[0]["params"]
        for copy, weight in zip(mine, self._trained, strict=True):
            copy.data.copy_(weight.data)
            copy.grad = None if weight.grad is None else weight.grad.to("cpu")
        super().step()
        for copy, weight in zip(mine, self._trained, strict=True):
            weight.data.copy_(copy.data)
            copy.grad = None


def learning_rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of step ``step`` of ``steps``: linear warm-up, then half a cosine down to zero."""
    warm_up = min(settings.warm_up, steps)
    if step < warm_up:
        return settings.learning_rate * (step + 1) / warm_up
    share = (step - warm_up) / max(1, steps - warm_up)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))
