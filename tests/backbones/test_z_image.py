"""Z-Image as a pipeline: text columns, ragged texts, order of branches, noise levels, and every verb."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seg4diff
from seg4diff.backbones import find_backbone
from seg4diff.kernels.types import MapRequest
from tests.support import tiny
from tests.support.tiny import seeded

LONG = "a red sofa on a tree"
SHORT = "cat"
CALL: dict[str, Any] = {
    "num_inference_steps": 2,
    "height": 64,
    "width": 96,
    "output_type": "latent",
    "guidance_scale": 0.0,
}
IMAGE = 32  # 24 image tokens and 8 learned ones


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.z_image_pipeline()


def joint_matrices(run: Any, tokens: int) -> list[Tensor]:
    """Probabilities [B, H, S, S] of all attentions over `tokens` tokens of a stock run, in float64."""
    found = []
    stock = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Any:
        if query.shape[1::2] == (2, 16) and query.shape[2] == tokens:
            scores = query.double() @ key.double().mT / 4
            if attn_mask is not None:
                scores = scores.masked_fill(~attn_mask, -torch.inf)
            found.append(scores.softmax(dim=-1))
        return stock(query, key, value, attn_mask, **kwargs)

    F.scaled_dot_product_attention = spy
    try:
        run()
    finally:
        F.scaled_dot_product_attention = stock
    return found


@torch.no_grad()
def test_words_and_maps_of_a_pipeline_call(pipe: Any) -> None:
    """By the ids that the pipeline feeds its text encoder, and by the maps of a stock run."""
    prompts = [LONG, SHORT]
    fed: list[Tensor] = []
    handle = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    with seg4diff.capture(pipe, [0, 2], maps=MapRequest(heads="each"), steps="each") as captured:
        drawn = pipe(list(prompts), generator=seeded(), **CALL).images
    handle.remove()
    long, short = (pipe.tokenizer.convert_ids_to_tokens(row.tolist()) for row in fed[0])
    assert captured.columns("red sofa") == [long.index("Ġred"), long.index("Ġsofa")]
    assert captured.columns("cat", image=1) == [short.index("cat")]
    with pytest.raises(ValueError, match="known words: cat$"):
        captured.columns("user", image=1)  # a word of the template
    images = []
    text = captured.records[0].maps.shape[-1]
    assert text % 32 == 0
    run = lambda: images.append(pipe(list(prompts), generator=seeded(), **CALL).images)  # noqa: E731
    exact = joint_matrices(run, IMAGE + text)
    torch.testing.assert_close(drawn, images[0])
    assert len(exact) == 2 * 3
    for record, number in zip(captured.records, (0, 2, 3, 5), strict=True):
        assert record.grid == (4, 6)
        assert record.maps is not None
        expected = exact[number][:, :, :24, IMAGE:]
        torch.testing.assert_close(record.maps.double(), expected, rtol=1e-4, atol=1e-7)
    assert captured.heatmap("sofa").shape == (64, 96)


@torch.no_grad()
def test_branches(pipe: Any) -> None:
    """The conditional rows come first; each map is that of the prompt drawn alone in as long a batch."""
    guided = {**CALL, "guidance_scale": 2.0, "num_inference_steps": 1, "negative_prompt": "a dog " * 9}
    records = {}
    for branch in ("conditional", "unconditional", "both"):
        with seg4diff.capture(pipe, [0, 2], branch=branch, steps="each") as captured:
            pipe("a cat", generator=seeded(), **guided)
        records[branch] = captured.records
        assert captured.columns("cat") == [captured.columns("a")[-1] + 1]
    with seg4diff.capture(pipe, [0, 2], steps="each") as alone:
        start = torch.randn(1, 4, 8, 12, generator=seeded()).repeat(2, 1, 1, 1)
        plain = {**CALL, "num_inference_steps": 1}
        pipe(["a cat", "a dog " * 9], latents=start, **plain)
    for number, record in enumerate(alone.records):
        assert record.maps is not None
        torch.testing.assert_close(records["conditional"][number].maps, record.maps[:1])
        torch.testing.assert_close(records["unconditional"][number].maps, record.maps[1:])
        torch.testing.assert_close(records["both"][number].maps, record.maps.flip(0))


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_several_images_of_a_prompt(pipe: Any, scale: float) -> None:
    call = {**CALL, "guidance_scale": scale}
    with seg4diff.capture(pipe, 1) as captured:
        pipe(["a cat", "a red dog"], num_images_per_prompt=2, generator=seeded(), **call)
    assert captured.records[0].maps is not None
    assert len(captured.records[0].maps) == 4
    assert captured.columns("dog", image=2) == captured.columns("dog", image=3)
    with pytest.raises(ValueError, match="known words: a, cat"):
        captured.columns("dog", image=1)


@torch.no_grad()
def test_latents_are_those_of_image_to_image(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the noise that diffusers adds to the mean of the posterior, and at no noise."""
    from diffusers import ZImageImg2ImgPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    other = ZImageImg2ImgPipeline(**pipe.components)
    pixels = other.image_processor.preprocess(torch.rand(1, 3, 64, 96, generator=seeded()))
    latents = find_backbone(pipe).latents(pipe, pixels)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    monkeypatch.setattr(type(other.scheduler), "scale_noise", lambda self, sample, timestep, noise: sample)
    expected = other.prepare_latents(pixels, None, 1, 4, 64, 96, torch.float32, torch.device("cpu"), seeded())
    torch.testing.assert_close(latents, expected)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_noise_levels_are_those_of_the_pipeline(dynamic: bool) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = tiny.z_image_pipeline()
    if dynamic:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    seen: list[float] = []
    pipe("cat", **{**CALL, "num_inference_steps": 28},
         callback_on_step_end=lambda p, i, t, k: seen.append(float(t)) or k)  # fmt: skip
    backbone = find_backbone(pipe)
    latents = torch.zeros(1, 4, 8, 12)
    for index in (0, 13, -8):
        assert 1000 * float(backbone.sigma(pipe, latents, 28, index)) == pytest.approx(seen[index], rel=1e-5)


