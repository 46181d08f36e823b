"""Qwen-Image as a pipeline: text columns, masks, noise levels, branches, and every verb on it."""

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

PROMPT = "a red sofa on a tree"
CALL: dict[str, Any] = {
    "num_inference_steps": 2,
    "height": 64,
    "width": 96,
    "output_type": "latent",
    "true_cfg_scale": 1.0,
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.qwen_pipeline()


def fed_pieces(pipe: Any, run: Any) -> list[list[str]]:
    """Tokens that a run feeds the text encoder, padding included, for every prompt of its first call."""
    fed: list[Tensor] = []
    handle = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    run()
    handle.remove()
    return [pipe.tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in fed[0]]


def joint_matrices(run: Any, image_tokens: int = 24) -> list[Tensor]:
    """Probabilities [B, H, S, S] of the joint attention of a stock run's transformer, in float64."""
    found = []
    stock = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Any:
        causal = kwargs.get("is_causal") or (attn_mask is not None and attn_mask.shape[-2] > 1)
        if query.shape[1::2] == (2, 16) and query.shape[2] > image_tokens and not causal:
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
def test_words_are_columns_behind_the_template(pipe: Any) -> None:
    """By the ids that the pipeline feeds its text encoder, for prompts of different lengths."""
    prompts = [PROMPT, "a cat"]
    with seg4diff.capture(pipe, [0, 2], maps=MapRequest(heads="each"), steps="each") as captured:
        pieces = fed_pieces(pipe, lambda: pipe(prompts, generator=seeded(), **CALL))
    dropped = pipe.prompt_template_encode_start_idx
    long, short = (row[dropped:] for row in pieces)
    assert captured.columns("red sofa") == [long.index("Ġred"), long.index("Ġsofa")] == [1, 2]
    assert captured.columns("tree", encoder="qwen") == [long.index("Ġtree")]
    assert captured.columns("cat", image=1) == [short.index("Ġcat")]
    padding = captured.columns(seg4diff.Special("pad"), image=1)
    assert padding == [column for column, piece in enumerate(short) if piece == "<|endoftext|>"]
    assert captured.columns(seg4diff.Special("eos"), image=1) == [short.index("<|im_end|>")]
    with pytest.raises(ValueError, match="known words: a, cat"):
        captured.columns("describe", image=1)  # a word of the template
    maps = captured.records[0].maps
    assert maps is not None
    assert maps.shape == (2, 2, 24, len(long))
    assert float(maps[1, ..., padding].abs().max()) == 0
    assert captured.heatmap("sofa").shape == (64, 96)


@torch.no_grad()
def test_maps_of_a_pipeline_call(pipe: Any) -> None:
    """Every step, padded rows too, and the drawn image is the stock one."""
    prompts = [PROMPT, "a cat"]
    with seg4diff.capture(pipe, [0, 2], maps=MapRequest(heads="each"), steps="each") as captured:
        drawn = pipe(prompts, generator=seeded(), **CALL).images
    images = []
    exact = joint_matrices(lambda: images.append(pipe(prompts, generator=seeded(), **CALL).images))
    torch.testing.assert_close(drawn, images[0])
    assert len(exact) == 2 * 3
    for record, number in zip(captured.records, (0, 2, 3, 5), strict=True):
        text = exact[number].shape[-1] - 24
        torch.testing.assert_close(
            record.maps.double(), exact[number][:, :, text:, :text], rtol=1e-4, atol=1e-7
        )
        assert record.grid == (4, 6)


@torch.no_grad()
def test_branches_of_true_guidance(pipe: Any) -> None:
    """The branches have forwards of their own, whose texts differ in length."""
    guided = {**CALL, "negative_prompt": "a dog on a dog", "true_cfg_scale": 2.0, "num_inference_steps": 1}
    plain = {**CALL, "num_inference_steps": 1}
    for branch, prompt in (("conditional", "a cat"), ("unconditional", "a dog on a dog")):
        with seg4diff.capture(pipe, [0, 2], branch=branch, steps="each") as captured:
            pipe("a cat", generator=seeded(), **guided)
        assert captured.columns("cat") == [1]
        with seg4diff.capture(pipe, [0, 2], steps="each") as alone:
            pipe(prompt, generator=seeded(), **plain)
        assert len(captured.records) == 2
        for own, other in zip(captured.records, alone.records, strict=True):
            torch.testing.assert_close(own.maps, other.maps)


@torch.no_grad()
def test_several_images_of_a_prompt(pipe: Any) -> None:
    with seg4diff.capture(pipe, 1) as captured:
        pipe(["a cat", "a red dog"], num_images_per_prompt=2, generator=seeded(), **CALL)
    assert captured.records[0].maps is not None
    assert len(captured.records[0].maps) == 4
    assert captured.columns("cat", image=1) == [1]
    assert captured.columns("dog", image=2) == [2]


@torch.no_grad()
def test_latents_are_those_of_image_to_image(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the noise that diffusers adds to the mean of the posterior."""
    from diffusers import QwenImageImg2ImgPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    other = QwenImageImg2ImgPipeline(**pipe.components)
    pixels = other.image_processor.preprocess(torch.rand(2, 3, 64, 96, generator=seeded()))
    latents = find_backbone(pipe).latents(pipe, pixels)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    expected = other._encode_vae_image(pixels[:, :, None], seeded())
    assert latents.shape == (2, 4, 8, 12)
    torch.testing.assert_close(latents, expected[:, :, 0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_noise_levels_are_those_of_the_pipeline() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = tiny.qwen_pipeline()
    published = {**pipe.scheduler.config, "shift_terminal": 0.02}  # of more than one step
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(published)
    seen: list[float] = []
    pipe("cat", **{**CALL, "num_inference_steps": 28},
         callback_on_step_end=lambda p, i, t, k: seen.append(float(t)) or k)  # fmt: skip
    backbone = find_backbone(pipe)
    latents = torch.zeros(1, 4, 8, 12)
    for index in (0, 13, -8):
        assert 1000 * float(backbone.sigma(pipe, latents, 28, index)) == pytest.approx(seen[index], rel=1e-5)


@torch.no_grad()
def test_arguments_are_those_of_the_pipeline(pipe: Any) -> None:
    """One step from known latents: latents, shapes, timestep and text give the pipeline's own prediction."""
    backbone = find_backbone(pipe)
    latents = torch.randn(2, 4, 8, 12, generator=seeded())
    fed: list[dict[str, Any]] = []
    predicted: list[Tensor] = []
    before = pipe.transformer.register_forward_pre_hook(lambda m, a, k: fed.append(k), with_kwargs=True)
    after = pipe.transformer.register_forward_hook(lambda m, a, output: predicted.append(output[0]))
    packed = pipe._pack_latents(latents, 2, 4, 8, 12)
    pipe(["a cat", PROMPT], latents=packed, **{**CALL, "num_inference_steps": 1})
    before.remove()
    after.remove()
    sigma = fed[0]["timestep"]
    text = backbone.encode_text(pipe, ["a cat", PROMPT])
    assert text["encoder_hidden_states"].shape == (2, 512, 32)
    arguments = backbone.arguments(pipe.transformer, latents, sigma, text)
    assert torch.equal(arguments["hidden_states"], fed[0]["hidden_states"])
    assert arguments["img_shapes"] == fed[0]["img_shapes"]
    output = pipe.transformer(**arguments, return_dict=False)[0]
    torch.testing.assert_close(output, predicted[0], rtol=1e-4, atol=1e-5)  # more padding changes nothing
    expected = pipe._unpack_latents(output, 64, 96, pipe.vae_scale_factor)[:, :, 0]
    assert torch.equal(backbone.prediction(output, latents), expected)
    call = backbone.read_call(pipe.transformer, fed[0])
    assert call.timestep is not None
    assert call.timestep.tolist() == [1000.0, 1000.0]
    given = backbone.prompt_arguments(pipe, ["a cat", PROMPT])
    fed.clear()
    before = pipe.transformer.register_forward_pre_hook(lambda m, a, k: fed.append(k), with_kwargs=True)
    pipe(**given, **CALL)
    before.remove()
    assert fed[0]["encoder_hidden_states_mask"].sum(dim=1).tolist() == text[
        "encoder_hidden_states_mask"].sum(dim=1).tolist()  # fmt: skip


def test_no_expert_layer_is_known(pipe: Any) -> None:
    backbone = find_backbone(pipe)
    assert not backbone.knows_experts(pipe.transformer)
    with pytest.raises(ValueError, match="Qwen-Image transformer of 3 blocks"):
        backbone.expert_layers(pipe.transformer)


# Verbs


@torch.no_grad()
def test_segment(pipe: Any) -> None:
    """One image as in a batch; scores are the maps of the words' own columns, by hand."""
    images = [np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8) for n in range(2)]
    names = ["cat", "red sofa"]
    alone = [seg4diff.segment(pipe, image, names, layers=1, preset="paper") for image in images]
    together = seg4diff.segment(pipe, images, names, layers=1, preset="paper", batch_size=2)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.scores, other.scores)
    backbone = find_backbone(pipe)
    pixels = torch.from_numpy(images[0]).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = backbone.latents(pipe, pixels)
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))[None]
    sigma = backbone.sigma(pipe, latents, 28, -8)
    embeddings, mask = pipe.encode_prompt("cat red sofa")
    assert mask is None
    matrix = joint_matrices(
        lambda: pipe.transformer(
            hidden_states=pipe._pack_latents((1 - sigma) * latents + sigma * noise, 1, 4, 8, 8),
            timestep=sigma,
            encoder_hidden_states=embeddings,
            img_shapes=[[(1, 4, 4)]],
        ),
        image_tokens=16,
    )[1]
    text = embeddings.shape[1]
    maps = matrix[0, :, text:, :text].mean(0)
    expected = torch.stack([maps[:, 0], maps[:, 1:3].mean(-1)]).reshape(2, 4, 4).float()
    expected = F.interpolate(expected[None], size=(64, 64), mode="bilinear")[0]
    torch.testing.assert_close(alone[0].pixel_scores(), expected, rtol=1e-3, atol=1e-7)
    assert not torch.allclose(alone[0].scores, alone[1].scores, rtol=1e-3)


