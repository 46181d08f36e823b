"""Words in, segmentation out, on a random pipeline: the recipe by hand, batches, prompts, bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import seg4diff
from seg4diff.backbones.base import Recipe
from seg4diff.backbones.text import TextSpan
from seg4diff.segmentation import zero_shot
from seg4diff.segmentation.passes import NamedScores
from seg4diff.segmentation.presets import PRESETS
from seg4diff.segmentation.prompts import plan_prompts
from seg4diff.segmentation.scores import resize_scores
from tests.support import tiny
from tests.support.hooked import hooked_projections, image_to_text

CLASSES = ["cat", "red sofa", "purple unicorn"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return seg4diff.patch(tiny.pipeline(layers=4))


def picture(width: int = 70, height: int = 50, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def by_hand(
    pipe: Any, projections: dict[str, torch.Tensor], names: list[str], size: tuple[int, int], geometric: bool
) -> torch.Tensor:
    """Scores of names on a 4 x 4 grid, from a layer's projections: means over heads and columns, resized."""
    maps = image_to_text(projections).mean(dim=1)[0]  # [N, T]
    columns: list[list[int]] = [[] for _ in names]
    first = 1  # after the begin-of-text token
    for found, name in zip(columns, names, strict=True):
        length = len(pipe.tokenizer(name).input_ids) - 2
        found += range(first, first + length)
        first += length
    scores = torch.stack([maps[:, found].mean(dim=1).reshape(4, 4) for found in columns])[None]
    if geometric:
        return F.interpolate(scores.log(), size=size, mode="bilinear")[0].exp()
    return F.interpolate(scores, size=size, mode="bilinear")[0]


