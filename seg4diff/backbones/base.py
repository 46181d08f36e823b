"""What a model family tells the rest of the library: `Backbone`, and the types that its methods give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from seg4diff.backbones.text import TextSpan

EXPERTS_KEY = "_seg4diff_expert_layers"
"""Entry of a transformer's configuration that lists its expert layers, where a model brings them along."""

RECIPE_KEY = "_seg4diff_recipe"
"""Entry of a transformer's configuration that holds the fields of its `Recipe`, where one was measured."""

Guidance = Literal["one forward", "separate forwards"]


class Pipeline(Protocol):
    """What the library asks of a pipeline's type, which diffusers' text-to-image pipelines have.

    Its models and settings (`vae`, `scheduler`, ...) are attributes that diffusers makes while loading, which
    type checkers do not know; `__getattr__` stands for them, here as there.
    """

    @property
    def components(self) -> dict[str, Any]: ...
    @property
    def device(self) -> torch.device: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Recipe:
    """How one model segments best by names. The defaults are for models of which nothing was measured.

    Attributes:
        level: steps that are left of the noise schedule; that of the family when None.
        behind: layers from the last expert layer to the one whose attention outputs tell which image tokens
            belong together; where the model ends before, its last layer.
        tau: temperature of that comparison, in mean squared distances of two tokens.
        block: share of the image area of the square of tokens that a name wins if it is in the image.
        upsample: how scores go from image tokens to pixels, see `seg4diff.segmentation.presets.Preset`.
        floor: attention to a name, mean over heads and tokens, below which a pixel does not show it; None
            where it is not known.
        alone: attention that a name without others has to reach on a whole block; None where it is not known.
        calibration: for thresholds of the presence score, ascending: (threshold, absent names per image that
            are found, names per image that are missed). Empty where it was not measured.
    """

    level: int | None = None
    behind: int = 2
    tau: float = 0.1
    block: float = 0.0025
    upsample: Literal["bicubic", "bilateral"] = "bicubic"
    floor: float | None = None
    alone: float | None = None
    calibration: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Layout:
    """Where image and text tokens lie in the sequence that a joint attention sees.

    Attributes:
        text_first: whether the text tokens come before the image tokens.
        image_tokens: tokens of the image stream: of the image that is generated, then of reference images.
        text_tokens: tokens of the text stream, padding included.
        generated: tokens of the image that is generated, the first of the image stream.
        masked: whether an attention may come with a mask of its keys, which hides text tokens alone.
        order: positions in the sequence [B, tokens] of the tokens of both streams, where the streams lie at
            other places in every row; None where they do not.
        added: whether it may come with a mask that adds the product of two tokens' numbers to their score.
        cross: whether image tokens read the text alone, and text tokens nothing (cross-attention).
    """

    text_first: bool
    image_tokens: int
    text_tokens: int
    generated: int
    masked: bool = False
    order: Tensor | None = field(default=None, compare=False)
    added: bool = False
    cross: bool = False

    @property
    def tokens(self) -> int:
        """Length of the whole sequence."""
        return self.image_tokens + self.text_tokens

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Image stream and text stream of [B, tokens, ...], as views unless rows differ."""
        if self.order is not None:
            joint = _along_rows(joint, self.order)
        if self.text_first:
            return joint[:, self.text_tokens :], joint[:, : self.text_tokens]
        return joint[:, : self.image_tokens], joint[:, self.image_tokens :]

    def join(self, image: Tensor, text: Tensor) -> Tensor:
        """The inverse of `split`."""
        return self.in_place(torch.cat([text, image] if self.text_first else [image, text], dim=1))

    def in_place(self, streams: Tensor) -> Tensor:
        """One stream behind the other, [B, tokens, ...], as the model orders its tokens."""
        return streams if self.order is None else _along_rows(streams, self.order.argsort(dim=1))


def _along_rows(tokens: Tensor, positions: Tensor) -> Tensor:
    if len(tokens) != len(positions):
        raise ValueError(f"{len(tokens)} rows run, but the call that was read has {len(positions)}")
    index = positions.reshape(*positions.shape, *(1 for _ in tokens.shape[2:]))
    return tokens.gather(1, index.expand(*positions.shape, *tokens.shape[2:]))


@dataclass(frozen=True, eq=False)
class TransformerCall:
    """What one call of a transformer was given.

    Attributes:
        grid: tokens of the generated image along each axis: (height, width).
        layout: where the tokens of its sequence lie.
        text: the text embeddings [B, T, C] as they were given, which tell branches of guidance apart.
        batch: number of rows.
        timestep: in the scheduler's units (1000 is pure noise), one per row or one for all, or None.
        skipped_layers: layers that are left out of this call.
    """

    grid: tuple[int, ...]
    layout: Layout
    text: Tensor
    batch: int
    timestep: Tensor | None
    skipped_layers: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class EncodedText:
    """What one call of a pipeline's `encode_prompt` made.

    Attributes:
        texts: for every prompt its text by the name of the text encoder; empty where embeddings were given.
        embeddings: what the transformer gets, [rows, T, C]; several images of one prompt follow each other.
        guided: whether the same call also made the embeddings of the unconditional branch.
        arguments: what `encode_prompt` was given, by name.
        conditional_first: whether the rows of the conditional branch come before the unconditional ones.
        repeats: images of a prompt, where the pipeline repeats prompts after it has encoded them.
        unconditional: embeddings of the unconditional branch, where the same call made them and the branch
            has forwards of its own; else None.
    """

    texts: tuple[Mapping[str, str], ...]
    embeddings: Tensor
    guided: bool
    arguments: Mapping[str, Any]
    conditional_first: bool = False
    repeats: int = 1
    unconditional: Tensor | None = None


@dataclass(frozen=True)
class BlockList:
    """A list of transformer blocks that share an interface.

    Attributes:
        name: of the `ModuleList` in the transformer.
        returns: the arguments of a block's forward that it returns changed, in its order.
        unneeded: submodules, by dotted name, whose output neither the block's own image-to-text map nor the
            attention output of its image tokens depends on. Those that a block does not have are ignored.
        values: those that the attention output needs and the map does not.
        text_queries: those that only the text rows need, which statistics count.
        attention: name of the joint attention in a block.
    """

    name: str
    returns: tuple[str, ...]
    unneeded: tuple[str, ...]
    values: tuple[str, ...] = ("attn.to_v", "attn.add_v_proj")
    text_queries: tuple[str, ...] = ("attn.add_q_proj",)
    attention: str = "attn"


@dataclass(frozen=True)
class Backbone:
    """One model family: its names as data, and methods that a family overrides where it differs.

    The methods hold no state; `transformer` is the diffusers model, `pipe` its pipeline. `text` is the
    transformer's text arguments by name, the first axis the batch.

    Attributes:
        name: of the family, for messages.
        transformer: class name of its transformer.
        pipeline: class name of the pipeline whose methods write its LoRA files.
        lists: its block lists in the order they run; layers are numbered through all of them.
        guidance: how its pipelines run classifier-free guidance: one forward of rows [unconditional;
            conditional], or separate forwards, the conditional one first.
        experts: expert layers by the number of blocks.
        noise: where images are segmented: length of the noise schedule, and steps that are left of it.
        optional: components that a pipeline of this family may lack, by `load_pipeline`'s options.
        lora_targets: attention projections that get an adapter unless the user names others.
        shared_arguments: tensors of a transformer call whose first axis is not the batch.
        patch: latent pixels that a token covers along each axis.
        timestep_unit: the transformer's own number for pure noise.
        text_tokens: length of the text stream that `encode_text` makes, without optional text encoders.
        name_tokens: text tokens of the encoder in which segmentation looks for names.
        configurations: configurations of published transformers by repository, for estimates without a file.
        cross_attention: whether its image tokens read the text in a softmax of its own; then there is no
            attention mass, no text row and no image column in what layers are asked for.
        experts_source: where `experts` are from, as Markdown, for the table of models.
    """

    name: str
    transformer: str
    pipeline: str
    lists: tuple[BlockList, ...]
    guidance: Guidance
    lora_targets: tuple[str, ...]
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    noise: tuple[int, int] = (28, 8)  # sigma 0.515 with SD3's shift of 3 (Seg4Diff, section 4.1)
    optional: tuple[str, ...] = ()
    shared_arguments: frozenset[str] = frozenset()
    patch: int = 2
    timestep_unit: float = 1000.0
    text_tokens: int = 512
    name_tokens: int = 512
    configurations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cross_attention: bool = False
    experts_source: str = ""

    # Blocks

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """Transformer blocks with joint attention in the order they run; the index is the layer."""
        return [block for entry in self.lists for block in transformer.get_submodule(entry.name).children()]

    def block_lists(self, transformer: nn.Module) -> list[BlockList]:
        """The list of every layer."""
        return [entry for entry in self.lists for _ in transformer.get_submodule(entry.name).children()]

    def attention(self, transformer: nn.Module, layer: int) -> nn.Module:
        """The joint attention of a layer."""
        entry = self.block_lists(transformer)[layer]
        return self.blocks(transformer)[layer].get_submodule(entry.attention)

    def heads(self, transformer: nn.Module, layer: int) -> int:
        """Number of heads of a layer's joint attention."""
        attention: Any = self.attention(transformer, layer)
        return int(attention.heads if hasattr(attention, "heads") else attention.num_heads)

    def knows_experts(self, transformer: nn.Module) -> bool:
        """Whether `expert_layers` is known."""
        stored = transformer.config.get(EXPERTS_KEY)  # type: ignore[union-attr, operator]
        return bool(stored) or len(self.blocks(transformer)) in self.experts

    def expert_layers(self, transformer: nn.Module) -> tuple[int, ...]:
        """The layers whose maps segment best: from the model's configuration, else known for this family.

        Raises:
            ValueError: nothing is known for this model.
        """
        stored = transformer.config.get(EXPERTS_KEY)  # type: ignore[union-attr, operator]
        if stored:
            return tuple(int(layer) for layer in stored)
        count = len(self.blocks(transformer))
        if count not in self.experts:
            raise ValueError(
                f"no expert layer is known for a {self.name} transformer of {count} blocks; "
                "name it: layers=[...], or mask.layers of a training run (`seg4diff rank-layers` measures it)"
            )
        return self.experts[count]

    def recipe(self, transformer: nn.Module) -> Recipe:
        """How the model segments best by names: from its configuration, else the defaults."""
        stored = dict(transformer.config.get(RECIPE_KEY) or {})  # type: ignore[union-attr, operator]
        calibration = tuple((float(t), float(f), float(m)) for t, f, m in stored.pop("calibration", ()))
        return Recipe(**stored, calibration=calibration)

    # Calls of the transformer

    def named(self, transformer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by their names."""
        if not args:
            return dict(kwargs)
        names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def read_call(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
        """What a call with these arguments is."""
        raise NotImplementedError

    def arguments(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Arguments of a call of the transformer.

        Args:
            transformer: the model.
            latents: noisy latents, [B, C, height, width].
            sigma: noise levels in [0, 1], [B].
            text: what `encode_text` gives, for B rows.
        """
        raise self._transformer_alone()

    def latent_channels(self, transformer: nn.Module) -> int:
        """Channels C of the latents that `arguments` takes."""
        return int(transformer.config.in_channels)  # type: ignore[union-attr, arg-type]

    def prediction(self, output: Any, latents: Tensor) -> Tensor:
        """What the transformer predicts, in the shape of `latents`, from what it returned for all rows."""
        return output

    def rows_again(self, arguments: Mapping[str, Any], batch: int, rows: slice) -> dict[str, Any]:
        """`arguments` of a call of `batch` rows with `rows` appended to everything that has a batch axis."""
        return {
            name: value if name in self.shared_arguments else _append_rows(value, batch, rows)
            for name, value in arguments.items()
        }

    def _transformer_alone(self) -> NotImplementedError:
        return NotImplementedError(
            f"pipelines of {self.name} are not supported, maps of its transformer are; capture that"
        )

    # Text

    def encode_text(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The transformer's text arguments for `prompts`, first axis len(prompts)."""
        raise self._transformer_alone()

    def encode_each(self, pipe: Pipeline, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """What `encode_text` gives for each prompt, without the batch axis; lengths may differ."""
        arguments = self.encode_text(pipe, prompts)
        return [{name: value[row] for name, value in arguments.items()} for row in range(len(prompts))]

    def empty_text(self, transformer: nn.Module, batch: int, text_tokens: int) -> dict[str, Tensor]:
        """Text arguments of zeros, float32 on the CPU, for estimates and benchmarks."""
        config: Any = transformer.config
        return {
            "encoder_hidden_states": torch.zeros(batch, text_tokens, config.joint_attention_dim),
            "pooled_projections": torch.zeros(batch, config.pooled_projection_dim),
        }

    def prompt_arguments(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Any]:
        """Arguments of the pipeline's call that stand for `prompts`, so that it needs no text encoder."""
        raise self._transformer_alone()

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        """The text encoders whose tokens make up the text stream, in the order of the stream.

        Args:
            pipe: the pipeline.
            text_tokens: length T of the text stream; that of `encode_text` when None.
        """
        raise self._transformer_alone()

    def name_span(self, pipe: Pipeline) -> TextSpan:
        """The text encoder in whose tokens segmentation looks for names."""
        return self.text_spans(pipe)[0]

    def read_encoded(self, arguments: Mapping[str, Any], output: tuple[Any, ...]) -> EncodedText:
        """What a call of `encode_prompt` made, from its arguments by name and what it returned."""
        raise self._transformer_alone()

    def text_arguments(self, output: tuple[Any, ...]) -> dict[str, Any]:
        """The transformer's text arguments of the conditional branch, from what `encode_prompt` returned."""
        raise self._transformer_alone()

    def encode_again(
        self, pipe: Pipeline, encoded: EncodedText, change: Callable[[str], str]
    ) -> dict[str, Any]:
        """The transformer's text arguments for the prompts of `encoded` with their text changed."""

        def changed(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [changed(entry) for entry in value]
            return change(value) if isinstance(value, str) else value

        given = {
            name: changed(value) if name.startswith("prompt") else value
            for name, value in encoded.arguments.items()
        }
        # Behind the hooks that open contexts have on it: this is not a prompt of the pipeline's call.
        return self.text_arguments(inspect.unwrap(pipe.encode_prompt)(**given))

    def call_defaults(self, pipe: Pipeline) -> dict[str, Any]:
        """Arguments of the pipeline's call that make it encode text as `encode_text` does."""
        return {}

    # Images and noise

    def latents(self, pipe: Pipeline, pixels: Tensor) -> Tensor:
        """Clean latents (posterior mean, scaled) [B, C, h, w] of images [B, 3, height, width] in [-1, 1]."""
        vae = pipe.vae
        posterior = vae.encode(pixels.to(device=pipe._execution_device, dtype=vae.dtype)).latent_dist
        return (posterior.mode() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def sigma(self, pipe: Pipeline, latents: Tensor, steps: int, index: int) -> Tensor:
        """Noise level in [0, 1], [1], at position `index` of the pipeline's own schedule of `steps` steps.

        Raises:
            ValueError: the index is outside the schedule.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        # A scheduler of our own: setting timesteps on the pipeline's would change its state.
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        arguments = self.schedule(scheduler.config, steps)
        if scheduler.config.get("use_dynamic_shifting"):
            tokens = (latents.shape[-2] // self.patch) * (latents.shape[-1] // self.patch)
            arguments["mu"] = self.shift(scheduler.config, tokens, steps)
        scheduler.set_timesteps(device=latents.device, **arguments)
        if not -len(scheduler.timesteps) <= index < len(scheduler.timesteps):
            raise ValueError(f"timestep index {index} is outside a schedule of {steps} steps")
        return scheduler.sigmas[index % len(scheduler.timesteps)].reshape(1)  # sigmas end with one more, 0

    def shift(self, scheduler_config: Mapping[str, Any], tokens: int, steps: int) -> float:
        """Shift of the noise schedule for a number of image tokens: a line through two points."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        return float(
            calculate_shift(
                tokens,
                scheduler_config.get("base_image_seq_len", 256),
                scheduler_config.get("max_image_seq_len", 4096),
                scheduler_config.get("base_shift", 0.5),
                scheduler_config.get("max_shift", 1.15),
            )
        )

    def noisy(self, pipe: Pipeline, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Latents at noise level `sigma`, [1], as the pipeline's scheduler mixes them with noise."""
        return torch.lerp(latents, noise, sigma.to(latents))

    def schedule(self, scheduler_config: Mapping[str, Any], steps: int) -> dict[str, Any]:
        """Arguments of `set_timesteps` as the pipeline gives them."""
        return {"num_inference_steps": steps}

    def pixel_multiple(self, pipe: Pipeline) -> int:
        """Pixels that a token covers along each axis; image sizes are multiples of it."""
        return int(pipe.vae_scale_factor * self.patch)

    def native_size(self, pipe: Pipeline) -> int:
        """Side in pixels of the square image the model was made for."""
        return int(pipe.default_sample_size * pipe.vae_scale_factor)

    def largest_size(self, pipe: Pipeline) -> int:
        """Largest side in pixels that the model takes."""
        return 2 * self.native_size(pipe)


def _append_rows(value: Any, batch: int, rows: slice) -> Any:
    if isinstance(value, Tensor):
        return torch.cat([value, value[rows]]) if value.dim() and len(value) == batch else value
    if isinstance(value, (list, tuple)):
        return type(value)(_append_rows(entry, batch, rows) for entry in value)
    if isinstance(value, dict):
        return {key: _append_rows(entry, batch, rows) for key, entry in value.items()}
    return value


PURE_NOISE = 1000.0
"""The scheduler's own number for pure noise: its timestep is this times sigma."""


def as_texts(text: str | Sequence[str] | None) -> list[str]:
    """A prompt argument of a pipeline as a list."""
    return [text] if isinstance(text, str) else list(text or ())


def pack(latents: Tensor, patch: int = 2) -> Tensor:
    """Latents [B, C, height, width] as tokens [B, N, C patch patch], as packed families read them."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpack(tokens: Tensor, latents: Tensor, patch: int = 2) -> Tensor:
    """The inverse of `pack`, in the size of `latents`."""
    height = latents.shape[-2] // patch
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=patch, q=patch)
