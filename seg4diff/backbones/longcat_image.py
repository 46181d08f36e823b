"""LongCat-Image: blocks of Flux's kind over [text; image] tokens.

Text tokens are the prompt's own in the language model, 512 with padding; those of the chat template around
them are left out. Text in quotes is split into letters, each tokenised alone. The pipeline rewrites prompts
unless it is called with `enable_prompt_rewrite=False`: words are then those of the rewritten prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from seg4diff.backbones.base import Pipeline
from seg4diff.backbones.flux import DOUBLE, SINGLE, Packed, image_ids
from seg4diff.backbones.single import SingleEncoder
from seg4diff.backbones.text import TextSpan

_TOKENS = 512


@dataclass(frozen=True)
class QuotedSpan(TextSpan):
    """Text tokens of a prompt whose quoted parts are tokenised letter by letter."""

    def token_count(self, text: str) -> int:
        return len(self._tokens(text))

    def _tokenised(self, prompt: str, **options: Any) -> Any:
        tokens = self._tokens(prompt)[: self.length]
        return SimpleNamespace(
            input_ids=[token for token, _, _ in tokens],
            offset_mapping=[(start, stop) for _, start, stop in tokens],
        )

    def _tokens(self, prompt: str) -> list[tuple[int, int, int]]:
        """Token and characters [start, stop) of everything that the pipeline tokenises."""
        from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

        parts = split_quotation(prompt)
        if "".join(text for text, _ in parts) != prompt:
            raise ValueError(
                f"the pipeline garbles the prompt {prompt!r}, since several words in it have an apostrophe; "
                "write at most one such word"
            )
        tokens, start = [], 0
        for part, quoted in parts:
            for text in part if quoted else (part,):
                found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                for token, (first, last) in zip(found.input_ids, found.offset_mapping, strict=True):
                    tokens.append((token, start + first, start + last))
                start += len(text)
        return tokens


@dataclass(frozen=True)
class LongCatImage(Packed, SingleEncoder):
    """See `Backbone`."""

    def image_ids(self, height: int, width: int) -> Tensor:
        return image_ids(height, width) + torch.tensor([1, _TOKENS, _TOKENS])

    def text_ids(self, tokens: int) -> Tensor:
        return torch.nn.functional.pad(torch.arange(tokens)[:, None].expand(-1, 2), (1, 0))

    def prompt_arguments(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Any]:
        """As `Backbone.prompt_arguments`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{type(pipe).__name__} takes no embeddings in place of a prompt, so it draws nothing without "
            "its text encoder; train without samples"
        )

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        length = self.text_tokens if text_tokens is None else text_tokens
        left = pipe.tokenizer.padding_side == "left"
        return (QuotedSpan(self.encoder, pipe.tokenizer, 0, length, special=0, ends=left),)


BACKBONE = LongCatImage(
    name="LongCat-Image",
    transformer="LongCatImageTransformer2DModel",
    pipeline="LongCatImagePipeline",
    lists=(DOUBLE, SINGLE),
    encoder="llm",
)
