"""Gradient checkpointing that recomputes a block as it ran, also after the context has ended."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from seg4diff.attention.patch import Patch


class Checkpointing:
    """diffusers' checkpointing function, made to remember what a block ran when it was first called."""

    def __init__(self, stock: Callable[..., Any], state: Patch) -> None:
        self.stock = stock
        self._state = state

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        mode = self._state.mode_of(block)
        if mode is None:
            return self.stock(block, *args)
        if mode.skipped:  # nothing to recompute, and in backward the block would be stock
            return block(*args)
        first_run, layout = True, self._state.layout

        def run(*inputs: Any) -> Any:
            nonlocal first_run
            if first_run:
                first_run = False
                if not torch.is_grad_enabled():
                    raise ValueError(
                        "gradient checkpointing with use_reentrant=True cannot carry gradients of captured "
                        "maps; use transformer.enable_gradient_checkpointing() or use_reentrant=False"
                    )
                return block(*inputs)
            # Recomputation in backward: the same operations again, but its maps are not new ones.
            with mode.again(layout):
                return block(*inputs)

        return self.stock(run, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy(self.stock, memo)  # copies of the model are stock
