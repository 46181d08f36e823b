"""Train the bundled demo model from scratch: `python -m seg4diff.demo.train [--out DIR] [--seed N]`.

The model is Stable Diffusion 3 in small, made of the same diffusers classes, and it learns from images and
captions alone: no mask ever enters a loss. Five stages, each leaving a file in the work folder, so that an
interrupted run goes on where it stopped:

1. scenes        drawn by `scenes.scene`, seeds below `HELD_OUT` only
2. autoencoder   AutoencoderKL, 128 x 128 x 3 -> 32 x 32 x 8, trained on crops of 64 pixels
3. latents       posterior means of all scenes, standardised by `scaling_factor` and `shift_factor`
4. transformer   SD3Transformer2DModel, flow matching; small crops of the latents first, whole latents last
5. expert layer  the layer whose image-to-text attention segments training scenes best, kept in its config

The text encoders stay as they were drawn: random CLIP encoders give every word its own direction, and that is
all that captions of a few dozen words need. Lengths of schedules count steps, never seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import Attention
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from seg4diff.files import write_atomically

from . import WEIGHTS
from .scenes import CLASSES, HELD_OUT, SIZE, STUFF, THINGS, describe, scene

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Every number of the training run; the defaults are those of the bundled weights."""

    scenes: int = 16_384
    """Training scenes: seeds 0 to `scenes` - 1."""
    vae_steps: int = 2_400
    vae_batch: int = 16
    vae_crop: int = 64
    """Side of the autoencoder's training crops in pixels."""
    vae_rate: float = 3e-3
    vae_divergence: float = 1e-4
    """Weight of the Kullback-Leibler term, per latent number, beside the mean squared error."""
    steps: int = 3_300
    rate: float = 2e-3
    batch: int = 32
    crop: int = 16
    """Side of the latent crops that most of the early steps use."""
    crop_batch: int = 64
    crop_share: float = 0.75
    """Share of the steps of which seven in eight use crops."""
    reading_price: tuple[tuple[int, float], ...] = (
        (0, 0.0),
        (1_000, 0.03),
        (1_250, 0.003),
        (1_750, 0.001),
        (3_000, 0.0),
    )
    """(step, price): what attention from image to words costs from that step on, see `train_transformer`."""
    text_tokens: int = 31
    """CLIP tokens a caption keeps in training, of 77: its words and some of its padding."""
    sweep: int = 256
    """Training scenes on which the expert layer is chosen."""


# ----------------------------------------------------------------------------------------------------
# 1. Scenes


def _draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image [SIZE, SIZE, 3] and labels [SIZE, SIZE] (indices into CLASSES) of a training seed, uint8."""
    if seed >= HELD_OUT:
        raise ValueError(f"training must not draw the held-out seed {seed}")
    drawn = scene(seed)
    names = np.array([CLASSES.index(name) for name in drawn.classes], np.uint8)
    return np.asarray(drawn.image), names[drawn.labels]


def draw_scenes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 3, SIZE, SIZE] and labels [count, SIZE, SIZE], uint8, of the seeds below `count`.

    The labels tell which classes a crop shows, for its caption; no loss reads them.
    """
    images = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    labels = torch.empty(count, SIZE, SIZE, dtype=torch.uint8)
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(_draw, range(count), chunksize=64)
        for i, (image, label) in enumerate(tqdm(drawn, "scenes", count, mininterval=5)):
            images[i] = torch.from_numpy(image.copy()).permute(2, 0, 1)
            labels[i] = torch.from_numpy(label)
    return images, labels


