"""Pipelines with one text encoder, whose `encode_prompt` returns its embeddings first."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seg4diff.backbones.base import Backbone, EncodedText, Pipeline, as_texts
from seg4diff.backbones.text import TextSpan


@dataclass(frozen=True)
class SingleEncoder(Backbone):
    """What families share whose text tokens are those of one encoder.

    Attributes:
        encoder: name of the text encoder in messages and in `encoder=` of captures.
        negative: where `encode_prompt` returns the embeddings of the negative prompt; None where the pipeline
            calls it once more for them.
    """

    encoder: str = ""
    negative: int | None = None

    def encode_text(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        encoded = self.text_arguments(self._encoded(pipe, prompts, guided=False))
        return {name: value.to(pipe.transformer.dtype) for name, value in encoded.items()}

    def text_arguments(self, output: tuple[Any, ...]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": output[0]}

    def prompt_arguments(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Any]:
        output = self._encoded(pipe, prompts, guided=True)
        given = {"prompt_embeds": output[0]}
        if "negative_prompt_embeds" in inspect.signature(pipe.__call__).parameters:
            empty = [""] * len(prompts)
            given["negative_prompt_embeds"] = (
                self._encoded(pipe, empty, guided=False)[0]
                if self.negative is None
                else output[self.negative]
            )
        return given

    def read_encoded(self, arguments: Mapping[str, Any], output: tuple[Any, ...]) -> EncodedText:
        given = as_texts(arguments.get("prompt"))
        negative = None if self.negative is None else output[self.negative]
        together = self.guidance == "one forward"
        return EncodedText(
            texts=()
            if arguments.get("prompt_embeds") is not None
            else tuple({self.encoder: text} for text in given),
            embeddings=output[0],
            guided=together and bool(arguments.get("do_classifier_free_guidance")) and negative is not None,
            arguments=arguments,
            unconditional=None if together else negative,
        )

    def empty_text(self, transformer: nn.Module, batch: int, text_tokens: int) -> dict[str, Tensor]:
        config: Any = transformer.config
        return {"encoder_hidden_states": torch.zeros(batch, text_tokens, config.joint_attention_dim)}

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        length = self.text_tokens if text_tokens is None else text_tokens
        return (TextSpan(self.encoder, pipe.tokenizer, 0, length, special=1),)

    def _encoded(self, pipe: Pipeline, prompts: Sequence[str], *, guided: bool) -> tuple[Any, ...]:
        """What `encode_prompt` returns for texts of the length of `encode_text`."""
        options = {"do_classifier_free_guidance": guided, "max_sequence_length": self.text_tokens}
        known = inspect.signature(pipe.encode_prompt).parameters
        taken = {name: value for name, value in options.items() if name in known}
        output: tuple[Any, ...] = pipe.encode_prompt(prompt=list(prompts), **taken)
        return output
