"""Families that read text by cross-attention, end to end: masks, words, segments, edits, refusals."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seg4diff
from seg4diff.attention.maps import maps_of
from seg4diff.backbones import find_backbone
from seg4diff.kernels.types import MapRequest
from tests.support import tiny
from tests.support.images import random_image

# The multistep solver of diffusers hands a tensor to NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

INSTRUCTION = ["user prompt : a dog", "user prompt : "]
CALL: dict[str, Any] = {
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "output_type": "latent",
    "use_resolution_binning": False,
    "max_sequence_length": 20,
}
MODELS = {
    "pixart": (tiny.pixart_transformer, tiny.pixart_inputs),
    "sana": (tiny.sana_transformer, tiny.sana_inputs),
}


@pytest.fixture(params=["pixart", "sana"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return tiny.pixart_pipeline() if request.param == "pixart" else tiny.sana_pipeline()


def attention_of(calls: list[tuple[Tensor, Tensor, Tensor | None]], text: int) -> list[Tensor]:
    """Softmax in float64 [B, H, N, T] of the calls that read `text` tokens, masks included."""
    maps = []
    for query, key, mask in calls:
        if key.shape[2] == text and query.shape[2] != text:
            scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
            maps.append((scores if mask is None else scores + mask.double()).softmax(dim=-1))
    return maps


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Queries, keys and masks of PyTorch's attention calls."""
    found: list[tuple[Tensor, Tensor, Tensor | None]] = []
    stock = F.scaled_dot_product_attention

    def spy(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **other: Any
    ) -> Tensor:
        found.append((query.detach(), key.detach(), attn_mask))
        return stock(query, key, value, attn_mask=attn_mask, **other)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return found


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_masked_padding(model: str, calls: list[Any]) -> None:
    """Rows of different text length, both kinds of map, against a float64 softmax; output is stock's."""
    transformer, inputs = MODELS[model][0](), MODELS[model][1]()
    mask = torch.ones(2, 9)
    mask[0, 4:] = 0
    inputs["encoder_attention_mask"] = mask
    stock = transformer(**inputs).sample
    exact = attention_of(calls, 9)
    assert len(exact) == 3
    for kind in ("probability", "text_probability"):
        request = MapRequest(kind=kind, heads="each")  # type: ignore[arg-type]
        with seg4diff.capture(transformer, maps=request) as captured:
            torch.testing.assert_close(transformer(**inputs).sample, stock, rtol=1e-5, atol=1e-5)
        for record, expected in zip(captured.records, exact, strict=True):
            assert record.maps is not None
            torch.testing.assert_close(record.maps.double(), expected, rtol=1e-5, atol=1e-8)
            assert float(record.maps[0, ..., 4:].abs().max()) == 0.0
            assert float(record.maps[1, ..., 4:].min()) > 0
        early = maps_of(transformer, [0, 2], request, inputs)
        torch.testing.assert_close(early[1].double(), exact[2], rtol=1e-5, atol=1e-8)
    request = MapRequest(kind="logit", heads="each")
    logits = maps_of(transformer, [1], request, inputs)[0].double()
    wanted = exact[1].log() - exact[1].log()[..., :1]
    shown = mask.bool()[:, None, None].expand_as(logits)
    torch.testing.assert_close((logits - logits[..., :1])[shown], wanted[shown], rtol=1e-4, atol=1e-5)
    assert torch.equal(transformer(**inputs).sample, stock)


