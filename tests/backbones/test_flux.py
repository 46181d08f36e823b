"""Flux.1 as a pipeline: text columns, noise levels, branches of guidance, and every verb on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import seg4diff
from seg4diff.attention.maps import maps_of
from seg4diff.backbones import find_backbone
from seg4diff.backbones.base import pack, unpack
from seg4diff.backbones.flux import generated_grid
from seg4diff.kernels.types import MapRequest
from tests.support import tiny
from tests.support.families import attention_calls
from tests.support.tiny import seeded

PROMPT = "a red sofa on a tree"
CALL: dict[str, Any] = {
    "num_inference_steps": 2,
    "height": 64,
    "width": 96,
    "output_type": "latent",
    "max_sequence_length": 32,
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.flux_pipeline()


@torch.no_grad()
def test_words_are_columns_of_t5(pipe: Any) -> None:
    """By the ids that the pipeline feeds its text encoder, and by the maps of a stock run."""
    with seg4diff.capture(pipe, [1, 3], steps="each", maps=MapRequest(heads="each")) as captured:
        pipe(PROMPT, generator=seeded(), **CALL)
    fed = pipe.tokenizer_2(PROMPT, padding="max_length", max_length=32, truncation=True).input_ids
    pieces = pipe.tokenizer_2.convert_ids_to_tokens(fed)
    assert captured.columns("red sofa") == [pieces.index("▁red"), pieces.index("▁sofa")]
    assert captured.columns("tree", encoder="t5") == [pieces.index("▁tree")]
    with pytest.raises(ValueError, match="not in this pipeline"):
        captured.columns("tree", encoder="clip")
    assert [(r.layer, r.grid) for r in captured.records] == [(1, (4, 6)), (3, (4, 6))] * 2
    with attention_calls() as calls:
        pipe(PROMPT, generator=seeded(), **CALL)
    joint = [(q, k) for q, k in calls if q.shape[2] == 32 + 24]
    assert len(joint) == 2 * 4
    for record, number in zip(captured.records, (1, 3, 5, 7), strict=True):
        query, key = (tensor.double() for tensor in joint[number])
        exact = (query @ key.transpose(-1, -2) / 4).softmax(dim=-1)[:, :, 32:, :32]
        torch.testing.assert_close(record.maps.double(), exact, rtol=1e-4, atol=1e-7)
    heat = captured.heatmap("red sofa", layers=3, resize=False)
    last = [r for r in captured.records if r.layer == 3]
    own = torch.stack([r.maps[0].mean(0)[:, captured.columns("red sofa")].mean(-1) for r in last]).mean(0)
    torch.testing.assert_close(heat.flatten(), own)
    assert captured.heatmap("sofa").shape == (64, 96)


@torch.no_grad()
def test_prompt_2_is_what_t5_reads(pipe: Any) -> None:
    with seg4diff.capture(pipe, 0) as captured:
        pipe("a cat", prompt_2="a dog", **CALL)
    assert captured.columns("dog") == [1]
    with pytest.raises(ValueError, match="known words: a, dog"):
        captured.columns("cat")


@torch.no_grad()
def test_branches_of_true_guidance(pipe: Any) -> None:
    """The branches have forwards of their own; each map is that of the same prompt without guidance."""
    guided = {**CALL, "negative_prompt": "a dog", "true_cfg_scale": 2.0, "num_inference_steps": 1}
    records = {}
    for branch in ("conditional", "unconditional", "both"):
        with seg4diff.capture(pipe, [0, 2], branch=branch, steps="each") as captured:
            pipe("a cat", generator=seeded(), **guided)
        assert len(captured.records) == 2
        records[branch] = captured.records
        assert captured.columns("cat") == [1]
    plain = {**CALL, "num_inference_steps": 1}
    for branch, prompt in (("conditional", "a cat"), ("unconditional", "a dog")):
        with seg4diff.capture(pipe, [0, 2], steps="each") as alone:
            pipe(prompt, generator=seeded(), **plain)
        for own, other in zip(records[branch], alone.records, strict=True):
            torch.testing.assert_close(own.maps, other.maps)
    for both, one, other in zip(*(records[b] for b in ("both", "unconditional", "conditional")), strict=True):
        assert torch.equal(both.maps, torch.cat([one.maps, other.maps]))
    assert not torch.allclose(records["conditional"][0].maps, records["unconditional"][0].maps, rtol=1e-3)


@torch.no_grad()
def test_equal_prompts_and_failed_calls_do_not_confuse_the_branches(pipe: Any) -> None:
    guided = {**CALL, "true_cfg_scale": 2.0}
    with seg4diff.capture(pipe, 0, steps="each") as captured:
        pipe("a cat", negative_prompt="a cat", generator=seeded(), **guided)
        assert len(captured.records) == 2
        with pytest.raises(ValueError, match="generators"):
            pipe("a dog", generator=[seeded()] * 2, **CALL)  # fails after the prompt is encoded
        pipe("a tree", generator=seeded(), **CALL)
    assert [r.call for r in captured.records] == [0, 0, 1, 1]
    assert captured.columns("tree") == [1]


@torch.no_grad()
def test_several_prompts_and_images(pipe: Any) -> None:
    with seg4diff.capture(pipe, 1) as captured:
        pipe(["a cat", "a red dog"], num_images_per_prompt=2, generator=seeded(), **CALL)
    (record,) = captured.records
    assert record.maps is not None
    assert record.maps.shape == (4, 24, 32)
    assert captured.columns("cat", image=1) == [1]
    assert captured.columns("dog", image=2) == [2]
    with pytest.raises(ValueError, match="known words: a, cat"):
        captured.columns("dog", image=1)


@torch.no_grad()
def test_noise_levels_are_those_of_the_pipeline(pipe: Any) -> None:
    backbone = find_backbone(pipe)
    seen: list[float] = []
    pipe("cat", **{**CALL, "num_inference_steps": 28},
         callback_on_step_end=lambda p, i, t, k: seen.append(float(t)) or k)  # fmt: skip
    latents = torch.zeros(1, 4, 8, 12)
    for index in (0, 13, -8):
        sigma = backbone.sigma(pipe, latents, 28, index)
        assert 1000 * float(sigma) == pytest.approx(seen[index], rel=1e-5)


@torch.no_grad()
def test_arguments_are_those_of_the_pipeline(pipe: Any) -> None:
    """Latents, positions and timestep as the pipeline packs them; the prediction comes back unpacked."""
    backbone = find_backbone(pipe)
    latents = torch.randn(2, 4, 8, 12, generator=seeded())
    text = backbone.encode_text(pipe, ["a cat", "a dog"])
    assert text["encoder_hidden_states"].shape == (2, 512, 32)
    arguments = backbone.arguments(pipe.transformer, latents, torch.tensor([0.5, 0.25]), text)
    packed = pipe._pack_latents(latents, 2, 4, 8, 12)
    assert torch.equal(arguments["hidden_states"], packed)
    ids = pipe._prepare_latent_image_ids(2, 4, 6, torch.device("cpu"), torch.float32)
    assert torch.equal(arguments["img_ids"], ids)
    assert arguments["timestep"].tolist() == [0.5, 0.25]
    assert torch.equal(unpack(pack(latents), latents), latents)
    output = pipe.transformer(**arguments, return_dict=False)[0]
    expected = pipe._unpack_latents(output, 64, 96, pipe.vae_scale_factor)
    assert torch.equal(backbone.prediction(output, latents), expected)
    call = backbone.read_call(pipe.transformer, arguments)
    assert call.timestep is not None
    assert call.timestep.tolist() == [500.0, 250.0]
    assert (call.grid, call.layout.text_tokens, call.layout.tokens) == ((4, 6), 512, 536)


def test_fill_models_see_an_image_of_which_nothing_is_known() -> None:
    fill = tiny.flux_transformer(in_channels=16 + 16 + 64)
    backbone = find_backbone(fill)
    text = backbone.empty_text(fill, 1, 9)
    arguments = backbone.arguments(fill, torch.randn(1, 4, 8, 12), torch.tensor([0.5]), text)
    tokens = arguments["hidden_states"]
    assert tokens.shape == (1, 24, 96)
    assert tokens[..., 16:32].abs().max() == 0
    assert torch.equal(tokens[..., 32:], torch.ones(1, 24, 64))
    assert maps_of(fill, [0], MapRequest(), arguments).shape == (1, 1, 24, 9)


def test_broken_grids_are_named() -> None:
    assert generated_grid(tiny.flux_inputs(reference=5)["img_ids"]) == (4, 6)
    with pytest.raises(ValueError, match="23 tokens of the first image"):
        generated_grid(tiny.flux_inputs()["img_ids"][1:])


def test_expert_layers_and_guidance_distillation() -> None:
    small = tiny.flux_transformer(guidance=True)
    backbone = find_backbone(small)
    with pytest.raises(ValueError, match="Flux.1 transformer of 4 blocks"):
        backbone.expert_layers(small)
    assert backbone.expert_layers(tiny.flux_transformer(19, 38)) == tuple(range(10, 19))
    text = backbone.empty_text(small, 1, 9)
    arguments = backbone.arguments(small, torch.randn(1, 4, 8, 12), torch.tensor([0.5]), text)
    assert arguments["guidance"].tolist() == [3.5]


# Verbs


@torch.no_grad()
def test_segment(pipe: Any) -> None:
    """One image as in a batch; scores are the maps of the prompt's own columns."""
    images = [np.random.default_rng(n).integers(0, 256, (64, 96, 3), np.uint8) for n in range(2)]
    names = ["cat", "red sofa", "tree"]
    alone = [seg4diff.segment(pipe, image, names, layers=[1, 2], preset="paper") for image in images]
    together = seg4diff.segment(pipe, images, names, layers=[1, 2], preset="paper", batch_size=2)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.scores, other.scores)
        assert torch.equal(one.labels, other.labels)
    assert alone[0].metadata["prompts"] == ["cat red sofa tree"]
    assert not torch.allclose(alone[0].scores, alone[1].scores, rtol=1e-3)
    reversed_names = seg4diff.segment(pipe, images[0], names[::-1], layers=[1, 2], preset="paper")
    assert reversed_names.classes == ("tree", "red sofa", "cat")
    shown = seg4diff.segment(pipe, images[0], names, layers=2)
    assert shown.labels.shape == (64, 96)


