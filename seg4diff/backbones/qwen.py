"""Qwen-Image (also Edit and control models): double-stream blocks over [text; image].

Text tokens are those of Qwen2.5-VL under a chat template, whose begin the pipeline drops. Prompts of one
batch are padded to the longest, and a mask hides the padding. Latents are packed two by two. Reference
images (Edit) follow the generated one in the image stream, and their tokens precede the prompt in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg4diff.backbones.base import (
    Backbone,
    BlockList,
    EncodedText,
    Layout,
    Pipeline,
    TransformerCall,
    as_texts,
    pack,
    unpack,
)
from seg4diff.backbones.text import TextSpan, templated_span

_MASK = "encoder_hidden_states_mask"


@dataclass(frozen=True)
class QwenImage(Backbone):
    """See `Backbone`."""

    def read_call(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
        if transformer.config.use_layer3d_rope:  # type: ignore[union-attr]
            raise NotImplementedError(
                "Qwen-Image-Layered draws several images at once, which is not supported"
            )
        hidden_states, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        shapes = arguments["img_shapes"][0]
        frames, height, width = shapes[0] if isinstance(shapes, list) else shapes
        timestep = arguments.get("timestep")
        return TransformerCall(
            grid=(height, width),
            layout=Layout(
                True,
                image_tokens=hidden_states.shape[1],
                text_tokens=text.shape[1],
                generated=frames * height * width,
                masked=True,
            ),
            text=text,
            batch=len(hidden_states),
            timestep=None if timestep is None else timestep * (1000.0 / self.timestep_unit),
        )

    def arguments(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        height, width = (side // self.patch for side in latents.shape[-2:])
        return {
            "hidden_states": pack(latents),
            "timestep": sigma * self.timestep_unit,
            "img_shapes": [[(1, height, width)]] * len(latents),
            "encoder_hidden_states": text["encoder_hidden_states"],
            _MASK: text[_MASK].bool(),
        }

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        return unpack(output, latents)

    def latent_channels(self, transformer: nn.Module) -> int:
        return int(transformer.config.in_channels) // self.patch**2  # type: ignore[union-attr, arg-type]

    def rows_again(self, arguments: Mapping[str, Any], batch: int, rows: slice) -> dict[str, Any]:
        again = super().rows_again(arguments, batch, rows)
        shapes = list(arguments["img_shapes"])
        if len(shapes) == batch:  # the pipeline has one for each prompt, not for each image
            again["img_shapes"] = shapes + shapes[rows]
        if again.get(_MASK) is None:
            text = again["encoder_hidden_states"]
            again[_MASK] = text.new_ones(text.shape[:2], dtype=torch.bool)
        return again

    def encode_text(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        text = _padded(self._encoded(pipe, prompts), self.text_tokens)
        return {**text, "encoder_hidden_states": text["encoder_hidden_states"].to(pipe.transformer.dtype)}

    def empty_text(self, transformer: nn.Module, batch: int, text_tokens: int) -> dict[str, Tensor]:
        config: Any = transformer.config
        return {
            "encoder_hidden_states": torch.zeros(batch, text_tokens, config.joint_attention_dim),
            _MASK: torch.ones(batch, text_tokens, dtype=torch.bool),
        }

    def prompt_arguments(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        text = self._encoded(pipe, prompts)
        return {"prompt_embeds": text["encoder_hidden_states"], "prompt_embeds_mask": text[_MASK]}

    def _encoded(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        if "<|image_pad|>" in pipe.prompt_template_encode:
            raise NotImplementedError(
                f"{type(pipe).__name__} encodes no prompt without a reference image; build a "
                "QwenImagePipeline of its components (scheduler, vae, text_encoder, tokenizer, transformer)"
            )
        return self.text_arguments(
            pipe.encode_prompt(prompt=list(prompts), max_sequence_length=self.text_tokens)
        )

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        span = templated_span(
            "qwen",
            pipe.tokenizer,
            pipe.prompt_template_encode,
            self.text_tokens if text_tokens is None else text_tokens,
            dropped=pipe.prompt_template_encode_start_idx,
        )
        # Tokens of reference images come before the prompt; padding of the tokenizer is left out.
        return (replace(span, ends=text_tokens is not None and "processor" in pipe.components),)

    def read_encoded(self, arguments: Mapping[str, Any], output: tuple[Any, ...]) -> EncodedText:
        texts = as_texts(arguments.get("prompt"))
        # Behind reference images, columns are counted from the end, which the longest prompt alone reaches.
        unknown = arguments.get("image") is not None and len(set(texts)) > 1
        return EncodedText(
            texts=()
            if unknown or arguments.get("prompt_embeds") is not None
            else tuple({"qwen": text} for text in texts),
            embeddings=output[0],
            guided=False,
            arguments=arguments,
        )

    def text_arguments(self, output: tuple[Any, ...]) -> dict[str, Tensor]:
        embeddings, mask = output
        if mask is None:
            mask = embeddings.new_ones(embeddings.shape[:2], dtype=torch.bool)
        return {"encoder_hidden_states": embeddings, _MASK: mask.bool()}

    def encode_again(
        self, pipe: Pipeline, encoded: EncodedText, change: Callable[[str], str]
    ) -> dict[str, Tensor]:
        text = super().encode_again(pipe, encoded, change)
        own, found = encoded.embeddings.shape[1], text["encoder_hidden_states"].shape[1]
        if found > own:
            raise ValueError(
                f"the changed prompt has {found} tokens and the prompt {own}, but Qwen-Image reads as many "
                "as the prompt has; make the prompt longer or the words shorter"
            )
        return _padded(text, own)

    def latents(self, pipe: Pipeline, pixels: Tensor) -> Tensor:
        vae = pipe.vae
        images = pixels.to(device=pipe._execution_device, dtype=vae.dtype)[:, :, None]  # one frame each
        found = vae.encode(images).latent_dist.mode()[:, :, 0]
        mean, deviation = (
            torch.tensor(values).view(1, -1, 1, 1).to(found)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (found - mean) / deviation

    def schedule(self, scheduler_config: Mapping[str, Any], steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / steps, steps)}


def _padded(text: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Text arguments with hidden tokens up to a length."""
    missing = length - text[_MASK].shape[1]
    return {
        "encoder_hidden_states": F.pad(text["encoder_hidden_states"], (0, 0, 0, missing)),
        _MASK: F.pad(text[_MASK], (0, missing)),
    }


_QWEN_IMAGE = {
    "_class_name": "QwenImageTransformer2DModel",
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}

# No expert layer is known: nothing was measured, and no publication names one.
BACKBONE = QwenImage(
    name="Qwen-Image",
    transformer="QwenImageTransformer2DModel",
    pipeline="QwenImagePipeline",
    lists=(
        BlockList(
            "transformer_blocks",
            returns=("encoder_hidden_states", "hidden_states"),
            unneeded=("img_mlp", "txt_mlp", "attn.to_out.0", "attn.to_add_out"),
        ),
    ),
    guidance="separate forwards",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    timestep_unit=1.0,
    configurations={"Qwen/Qwen-Image": _QWEN_IMAGE},
)
