"""What holds for pipelines of all families: text columns, noise, latents, branches of guidance, verbs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import seg4diff
from seg4diff.attention.patch import patch_of
from seg4diff.backbones import find_backbone
from seg4diff.backbones.base import pack
from seg4diff.editing.blur import Blur
from seg4diff.kernels.types import MapRequest
from tests.support import models
from tests.support.families import recorded_calls
from tests.support.tiny import seeded

PROMPT = "a red sofa on a tree"


@dataclass(frozen=True)
class Case:
    """A pipeline and what is known of it by hand.

    Attributes:
        name: of the case.
        build: makes the pipeline.
        text: columns of the text stream in its calls.
        call: arguments that make its text that long, without guidance.
        guided: arguments that switch guidance on, with `NEGATIVE` as the other branch.
        first: text column of the first token that the text encoder reads, negative where tokens are dropped.
        packed: how `latents=` takes latents [B, C, h, w].
    """

    name: str
    build: Callable[[], Any]
    text: int
    call: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] | None = None
    first: int = 0
    packed: Callable[[Tensor], Tensor] = pack


def patches(latents: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    return pack(latents).mT.reshape(batch, 4 * channels, height // 2, width // 2)


NEGATIVE = {"negative_prompt": "a dog", "guidance_scale": 3.0}
OFF = {"guidance_scale": 1.0}
CASES = (
    Case("flux.2 dev", models.flux2_pipeline, 48, {"max_sequence_length": 48}, packed=patches),
    Case(
        "flux.2 klein",
        lambda: models.flux2_pipeline(klein=True),
        32,
        {"max_sequence_length": 32, **OFF},
        {"guidance_scale": 3.0},
        packed=patches,
    ),
    Case(
        "longcat",
        models.longcat_pipeline,
        512,
        {"enable_prompt_rewrite": False, **OFF},
        NEGATIVE,
        first=-34,
    ),
    Case("ovis", models.ovis_pipeline, 32, {"max_sequence_length": 32, **OFF}, NEGATIVE, first=-28),
    Case("bria", models.bria_pipeline, 32, {"max_sequence_length": 32, **OFF}, NEGATIVE),
    Case(
        "auraflow",
        models.auraflow_pipeline,
        8 + 32,
        {"max_sequence_length": 32, **OFF},
        NEGATIVE,
        first=8,
        packed=lambda latents: latents,
    ),
    Case("chroma", models.chroma_pipeline, 32, {"max_sequence_length": 32, **OFF}, NEGATIVE),
    Case("cogview4", models.cogview4_pipeline, 16, OFF, NEGATIVE, packed=lambda latents: latents),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
guided_case = pytest.mark.parametrize("case", [c for c in CASES if c.guided], ids=lambda case: case.name)
pipeline_of = cache(lambda case: case.build())
Case.__hash__ = object.__hash__  # type: ignore[method-assign]


def call_of(case: Case, steps: int = 2) -> dict[str, Any]:
    return {"num_inference_steps": steps, "height": 64, "width": 96, "output_type": "latent", **case.call}


def tokenizer_of(pipe: Any) -> Any:
    return getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)


def columns_of(case: Case, pipe: Any, ids: Tensor, word: str) -> list[int]:
    pieces = [piece.strip("▁") for piece in tokenizer_of(pipe).convert_ids_to_tokens(ids)]
    columns = [case.first + number for number, piece in enumerate(pieces) if piece == word]
    return [column for column in columns if column >= 0]


@every_case
@torch.no_grad()
def test_words_and_maps(case: Case) -> None:
    """By the ids that the pipeline feeds its text encoder, and by the attention of a stock run."""
    pipe = pipeline_of(case)
    with (
        models.fed_ids(pipe.text_encoder) as fed,
        seg4diff.capture(pipe, [1, 3], steps="each", maps=MapRequest(heads="each")) as captured,
    ):
        drawn = pipe(prompt=PROMPT, generator=seeded(), **call_of(case)).images
    red, sofa = (columns_of(case, pipe, fed[0][0], word) for word in ("red", "sofa"))
    assert len(red) == len(sofa) == 1
    assert captured.columns("red sofa") == [*red, *sofa]
    assert captured.columns("tree") == columns_of(case, pipe, fed[0][0], "tree")
    assert [(r.layer, r.grid) for r in captured.records] == [(1, (4, 6)), (3, (4, 6))] * 2
    with recorded_calls() as calls:
        stock = pipe(prompt=PROMPT, generator=seeded(), **call_of(case)).images
    torch.testing.assert_close(drawn, stock, rtol=1e-4, atol=1e-5)
    joint = [call for call in calls if call.query.shape[2] == call.key.shape[2] == case.text + 24]
    assert len(joint) == 2 * 4
    image, text = slice(case.text, None), slice(0, case.text)
    for record, number in zip(captured.records, (1, 3, 5, 7), strict=True):
        exact = joint[number].probabilities()[:, :, image, text]
        torch.testing.assert_close(record.maps.double(), exact, rtol=1e-4, atol=1e-7)
    assert captured.heatmap("sofa").shape == (64, 96)


@guided_case
@torch.no_grad()
def test_branches_of_guidance(case: Case) -> None:
    """Each branch has the maps of the same prompt without guidance."""
    pipe = pipeline_of(case)
    other = case.guided.get("negative_prompt", "")
    guided = {**call_of(case, 1), **case.guided}
    records = {}
    for branch in ("conditional", "unconditional", "both"):
        with seg4diff.capture(pipe, [0, 2], branch=branch, steps="each") as captured:
            pipe(prompt="a cat", generator=seeded(), **guided)
        assert len(captured.records) == 2
        records[branch] = captured.records
        assert captured.columns("cat") == captured.columns("a cat")[1:]
    for branch, prompt in (("conditional", "a cat"), ("unconditional", other)):
        with seg4diff.capture(pipe, [0, 2], steps="each") as alone:
            pipe(prompt=prompt, generator=seeded(), **call_of(case, 1))
        for own, same in zip(records[branch], alone.records, strict=True):
            torch.testing.assert_close(own.maps, same.maps, rtol=1e-4, atol=1e-7)
    for both, one, two in zip(*(records[b] for b in ("both", "unconditional", "conditional")), strict=True):
        torch.testing.assert_close(both.maps, torch.cat([one.maps, two.maps]))
        assert not torch.allclose(one.maps, two.maps, rtol=1e-3)


@every_case
@torch.no_grad()
def test_noise_levels_and_arguments(case: Case) -> None:
    """Noise level, timestep and positions at a step are those that the pipeline itself has there."""
    pipe = pipeline_of(case)
    backbone, given = find_backbone(pipe), []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(backbone.named(module, args, kwargs)), with_kwargs=True
    )
    pipe(prompt="cat", generator=seeded(), **call_of(case, 12))
    handle.remove()
    latents = torch.zeros(1, backbone.latent_channels(pipe.transformer), 8, 12)
    text = {"encoder_hidden_states": given[0]["encoder_hidden_states"]}
    if given[0].get("attention_mask") is not None:
        text["attention_mask"] = given[0]["attention_mask"][:, : case.text]
    for index in (0, 5, -3):
        sigma = backbone.sigma(pipe, latents, 12, index)
        assert float(sigma) == pytest.approx(float(pipe.scheduler.sigmas[:-1][index]), rel=1e-5)
        own = backbone.arguments(pipe.transformer, latents, sigma, text)
        for name, value in own.items():
            theirs = given[index][name]
            if name == "hidden_states":
                assert value.shape == theirs.shape
            else:
                theirs = theirs[0] if theirs.ndim > value.ndim else theirs
                torch.testing.assert_close(value.float(), theirs.float(), rtol=1e-5, atol=0)
        call = backbone.read_call(pipe.transformer, given[index])
        assert call.timestep is not None
        assert (call.grid, call.layout.text_tokens, call.layout.generated) == ((4, 6), case.text, 24)
    assert set(given[0]) - set(own) <= {
        "return_dict", "guidance", "joint_attention_kwargs", "attention_kwargs",
    }  # fmt: skip


@every_case
@torch.no_grad()
def test_latents_are_those_that_the_pipeline_decodes(case: Case) -> None:
    """A pipeline whose model predicts no change decodes our latents to what the VAE makes of the image."""
    pipe = pipeline_of(case)
    backbone = find_backbone(pipe)
    pixels = torch.rand(1, 3, 64, 96, generator=seeded()) * 2 - 1
    latents = backbone.latents(pipe, pixels)
    assert latents.shape == (1, backbone.latent_channels(pipe.transformer), 8, 12)
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] * 0,))
    call = {**call_of(case, 1), "output_type": "pt"}
    shown = pipe(prompt="cat", latents=case.packed(latents), **call).images
    handle.remove()
    vae = pipe.vae
    expected = vae.decode(vae.encode(pixels).latent_dist.mode(), return_dict=False)[0]
    torch.testing.assert_close(shown, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert backbone.pixel_multiple(pipe) == 16


@every_case
@torch.no_grad()
def test_prediction_has_the_shape_of_latents(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prediction moves the latents as the pipeline's own step does."""
    pipe = pipeline_of(case)
    backbone = find_backbone(pipe)
    pixels = torch.rand(1, 3, 64, 96, generator=seeded()) * 2 - 1
    latents = backbone.latents(pipe, pixels)
    outputs: list[Tensor] = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    step, stepped = pipe.scheduler.step, []
    monkeypatch.setattr(pipe.scheduler, "step", lambda *a, **k: stepped.append(step(*a, **k)) or stepped[-1])
    pipe(prompt="cat", latents=case.packed(latents), **call_of(case, 1))
    handle.remove()
    moved = latents - backbone.sigma(pipe, latents, 1, 0) * backbone.prediction(outputs[0], latents)
    drawn = stepped[0][0]
    torch.testing.assert_close(drawn, pack(moved) if drawn.ndim == 3 else moved, rtol=1e-4, atol=1e-5)


