"""Tiny random pipelines of real diffusers classes: seconds of import, milliseconds to build and to run."""

from __future__ import annotations

import copy
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

CALL: dict[str, Any] = {
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "output_type": "latent",
    "max_sequence_length": 77,
}
"""Arguments of a call of a pipeline that give latents and cost little."""

WORDS = ("cat", "sofa", "dog", "red", "tree")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """A byte-level CLIP tokenizer in which the words above are one token each and all others many."""
    import tokenizers
    from transformers import CLIPTokenizer

    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {s: i for i, s in enumerate(symbols + [s + "</w>" for s in symbols])}
    merges = []
    for word in WORDS:
        left = word[0]
        for position, letter in enumerate(word[1:], start=1):
            right = letter + ("</w>" if position == len(word) - 1 else "")
            merges.append(f"{left} {right}")
            left += right
            vocabulary.setdefault(left, len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "vocab.json").write_text(json.dumps(vocabulary))
        (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return CLIPTokenizer.from_pretrained(folder)


@cache
def t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "▁"] + ["▁" + w for w in (*WORDS, "a", "on")]
    pieces += list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.!'-")
    return T5TokenizerFast(vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0)


def transformer(
    layers: int = 3,
    heads: int = 2,
    head_dim: int = 8,
    dual: tuple[int, ...] = (),
    qk_norm: str | None = None,
    sample_size: int = 8,
    seed: int = 0,
) -> Any:
    """A random SD3 transformer; ``dual=(0,), qk_norm="rms_norm"`` makes it SD3.5-shaped."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    ).eval()


def transformer_inputs(
    batch: int = 2, height: int = 8, width: int = 12, text: int = 9, seed: int = 1
) -> dict[str, Any]:
    """Random arguments of a call; 24 image tokens on a 4 x 6 grid."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 64, generator=generator),
        "pooled_projections": torch.randn(batch, 64, generator=generator),
        "timestep": torch.full((batch,), 500.0),
    }


def vae(channels: int = 4) -> Any:
    """A random autoencoder that shrinks each side by 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=1,
        layers_per_block=1,
        latent_channels=channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=1.5,
    ).eval()


def pipeline(t5: bool = False, seed: int = 0, **transformer_arguments: Any) -> Any:
    """A random StableDiffusion3Pipeline that draws 64 x 64 images; without T5 unless asked."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    # Tokenizers hold state while they run: no two pipelines share one.
    tokenizer, tokenizer_2 = copy.deepcopy(clip_tokenizer()), copy.deepcopy(clip_tokenizer("!"))

    def clip() -> Any:
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=32,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).eval()

    text_encoder, text_encoder_2 = clip(), clip()
    text_encoder_3 = tokenizer_3 = None
    if t5:
        tokenizer_3 = copy.deepcopy(t5_tokenizer())
        configuration = T5Config(
            vocab_size=len(tokenizer_3), d_model=64, d_kv=8, d_ff=32, num_layers=1, num_heads=2
        )
        text_encoder_3 = T5EncoderModel(configuration).eval()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer(seed=seed, **transformer_arguments),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_transformer(
    double: int = 2, single: int = 2, *, guidance: bool = False, in_channels: int = 16, seed: int = 0
) -> Any:
    """A random Flux transformer of two heads of 16."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def flux_inputs(
    batch: int = 2, grid: tuple[int, int] = (4, 6), text: int = 9, reference: int = 0, seed: int = 1
) -> dict[str, Any]:
    """Random arguments of a call; ``reference`` tokens of another image follow those of the grid."""
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    others = torch.tensor([[1.0, 0.0, float(column)] for column in range(reference)]).reshape(-1, 3)
    return {
        "hidden_states": torch.randn(batch, tokens + reference, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 32, generator=generator),
        "pooled_projections": torch.randn(batch, 24, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.cat([ids, others]),
        "txt_ids": torch.zeros(text, 3),
    }


def flux_pipeline(seed: int = 0, **transformer_arguments: Any) -> Any:
    """A random FluxPipeline that draws 64 x 64 images."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = copy.deepcopy(clip_tokenizer()), copy.deepcopy(t5_tokenizer())
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            **special,
        )
    ).eval()
    text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer_2), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()
    pipe = FluxPipeline(
        transformer=flux_transformer(seed=seed, **transformer_arguments),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )
    pipe.default_sample_size = 8  # a constant of the pipeline's class: 1024 pixels
    pipe.set_progress_bar_config(disable=True)
    return pipe