def test_capture_reads_the_conditional_rows_and_words(pipe: Any, calls: list[Any]) -> None:
    """Heat map of a word: the float64 softmax of stock's conditional rows at its tokenizer's columns."""
    size = 64 if pipe.vae_scale_factor == 8 else 128
    call = {**CALL, "height": size, "width": size, "generator": torch.Generator().manual_seed(0)}
    if "Sana" in type(pipe).__name__:
        call["complex_human_instruction"] = None
    prompt = "A red SOFA on a cat"
    stock = pipe(prompt, **call).images
    exact = attention_of(calls, 20)
    assert len(exact) == 6
    call["generator"] = torch.Generator().manual_seed(0)
    with seg4diff.capture(pipe, [1]) as captured:
        torch.testing.assert_close(pipe(prompt, **call).images, stock, rtol=1e-4, atol=1e-4)
    ids = pipe.tokenizer(prompt.lower()).input_ids
    of_word = pipe.tokenizer("sofa", add_special_tokens=False).input_ids
    columns = [c for c, token in enumerate(ids) if token in of_word]
    assert len(columns) == 1
    assert captured.columns("sofa") == columns
    assert captured.columns(seg4diff.Special("pad")) == list(range(len(ids), 20))
    mean = (exact[1][1] + exact[4][1]).mean(dim=0) / 2  # both steps of layer 1, conditional row
    heat = captured.heatmap("Sofa", resize=False)
    torch.testing.assert_close(heat.double(), mean[:, columns].mean(-1).reshape(4, 4), rtol=1e-4, atol=1e-7)
    unconditional = (exact[1][0] + exact[4][0]).mean(dim=0) / 2
    assert not torch.allclose(heat.double().flatten(), unconditional[:, columns[0]], rtol=1e-2)
    assert captured.heatmap("sofa").shape == (size, size)


