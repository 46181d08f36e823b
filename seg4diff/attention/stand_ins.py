"""Stand-ins for what an early stop leaves out: they take the place of a module's forward, and cost nothing.

The module tree stays as it is, so `state_dict`, `parameters`, `to` and `save_pretrained` see the whole model,
and offloading hooks, which live on a module's forward too, are left out with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class StandIn:
    """A forward in the place of a module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._before: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def installed(self) -> bool:
        """Whether the module runs this."""
        return self.module.__dict__.get("forward") is self

    def install(self) -> None:
        """Make the module run this."""
        self._before = self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = self

    def remove(self) -> None:
        """Give the module back the forward that it had, unless another one came since."""
        if not self.installed:
            return
        if self._before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo.get(id(self.module))  # copies of the model are stock
        return self if copy is None else type(self.module).forward.__get__(copy)


class SkippedBlock(StandIn):
    """For a whole block: what it would change passes through."""

    def __init__(self, block: nn.Module, returns: tuple[str, ...]) -> None:
        super().__init__(block)
        self._names = list(inspect.signature(type(block).forward).parameters)[1:]
        self._returns = returns

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if len(self._returns) == 1:
            return given[self._returns[0]]
        return tuple(given[name] for name in self._returns)


class SkippedModule(StandIn):
    """For a projection, activation or feed-forward: its input, stretched to the width of the output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        width_in, width_out = (getattr(module, f"{side}_features", None) for side in ("in", "out"))
        self._width = None if width_in == width_out else width_out

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._width is None:
            return hidden_states
        return hidden_states[..., :1].expand(*hidden_states.shape[:-1], self._width)


def skipped_modules(block: nn.Module, names: tuple[str, ...]) -> list[StandIn]:
    """Stand-ins for the submodules of a block that have one of these dotted names."""
    known: Mapping[str, nn.Module] = dict(block.named_modules())
    return [SkippedModule(known[name]) for name in names if name in known]
