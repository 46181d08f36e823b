"""How one block runs while something is asked of it, or while it is left out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from seg4diff.attention.interception import RESULT_ATTRIBUTE
from seg4diff.attention.requests import LayerRequest, Place
from seg4diff.attention.stand_ins import StandIn
from seg4diff.backbones import Layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Mode:
    """A block's attention processor and its stand-ins; a block that is left out has no processor.

    Attributes:
        place: the layout of the forward that runs.
        attention: the block's joint attention.
        stock: the processor that it had.
        processor: the one that takes its place.
        requests: what that processor answers, in the order of its results.
        stand_ins: for submodules whose output nothing reads, or for the whole block.
    """

    place: Place
    attention: Any = None
    stock: Any = None
    processor: Any = None
    requests: tuple[LayerRequest, ...] = ()
    stand_ins: tuple[StandIn, ...] = ()

    @property
    def skipped(self) -> bool:
        """Whether the whole block is left out."""
        return self.attention is None

    def enter(self) -> None:
        """Make the block run in this mode."""
        if not self.skipped:
            self.attention.processor = self.processor
        for stand_in in self.stand_ins:
            stand_in.install()

    def leave(self, layer: int) -> None:
        """Make the block stock again, but for a processor that was set since."""
        for stand_in in self.stand_ins:
            stand_in.remove()
        if self.skipped:
            return
        if self.attention.processor is self.processor:
            self.attention.processor = self.stock
        else:
            name = type(self.attention.processor).__name__
            logger.warning("layer %d keeps %s, which was set within the context", layer, name)

    @contextmanager
    def again(self, layout: Layout | None) -> Iterator[None]:
        """Run the block in this mode once more, for a forward of `layout`, whatever mode it is in by now."""
        before = self.attention.processor, self.place.layout, self.attention.__dict__.get(RESULT_ATTRIBUTE)
        self.attention.processor, self.place.layout = self.processor, layout
        stand_ins = [stand_in for stand_in in self.stand_ins if not stand_in.installed]
        for stand_in in stand_ins:
            stand_in.install()
        try:
            yield
        finally:
            for stand_in in stand_ins:
                stand_in.remove()
            self.attention.processor, self.place.layout, results = before
            self.attention.__dict__.pop(RESULT_ATTRIBUTE, None)
            if results is not None:
                setattr(self.attention, RESULT_ATTRIBUTE, results)