def qwen_transformer(layers: int = 3, *, zero_cond_t: bool = False, seed: int = 0) -> Any:
    """A random Qwen-Image transformer of two heads of 16; later Edit models have ``zero_cond_t``."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    ).eval()


def qwen_inputs(
    batch: int = 2, text: int = 9, reference: int = 0, *, masked: bool = False, seed: int = 1
) -> dict[str, Any]:
    """Random arguments of a call on a 4 x 6 grid; ``masked`` has texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, 4, 6)] + ([(1, 1, reference)] if reference else [])
    inputs = {
        "hidden_states": torch.randn(batch, 24 + reference, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 32, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [shapes] * batch,
    }
    if masked:
        lengths = torch.tensor([text, *(text - 4,) * (batch - 1)])
        inputs["encoder_hidden_states_mask"] = torch.arange(text) < lengths[:, None]
    return inputs


@cache
def chat_tokenizer() -> Any:
    """A byte-level tokenizer of Qwen2's class: the words above are one token each, also behind a space."""
    import tokenizers
    from transformers import Qwen2Tokenizer

    vocabulary = {s: i for i, s in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in (*("Ġ" + word for word in WORDS), *WORDS):
        left = word[0]
        for letter in word[1:]:
            merges.append((left, letter))
            left += letter
            vocabulary.setdefault(left, len(vocabulary))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={**vocabulary, "<|endoftext|>": len(vocabulary)},
        merges=list(dict.fromkeys(merges)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special[1:2] + special[3:],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def qwen_pipeline(seed: int = 0, **transformer_arguments: Any) -> Any:
    """A random QwenImagePipeline that draws 64 x 64 images."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    tokenizer = copy.deepcopy(chat_tokenizer())
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
            for name, token in (
                ("image", "<|image_pad|>"),
                ("video", "<|video_pad|>"),
                ("vision_start", "<|vision_start|>"),
                ("vision_end", "<|vision_end|>"),
            )
        },
    )
    pipe = QwenImagePipeline(
        transformer=qwen_transformer(seed=seed, **transformer_arguments),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        ).eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
    )
    before, _, _ = pipe.prompt_template_encode.partition("{}")
    # 34 with the tokenizer of the published model
    pipe.prompt_template_encode_start_idx = len(tokenizer(before).input_ids)
    pipe.default_sample_size = 8  # a constant of the pipeline's class: 1024 pixels
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart_transformer(layers: int = 3, sample_size: int = 8, seed: int = 0) -> Any:
    """A random PixArt transformer of two heads of 8."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(seed)
    return PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=layers,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        cross_attention_dim=16,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    ).eval()


def pixart_inputs(height: int = 8, width: int = 12, seed: int = 1) -> dict[str, Any]:
    """Random arguments of a call of two rows; 24 image tokens on a 4 x 6 grid."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(2, 9, 32, generator=generator),
        "timestep": torch.full((2,), 500.0),
    }


def pixart_pipeline(seed: int = 0) -> Any:
    """A random PixArtSigmaPipeline that draws 256 x 256 images, or 64 x 64 without resolution binning."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer = copy.deepcopy(t5_tokenizer())
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()
    pipe = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae(),
        transformer=pixart_transformer(seed=seed),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sana_transformer(layers: int = 3, sample_size: int = 4, seed: int = 0) -> Any:
    """A random SANA transformer of two heads of 8."""
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(seed)
    return SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=4,
        num_attention_heads=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=sample_size,
    ).eval()


def sana_inputs(seed: int = 1) -> dict[str, Any]:
    """Random arguments of a call of two rows; 24 image tokens on a 4 x 6 grid."""
    return pixart_inputs(height=4, width=6, seed=seed)


@cache
def gemma_tokenizer() -> Any:
    """A byte-level tokenizer with the begin of text of Gemma, in which some words are one token each."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<unk>", *WORDS, "a", "on", ".", ":", "user", "prompt"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )


def sana_pipeline(seed: int = 0) -> Any:
    """A random SanaPipeline that draws 128 x 128 images without resolution binning."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(seed)
    tokenizer = copy.deepcopy(gemma_tokenizer())
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=0,
            bos_token_id=1,
        )
    ).eval()
    depths = (1,) * 6
    shrinking = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 6,
        decoder_block_types=("ResBlock",) * 6,
        encoder_block_out_channels=(4,) * 6,
        decoder_block_out_channels=(4,) * 6,
        encoder_layers_per_block=depths,
        decoder_layers_per_block=depths,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    ).eval()
    pipe = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=shrinking,
        transformer=sana_transformer(seed=seed),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def z_image_transformer(layers: int = 3, seed: int = 0) -> Any:
    """A random Z-Image transformer of two heads of 16."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    ).eval()
    for token in (model.x_pad_token, model.cap_pad_token):  # zeros that training has changed
        torch.nn.init.normal_(token)
    return model


def z_image_inputs(text: tuple[int, ...] = (9, 40), seed: int = 1) -> dict[str, Any]:
    """Random arguments of a call on a 4 x 6 grid, with texts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": [torch.randn(4, 1, 8, 12, generator=generator) for _ in text],
        "cap_feats": [torch.randn(length, 32, generator=generator) for length in text],
        "t": torch.full((len(text),), 0.5),
    }