@torch.no_grad()
def test_arguments_are_those_of_the_pipeline(pipe: Any) -> None:
    """One step from known latents: latents, timestep and texts are the pipeline's own, and its prediction."""
    backbone = find_backbone(pipe)
    latents = torch.randn(2, 4, 8, 12, generator=seeded())
    fed: list[tuple[Any, ...]] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, args: fed.append(args))
    end = pipe([LONG, SHORT], latents=latents, **{**CALL, "num_inference_steps": 1}).images
    handle.remove()
    text = backbone.encode_text(pipe, [LONG, SHORT])
    assert text["cap_feats"].shape == (2, 512, 32)
    sigma = torch.ones(2)
    arguments = backbone.arguments(pipe.transformer, latents, sigma, text)
    assert torch.equal(arguments["t"], fed[0][1])
    for ours, theirs in ((arguments["x"], fed[0][0]), (arguments["cap_feats"], fed[0][2])):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    velocity = backbone.prediction(pipe.transformer(**arguments, return_dict=False)[0], latents)
    torch.testing.assert_close(latents - velocity, end, rtol=1e-4, atol=1e-5)
    call = backbone.read_call(pipe.transformer, arguments)
    assert call.timestep is not None
    assert call.timestep.tolist() == [1000.0, 1000.0]


def test_rows_of_different_sizes_are_refused() -> None:
    transformer, inputs = tiny.z_image_transformer(), tiny.z_image_inputs()
    inputs["x"][1] = torch.randn(4, 1, 8, 8)
    with seg4diff.capture(transformer, 0), pytest.raises(ValueError, match=r"sizes \[\(8, 8\), \(8, 12\)\]"):
        transformer(**inputs)


# Verbs


