"""Tiny random models and pipelines of the families that differ little from Flux or from SD3."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.support import tiny

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}"
    "[/SYSTEM_PROMPT]{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


@cache
def word_tokenizer(template: str = TURNS, padding_side: str = "right", *, begins: bool = False) -> Any:
    """A tokenizer of whole words with a chat template; ``begins`` adds a begin of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
    special += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    words = [*special, "user", "system", "assistant", *tiny.WORDS, "a", "on", '"', "'", *"bcdefghijklmn"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if begins:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>" if begins else None,
        unk_token="<unk>",
        additional_special_tokens=special[3:],
        chat_template=template,
        padding_side=padding_side,
    )


def transformer_arguments(double: int, single: int) -> dict[str, Any]:
    """What the transformers of Flux's kind take alike: two heads of 16."""
    return {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }


def inputs(**others: Any) -> dict[str, Any]:
    """`tiny.flux_inputs` without a pooled embedding."""
    given = tiny.flux_inputs(**others)
    del given["pooled_projections"]
    return given


def flux2_transformer(double: int = 2, single: int = 2, *, guidance: bool = False, text: int = 32) -> Any:
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    arguments = transformer_arguments(double, single)
    arguments |= {"axes_dims_rope": (4, 4, 4, 4), "joint_attention_dim": text, "guidance_embeds": guidance}
    return Flux2Transformer2DModel(**arguments, timestep_guidance_channels=32).eval()


def flux2_inputs(*, reference: int = 0, batch: int = 2) -> dict[str, Any]:
    given = inputs(reference=reference, batch=batch)
    ids = given["img_ids"]
    given["img_ids"] = torch.cat([ids, ids.new_zeros(len(ids), 1)], -1)[None].expand(batch, -1, -1)
    given["txt_ids"] = torch.nn.functional.pad(torch.arange(9.0)[:, None], (3, 0))[None].expand(batch, -1, -1)
    return given


def flux2_pipeline(*, klein: bool = False) -> Any:
    """A random pipeline of Flux.2 that draws 64 x 64 images, dev or klein."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Pipeline,
    )

    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=1,
        layers_per_block=1,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    parts: dict[str, Any] = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae,
        "transformer": flux2_transformer(text=3 * 8, guidance=not klein),
    }
    pipe: Any
    if klein:
        tokenizer = copy.deepcopy(word_tokenizer())
        pipe = Flux2KleinPipeline(text_encoder=qwen3(len(tokenizer), 28), tokenizer=tokenizer, **parts)
    else:
        tokenizer = copy.deepcopy(word_tokenizer(INSTRUCTIONS, "left", begins=True))
        processor = text_processor(tokenizer)
        pipe = Flux2Pipeline(text_encoder=mistral(len(tokenizer)), tokenizer=processor, **parts)
    return finished(pipe)


def text_processor(tokenizer: Any) -> Any:
    """A processor of text alone; that of Pixtral needs torchvision."""
    from transformers import ProcessorMixin

    class TextProcessor(ProcessorMixin):
        def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
            super().__init__(tokenizer, chat_template=chat_template)

    return TextProcessor(tokenizer, INSTRUCTIONS)


def decoder(vocabulary: int, layers: int, hidden: int = 8) -> dict[str, Any]:
    """What the configurations of tiny language models take alike."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }


def qwen3(vocabulary: int, layers: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**decoder(vocabulary, layers))).eval()


def mistral(vocabulary: int) -> Any:
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
    )

    vision = PixtralVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    text = MistralConfig(**decoder(vocabulary, 30))
    return Mistral3ForConditionalGeneration(Mistral3Config(vision_config=vision, text_config=text)).eval()


@contextmanager
def fed_ids(encoder: Any) -> Iterator[list[Tensor]]:
    """The token ids of every call of a text encoder."""
    found: list[Tensor] = []

    def spy(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        assert ids is not None
        found.append(ids.detach().cpu())

    handle = encoder.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def longcat_transformer(double: int = 2, single: int = 2, *, channels: int = 16) -> Any:
    from diffusers import LongCatImageTransformer2DModel

    torch.manual_seed(0)
    arguments = {**transformer_arguments(double, single), "in_channels": channels}
    return LongCatImageTransformer2DModel(**arguments, pooled_projection_dim=32).eval()


def longcat_inputs() -> dict[str, Any]:
    given = inputs(reference=10)
    given["img_ids"] += torch.tensor([1.0, 512, 512])
    given["txt_ids"] = counted(9)
    return given


def counted(tokens: int) -> Tensor:
    """Positions (0, n, n) of text tokens."""
    return torch.nn.functional.pad(torch.arange(float(tokens))[:, None].expand(-1, 2), (1, 0))


def ovis_transformer(double: int = 2, single: int = 2) -> Any:
    from diffusers import OvisImageTransformer2DModel

    torch.manual_seed(0)
    return OvisImageTransformer2DModel(**transformer_arguments(double, single), out_channels=16).eval()


def bria_transformer(double: int = 2, single: int = 2) -> Any:
    from diffusers import BriaTransformer2DModel

    torch.manual_seed(0)
    return BriaTransformer2DModel(
        **transformer_arguments(double, single), pooled_projection_dim=None, guidance_embeds=False
    ).eval()


def bria_inputs() -> dict[str, Any]:
    return {**inputs(), "timestep": torch.full((2,), 500.0)}


def auraflow_transformer(joint: int = 2, single: int = 2) -> Any:
    from diffusers import AuraFlowTransformer2DModel

    torch.manual_seed(0)
    return AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=joint,
        num_single_dit_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    ).eval()


