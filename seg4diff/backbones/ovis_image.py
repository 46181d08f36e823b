"""Ovis-Image: blocks of Flux's kind over [text; image] tokens.

Text tokens are those of a language model behind the fixed begin of its chat template, padding included, which
is zero. One call of `encode_prompt` encodes both branches of guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seg4diff.backbones.base import Pipeline
from seg4diff.backbones.flux import DOUBLE, SINGLE, Packed
from seg4diff.backbones.single import SingleEncoder
from seg4diff.backbones.text import TextSpan, templated_span


@dataclass(frozen=True)
class OvisImage(Packed, SingleEncoder):
    """See `Backbone`."""

    def text_ids(self, tokens: int) -> Tensor:
        return torch.nn.functional.pad(torch.arange(tokens)[:, None].expand(-1, 2), (1, 0))

    def prompt_arguments(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Any]:
        # Its default, an empty string, may not be given beside embeddings.
        return {**super().prompt_arguments(pipe, prompts), "negative_prompt": None}

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        (template,) = pipe._get_messages("{}")
        length = self.text_tokens if text_tokens is None else text_tokens
        dropped = pipe.user_prompt_begin_id
        span = templated_span(
            self.encoder, pipe.tokenizer, template, length, dropped=dropped, adds_special=False
        )
        return (span,)


BACKBONE = OvisImage(
    name="Ovis-Image",
    transformer="OvisImageTransformer2DModel",
    pipeline="OvisImagePipeline",
    lists=(DOUBLE, SINGLE),
    encoder="llm",
    negative=1,
    text_tokens=256,
    name_tokens=256,
)