@every_case
@torch.no_grad()
def test_segment(case: Case) -> None:
    """One image as in a batch; names keep their scores in another order of the result."""
    pipe = pipeline_of(case)
    images = [np.random.default_rng(n).integers(0, 256, (64, 96, 3), np.uint8) for n in range(2)]
    names = ["cat", "red sofa", "tree"]
    alone = [seg4diff.segment(pipe, image, names, layers=[1, 2], preset="paper") for image in images]
    together = seg4diff.segment(pipe, images, names, layers=[1, 2], preset="paper", batch_size=2)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-7)
        assert torch.equal(one.labels, other.labels)
    assert not torch.allclose(alone[0].scores, alone[1].scores, rtol=1e-3)
    found = seg4diff.segment(pipe, images[0], names, layers=2)
    assert found.labels.shape == (64, 96)
    regions = seg4diff.segment_unsupervised(pipe, images[0], layers=[1])
    assert regions.labels.shape == (64, 96)


@every_case
@torch.no_grad()
def test_edits_and_guidance(case: Case) -> None:
    pipe = pipeline_of(case)
    call = call_of(case)
    plain = pipe(prompt=PROMPT, generator=seeded(), **call).images

    def drawn() -> Tensor:
        return pipe(prompt=PROMPT, generator=seeded(), **call).images

    with seg4diff.edit(pipe, [0], weights={"sofa": 1.0}):
        torch.testing.assert_close(drawn(), plain, rtol=1e-4, atol=1e-5)
    with seg4diff.edit(pipe, [0], drop="sofa"):
        dropped = drawn()
    with seg4diff.edit(pipe, [0], drop="red"):
        assert not torch.allclose(drawn(), dropped, rtol=1e-4)
    assert not torch.allclose(dropped, plain, rtol=1e-4)
    with seg4diff.edit(pipe, [0, 1, 2, 3], replace={"cat": "sofa"}):
        if case.name == "chroma":
            with pytest.raises(NotImplementedError, match="no row of another prompt"):
                drawn()
        else:
            assert not torch.allclose(drawn(), plain, rtol=1e-4)
    with seg4diff.perturb(pipe, [0], sigma=1e-6):  # a blur of width zero
        torch.testing.assert_close(drawn(), plain, rtol=1e-4, atol=1e-5)
    with seg4diff.perturb(pipe, [0]):
        assert not torch.allclose(drawn(), plain, rtol=1e-4)
    for guided in [{}] if case.guided is None else [{}, case.guided]:
        options = {**call, **guided}
        without = pipe(prompt=PROMPT, generator=seeded(), **options).images
        same = seg4diff.guide(
            pipe, prompt=PROMPT, scale=2.0, layers=[1], blur=Blur(sigma=1e-6), generator=seeded(), **options
        )
        torch.testing.assert_close(same.images, without, rtol=1e-3, atol=1e-4)
        moved = seg4diff.guide(pipe, prompt=PROMPT, scale=2.0, layers=[1], generator=seeded(), **options)
        assert not torch.allclose(moved.images, without, rtol=1e-3)
    assert torch.equal(drawn(), plain)
    assert not patch_of(pipe).requests(0)