@torch.no_grad()
def test_segment_scores_by_hand(pipe: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    found = seg4diff.segment(pipe, image, ["cat", "red sofa"], layers=1, preset="paper")
    backbone = find_backbone(pipe)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = backbone.latents(pipe, pixels)
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))[None]
    sigma = backbone.sigma(pipe, latents, 28, -8)
    text = backbone.encode_text(pipe, ["cat red sofa"])
    arguments = backbone.arguments(pipe.transformer, (1 - sigma) * latents + sigma * noise, sigma, text)
    with attention_calls() as calls:
        pipe.transformer(**arguments)
    query, key = (tensor.double() for tensor in [c for c in calls if c[0].shape[2] == 512 + 16][1])
    maps = (query @ key.transpose(-1, -2) / 4).softmax(dim=-1)[0, :, 512:, :512].mean(0)
    expected = torch.stack([maps[:, 0], maps[:, 1:3].mean(-1)]).reshape(2, 4, 4).float()
    expected = torch.nn.functional.interpolate(expected[None], size=(64, 64), mode="bilinear")[0]
    torch.testing.assert_close(found.pixel_scores(), expected, rtol=1e-3, atol=1e-7)


@torch.no_grad()
def test_regions(pipe: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    # Four layers of two heads and 512 tokens are more maps than are kept apart.
    whole = seg4diff.segment_unsupervised(pipe, image, layers=[0, 1, 2, 3])
    assert 1 <= len(whole.classes) <= 24
    for preset in ("default", "paper"):
        found = seg4diff.segment_unsupervised(pipe, image, layers=[1], preset=preset)
        assert found.labels.shape == ((64, 96) if preset == "default" else (64, 64))
        assert 1 <= len(found.classes) <= 24
        assert int(found.labels.max()) == len(found.classes) - 1


@torch.no_grad()
def test_perturb_and_edit(pipe: Any) -> None:
    """Dropping a word is the stock model with that column of the softmax set to zero."""
    plain = pipe(PROMPT, generator=seeded(), **CALL).images
    with seg4diff.edit(pipe, [0], drop="sofa"):
        dropped = pipe(PROMPT, generator=seeded(), **CALL).images
    assert not torch.allclose(dropped, plain, rtol=1e-3)
    with ZeroedColumn(pipe, column=2, layer=0):
        expected = pipe(PROMPT, generator=seeded(), **CALL).images
    torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-5)
    with seg4diff.perturb(pipe, [0], sigma=1e-6):  # a blur of width zero
        torch.testing.assert_close(pipe(PROMPT, generator=seeded(), **CALL).images, plain)
    with seg4diff.perturb(pipe, [0]):
        assert not torch.allclose(pipe(PROMPT, generator=seeded(), **CALL).images, plain, rtol=1e-3)
    assert torch.equal(pipe(PROMPT, generator=seeded(), **CALL).images, plain)