@torch.no_grad()
def test_the_recipe_by_hand(pipe: Any) -> None:
    """The same steps with diffusers alone: posterior mean, noise at timesteps[-8] of 28, one forward."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    image = picture(64, 64)
    result = seg4diff.segment(pipe, image, CLASSES, layers=2, seed=3)
    assert result.metadata["prompts"] == ["cat red sofa purple unicorn"]
    assert result.metadata["timestep"] == pytest.approx(515.07, abs=0.01)

    pixels = pipe.image_processor.preprocess(image)
    vae = pipe.vae
    clean = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(3))[None]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    sigma = scheduler.sigmas[:-1][-8]
    assert sigma == pytest.approx(0.515, abs=1e-3)
    embeddings, _, pooled, _ = pipe.encode_prompt(
        "cat red sofa purple unicorn", None, None, do_classifier_free_guidance=False, max_sequence_length=77
    )
    with hooked_projections(pipe.transformer) as projections:
        pipe.transformer(
            hidden_states=sigma * noise + (1 - sigma) * clean,
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            timestep=scheduler.timesteps[-8].reshape(1),
        )
    assert len(pipe.tokenizer("cat").input_ids) == 3
    exact = by_hand(pipe, projections[2], CLASSES, (64, 64), geometric=True)
    scores = result.pixel_scores()
    torch.testing.assert_close(scores.double(), exact, rtol=1e-4, atol=0)
    assert torch.equal(result.labels, scores.argmax(dim=0))
    assert result.classes == tuple(CLASSES)
    for other in ({"layers": 1}, {"seed": 4}):
        changed = seg4diff.segment(pipe, image, CLASSES, **{"layers": 2, "seed": 3, **other})
        assert not torch.allclose(changed.pixel_scores().double(), exact, rtol=1e-3, atol=0)


def test_scores_at_pixels(pipe: Any) -> None:
    """Linear as the paper has it, geometric by default: they differ between a strong and a weak token."""
    tokens = torch.tensor([[[0.5, 0.002]], [[0.05, 0.05]]])  # a thing on the left half, a ground everywhere
    linear = resize_scores(tokens, (1, 64), "linear")
    geometric = resize_scores(tokens, (1, 64), "geometric")
    torch.testing.assert_close(linear[0, 0, 31:33].mean(), torch.tensor(0.251))
    middle = geometric[0, 0, 31:33].log().mean().exp()
    torch.testing.assert_close(middle, torch.tensor((0.5 * 0.002) ** 0.5))
    assert [int((s[0] > s[1]).sum()) for s in (linear, geometric)] == [45, 29]
    assert torch.isfinite(resize_scores(torch.zeros(1, 2, 2), (4, 4), "geometric")).all()
    image = picture(64, 64)
    default, paper = (
        seg4diff.segment(pipe, image, CLASSES, layers=1, preset=p).pixel_scores()
        for p in ("default", "paper")
    )
    # The same map behind both: they agree where no token is far from its neighbours.
    assert not torch.equal(default, paper)
    torch.testing.assert_close(default, paper, rtol=0.2, atol=0)


def test_seeds_and_generators(pipe: Any) -> None:
    image = picture()

    def scores(**arguments: Any) -> torch.Tensor:
        return seg4diff.segment(pipe, image, CLASSES, layers=1, **arguments).scores

    assert torch.equal(scores(), scores(seed=0))
    assert not torch.equal(scores(), scores(seed=1))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(scores(generator=generator), scores(seed=1))
    assert not torch.equal(scores(generator=generator), scores(seed=1))
    with pytest.raises(ValueError, match="give one"):
        scores(seed=1, generator=generator)


def test_batches_equal_single_images(pipe: Any) -> None:
    images = [picture(70, 50, 0), picture(40, 60, 1), picture(70, 50, 2), np.asarray(picture(70, 50, 3))]
    per_image = [CLASSES, ["dog"], ["tree", "sofa"], CLASSES]
    alone = [
        seg4diff.segment(pipe, image, names, layers=1) for image, names in zip(images, per_image, strict=True)
    ]
    together = seg4diff.segment(pipe, images, per_image, layers=1, batch_size=3)
    assert isinstance(together, list)
    for one, two, names in zip(alone, together, per_image, strict=True):
        torch.testing.assert_close(two.scores, one.scores, rtol=1e-4, atol=0)
        assert two.classes == tuple(names)
        assert two.image.size == one.image.size
    same = seg4diff.segment(pipe, images[:1], CLASSES, layers=1)
    assert isinstance(same, list)
    assert len(same) == 1


def test_text_and_images_are_encoded_once(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    encode_prompt = pipe.encode_prompt

    def watched(*args: Any, **kwargs: Any) -> Any:
        prompts.extend(kwargs["prompt"])
        return encode_prompt(*args, **kwargs)

    monkeypatch.setitem(pipe.__dict__, "encode_prompt", watched)
    encoded = []
    handle = pipe.vae.encoder.register_forward_hook(lambda *args: encoded.append(args[-1].shape[0]))
    names = [f"thing {i}" for i in range(30)]
    seg4diff.segment(pipe, [picture(seed=i) for i in range(3)], names, layers=1, batch_size=2)
    handle.remove()
    assert len(prompts) == len(set(prompts)) > 1
    assert encoded == [2, 1]


def test_long_class_lists_are_spread_over_prompts(pipe: Any) -> None:
    names = [f"thing{i:02d}" for i in range(40)]
    result = seg4diff.segment(pipe, picture(), names, layers=1, batch_size=3)
    prompts = result.metadata["prompts"]
    assert " ".join(prompts).split() == names
    assert all(len(pipe.tokenizer(prompt).input_ids) <= 77 for prompt in prompts)
    assert len(prompts) == 4  # seven tokens a name, ten names in a prompt of 75 tokens
    # Every prompt's probabilities stand in the result as they are.
    last = prompts[-1].split()
    alone = seg4diff.segment(pipe, picture(), last, layers=1)
    torch.testing.assert_close(result.scores[-len(last) :], alone.scores, rtol=1e-4, atol=0)


def test_layers_are_averaged(pipe: Any) -> None:
    options = {"preset": "reference"}  # linear from maps to scores
    single = [seg4diff.segment(pipe, picture(), CLASSES, layers=layer, **options).scores for layer in (0, 2)]
    both = seg4diff.segment(pipe, picture(), CLASSES, layers=[2, 0], **options)
    torch.testing.assert_close(both.scores, torch.stack(single).mean(dim=0), rtol=1e-4, atol=0)
    assert both.metadata["layers"] == (0, 2)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((70, 50), (80, 48)),
        ((1, 1), (64, 64)),
        ((4000, 3), (512, 16)),
        ((50, 70), (48, 80)),
        ((3, 640), (16, 512)),
    ],
)
def test_any_size_keeps_its_aspect(pipe: Any, size: tuple[int, int], fitted: tuple[int, int]) -> None:
    result = seg4diff.segment(pipe, picture(*size), CLASSES, layers=0)
    assert result.metadata["size"] == fitted
    assert tuple(result.labels.shape) == size[::-1]


def test_presets(pipe: Any) -> None:
    image = picture(90, 50)
    paper = seg4diff.segment(pipe, image, CLASSES, layers=0, preset="paper")
    assert paper.image.size == (50, 50)
    centre = image.crop((20, 0, 70, 50))
    torch.testing.assert_close(
        paper.scores, seg4diff.segment(pipe, centre, CLASSES, layers=0, preset="paper").scores
    )
    with hooked_projections(pipe.transformer) as projections:
        reference = seg4diff.segment(pipe, image, ["cat-merged", "sofa"], layers=0, preset="reference")
    assert reference.metadata["prompts"] == ["cat sofa"]
    assert reference.metadata["size"] == (64, 64)
    assert reference.classes == ("cat-merged", "sofa")
    assert tuple(reference.labels.shape) == (50, 90)
    exact = by_hand(pipe, projections[0], ["cat", "sofa"], (50, 90), geometric=False)
    torch.testing.assert_close(reference.pixel_scores().double(), exact, rtol=1e-4, atol=0)
    wrong = by_hand(pipe, projections[0], ["cat", "sofa"], (50, 90), geometric=True)
    assert (wrong / exact - 1).abs().max() > 1e-3


def test_half_precision() -> None:
    exact = seg4diff.segment(seg4diff.patch(tiny.pipeline()), picture(), CLASSES, layers=1)
    pipe = seg4diff.patch(tiny.pipeline().to(torch.bfloat16))
    result = seg4diff.segment(pipe, picture(), CLASSES, layers=1)
    assert result.scores.dtype == torch.float32
    torch.testing.assert_close(result.scores, exact.scores, rtol=0.1, atol=0)
    assert pipe.transformer.dtype == torch.bfloat16


def test_the_pipeline_is_left_as_it_was(pipe: Any) -> None:
    steps = pipe.scheduler.timesteps.clone()
    processors = pipe.transformer.attn_processors
    with pytest.raises(ValueError, match="out of range"):
        seg4diff.segment(pipe, picture(), CLASSES, layers=4)
    seg4diff.segment(pipe, picture(), CLASSES, layers=1)
    assert torch.equal(pipe.scheduler.timesteps, steps)
    assert pipe.transformer.attn_processors == processors


def test_out_of_memory_names_the_remedies(pipe: Any) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(exhausted)
    processors = pipe.transformer.attn_processors
    with pytest.raises(torch.OutOfMemoryError, match="80 x 48 pixels.*enable_model_cpu_offload"):
        seg4diff.segment(pipe, picture(), CLASSES, layers=1)
    handle.remove()
    assert pipe.transformer.attn_processors == processors


def test_t5_reads_the_names_too() -> None:
    pipe = seg4diff.patch(tiny.pipeline(t5=True))
    asked: list[list[int]] = []
    pipe.text_encoder_3.register_forward_pre_hook(lambda _, given: asked.append(given[0][0].tolist()))
    with hooked_projections(pipe.transformer) as projections:
        result = seg4diff.segment(pipe, picture(64, 64), CLASSES, layers=1)
    words = pipe.tokenizer_3("cat red sofa purple unicorn").input_ids
    assert [ids[: len(words)] for ids in asked] == [words]
    assert projections[1]["add_k_proj"].shape[1] > 77
    exact = by_hand(pipe, projections[1], CLASSES, (64, 64), geometric=True)
    torch.testing.assert_close(result.pixel_scores().double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "classes is empty", {"classes": []}),
        (ValueError, r"give a list of names, such as \['cat'\]", {"classes": "cat"}),
        (ValueError, "'cat' and 'Cat ' are the same", {"classes": ["cat", "Cat "]}),
        (ValueError, "'  ' is blank", {"classes": ["cat", "  "]}),
        (ValueError, "3 is not a string", {"classes": [["cat", 3]]}),
        (ValueError, "mixes names and lists", {"classes": ["cat", ["dog"]]}),
        (ValueError, "2 lists of names for 1 images", {"classes": [["cat"], ["dog"]]}),
        (ValueError, "an image's list of classes is empty", {"classes": [[]]}),
        (ValueError, "has 100 tokens, but a prompt holds 75", {"classes": ["x" * 100]}),
        (ValueError, "'finest' is unknown; accepted: 'default', 'best', 'fast'", {"preset": "finest"}),
        (
            ValueError,
            "absent='drop' is unknown; accepted: 'ignore', 'keep', 'background'",
            {"absent": "drop"},
        ),
        (ValueError, "false_names=0.1 needs calibrated presence scores", {"false_names": 0.1}),
        (ValueError, "layer 9 is out of range: this model has layers 0 to 3", {"layers": 9}),
        (ValueError, "layers='automatic' is unknown", {"layers": "automatic"}),
        (ValueError, "batch_size=0", {"batch_size": 0}),
        (ValueError, "empty", {"image": []}),
        (FileNotFoundError, "nowhere", {"image": "nowhere.png"}),
    ],
)
def test_bad_input(pipe: Any, error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    given: dict[str, Any] = {"image": picture(), "classes": CLASSES, "layers": 1, **arguments}
    with pytest.raises(error, match=message):
        seg4diff.segment(pipe, given.pop("image"), given.pop("classes"), **given)


def test_bad_pipelines(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no VAE"):
        seg4diff.segment(pipe.transformer, picture(), CLASSES)
    truncated = tmp_path / "half.png"
    picture().save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"half\.png"):
        seg4diff.segment(pipe, truncated, CLASSES)


def test_a_name_without_tokens_is_refused() -> None:
    class Deaf:
        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return SimpleNamespace(input_ids=[])

    with pytest.raises(ValueError, match="'xyzzy' has no tokens"):
        plan_prompts(["xyzzy"], TextSpan("clip", Deaf(), 0, 77, special=2))


def by_given_scores(pipe: Any, monkeypatch: pytest.MonkeyPatch, scores: torch.Tensor, **options: Any) -> Any:
    """`segment` where the model reads these scores [names, 4, 4]; 16 pixels of a token, block of 2 x 2."""

    def given(*_: Any, **__: Any) -> Any:
        yield NamedScores(0, scores, 500.0)

    monkeypatch.setattr(zero_shot, "run_scores", given)
    names = [f"thing{number}" for number in range(len(scores))]
    recipe = options.pop("recipe", Recipe(floor=0.001))
    preset = replace(PRESETS["best"], upsample="linear", recipe=recipe)
    return seg4diff.segment(pipe, picture(16, 16), names, preset=preset, layers=0, **options)


def left_and_right() -> torch.Tensor:
    """Names 1 and 3 on the left and right half; 0 nowhere; 2 on one token of the right."""
    scores = torch.full((4, 4, 4), 1e-5)
    scores[1, :, :2] = 0.1
    scores[3, :, 2:] = 0.02
    scores[2, 0, 3] = 0.05
    scores[3, :, 3] = 0.0004
    return scores


def test_labels_index_the_names_as_given_when_some_are_dropped(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = left_and_right()
    found = by_given_scores(pipe, monkeypatch, scores)
    assert found.classes == ("thing0", "thing1", "thing2", "thing3")
    assert (found.presence >= 0.5).tolist() == [False, True, False, True]
    assert torch.equal(found.scores, scores)
    pixels = found.pixel_scores()
    assert pixels.shape == (4, 16, 16)
    assert torch.equal(found.labels, torch.tensor([1, 3])[pixels[[1, 3]].argmax(dim=0)])
    assert found.labels.unique().tolist() == [1, 3]
    kept = by_given_scores(pipe, monkeypatch, scores, absent="keep")
    assert torch.equal(kept.labels, pixels.argmax(dim=0))
    assert 2 in kept.labels
    assert torch.equal(kept.presence, found.presence)
    background = by_given_scores(pipe, monkeypatch, scores, absent="background")
    unexplained = pixels[[1, 3]].amax(dim=0) < 0.001
    assert 0 < int(unexplained.sum()) < 128
    assert torch.equal(background.labels, found.labels.masked_fill(unexplained, -1))
    relative = by_given_scores(pipe, monkeypatch, scores, absent="background", recipe=Recipe())
    assert torch.equal(relative.labels == -1, pixels[[1, 3]].amax(dim=0) < 0.01 * 0.1)


def test_no_name_is_present(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest, or background alone."""
    scores = torch.full((2, 4, 4), 0.01)
    scores[0, ::2, ::2] = scores[0, 1::2, 1::2] = 0.03
    scores[1, ::2, 1::2] = scores[1, 1::2, ::2] = 0.02
    assert by_given_scores(pipe, monkeypatch, scores).labels.unique().tolist() == [0]
    background = by_given_scores(pipe, monkeypatch, scores, absent="background")
    assert background.labels.unique().tolist() == [-1]
    assert background.shares() == "background 100%"