def latent_inputs(text: int = 9, timestep: float = 0.5) -> dict[str, Any]:
    """Random arguments of a call of a model that patches latents itself; 4 x 6 image tokens."""
    generator = tiny.seeded(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(2, text, 32, generator=generator),
        "timestep": torch.full((2,), timestep),
    }


def finished(pipe: Any) -> Any:
    """The pipeline for images of 64 x 64 pixels, without a progress bar."""
    pipe.default_sample_size = 4 if type(pipe).__name__ == "BriaPipeline" else 8
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def longcat_pipeline() -> Any:
    from diffusers import LongCatImagePipeline
    from transformers import Qwen2Config, Qwen2Model

    transformer = longcat_transformer(channels=64)  # the pipeline has 16 channels written down
    tokenizer = copy.deepcopy(word_tokenizer())
    encoder = Qwen2Model(Qwen2Config(**decoder(len(tokenizer), 1, 32))).eval()
    return finished(
        LongCatImagePipeline(
            scheduler=flow(use_dynamic_shifting=True),
            vae=tiny.vae(16),
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_processor=None,
            transformer=transformer,
        )
    )


def ovis_pipeline() -> Any:
    from diffusers import OvisImagePipeline
    from transformers import Qwen3Config, Qwen3Model

    transformer = ovis_transformer()
    tokenizer = copy.deepcopy(word_tokenizer())
    encoder = Qwen3Model(Qwen3Config(**decoder(len(tokenizer), 1, 32))).eval()
    return finished(
        OvisImagePipeline(
            scheduler=flow(use_dynamic_shifting=True),
            vae=tiny.vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=transformer,
        )
    )


def t5(tokenizer: Any, *, multilingual: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    sizes = {
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    if multilingual:
        return UMT5EncoderModel(UMT5Config(**sizes)).eval()
    return T5EncoderModel(T5Config(**sizes)).eval()


def bria_pipeline(**scheduler: Any) -> Any:
    from diffusers import BriaPipeline

    transformer = bria_transformer()
    tokenizer = copy.deepcopy(tiny.t5_tokenizer())
    return finished(
        BriaPipeline(
            transformer=transformer,
            scheduler=flow(**scheduler),
            vae=tiny.vae(),
            text_encoder=t5(tokenizer),
            tokenizer=tokenizer,
        )
    )


def auraflow_pipeline() -> Any:
    from diffusers import AuraFlowPipeline

    transformer = auraflow_transformer()
    tokenizer = copy.deepcopy(tiny.t5_tokenizer())
    vae = tiny.vae()
    vae.register_to_config(shift_factor=None)
    return finished(
        AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=t5(tokenizer, multilingual=True),
            vae=vae,
            transformer=transformer,
            scheduler=flow(shift=1.73),
        )
    )


def cogview4_transformer(layers: int = 4) -> Any:
    from diffusers import CogView4Transformer2DModel

    torch.manual_seed(0)
    return CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(32, 32),
    ).eval()


def cogview4_inputs(*, masked: bool = False) -> dict[str, Any]:
    size = torch.tensor([[64.0, 96.0]] * 2)
    sizes = {"original_size": size, "target_size": size, "crop_coords": size * 0}
    mask = {"attention_mask": (torch.arange(9) >= torch.tensor([[0], [4]])).float()} if masked else {}
    return {**latent_inputs(timestep=500.0), **sizes, **mask}


def cogview4_pipeline() -> Any:
    from diffusers import CogView4Pipeline
    from transformers import GlmConfig, GlmModel

    transformer = cogview4_transformer()
    tokenizer = copy.deepcopy(word_tokenizer(TURNS, "left", begins=True))
    encoder = GlmModel(GlmConfig(**decoder(len(tokenizer), 2, 32))).eval()
    vae = tiny.vae()
    vae.register_to_config(shift_factor=None)
    scheduler = flow(
        use_dynamic_shifting=True,
        time_shift_type="linear",
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
    )
    return finished(
        CogView4Pipeline(
            tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
    )


def chroma_transformer(double: int = 2, single: int = 2) -> Any:
    from diffusers import ChromaTransformer2DModel

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers builds it of deprecated parts of its own
        return ChromaTransformer2DModel(
            **transformer_arguments(double, single),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ).eval()


def chroma_inputs(*, masked: bool = True) -> dict[str, Any]:
    given = inputs()
    if masked:
        text = (torch.arange(9) < torch.tensor([[9], [5]])).float()
        given["attention_mask"] = torch.cat([text, torch.ones(2, 24)], dim=1)
    return given


def chroma_pipeline() -> Any:
    from diffusers import ChromaPipeline

    transformer = chroma_transformer()
    tokenizer = copy.deepcopy(tiny.t5_tokenizer())
    return finished(
        ChromaPipeline(
            scheduler=flow(use_dynamic_shifting=True),
            vae=tiny.vae(),
            text_encoder=t5(tokenizer),
            tokenizer=tokenizer,
            transformer=transformer,
        )
    )
