"""AdamW, with 32-bit or 8-bit states, and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from seg4diff.training.settings import OptimizerSettings


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
    return torch.optim.AdamW(weights, **arguments)


def learning_rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of step ``step`` of ``steps``: linear warm-up, then half a cosine down to zero."""
    warm_up = min(settings.warm_up, steps)
    if step < warm_up:
        return settings.learning_rate * (step + 1) / warm_up
    share = (step - warm_up) / max(1, steps - warm_up)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))
