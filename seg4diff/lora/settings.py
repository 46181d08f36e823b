"""What low-rank adapters are added to."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from seg4diff.settings import CHECKED, Count, Name, Weight, Whole


@dataclass(frozen=True, config=CHECKED)
class LoraSettings:
    """Low-rank adapters on the attention projections of the image stream (Hu et al. 2021).

    Attributes:
        rank: of every adapter.
        alpha: adapters are scaled by alpha / rank; 0 means alpha = rank.
        targets: modules within the joint attention of a block; empty for those of the model family.
        blocks: transformer blocks that get adapters; empty for all.
    """

    rank: Count = 16
    alpha: Weight = 0.0
    targets: tuple[Name, ...] = ()
    blocks: tuple[Whole, ...] = ()