@every_case
@torch.no_grad()
def test_analyze_and_rank_layers(case: Case) -> None:
    pipe = pipeline_of(case)
    call = {key: value for key, value in case.call.items() if key != "guidance_scale"}
    report = seg4diff.analyze(pipe, ["a cat"], noise_levels=(1, 2), steps=2, height=64, width=96, **call)
    assert report.layers == (0, 1, 2, 3)
    assert report.grid == (4, 6)
    assert report.uniform_to_text == pytest.approx(case.text / (case.text + 24))
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    labels = np.arange(64 * 64).reshape(1, 64, 64) // (64 * 32)
    ranking = seg4diff.rank_layers(pipe, images=image[None], labels=labels, classes=[["cat", "red sofa"]])
    assert sorted(ranking.layers) == [0, 1, 2, 3]


@every_case
@torch.no_grad()
def test_prompt_arguments_stand_for_the_prompt(case: Case) -> None:
    pipe = pipeline_of(case)
    if case.name == "longcat":  # its pipeline takes no embeddings without a prompt
        with pytest.raises(NotImplementedError, match="takes no embeddings"):
            find_backbone(pipe).prompt_arguments(pipe, ["a cat"])
        return
    given = find_backbone(pipe).prompt_arguments(pipe, ["a cat"])
    call = {k: v for k, v in call_of(case).items() if k != "max_sequence_length"}
    expected = pipe(prompt="a cat", generator=seeded(), **call).images
    torch.testing.assert_close(pipe(**given, generator=seeded(), **call).images, expected)