def z_image_pipeline(seed: int = 0) -> Any:
    """A random ZImagePipeline that segments 64 x 64 images."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    tokenizer = copy.deepcopy(chat_tokenizer())
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=None,
        eos_token_id=None,
    )
    pipe = ZImagePipeline(
        transformer=z_image_transformer(seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=Qwen3Model(config).eval(),
        tokenizer=tokenizer,
    )
    pipe.default_sample_size = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe


def krea2_transformer(layers: int = 3, seed: int = 0) -> Any:
    """A random Krea 2 transformer of four heads of 16 and two of keys."""
    from diffusers import Krea2Transformer2DModel

    torch.manual_seed(seed)
    return Krea2Transformer2DModel(
        in_channels=16,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=32,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def krea2_inputs(seed: int = 1) -> dict[str, Any]:
    """Random arguments of a call of two rows on a 4 x 6 grid, the second with padding in the middle."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 3:7] = False
    return {
        "hidden_states": torch.randn(2, 24, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 9, 3, 32, generator=generator),
        "timestep": torch.full((2,), 0.5),
        "position_ids": torch.cat([torch.zeros(9, 3), flux_inputs()["img_ids"]]),
        "encoder_attention_mask": mask,
    }


def lumina2_transformer(layers: int = 3, seed: int = 0) -> Any:
    """A random Lumina 2 transformer of four heads of 16 and two of keys."""
    from diffusers import Lumina2Transformer2DModel

    torch.manual_seed(seed)
    return Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=64,
        num_layers=layers,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        cap_feat_dim=32,
    ).eval()


def lumina2_inputs(seed: int = 1) -> dict[str, Any]:
    """Random arguments of a call on a 4 x 6 grid, of two rows with 9 and 5 text tokens, padded to 12."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 4, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(2, 12, 32, generator=generator),
        "encoder_attention_mask": (torch.arange(12) < torch.tensor([[9], [5]])).long(),
        "timestep": torch.full((2,), 0.5),
    }


def clip() -> tuple[Any, Any]:
    """A random CLIP model and its processor, as the CLIP score takes them."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={**small, **special, "vocab_size": len(tokenizer), "projection_dim": 8},
        vision_config={**small, "image_size": 32, "patch_size": 8, "projection_dim": 8},
        projection_dim=8,
    )
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return CLIPModel(config).eval(), CLIPProcessor(CLIPImageProcessor(**size), tokenizer)