@torch.no_grad()
def test_segment_without_known_layers_and_regions(pipe: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    found = seg4diff.segment(pipe, image, ["cat", "sofa"])
    assert found.labels.shape == (64, 96)
    for preset in ("default", "paper"):
        regions = seg4diff.segment_unsupervised(pipe, image, layers=[1], preset=preset)
        assert 1 <= len(regions.classes) <= 24
        assert int(regions.labels.max()) == len(regions.classes) - 1


@torch.no_grad()
def test_perturb_and_edit(pipe: Any) -> None:
    """Dropping a word is the same as an attention whose output lacks what that column adds to image rows."""
    prompts = [PROMPT, "a sofa"]  # a padded row
    plain = pipe(prompts, generator=seeded(), **CALL).images
    with seg4diff.edit(pipe, [0], drop="sofa"):
        dropped = pipe(prompts, generator=seeded(), **CALL).images
    columns = [2, 1]
    stock, calls = F.scaled_dot_product_attention, [0]

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        out = stock(query, key, value, attn_mask, **kwargs)
        if query.shape[1::2] == (2, 16) and attn_mask is not None and attn_mask.shape[-2] == 1:
            if calls[0] % 3 == 0:
                weights = (query @ key.mT / 4).masked_fill(~attn_mask, -torch.inf).softmax(dim=-1)
                text = query.shape[2] - 24
                out = out.clone()
                for row, column in enumerate(columns):
                    out[row, :, text:] -= weights[row, :, text:, column, None] * value[row, :, column, None]
            calls[0] += 1
        return out

    F.scaled_dot_product_attention = attend
    try:
        expected = pipe(prompts, generator=seeded(), **CALL).images
    finally:
        F.scaled_dot_product_attention = stock
    assert calls[0] == 2 * 3
    torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dropped, plain, rtol=1e-3)
    with seg4diff.perturb(pipe, [0], sigma=1e-6):  # a blur of width zero
        torch.testing.assert_close(pipe(prompts, generator=seeded(), **CALL).images, plain)
    with seg4diff.perturb(pipe, [0]):
        assert not torch.allclose(pipe(prompts, generator=seeded(), **CALL).images, plain, rtol=1e-3)
    assert torch.equal(pipe(prompts, generator=seeded(), **CALL).images, plain)