def test_one_name_alone(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the pixels that it explains, none if it is absent, all with `keep`."""
    scores = left_and_right()[1:2]
    recipe = Recipe(floor=0.001, alone=0.05)
    found = by_given_scores(pipe, monkeypatch, scores, recipe=recipe)
    assert float(found.presence[0]) == pytest.approx(2 / 3)
    assert torch.equal(found.labels == 0, found.pixel_scores()[0] >= 0.001)
    assert found.labels.unique().tolist() == [-1, 0]
    assert found.shares().startswith("thing0 ")
    absent = by_given_scores(pipe, monkeypatch, scores, recipe=replace(recipe, alone=0.2))
    assert float(absent.presence[0]) == pytest.approx(1 / 3)
    assert absent.labels.unique().tolist() == [-1]
    everything = by_given_scores(pipe, monkeypatch, scores, recipe=recipe, absent="keep")
    assert everything.labels.unique().tolist() == [0]
    unknown = by_given_scores(pipe, monkeypatch, scores, recipe=Recipe())
    assert bool(unknown.presence.isnan().all())
    assert unknown.labels.unique().tolist() == [-1, 0]


def test_a_lower_error_rate_finds_fewer_names(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.full((2, 4, 4), 0.01)
    scores[0, :, :2] = 0.011
    scores[1, :, 2:] = 0.09
    recipe = Recipe(calibration=((0.5, 0.3, 0.0), (0.7, 0.1, 0.2)))
    assert by_given_scores(pipe, monkeypatch, scores, recipe=recipe).labels.unique().tolist() == [0, 1]
    sure = by_given_scores(pipe, monkeypatch, scores, recipe=recipe, false_names=0.1)
    assert sure.labels.unique().tolist() == [1]
    assert sure.metadata["threshold"] == 0.7


@pytest.mark.parametrize("preset", ["best", "fast"])
def test_best_without_a_measured_recipe(pipe: Any, preset: Any) -> None:
    """Any model and size: bicubic, one image or several, the grid smaller than a block of the recipe."""
    results = seg4diff.segment(pipe, [picture(70, 50), picture(300, 10)], CLASSES, layers=3, preset=preset)
    for result in results:
        assert result.upsample == "bicubic"
        assert result.scores.shape[0] == result.presence.shape[0] == 3
        assert 0 < float(result.scores.min()) <= float(result.pixel_scores().max()) <= 1
        present = (result.presence >= 0.5).nonzero()[:, 0].tolist() or [int(result.presence.argmax())]
        assert set(result.labels.unique().tolist()) <= set(present)
