"""PyTorch's operators as a backend."""

from __future__ import annotations

from ..operators import register
from ..reference import value_norm
from .backward import backward, map_gradient
from .forward import attention_mass, forward

__all__ = ["attend", "attention_mass", "backward", "forward", "map_gradient", "value_norm"]

attend = register("aten", forward, backward, attention_mass, value_norm)
