"""Z-Image: single-stream blocks over [image; text], after blocks of their own for image and text.

Image and text of every row are padded to a multiple of 32 tokens with learned tokens, which the model reads;
a mask hides what a batch adds to shorter rows. Text tokens are those of Qwen3 under a chat template, none of
it dropped. Latents and texts are lists with one entry for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from seg4diff.backbones.base import (
    PURE_NOISE,
    Backbone,
    BlockList,
    EncodedText,
    Layout,
    Pipeline,
    TransformerCall,
    as_texts,
)
from seg4diff.backbones.text import TextSpan, templated_span

_MULTIPLE = 32  # streams are padded to multiples of as many tokens
_MASK = "cap_mask"  # beside the texts that `encode_text` pads to one length


@dataclass(frozen=True)
class ZImage(Backbone):
    """See `Backbone`."""

    def read_call(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
        latents, texts, timestep = arguments["x"], arguments["cap_feats"], arguments["t"]
        if isinstance(latents[0], list):
            raise NotImplementedError("Z-Image-Omni orders its tokens in another way, which is not supported")
        if any(row.shape != latents[0].shape for row in latents):
            sizes = sorted({tuple(row.shape[-2:]) for row in latents})
            raise ValueError(f"the rows of a call have latents of different sizes {sizes}; draw them apart")
        patch = arguments.get("patch_size", self.patch)
        height, width = (side // patch for side in latents[0].shape[-2:])
        return TransformerCall(
            grid=(height, width),
            layout=Layout(
                False,
                image_tokens=_padded(height * width),
                text_tokens=_padded(max(len(text) for text in texts)),
                generated=height * width,
                masked=True,
            ),
            text=pad_sequence(list(texts), batch_first=True),
            batch=len(latents),
            timestep=PURE_NOISE * (1 - timestep),
        )

    def arguments(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        texts = list(text["cap_feats"].unbind())
        if _MASK in text:
            lengths = text[_MASK].bool().sum(dim=1).tolist()  # reads them once per forward
            texts = [row[:length] for row, length in zip(texts, lengths, strict=True)]
        return {"x": list(latents[:, :, None].unbind()), "t": 1 - sigma, "cap_feats": texts}

    def prediction(self, output: Any, latents: Tensor) -> Tensor:
        return -torch.stack(list(output))[:, :, 0]

    def rows_again(self, arguments: Mapping[str, Any], batch: int, rows: slice) -> dict[str, Any]:
        lists = {name: [*arguments[name], *arguments[name][rows]] for name in ("x", "cap_feats")}
        others = {name: value for name, value in arguments.items() if name not in lists}
        return {**super().rows_again(others, batch, rows), **lists}

    def encode_text(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        texts = self.prompt_arguments(pipe, prompts)["prompt_embeds"]
        length = torch.tensor([len(text) for text in texts])
        padded = [F.pad(text, (0, 0, 0, self.text_tokens - len(text))) for text in texts]
        return {
            "cap_feats": torch.stack(padded).to(pipe.transformer.dtype),
            _MASK: torch.arange(self.text_tokens) < length[:, None],
        }

    def empty_text(self, transformer: nn.Module, batch: int, text_tokens: int) -> dict[str, Tensor]:
        config: Any = transformer.config
        return {"cap_feats": torch.zeros(batch, text_tokens, config.cap_feat_dim)}

    def prompt_arguments(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Any]:
        embeddings, _ = pipe.encode_prompt(
            prompt=list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeddings}

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        template = pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": "{}"}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        length = self.text_tokens if text_tokens is None else text_tokens
        span = templated_span("qwen", pipe.tokenizer, template, length)
        return (replace(span, ends=False, ragged=True),)  # padding of the tokenizer is left out

    def read_encoded(self, arguments: Mapping[str, Any], output: tuple[Any, ...]) -> EncodedText:
        conditional, unconditional = output
        rows = pad_sequence([*conditional, *unconditional], batch_first=True)
        rows = F.pad(rows, (0, 0, 0, _padded(rows.shape[1]) - rows.shape[1]))
        given = arguments.get("prompt_embeds") is not None
        return EncodedText(
            texts=() if given else tuple({"qwen": text} for text in as_texts(arguments.get("prompt"))),
            embeddings=rows[: len(conditional)],
            guided=len(unconditional) > 0,
            arguments=arguments,
            conditional_first=True,
        )

    def text_arguments(self, output: tuple[Any, ...]) -> dict[str, Any]:
        return {"cap_feats": list(output[0])}

    def encode_again(
        self, pipe: Pipeline, encoded: EncodedText, change: Callable[[str], str]
    ) -> dict[str, Any]:
        text = super().encode_again(pipe, encoded, change)
        own, found = encoded.embeddings.shape[1], max(len(row) for row in text["cap_feats"])
        if found > own:
            raise ValueError(
                f"the changed prompt has {found} tokens, but the text stream of the prompt has {own}; make "
                "the prompt longer or the words shorter"
            )
        # Images of one prompt follow each other.
        return {"cap_feats": [row for row in text["cap_feats"] for _ in range(encoded.repeats)]}

    def native_size(self, pipe: Pipeline) -> int:
        # The pipeline has no size of its own; its call draws 1024 pixels.
        return int(
            getattr(pipe, "default_sample_size", 1024 // pipe.vae_scale_factor) * pipe.vae_scale_factor
        )

    def schedule(self, scheduler_config: Mapping[str, Any], steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / steps, steps)}


def _padded(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE


_Z_IMAGE = {
    "_class_name": "ZImageTransformer2DModel",
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "axes_dims": (32, 48, 48),
    "axes_lens": (1536, 512, 512),
}

# No expert layer is known: nothing was measured, and no publication names one.
BACKBONE = ZImage(
    name="Z-Image",
    transformer="ZImageTransformer2DModel",
    pipeline="ZImagePipeline",
    lists=(
        BlockList(
            "layers",
            returns=("x",),
            unneeded=("feed_forward", "attention.to_out.0"),
            values=("attention.to_v",),
            text_queries=(),
            attention="attention",
        ),
    ),
    guidance="one forward",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    timestep_unit=1.0,
    configurations={"Tongyi-MAI/Z-Image-Turbo": _Z_IMAGE},
)