def test_words_behind_an_instruction() -> None:
    """SANA's pipeline keeps the begin and the last tokens of instruction and prompt."""
    pipe = tiny.sana_pipeline()
    fed: list[Tensor] = []
    stock = pipe.text_encoder.forward

    def spy(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        fed.append(ids)
        return stock(ids, *args, **kwargs)

    pipe.text_encoder.forward = spy
    call = {**CALL, "height": 128, "width": 128, "complex_human_instruction": INSTRUCTION}
    with seg4diff.capture(pipe, [1]) as captured:
        pipe("a red dog on a sofa", **call)
    kept = fed[0][0][[0, *range(-19, 0)]]  # as the pipeline selects them
    for word in ("red", "dog", "sofa"):
        (token,) = pipe.tokenizer(word, add_special_tokens=False).input_ids
        assert captured.columns(word) == (kept == token).nonzero().flatten().tolist()


def test_segment(pipe: Any, calls: list[Any]) -> None:
    """Scores are the float64 maps of the stock transformer, called as `segment` calls it, at the names."""
    encoded: list[Any] = []
    given: dict[str, Any] = {}
    stock_encode = pipe.encode_prompt

    @wraps(stock_encode)
    def encode(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        encoded.extend(prompt)
        return stock_encode(prompt, *args, **kwargs)

    pipe.encode_prompt = encode
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, k: given.update(k), with_kwargs=True)
    names = ["cat", "sofa", "red tree"]
    result = seg4diff.segment(pipe, random_image(64, 64), names, layers=[1])
    handle.remove()
    calls.clear()
    with torch.no_grad():
        pipe.transformer(**given)
    exact = attention_of(calls, given["encoder_hidden_states"].shape[1])[1][0].mean(dim=0)  # [N, T]
    (prompt,) = encoded
    ids = pipe.tokenizer(prompt).input_ids
    expected = []
    for name in names:
        words = pipe.tokenizer(name, add_special_tokens=False).input_ids
        columns = [c for c, token in enumerate(ids) if token in words]
        assert len(columns) == len(name.split())
        expected.append(exact[:, columns].mean(dim=1).reshape(4, 4))
    assert result.classes == tuple(names)
    torch.testing.assert_close(result.scores.double(), torch.stack(expected), rtol=1e-4, atol=1e-8)
    assert tuple(result.labels.shape) == (64, 64)
    best = seg4diff.segment(pipe, random_image(64, 64), ["cat", "dog"], layers=[1], preset="best")
    assert tuple(best.labels.shape) == (64, 64)
    automatic = seg4diff.segment(pipe, random_image(64, 64), ["cat", "dog"])  # no expert is known
    assert set(automatic.metadata["layers"]) <= {0, 1, 2}


def test_noise_is_the_schedulers(pipe: Any) -> None:
    backbone = find_backbone(pipe)
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(5)
    for index in (0, 2, 4):
        sigma = backbone.sigma(pipe, latents, 5, index)
        timestep = pipe.scheduler.timesteps[index : index + 1]
        assert float(sigma) * 1000 == pytest.approx(float(timestep), abs=1)  # which are rounded
        expected = pipe.scheduler.add_noise(latents, noise, timestep)
        found = backbone.noisy(pipe, latents, noise, sigma)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
        text = backbone.encode_text(pipe, ["a cat"])
        arguments = backbone.arguments(pipe.transformer, found, sigma, text)
        assert float(arguments["timestep"][0]) == pytest.approx(float(timestep), abs=1)
    with pytest.raises(ValueError, match="index 5"):
        backbone.sigma(pipe, latents, 5, 5)


@torch.no_grad()
def test_latents_are_the_autoencoders(pipe: Any) -> None:
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoded = pipe.vae.encode(pixels)
    exact = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode() - 0.1
    exact = exact * pipe.vae.config.scaling_factor
    torch.testing.assert_close(find_backbone(pipe).latents(pipe, pixels), exact)


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_edits_of_text_values_work_and_the_rest_is_refused(model: str, calls: list[Any]) -> None:
    transformer, inputs = MODELS[model][0](), MODELS[model][1]()
    stock = transformer(**inputs).sample
    with seg4diff.perturb(transformer, layers=[1]):
        perturbed = transformer(**inputs).sample
    assert float((perturbed - stock).abs().max()) > 1e-4
    assert torch.equal(transformer(**inputs).sample, stock)
    with (
        pytest.raises(NotImplementedError, match="by cross-attention, which has no attention mass"),
        seg4diff.capture(transformer, 1, statistics=True),
    ):
        pass


def test_analyze_is_refused(pipe: Any) -> None:
    with pytest.raises(NotImplementedError, match="no attention mass"):
        seg4diff.analyze(pipe, images=[random_image()])


def test_guidance(pipe: Any) -> None:
    """Perturbed rows move the result, and a scale of 0 does not."""
    size = 64 if pipe.vae_scale_factor == 8 else 128
    call = {**CALL, "height": size, "width": size}
    stock = pipe("a cat on a sofa", generator=tiny.seeded(), **call).images
    moved = seg4diff.guide(pipe, "a cat on a sofa", layers=[1], generator=tiny.seeded(), **call).images
    assert moved.shape == stock.shape
    assert float((moved - stock).abs().max()) > 1e-4
    again = seg4diff.guide(
        pipe, "a cat on a sofa", layers=[1], scale=0.0, generator=tiny.seeded(), **call
    ).images
    assert torch.equal(again, stock)


def test_training_is_refused(pipe: Any, tmp_path: Path) -> None:
    from seg4diff.data.settings import DataSettings
    from seg4diff.training import train
    from seg4diff.training.settings import TrainSettings

    data = DataSettings(kind="demo", scenes=2)
    settings = TrainSettings(data=data, out=str(tmp_path / "out"), steps=1, device="cpu")
    with pytest.raises(NotImplementedError, match="reads text by cross-attention"):
        train(settings, pipe=pipe, progress=False)


def test_micro_conditions_of_the_large_pixart() -> None:
    """Resolution and aspect ratio as the pipeline gives them."""
    from diffusers import PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=128, num_layers=1, attention_head_dim=12, num_attention_heads=2, cross_attention_dim=24,
        caption_channels=8,
    )  # fmt: skip
    backbone = find_backbone(transformer)
    text = {"encoder_hidden_states": torch.zeros(2, 3, 8)}
    arguments = backbone.arguments(transformer, torch.zeros(2, 4, 8, 12), torch.tensor([0.5, 0.5]), text)
    conditions = arguments["added_cond_kwargs"]
    assert conditions["resolution"].tolist() == [[64.0, 96.0]] * 2
    assert conditions["aspect_ratio"].flatten().tolist() == pytest.approx([64 / 96] * 2)
    assert backbone.read_call(transformer, arguments).grid == (4, 6)
    assert transformer(**arguments).sample.shape == (2, 8, 8, 12)