@torch.no_grad()
def test_segment(pipe: Any) -> None:
    """One image as in a batch, also beside a longer prompt; scores by hand."""
    images = [np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8) for n in range(2)]
    names = [["cat", "red sofa"], ["cat", "a tree of many long and strange names"]]
    alone = [
        seg4diff.segment(pipe, image, own, layers=1, preset="paper")
        for image, own in zip(images, names, strict=True)
    ]
    together = seg4diff.segment(pipe, images, names, layers=1, preset="paper", batch_size=2)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.scores, other.scores)
    backbone = find_backbone(pipe)
    pixels = torch.from_numpy(images[0]).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = backbone.latents(pipe, pixels)
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))[None]
    sigma = backbone.sigma(pipe, latents, 28, -8)
    noisy = (1 - sigma) * latents + sigma * noise
    prompt = "cat red sofa"
    texts, _ = pipe.encode_prompt([prompt], do_classifier_free_guidance=False)
    tokens = 32 + -(-len(texts[0]) // 32) * 32
    matrix = joint_matrices(lambda: pipe.transformer([noisy[0][:, None]], 1 - sigma, texts), tokens)[1]
    templated = pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    pieces = pipe.tokenizer.tokenize(templated)
    maps = matrix[0, :, :16, 32:].mean(0)
    columns = [[pieces.index("cat")], [pieces.index("Ġred"), pieces.index("Ġsofa")]]
    expected = torch.stack([maps[:, own].mean(-1) for own in columns]).reshape(2, 4, 4).float()
    expected = F.interpolate(expected[None], size=(64, 64), mode="bilinear")[0]
    torch.testing.assert_close(alone[0].pixel_scores(), expected, rtol=1e-3, atol=1e-7)


@torch.no_grad()
def test_segment_without_known_layers_and_regions(pipe: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    assert seg4diff.segment(pipe, image, ["cat", "sofa"]).labels.shape == (64, 96)
    for preset in ("default", "paper"):
        regions = seg4diff.segment_unsupervised(pipe, image, layers=[1], preset=preset)
        assert 1 <= len(regions.classes) <= 24


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_edit_the_conditional_rows_and_perturb(pipe: Any, scale: float) -> None:
    """By the predictions of the conditional and the unconditional rows."""
    call = {**CALL, "guidance_scale": scale, "num_inference_steps": 1}
    outputs: list[Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda m, a, out: outputs.append(torch.stack(out[0])))
    pipe(LONG, generator=seeded(), **call)
    with seg4diff.edit(pipe, [0], drop="sofa"):
        pipe(LONG, generator=seeded(), **call)
    with seg4diff.edit(pipe, [0], replace={"dog": "red sofa"}):
        pipe(LONG, generator=seeded(), **call)
    with seg4diff.perturb(pipe, [0]):  # of every row
        pipe(LONG, generator=seeded(), **call)
    handle.remove()
    plain, *changed, perturbed = outputs
    assert not torch.allclose(perturbed[0], plain[0], rtol=1e-3)
    for other in changed:
        assert len(other) == len(plain) == (2 if scale else 1)
        assert not torch.allclose(other[0], plain[0], rtol=1e-3)
        torch.testing.assert_close(other[1:], plain[1:])


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_guidance(pipe: Any, scale: float) -> None:
    """cond + g (cond - uncond) + scale (cond - perturbed), from forwards of the stock pipeline."""
    from seg4diff.editing.blur import Blur

    call = {**CALL, "num_inference_steps": 1, "guidance_scale": scale}
    predictions: list[Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda m, a, out: predictions.append(-out[0][0][:, 0]))
    pipe("a cat", generator=seeded(), **{**call, "guidance_scale": 0.0})
    with seg4diff.perturb(pipe, [1]):
        pipe("a cat", generator=seeded(), **{**call, "guidance_scale": 0.0})
    pipe("", generator=seeded(), **{**call, "guidance_scale": 0.0})
    handle.remove()
    conditional, perturbed, unconditional = predictions
    away = 3.0 * (conditional - perturbed)
    expected = conditional + scale * (conditional - unconditional) + away
    start = torch.randn(1, 4, 8, 12, generator=seeded())
    drawn = seg4diff.guide(pipe, "a cat", scale=3.0, layers=[1], blur=Blur(), generator=seeded(), **call)
    torch.testing.assert_close(drawn.images, start - expected, rtol=1e-4, atol=1e-4)
    assert float(away.abs().max()) > 1e-3


@torch.no_grad()
def test_analyze(pipe: Any) -> None:
    report = seg4diff.analyze(
        pipe, ["a cat"], noise_levels=(1,), steps=2, height=64, width=96, guidance_scale=0.0
    )
    assert report.layers == (0, 1, 2)
    assert report.grid == (4, 6)