@torch.no_grad()
def test_replacing_words(pipe: Any) -> None:
    """A word by itself changes nothing; a shorter one is padded; a longer one does not fit and says so."""
    call = {**CALL, "num_inference_steps": 1}
    plain = pipe("a red cat", generator=seeded(), **call).images
    with seg4diff.edit(pipe, [0, 1], replace={"dog": "cat"}):
        replaced = pipe("a red cat", generator=seeded(), **call).images
    assert not torch.allclose(replaced, plain, rtol=1e-3)
    with seg4diff.edit(pipe, [0, 1], replace={"dog": "red cat"}):
        shorter = pipe("a red cat", generator=seeded(), **call).images
    assert not torch.allclose(shorter, plain, rtol=1e-3)
    with (
        seg4diff.edit(pipe, [0, 1], replace={"red cat": "dog"}),
        pytest.raises(ValueError, match="make the prompt longer"),
    ):
        pipe("a dog", generator=seeded(), **call)


@torch.no_grad()
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_guidance(zero_cond_t: bool) -> None:
    """cond + scale (cond - perturbed), from two forwards of the stock pipeline."""
    from seg4diff.editing.blur import Blur

    pipe = tiny.qwen_pipeline(zero_cond_t=zero_cond_t)
    call = {**CALL, "num_inference_steps": 1}
    predictions: list[Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda m, a, output: predictions.append(output[0]))
    pipe("a cat", generator=seeded(), **call)
    with seg4diff.perturb(pipe, [1]):
        pipe("a cat", generator=seeded(), **call)
    handle.remove()
    conditional, perturbed = predictions
    away = 2.0 * (conditional - perturbed)
    start = pipe.prepare_latents(1, 4, 64, 96, torch.float32, torch.device("cpu"), seeded())
    drawn = seg4diff.guide(pipe, "a cat", scale=2.0, layers=[1], blur=Blur(), generator=seeded(), **call)
    torch.testing.assert_close(drawn.images, start - conditional - away, rtol=1e-4, atol=1e-4)
    assert float(away.abs().max()) > 1e-3