def _pixels(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 images as float32 in -1..1, channels last in memory."""
    return images.to(device, torch.float32).div(127.5).sub(1.0).to(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------
# 2. Autoencoder


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder that shrinks each side four times, 8 channels."""
    model: AutoencoderKL = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    return model


def _rate(step: int, steps: int, peak: float, *, warm_up: int, flat: float) -> float:
    """Learning rate: linear warm-up, `peak` until `flat` of all steps, then a half cosine down to zero."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1.0 + math.cos(math.pi * max(0.0, (step / steps - flat) / (1.0 - flat))))


def train_autoencoder(images: torch.Tensor, recipe: Recipe, seed: int, device: torch.device) -> AutoencoderKL:
    """Fit the autoencoder to random crops of `images` [n, 3, SIZE, SIZE] uint8."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    model = build_autoencoder().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    side, progress = recipe.vae_crop, tqdm(range(recipe.vae_steps), "autoencoder", mininterval=5)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, recipe.vae_steps, recipe.vae_rate, warm_up=50, flat=0.2)
        chosen = rng.integers(len(images), size=recipe.vae_batch)
        corner = rng.integers(SIZE - side + 1, size=(recipe.vae_batch, 2))
        crops = [
            images[i, :, top : top + side, left : left + side]
            for i, (top, left) in zip(chosen, corner, strict=True)
        ]
        x = _pixels(torch.stack(crops), device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = model.encode(x).latent_dist
            y = model.decode(posterior.sample()).sample
        error = (y.float() - x).square().mean()
        mean, spread = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + spread.exp() - 1.0 - spread).mean()
        optimizer.zero_grad(set_to_none=True)
        (error + recipe.vae_divergence * divergence).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(psnr=f"{10.0 * math.log10(4.0 / error.item()):.1f} dB")
    return model.eval()


# ----------------------------------------------------------------------------------------------------
# 3. Latents


@torch.no_grad()
def encode_scenes(
    model: AutoencoderKL, images: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, float, float]:
    """Standardised posterior means [n, 8, 32, 32] float16, the shift taken off them and the scale put on."""
    latents = torch.empty(len(images), model.config.latent_channels, SIZE // 4, SIZE // 4)
    with torch.autocast(device.type, torch.bfloat16):
        for i in tqdm(range(0, len(images), 64), "latents", mininterval=5):
            posterior = model.encode(_pixels(images[i : i + 64], device)).latent_dist
            latents[i : i + 64] = posterior.mode().float()
    shift, scale = latents.mean().item(), 1.0 / latents.std().item()
    return latents.sub_(shift).mul_(scale).half(), shift, scale


# ----------------------------------------------------------------------------------------------------
# Text: a vocabulary of the scenes' words, and random encoders


BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEXT_TOKENS = 77
"""Length of a tokenised prompt, padding included."""


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of each word: always the most frequent pair, ties by alphabet."""
    merges: list[tuple[str, str]] = []
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    while counts := Counter(pair for pieces in split for pair in pairwise(pieces)):
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        for pieces in split:
            for i in range(len(pieces) - 2, -1, -1):
                if tuple(pieces[i : i + 2]) == merges[-1]:
                    pieces[i : i + 2] = ["".join(merges[-1])]
    return merges


def build_tokenizer(folder: Path, *, pad_token: str) -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the captions is one token; any other word is spelled out."""
    rng = np.random.default_rng(0)
    sentences = {describe([*pair], rng) for pair in product(THINGS, STUFF) for _ in range(16)}
    sentences |= {describe([*pair], rng) for pair in product(STUFF, STUFF) for _ in range(4)}
    words = sorted({word for sentence in sentences for word in re.findall("[a-z]+", sentence)})
    merges = _merges(words)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_TOKENS, "pad_token": pad_token}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    """A random CLIP text encoder in which a token's own identity outweighs its place and its neighbours."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        projection_dim=width,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if name.endswith("token_embedding.weight"):
            weight.normal_(std=1.0)
        elif name.endswith("position_embedding.weight"):
            weight.normal_(std=0.3)
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            weight.mul_(0.25)
        elif name.endswith("text_projection.weight"):  # the pooled vector must not drown the time embedding
            weight.mul_(0.1)
    return model


def write_caption(names: Sequence[str], rng: np.random.Generator) -> str:
    """A training caption for an image that shows `names`: often short of a name, sometimes with wrong ones.

    12 % are empty (for classifier-free guidance), the others sentences, comma lists or bare lists of names;
    a quarter of the bare lists also name classes that are absent, up to the whole vocabulary.
    """
    if rng.random() < 0.12:
        return ""
    kept = [str(name) for name in rng.permutation(names)]
    if len(kept) > 1 and rng.random() < 0.1:
        kept.pop()
    form = rng.random()
    if form < 0.35:
        return describe(kept, rng)
    if form < 0.45:
        return ", ".join(kept)
    if rng.random() < 0.25:
        absent = [name for name in CLASSES if name not in names]
        wrong = rng.choice(absent, rng.integers(1, len(absent) + 1), replace=False)
        kept = [str(name) for name in rng.permutation([*kept, *wrong])]
    return " ".join(kept)


# ----------------------------------------------------------------------------------------------------
# 4. Transformer


class CountedJointAttention:
    """SD3's joint attention, written out, with a weight for each key and the image-to-text map on request.

    `log_counts` [B, 1, 1, S] is added to the scores: a key that stands for n equal keys carries log n. The
    padding of a prompt can so be thinned out, and the zero tokens in T5's place, all equal, become one.
    """

    def __init__(self) -> None:
        self.log_counts: torch.Tensor | None = None
        self.maps: list[torch.Tensor] | None = None
        """Where set, each layer appends its probabilities [B, N, T], mean over the heads."""
        self.words: torch.Tensor | None = None
        """[B, S], one at the keys that are words, zero elsewhere."""
        self.reading: list[torch.Tensor] = []
        """Where `words` is set, each layer appends the mean probability mass of its image rows on words."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, N, C] of the image and [B, T, C] of the text in, the same out."""

        def heads(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:  # -> [B, H, N + T, D]
            return torch.cat([image, text], 1).unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states))
        key = heads(attn.to_k(hidden_states), attn.add_k_proj(encoder_hidden_states))
        value = heads(attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states))
        tokens = hidden_states.shape[1]
        with torch.autocast(
            query.device.type, enabled=False
        ):  # the softmax, too, in the dtype of the projections
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
            if self.log_counts is not None:
                scores = scores + self.log_counts.to(scores.dtype)
            probability = scores.softmax(-1)
            if self.words is not None:
                on_words = probability[:, :, :tokens].mean((1, 2)).float() * self.words
                self.reading.append(on_words.sum(1).mean())
            if self.maps is not None:
                self.maps.append(probability[:, :, :tokens, tokens:].mean(1))
            image, text = (probability @ value).transpose(1, 2).flatten(2).tensor_split([tokens], 1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def build_transformer() -> SD3Transformer2DModel:
    """An untrained transformer: 6 joint blocks, 4 heads of 32, 16 x 16 tokens a scene, 32 x 32 at most."""
    model: SD3Transformer2DModel = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=96,
        pos_embed_max_size=32,
    )
    return model