class ZeroedColumn:
    """A stock model whose image rows get nothing from one text column in the first joint attention."""

    def __init__(self, pipe: Any, column: int, layer: int) -> None:
        self.pipe, self.column, self.layer = pipe, column, layer

    def __enter__(self) -> None:
        functional = torch.nn.functional
        self.stock, calls = functional.scaled_dot_product_attention, [0]

        def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = self.stock(query, key, value, *args, **kwargs)
            if query.shape[2] == key.shape[2] == 32 + 24:
                if calls[0] % 4 == self.layer:
                    weights = (query @ key.transpose(-1, -2) / 4).softmax(dim=-1)[
                        :, :, 32:, self.column, None
                    ]
                    out = out.clone()
                    out[:, :, 32:] -= weights * value[:, :, self.column, None]
                calls[0] += 1
            return out

        functional.scaled_dot_product_attention = attend

    def __exit__(self, *_: Any) -> None:
        torch.nn.functional.scaled_dot_product_attention = self.stock


@torch.no_grad()
def test_edits_touch_the_conditional_branch_alone(pipe: Any) -> None:
    guided = {**CALL, "negative_prompt": PROMPT, "true_cfg_scale": 3.0, "num_inference_steps": 1}
    outputs: list[Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda m, a, output: outputs.append(output[0]))
    pipe(PROMPT, generator=seeded(), **guided)
    with seg4diff.edit(pipe, [0], drop="sofa"):
        pipe(PROMPT, generator=seeded(), **guided)
    handle.remove()
    conditional, unconditional, edited, untouched = outputs
    assert torch.equal(conditional, unconditional)
    torch.testing.assert_close(untouched, unconditional)
    assert not torch.allclose(edited, conditional, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("true_cfg", [False, True])
def test_guidance(pipe: Any, true_cfg: bool) -> None:
    """uncond + g (cond - uncond) + scale (cond - perturbed), from three forwards of the stock pipeline."""
    from seg4diff.editing.blur import Blur

    call = {**CALL, "num_inference_steps": 1}
    if true_cfg:
        call |= {"negative_prompt": "a dog", "true_cfg_scale": 3.0}
    predictions: list[Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda m, a, output: predictions.append(output[0]))
    pipe("a cat", generator=seeded(), **{**CALL, "num_inference_steps": 1})
    with seg4diff.perturb(pipe, [1]):
        pipe("a cat", generator=seeded(), **{**CALL, "num_inference_steps": 1})
    pipe("a dog", generator=seeded(), **{**CALL, "num_inference_steps": 1})
    handle.remove()
    conditional, perturbed, unconditional = predictions
    away = 2.0 * (conditional - perturbed)
    expected = conditional + away
    if true_cfg:
        expected = unconditional + 3.0 * (conditional - unconditional) + away
    start = seeded_latents(pipe)
    sigma = 1.0  # one step from pure noise to the end
    drawn = seg4diff.guide(pipe, "a cat", scale=2.0, layers=[1], blur=Blur(), generator=seeded(), **call)
    torch.testing.assert_close(drawn.images, start - sigma * expected, rtol=1e-4, atol=1e-4)
    assert float(away.abs().max()) > 1e-3


def seeded_latents(pipe: Any) -> Tensor:
    """The packed noise that the pipeline starts from with `seeded()`."""
    return pipe.prepare_latents(1, 4, 64, 96, torch.float32, torch.device("cpu"), seeded())[0]


@torch.no_grad()
def test_analyze(pipe: Any) -> None:
    report = seg4diff.analyze(pipe, ["a cat"], noise_levels=(1, 2), steps=2, max_sequence_length=32,
                              height=64, width=96)  # fmt: skip
    assert report.layers == (0, 1, 2, 3)
    assert report.grid == (4, 6)
    assert report.uniform_to_text == pytest.approx(32 / 56)
    with seg4diff.capture(pipe, 1, steps="each", statistics=True) as captured:
        pipe("a cat", generator=torch.Generator().manual_seed(0), **CALL)
    mass = captured.records[0].statistics.image_to_text.mean()
    assert float(report.by_layer.image_to_text[1, 1]) == pytest.approx(float(mass), rel=1e-4)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    looked = seg4diff.analyze(pipe, ["a cat"], images=image, noise_levels=(1,), steps=4)
    assert looked.uniform_to_text == pytest.approx(512 / 528)


# Other pipelines of the family


@torch.no_grad()
def test_kontext_pipeline(pipe: Any) -> None:
    """Maps have rows for the generated image alone, of the size that is asked for, not for the reference."""
    from diffusers import FluxKontextPipeline

    kontext = FluxKontextPipeline(**pipe.components)
    kontext.set_progress_bar_config(disable=True)
    reference = torch.rand(1, 3, 32, 64, generator=seeded())
    call = {"height": 64, "width": 96, "max_area": 64 * 96, "_auto_resize": False}
    call |= {"num_inference_steps": 1, "max_sequence_length": 32, "output_type": "latent"}
    with seg4diff.capture(kontext, [1, 3], maps=MapRequest(heads="each")) as captured:
        drawn = kontext(image=reference, prompt=PROMPT, generator=seeded(), **call).images
    with attention_calls() as calls:
        stock = kontext(image=reference, prompt=PROMPT, generator=seeded(), **call).images
    torch.testing.assert_close(drawn, stock)
    joint = [(q, k) for q, k in calls if q.shape[1::2] == (2, 16)]  # the VAE has an attention too
    assert len(joint) == 4
    for record in captured.records:
        assert record.grid == (4, 6)
        query, key = (tensor.double() for tensor in joint[record.layer])
        exact = (query @ key.transpose(-1, -2) / 4).softmax(dim=-1)[:, :, 32 : 32 + 24, :32]
        torch.testing.assert_close(record.maps.double(), exact, rtol=1e-4, atol=1e-7)
    assert captured.heatmap("sofa").shape == (64, 96)


@torch.no_grad()
def test_fill_pipeline(pipe: Any) -> None:
    from diffusers import FluxFillPipeline

    parts = dict(pipe.components)
    for name in ("image_encoder", "feature_extractor"):
        del parts[name]
    parts["transformer"] = tiny.flux_transformer(in_channels=16 + 16 + 256)
    fill = FluxFillPipeline(**parts)
    fill.set_progress_bar_config(disable=True)
    image, mask = torch.rand(1, 3, 64, 96, generator=seeded()), torch.ones(1, 1, 64, 96)
    call = {"height": 64, "width": 96, "num_inference_steps": 1, "max_sequence_length": 32}
    call |= {"output_type": "latent"}
    with seg4diff.capture(fill, 1) as captured:
        drawn = fill(prompt="a red dog", image=image, mask_image=mask, generator=seeded(), **call).images
    stock = fill(prompt="a red dog", image=image, mask_image=mask, generator=seeded(), **call).images
    torch.testing.assert_close(drawn, stock)
    assert captured.records[0].grid == (4, 6)
    assert captured.columns("dog") == [2]
    found = seg4diff.segment(fill, np.zeros((64, 64, 3), np.uint8), ["cat", "dog"], layers=1)
    assert found.labels.shape == (64, 64)


@torch.no_grad()
def test_ip_adapter() -> None:
    """The joint attention is captured, the adapter's own attention runs as ever, whatever their lengths."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    transformer, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    torch.manual_seed(0)
    adapters = {
        name: FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=8).eval()
        if "single" not in name
        else processor
        for name, processor in transformer.attn_processors.items()
    }
    transformer.set_attn_processor(dict(adapters))
    for tokens in (4, 9, 33):  # 33: as many keys as image and text tokens have together
        given = {"ip_hidden_states": [torch.randn(2, tokens, 8)]}
        stock = transformer(**inputs, joint_attention_kwargs=dict(given)).sample
        with attention_calls() as calls:
            transformer(**inputs, joint_attention_kwargs=dict(given))
        joint = [(q, k) for q, k in calls if q.shape[2] == 33]
        with seg4diff.capture(transformer) as captured:
            output = transformer(**inputs, joint_attention_kwargs=dict(given)).sample
        torch.testing.assert_close(output, stock)
        assert not torch.allclose(stock, transformer(**inputs, joint_attention_kwargs={
            "ip_hidden_states": [torch.zeros(2, tokens, 8)]}).sample, rtol=1e-3)  # fmt: skip
        for record, (query, key) in zip(captured.records, joint, strict=True):
            scores = query.double() @ key.double().transpose(-1, -2) / 4
            exact = scores.softmax(dim=-1)[:, :, 9:, :9].mean(dim=1)
            torch.testing.assert_close(record.maps.double(), exact, rtol=1e-5, atol=1e-8)
    assert all(adapters[name] is now for name, now in transformer.attn_processors.items())


@torch.no_grad()
def test_offloaded_pipeline(pipe: Any) -> None:
    """Sequential offloading: the scores of segmentation stay what they were."""
    from accelerate import cpu_offload

    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    expected = seg4diff.segment(pipe, image, ["cat", "dog"], layers=2).scores
    other = tiny.flux_pipeline()
    cpu_offload(other.transformer, execution_device="cpu", offload_buffers=False)
    torch.testing.assert_close(seg4diff.segment(other, image, ["cat", "dog"], layers=2).scores, expected)