@torch.no_grad()
def test_analyze(pipe: Any) -> None:
    report = seg4diff.analyze(pipe, ["a cat"], noise_levels=(1,), steps=2, height=64, width=96)
    assert report.layers == (0, 1, 2)
    assert report.grid == (4, 6)
    with seg4diff.capture(pipe, 1, steps="each", statistics=True) as captured:
        pipe("a cat", generator=torch.Generator().manual_seed(0), **CALL)
    mass = captured.records[-1].statistics.image_to_text.mean()
    assert float(report.by_layer.image_to_text[0, 1]) == pytest.approx(float(mass), rel=1e-4)


# Other pipelines of the family


@torch.no_grad()
@pytest.mark.parametrize("plus", [False, True])
def test_edit_pipelines(pipe: Any, plus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a reference image come before the words and behind the generated image's tokens."""
    from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
    from PIL import Image
    from transformers import Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    # The check needs a video processor, whose packages are not installed.
    monkeypatch.setattr(Qwen2VLProcessor, "check_argument_for_proper_class", lambda *_: object)
    for module, more in ((pipeline_qwenimage_edit, (None,)), (pipeline_qwenimage_edit_plus, ())):
        monkeypatch.setattr(module, "calculate_dimensions", lambda *_, more=more: (96, 64, *more))  # not 1 MP
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    processor = Qwen2VLProcessor(Qwen2VLImageProcessorPil(size=size), pipe.tokenizer, None)
    edit = (QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)(
        **pipe.components, processor=processor
    )
    edit.set_progress_bar_config(disable=True)
    before = edit.prompt_template_encode.partition("{}")[0].partition("<|vision_start|>")[0]
    edit.prompt_template_encode_start_idx = len(pipe.tokenizer(before).input_ids)  # 64 as published
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    call = {**CALL, "num_inference_steps": 1, "image": image, "prompt": PROMPT}
    with seg4diff.capture(edit, 1) as captured:
        (fed,) = fed_pieces(edit, lambda: edit(generator=seeded(), **call))
    fed = fed[edit.prompt_template_encode_start_idx :]
    assert fed.count("<|image_pad|>") > 1
    assert captured.columns("red sofa") == [fed.index("Ġred"), fed.index("Ġsofa")]
    (record,) = captured.records
    assert record.grid == (4, 6)
    assert record.maps is not None
    assert record.maps.shape == (1, 24, len(fed))
    array = np.asarray(image)
    if plus:
        assert seg4diff.segment(edit, array, ["cat", "dog"], layers=1).labels.shape == (64, 96)
        return
    with pytest.raises(NotImplementedError, match="QwenImageEditPipeline encodes no prompt"):
        seg4diff.segment(edit, array, ["cat", "dog"], layers=1)
