"""Stable Diffusion 3 and 3.5: joint blocks over [image; text] tokens, two CLIP encoders and an optional T5.

Text tokens are the 77 of CLIP followed by those of T5 (zeros where T5 was left out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from seg4diff.tokens import TextEncoding

from . import CallInputs

# Layer 9 of 24 is the semantic expert of SD3-medium, and the best one of SD3.5 (Seg4Diff, figure 8, appendix
# C).
_EXPERT_LAYERS = {24: (9,)}
METADATA_KEY = "_seg4diff_expert_layers"


@dataclass(frozen=True)
class StableDiffusion3:
    """See :class:`seg4diff.backbones.Backbone`."""

    name: str = "Stable Diffusion 3"

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)  # type: ignore[arg-type]

    def joint_attention(self, block: nn.Module) -> nn.Module:
        return block.attn  # type: ignore[return-value]

    def unneeded_for_maps(self, block: nn.Module) -> Mapping[str, nn.Module]:
        names = ("attn2", "ff", "ff_context")
        return {name: module for name in names if (module := getattr(block, name, None)) is not None}

    def read_call(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> CallInputs:
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        batch, _, height, width = given["hidden_states"].shape
        patch = transformer.config.patch_size  # type: ignore[union-attr]
        return CallInputs(
            grid=(height // patch, width // patch),
            text_length=given["encoder_hidden_states"].shape[1],
            batch=batch,
            timestep=given.get("timestep"),
            skipped_layers=frozenset(given.get("skip_layers") or ()),
        )

    def stop_after(self, transformer: nn.Module, kwargs: dict[str, Any], layer: int) -> dict[str, Any]:
        later = range(layer + 1, len(self.blocks(transformer)))
        return {**kwargs, "skip_layers": sorted({*(kwargs.get("skip_layers") or ()), *later})}

    def expert_layers(self, transformer: nn.Module) -> tuple[int, ...]:
        stored = transformer.config.get(METADATA_KEY)  # type: ignore[union-attr, operator]
        if stored:
            return tuple(int(layer) for layer in stored)
        count = len(self.blocks(transformer))
        if count not in _EXPERT_LAYERS:
            raise ValueError(
                f"no expert layer is known for a {self.name} transformer of {count} blocks; "
                "name it with layers=[...] (seg4diff.expert_layers measures it)"
            )
        return _EXPERT_LAYERS[count]

    def check_supported(self, transformer: nn.Module) -> None:
        for index, block in enumerate(self.blocks(transformer)):
            attention = self.joint_attention(block)
            processor = type(attention.processor).__name__
            if processor.startswith("Fused"):
                raise ValueError(
                    f"block {index} has fused projections ({processor}); "
                    "call transformer.unfuse_qkv_projections() first"
                )
            if isinstance(attention.processor, nn.Module) or "IPAdapter" in processor:
                raise ValueError(
                    f"block {index} runs an IP-Adapter ({processor}); call pipe.unload_ip_adapter() first"
                )
            if getattr(attention, "add_q_proj", None) is None:
                raise ValueError(f"block {index} has no joint attention (no projections of text tokens)")

    def latents(self, pipe: Any, pixels: Tensor) -> Tensor:
        vae = pipe.vae
        posterior = vae.encode(pixels.to(device=pipe._execution_device, dtype=vae.dtype)).latent_dist
        shift = vae.config.shift_factor or 0.0
        return (posterior.mode() - shift) * vae.config.scaling_factor

    def add_noise(
        self, pipe: Any, latents: Tensor, noise: Tensor, steps: int, index: int
    ) -> tuple[Tensor, Tensor]:
        from diffusers import FlowMatchEulerDiscreteScheduler

        # A scheduler of our own: setting timesteps on the pipeline's would change its state.
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        arguments = {}
        if scheduler.config.get("use_dynamic_shifting"):
            from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

            patch = pipe.transformer.config.patch_size
            tokens = (latents.shape[-2] // patch) * (latents.shape[-1] // patch)
            keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            known = {key: scheduler.config[key] for key in keys if key in scheduler.config}
            names = {"base_image_seq_len": "base_seq_len", "max_image_seq_len": "max_seq_len"}
            arguments["mu"] = calculate_shift(tokens, **{names.get(key, key): v for key, v in known.items()})
        scheduler.set_timesteps(steps, device=latents.device, **arguments)
        if not -len(scheduler.timesteps) <= index < len(scheduler.timesteps):
            raise ValueError(f"timestep index {index} is outside a schedule of {steps} steps")
        timestep = scheduler.timesteps[index].reshape(1)
        return scheduler.scale_noise(latents, timestep, noise), timestep

    def encode_text(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        # Without T5 its slot is filled with zeros: 77 of them, as the public code of the paper has it.
        length = 77 if pipe.text_encoder_3 is None else 256
        embeddings, _, pooled, _ = pipe.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        dtype = pipe.transformer.dtype
        return {"encoder_hidden_states": embeddings.to(dtype), "pooled_projections": pooled.to(dtype)}

    def text_encodings(self, pipe: Any, text_length: int) -> tuple[TextEncoding, ...]:
        clip = pipe.tokenizer_max_length
        encodings = [TextEncoding("clip", pipe.tokenizer, 0, clip)]
        if pipe.text_encoder_3 is not None:
            encodings.append(TextEncoding("t5", pipe.tokenizer_3, clip, text_length - clip))
        return tuple(encodings)

    def pixel_multiple(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor * pipe.transformer.config.patch_size)

    def native_size(self, pipe: Any) -> int:
        return int(pipe.transformer.config.sample_size * pipe.vae_scale_factor)

    def largest_size(self, pipe: Any) -> int:
        return int(pipe.transformer.config.pos_embed_max_size * self.pixel_multiple(pipe))


BACKBONE = StableDiffusion3()