def build_pipeline(autoencoder: AutoencoderKL, folder: Path, seed: int) -> StableDiffusion3Pipeline:
    """The whole pipeline, untrained, its text encoders random; the tokenizers are written to `folder`."""
    torch.manual_seed(seed)
    first = build_tokenizer(folder / "tokenizer", pad_token=EOS)
    second = build_tokenizer(folder / "tokenizer_2", pad_token="!")
    pipe = StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder,
        text_encoder=build_text_encoder(first, 32, 1),
        tokenizer=first,
        text_encoder_2=build_text_encoder(second, 64, 2),
        tokenizer_2=second,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _thin_text(
    pipe: StableDiffusion3Pipeline, captions: list[str], recipe: Recipe, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Captions with their padding thinned out.

    Returns the token embeddings [B, t + 1, C], the log of how many tokens each stands for [B, t + 1], and the
    pooled embeddings [B, C']. The last token stands for the zeros in T5's place, of which pipelines have as
    many as their `max_sequence_length`.
    """
    kept = recipe.text_tokens
    embedded, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=1
    )
    index = np.empty((len(captions), kept), np.int64)
    counts = np.ones((len(captions), kept + 1))
    for i, tokens in enumerate(pipe.tokenizer(captions).input_ids):
        padding = kept - len(tokens)
        index[i, : len(tokens)] = range(len(tokens))
        index[i, len(tokens) :] = len(tokens) + rng.choice(TEXT_TOKENS - len(tokens), padding, replace=False)
        counts[i, len(tokens) : kept] = (TEXT_TOKENS - len(tokens)) / padding
        counts[i, kept] = rng.choice([32, 77, 256])
    chosen = F.pad(torch.from_numpy(index), (0, 1), value=TEXT_TOKENS).to(embedded.device)
    thinned = embedded.gather(1, chosen[..., None].expand(-1, -1, embedded.shape[2]))
    return thinned, torch.from_numpy(counts).log().float().to(embedded.device), pooled


def _batch(
    latents: torch.Tensor, labels: torch.Tensor, crop: bool, recipe: Recipe, rng: np.random.Generator
) -> tuple[torch.Tensor, list[str]]:
    """Latents [B, 8, s, s] with captions: whole scenes, or crops whose captions name what the crop shows."""
    side = recipe.crop if crop else latents.shape[-1]
    chosen = rng.integers(len(latents), size=recipe.crop_batch if crop else recipe.batch)
    windows, captions = [], []
    for i in chosen:
        top, left = 2 * rng.integers((latents.shape[-1] - side) // 2 + 1, size=2)
        windows.append(latents[i, :, top : top + side, left : left + side])
        seen = labels[i, 4 * top : 4 * (top + side), 4 * left : 4 * (left + side)]
        share = np.bincount(seen.numpy().ravel(), minlength=len(CLASSES)) / seen.numel()
        captions.append(write_caption([CLASSES[c] for c in np.flatnonzero(share >= 0.03)], rng))
    return torch.stack(windows), captions


def train_transformer(
    pipe: StableDiffusion3Pipeline,
    latents: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
    seed: int,
    checkpoint: Path,
) -> None:
    """Train `pipe.transformer` in place on `latents` [n, 8, 32, 32]; ends with the averaged weights.

    The loss is the squared error of the velocity, plus a price on reading: the square root of the mean
    probability mass that image tokens spend on words, summed over the layers. Left free, several layers learn
    to read, side by side; a concave price makes it cheapest that one reads for all. Nothing says which.

    The state is kept in `checkpoint` every 250 steps, and read from there if it exists. Each step draws from
    generators of its own, so a resumed run takes the steps that the interrupted one would have taken.
    """
    model, device = pipe.transformer.train(), pipe.transformer.device
    attention = CountedJointAttention()
    stock = dict(model.attn_processors)
    model.set_attn_processor(attention)
    average = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizers = _optimizers(model, recipe)
    start, losses = 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
        average = state["average"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    progress = tqdm(range(start, recipe.steps), "transformer", recipe.steps, initial=start, mininterval=5)
    for step in progress:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, recipe.steps, recipe.rate, warm_up=50, flat=0.5)
        flow, reading = _losses_of_step(pipe, attention, latents, labels, recipe, step, seed)
        losses.append(flow.item())
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        (flow + reading).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                average[name].lerp_(weight, 1.0 - decay)
        if (step + 1) % 50 == 0:
            progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        if (step + 1) % 250 == 0 or step + 1 == recipe.steps:
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "average": average,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            write_atomically(checkpoint, partial(torch.save, state))
    model.load_state_dict(average, strict=False)
    model.set_attn_processor(stock)
    model.eval()


def _optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and feed-forward layers, AdamW for the rest."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        inner = weight.ndim == 2 and re.search(r"\.(attn|ff|ff_context)\.", name)
        (matrices if inner else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=recipe.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _losses_of_step(
    pipe: StableDiffusion3Pipeline,
    attention: CountedJointAttention,
    latents: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
    step: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The flow-matching loss of a step and its price on reading, both scalars."""
    device = pipe.transformer.device
    rng = np.random.default_rng([seed, 4, step])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    crop = step < recipe.crop_share * recipe.steps and step % 8 != 0
    clean, captions = _batch(latents, labels, crop, recipe, rng)
    clean = clean.to(device, torch.float32)
    with torch.no_grad():
        text, log_counts, pooled = _thin_text(pipe, captions, recipe, rng)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    wide = torch.rand(len(clean), generator=generator) < 0.15
    focused = torch.sigmoid(torch.randn(len(clean), generator=generator) + 0.6)
    sigma = torch.where(wide, torch.rand(len(clean), generator=generator), focused).to(device)
    noisy = torch.lerp(clean, noise, sigma[:, None, None, None])

    image_tokens = clean.shape[-1] ** 2 // 4
    attention.log_counts = F.pad(log_counts, (image_tokens, 0))[:, None, None]
    price = [price for first, price in recipe.reading_price if first <= step][-1]
    attention.words, attention.reading = None, []
    if price:
        words = (log_counts == 0).float()
        words[:, 0] = 0.0  # the begin token
        attention.words = F.pad(words, (image_tokens, 0))
    with torch.autocast(device.type, torch.bfloat16):
        velocity = pipe.transformer(noisy, text, pooled, sigma * 1000.0, return_dict=False)[0]
    flow = (velocity.float() - (noise - clean)).square().mean()
    if not price:
        return flow, flow.new_zeros(())
    return flow, price * torch.stack(attention.reading).add(1e-4).sqrt().sum()


# ----------------------------------------------------------------------------------------------------
# 5. Expert layer


def name_spans(tokenizer: CLIPTokenizer, names: Sequence[str]) -> list[slice]:
    """Columns of each name in the prompt " ".join(names), which begins with one special token."""
    ends = 1 + np.cumsum([len(tokenizer(name).input_ids) - 2 for name in names])
    return [slice(int(a), int(b)) for a, b in pairwise([1, *ends])]


@torch.no_grad()
def sweep_layers(
    pipe: StableDiffusion3Pipeline, seeds: Sequence[int], *, prompt_all: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Zero-shot mIoU [layers] and pixel accuracy [layers] of the image-to-text maps of every layer.

    The recipe of the paper: posterior mean, noise at `timesteps[-8]` of 28, names joined by spaces, one
    forward without guidance, probabilities averaged over heads and over the tokens of a name, argmax at full
    size. The prompt and the argmax hold the classes present, or with `prompt_all` every class. The noise of
    a scene is drawn from its seed.
    """
    model, attention = pipe.transformer, CountedJointAttention()
    stock = dict(model.attn_processors)
    model.set_attn_processor(attention)
    pipe.scheduler.set_timesteps(28)
    timestep = pipe.scheduler.timesteps[-8:-7]
    confusion = np.zeros((model.config.num_layers, len(CLASSES), len(CLASSES)), np.int64)
    for seed in tqdm(seeds, "layers", mininterval=5):
        drawn = scene(seed)
        names = CLASSES if prompt_all else drawn.classes
        pixels = pipe.image_processor.preprocess(drawn.image).to(pipe.vae.device, pipe.vae.dtype)
        clean = pipe.vae.encode(pixels).latent_dist.mode()
        clean = (clean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
        text, _, pooled, _ = pipe.encode_prompt(
            " ".join(names), None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
        )
        attention.maps = []
        noisy = pipe.scheduler.scale_noise(clean, timestep, noise)
        model(noisy, text, pooled, timestep.to(clean.device), return_dict=False)
        maps = torch.cat(attention.maps).float()  # [layers, N, T]
        scores = torch.stack([maps[..., span].mean(-1) for span in name_spans(pipe.tokenizer, names)], 1)
        scores = scores.unflatten(2, (SIZE // 8, SIZE // 8))
        found = F.interpolate(scores, size=(SIZE, SIZE), mode="bilinear").argmax(1).cpu().numpy()
        truth = np.array([CLASSES.index(name) for name in drawn.classes])[drawn.labels]
        predicted = np.array([CLASSES.index(name) for name in names])[found]
        for layer, guess in enumerate(predicted):
            pairs = np.bincount((truth * len(CLASSES) + guess).ravel(), minlength=len(CLASSES) ** 2)
            confusion[layer] += pairs.reshape(confusion[layer].shape)
    model.set_attn_processor(stock)
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    union = confusion.sum(1) + confusion.sum(2) - hits
    return (hits / union.clip(1)).mean(1), hits.sum(1) / confusion.sum((1, 2))


# ----------------------------------------------------------------------------------------------------
# The whole run


def save_pipeline(pipe: StableDiffusion3Pipeline, out: Path) -> None:
    """Cast the pipeline to float16 and write it to the folder `out`, which changes once all is written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        pipe.to("cpu", torch.float16).save_pretrained(Path(scratch) / "new")
        for file in Path(scratch).rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors lets nobody but the owner read
        if out.exists():
            out.rename(Path(scratch) / "old")
        (Path(scratch) / "new").rename(out)
    logger.info("wrote %s", out)


def train(out: Path, work: Path, recipe: Recipe, seed: int, device: torch.device) -> None:
    """Run all stages, reusing the files of those already in `work`, and write the pipeline to `out`."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    if not (work / "scenes.pt").exists():
        write_atomically(work / "scenes.pt", partial(torch.save, draw_scenes(recipe.scenes)))
    images, labels = torch.load(work / "scenes.pt", weights_only=True)

    autoencoder = build_autoencoder().to(device)
    if not (work / "autoencoder.pt").exists():
        trained = train_autoencoder(images, recipe, seed, device)
        write_atomically(work / "autoencoder.pt", partial(torch.save, trained.state_dict()))
    autoencoder.load_state_dict(torch.load(work / "autoencoder.pt", map_location=device, weights_only=True))
    autoencoder.eval().requires_grad_(False)

    if not (work / "latents.pt").exists():
        encoded = encode_scenes(autoencoder, images, device)
        write_atomically(work / "latents.pt", partial(torch.save, encoded))
    latents, shift, scale = torch.load(work / "latents.pt", weights_only=True)
    autoencoder.register_to_config(shift_factor=shift, scaling_factor=scale)

    pipe = build_pipeline(autoencoder, work, seed).to(device)
    train_transformer(pipe, latents, labels, recipe, seed, work / "transformer.pt")

    scores, _ = sweep_layers(pipe, range(recipe.sweep))
    logger.info("mIoU by layer on training scenes: %s", ", ".join(f"{score:.3f}" for score in scores))
    pipe.transformer.register_to_config(_seg4diff_expert_layers=[int(scores.argmax())])
    save_pipeline(pipe, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m seg4diff.demo.train", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the pipeline (%(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("demo-training"), help="folder of what a run leaves behind"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, batches and noise (%(default)s)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(options.out, options.work, Recipe(), options.seed, torch.device(options.device))


if __name__ == "__main__":
    main()
