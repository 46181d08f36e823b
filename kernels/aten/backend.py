"""PyTorch's operators as a backend."""

from __future__ import annotations

from ..operators import register
from ..reference import value_norm
from .backward import backward
from .forward import attention_mass, forward

attend = register("aten", forward, backward, attention_mass, value_norm)
