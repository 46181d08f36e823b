"""Attention sinks: which text tokens take the attention of image tokens.

Tokens that say nothing of the image, such as the begin of text or padding, often take most of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from seg4diff.backbones.text import Special, SpecialToken, TextSpan

WORDS_LISTED = 8
"""Tokens of prompts that a report lists by themselves, the largest."""

OTHER_WORDS = "other words"
WITHOUT_ENCODER = "<without encoder>"


def token_labels(spans: Sequence[TextSpan], texts: Mapping[str, str], length: int) -> list[str]:
    """What each of `length` text columns holds: encoder and `<bos>`, `<eos>`, `<pad>`, or the token's text.

    Columns behind all text encoders, such as those of one that was left out, are `WITHOUT_ENCODER`; tokens of
    a template around the prompt are `<template>`.
    """
    labels = [WITHOUT_ENCODER] * length
    for span in spans:
        prompt = texts[span.encoder]
        for column in range(span.first, min(span.first + span.length, length)):
            labels[column] = f"{span.encoder} <template>"
        for token in get_args(SpecialToken):
            for column in span.special_columns(prompt, Special(token)):
                if column < length:
                    labels[column] = f"{span.encoder} <{token}>"
        for column, start, stop in span.offsets(prompt):
            if column < length:
                labels[column] = f"{span.encoder} {prompt[start:stop].strip().lower()}"
    return labels


class SinkSums:
    """Sums over images of the attention that image tokens give to each token, by layer and noise level."""

    def __init__(self, levels: int, layers: int) -> None:
        self._shape = (levels, layers)
        self._sums: dict[str, Tensor] = {}

    def add(self, level: int, position: int, shares: Tensor, labels: Sequence[Sequence[str]]) -> None:
        """Add one layer's mean map rows `shares`, [rows, T], with the labels of each row's columns."""
        for row, names in zip(shares.cpu().double().tolist(), labels, strict=True):
            for name, share in zip(names, row, strict=True):
                if name not in self._sums:
                    self._sums[name] = torch.zeros(self._shape, dtype=torch.float64)
                self._sums[name][level, position] += share

    def means(self, images: Tensor) -> dict[str, Tensor]:
        """Means over `images` [levels], largest first; small tokens of prompts are one entry."""
        means = {name: total / images.reshape(-1, 1) for name, total in self._sums.items()}
        ordered = sorted(means, key=lambda name: -float(means[name].mean()))
        words = [name for name in ordered if "<" not in name]
        small = set(words[WORDS_LISTED:])
        kept = {name: means[name] for name in ordered if name not in small}
        if small:
            kept[OTHER_WORDS] = torch.stack([means[name] for name in small]).sum(dim=0)
        return kept
