"""Guidance against forwards made one by one and combined by hand; every argument of the pipeline call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import seg4diff
from seg4diff.editing.blur import Blur
from seg4diff.editing.guidance import guide
from tests.support import tiny
from tests.support.materialised import materialised
from tests.support.tiny import seeded

PROMPT = "a red cat on a sofa"
CALL: dict[str, Any] = {**tiny.CALL, "num_inference_steps": 3}
BLUR = Blur(sigma=9, kernel_size=15, padding="reflect")


@pytest.fixture(scope="module")
def pipe() -> Any:
    """In float64, with attention that is far from uniform, so that perturbing it matters."""
    pipe = tiny.pipeline().to(torch.float64)
    with torch.no_grad():
        for block in pipe.transformer.transformer_blocks:
            for name in ("to_q", "to_k", "add_q_proj", "add_k_proj", "add_v_proj"):
                getattr(block.attn, name).weight.mul_(6)
    return seg4diff.patch(pipe)


def by_hand(
    pipe: Any,
    prompts: list[str],
    negative: str,
    scale: float,
    guidance_scale: float,
    layers: tuple[int, ...],
    latents: Tensor,
    steps: int = 3,
) -> Tensor:
    """The whole sampling loop, three forwards a step, the perturbed one with an edited attention matrix."""
    cond, uncond, pooled, pooled_uncond = pipe.encode_prompt(
        prompts, None, None, negative_prompt=[negative] * len(prompts), max_sequence_length=77
    )
    matrix = BLUR.matrix(cond.shape[1])
    pipe.scheduler.set_timesteps(steps)

    def predict(embeddings: Tensor, pooled_embeddings: Tensor, time: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=latents,
            timestep=time.expand(len(latents)),
            encoder_hidden_states=embeddings,
            pooled_projections=pooled_embeddings,
        ).sample

    for time in pipe.scheduler.timesteps:
        predicted = predict(cond, pooled, time)
        with materialised(pipe.transformer, {layer: lambda p: p @ matrix for layer in layers}):
            perturbed = predict(cond, pooled, time)
        combined = predicted + scale * (predicted - perturbed)
        if guidance_scale > 1:
            combined = combined + (guidance_scale - 1) * (predicted - predict(uncond, pooled_uncond, time))
        latents = pipe.scheduler.step(combined, time, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("scale", [2.0, 0.5])
@torch.no_grad()
def test_guidance_is_three_forwards_combined(pipe: Any, scale: float, guidance_scale: float) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=seeded(), dtype=torch.float64)
    prompts = [PROMPT, "a dog, a tree"]
    arguments = {
        **CALL,
        "guidance_scale": guidance_scale,
        "negative_prompt": ["a tree"] * 2,
        "latents": noise,
    }
    output = guide(pipe, prompts, scale=scale, layers=[0, 2], blur=BLUR, **arguments).images
    expected = by_hand(pipe, prompts, "a tree", scale, guidance_scale, (0, 2), noise)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    effect = (output - pipe(prompts, **arguments).images).abs().max()
    assert effect > 1e-3
    for wrong in (
        by_hand(pipe, prompts, "a tree", -scale, guidance_scale, (0, 2), noise),
        by_hand(pipe, prompts, "a tree", scale, guidance_scale, (1, 2), noise),
        by_hand(pipe, prompts[::-1], "a tree", scale, guidance_scale, (0, 2), noise),
    ):
        assert (output - wrong).abs().max() > 0.05 * effect


@torch.no_grad()
def test_scale_zero_is_the_pipelines_own_image(pipe: Any) -> None:
    expected = pipe(PROMPT, **CALL, generator=seeded()).images
    assert torch.equal(guide(pipe, PROMPT, scale=0, layers=1, **CALL, generator=seeded()).images, expected)
    # and it is where small scales lead
    nearly = guide(pipe, PROMPT, scale=1e-9, layers=1, **CALL, generator=seeded()).images
    torch.testing.assert_close(nearly, expected, rtol=0, atol=1e-7)


@torch.no_grad()
def test_one_forward_a_step_with_one_more_row(pipe: Any) -> None:
    batches: list[int] = []
    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    guide(pipe, PROMPT, scale=2, layers=1, **CALL)
    guide(pipe, PROMPT, scale=2, layers=1, **{**CALL, "guidance_scale": 1.0}, num_images_per_prompt=2)
    handle.remove()
    assert batches == [3, 3, 3, 4, 4, 4]


@torch.no_grad()
def test_returns_what_the_pipeline_returns(pipe: Any) -> None:
    image = guide(pipe, PROMPT, scale=2, layers=1, **{**CALL, "output_type": "pil"}).images[0]
    assert image.size == (64, 64)
    arguments = {**CALL, "return_dict": False, "num_images_per_prompt": 2, "height": 48, "width": 64}
    (latents,) = guide(pipe, PROMPT, scale=2, layers=1, **arguments)
    assert latents.shape == (2, 4, 6, 8)
    assert type(guide(pipe, PROMPT, layers=1, **CALL)) is type(pipe(PROMPT, **CALL))


@torch.no_grad()
def test_generators_prompts_and_embeddings(pipe: Any) -> None:
    prompts = [PROMPT, "a dog"]
    together = guide(pipe, prompts, layers=1, **CALL, generator=[seeded(3), seeded(4)]).images
    for prompt, seed, row in zip(prompts, (3, 4), together, strict=True):
        alone = guide(pipe, prompt, layers=1, **CALL, generator=seeded(seed)).images[0]
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-9)
    encoded = pipe.encode_prompt(PROMPT, None, None, max_sequence_length=77)
    names = [f"{kind}prompt_embeds" for kind in ("", "negative_", "pooled_", "negative_pooled_")]
    embeddings = dict(zip(names, encoded, strict=True))
    from_embeddings = guide(pipe, layers=1, **CALL, **embeddings, generator=seeded(3)).images
    torch.testing.assert_close(from_embeddings[0], together[0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_callbacks_see_and_change_the_run(pipe: Any) -> None:
    seen: list[tuple[int, float]] = []

    def halve(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, float(time)))
        return {"latents": tensors["latents"] / 2}

    output = guide(pipe, PROMPT, layers=1, **CALL, generator=seeded(), callback_on_step_end=halve).images
    assert [step for step, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000.0
    plain = guide(pipe, PROMPT, layers=1, **CALL, generator=seeded()).images
    assert output.abs().mean() < 0.8 * plain.abs().mean()


@torch.no_grad()
def test_a_callback_may_end_classifier_free_guidance(pipe: Any) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=seeded(), dtype=torch.float64)

    def cut_off(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 0:
            pipe._guidance_scale = 0.0
            return {name: tensor.chunk(2)[1] for name, tensor in tensors.items()}
        return {}

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    arguments = {
        "callback_on_step_end": cut_off,
        "callback_on_step_end_tensor_inputs": names,
        "latents": noise,
    }
    output = guide(pipe, PROMPT, scale=2, layers=[0, 2], blur=BLUR, **CALL, **arguments).images

    # one guided step by hand, then two without
    full = by_hand_steps(pipe, noise, [4.0, 1.0, 1.0])
    torch.testing.assert_close(output, full, rtol=0, atol=1e-10)
    assert (output - by_hand_steps(pipe, noise, [4.0, 4.0, 1.0])).abs().max() > 1e-3


def by_hand_steps(pipe: Any, latents: Tensor, guidance_scales: list[float]) -> Tensor:
    """As ``by_hand`` with scale 2 and layers 0 and 2, another classifier-free guidance at every step."""
    cond, uncond, pooled, pooled_uncond = pipe.encode_prompt([PROMPT], None, None, max_sequence_length=77)
    matrix = BLUR.matrix(cond.shape[1])
    pipe.scheduler.set_timesteps(len(guidance_scales))
    for time, g in zip(pipe.scheduler.timesteps, guidance_scales, strict=True):
        given = {"hidden_states": latents, "timestep": time.expand(1)}
        predicted = pipe.transformer(encoder_hidden_states=cond, pooled_projections=pooled, **given).sample
        other = pipe.transformer(
            encoder_hidden_states=uncond, pooled_projections=pooled_uncond, **given
        ).sample
        with materialised(pipe.transformer, {layer: lambda p: p @ matrix for layer in (0, 2)}):
            away = (
                predicted
                - pipe.transformer(encoder_hidden_states=cond, pooled_projections=pooled, **given).sample
            )
        combined = other + g * (predicted - other) + 2 * away
        latents = pipe.scheduler.step(combined, time, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def test_skip_layer_guidance_is_added_unchanged(pipe: Any) -> None:
    """What both kinds of guidance add, to first order in one step, is the sum of what each adds."""
    call = {**CALL, "num_inference_steps": 2}
    skip = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    arguments = {**call, "latents": torch.randn(1, 4, 8, 8, generator=seeded(), dtype=torch.float64)}
    # Skip-layer guidance acts from the second step on; both steps' latents are recorded.
    runs: dict[str, list[Tensor]] = {}

    def run(name: str, scale: float, **more: Any) -> None:
        runs[name] = []

        def keep(_: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            runs[name].append(tensors["latents"].clone())
            return {"latents": arguments["latents"]}  # both steps begin at the same latents

        guide(pipe, PROMPT, scale=scale, layers=1, **arguments, **more, callback_on_step_end=keep)

    run("neither", 0.0)
    run("ours", 2.0)
    run("skip", 0.0, **skip)
    run("both", 2.0, **skip)
    moved = {name: steps[1] - runs["neither"][1] for name, steps in runs.items()}
    assert moved["ours"].abs().max() > 1e-4
    assert moved["skip"].abs().max() > 1e-4
    torch.testing.assert_close(moved["both"], moved["ours"] + moved["skip"], rtol=0, atol=1e-10)


@torch.no_grad()
def test_captures_around_guidance_keep_their_branch(pipe: Any) -> None:
    call = {**CALL, "num_inference_steps": 1, "num_images_per_prompt": 2}
    for branch in ("conditional", "unconditional", "both"):
        with seg4diff.capture(pipe, [0, 1, 2], branch=branch) as guided:  # type: ignore[arg-type]
            guide(pipe, PROMPT, layers=1, **call, generator=seeded())
        with seg4diff.capture(pipe, [0, 1, 2], branch=branch) as plain:  # type: ignore[arg-type]
            pipe(PROMPT, **call, generator=seeded())
        for ours, theirs in zip(guided.records, plain.records, strict=True):
            assert ours.maps is not None
            assert theirs.maps is not None
            assert len(ours.maps) == (4 if branch == "both" else 2)
            torch.testing.assert_close(ours.maps, theirs.maps, rtol=1e-9, atol=0)
            assert ours.timestep == theirs.timestep
        assert guided.heatmap("cat").shape == (64, 64) if branch != "both" else True


@torch.no_grad()
def test_edits_around_guidance_reach_both_conditional_rows(pipe: Any) -> None:
    call = {**CALL, "latents": torch.randn(1, 4, 8, 8, generator=seeded(), dtype=torch.float64)}
    column = pipe.tokenizer(PROMPT).input_ids.index(pipe.tokenizer.convert_tokens_to_ids("cat</w>"))
    matrix = BLUR.matrix(154)

    def change(probabilities: Tensor) -> Tensor:
        unconditional, conditional, perturbed = probabilities.clone().chunk(3)
        perturbed = perturbed @ matrix
        conditional, perturbed = conditional.clone(), perturbed.clone()
        conditional[..., column] = 0
        # the values are edited by the outer context first: P G_blur G_drop
        perturbed[..., column] = 0
        return torch.cat([unconditional, conditional, perturbed])

    with seg4diff.edit(pipe, [1], drop="cat"):
        output = guide(pipe, PROMPT, scale=2, layers=1, blur=BLUR, **call).images
    with materialised(pipe.transformer, {1: change}):  # our processor gives way to the test's
        seen = _guided_rows(pipe, call)
    torch.testing.assert_close(output, seen, rtol=0, atol=1e-10)
    assert (output - guide(pipe, PROMPT, scale=2, layers=1, blur=BLUR, **call).images).abs().max() > 1e-4


def _guided_rows(pipe: Any, call: dict[str, Any]) -> Tensor:
    """A loop with one forward of [uncond; cond; cond] a step."""
    cond, uncond, pooled, pooled_uncond = pipe.encode_prompt([PROMPT], None, None, max_sequence_length=77)
    latents = call["latents"]
    pipe.scheduler.set_timesteps(call["num_inference_steps"])
    for time in pipe.scheduler.timesteps:
        other, predicted, perturbed = pipe.transformer(
            hidden_states=torch.cat([latents] * 3),
            timestep=time.expand(3),
            encoder_hidden_states=torch.cat([uncond, cond, cond]),
            pooled_projections=torch.cat([pooled_uncond, pooled, pooled]),
        ).sample.chunk(3)
        combined = other + call["guidance_scale"] * (predicted - other) + 2 * (predicted - perturbed)
        latents = pipe.scheduler.step(combined, time, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def test_everything_is_restored_after_an_exception(pipe: Any) -> None:
    processors = dict(pipe.transformer.attn_processors)
    before = pipe(PROMPT, **CALL, generator=seeded()).images

    def fails(*_: Any) -> Any:
        raise RuntimeError("a callback")

    with pytest.raises(RuntimeError, match="a callback"):
        guide(pipe, PROMPT, layers=1, **CALL, callback_on_step_end=fails)
    assert pipe.transformer.attn_processors == processors
    assert "encode_prompt" not in vars(pipe)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks
    assert torch.equal(pipe(PROMPT, **CALL, generator=seeded()).images, before)


@torch.no_grad()
def test_progress_bar_is_the_pipelines(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    guide(pipe, PROMPT, layers=1, **CALL)
    pipe.set_progress_bar_config(disable=True)
    assert "drawing: 100%" in capsys.readouterr().err


@torch.no_grad()
def test_compiled_transformer_is_guided() -> None:
    pipe = seg4diff.patch(tiny.pipeline(layers=2).to(torch.float64))
    call = {**CALL, "num_inference_steps": 2}
    expected = guide(pipe, PROMPT, layers=1, **call, generator=seeded()).images
    counter = CompileCounter()
    pipe.transformer.compile(backend=counter, fullgraph=True)
    output = guide(pipe, PROMPT, layers=1, **call, generator=seeded()).images
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    settled = counter.frame_count
    assert settled > 0
    guide(pipe, PROMPT, layers=1, **call, generator=seeded())
    assert counter.frame_count == settled


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scale": -1}, ValueError, "scale=-1 must be at least 0"),
        ({"scale": float("nan")}, ValueError, "scale=nan"),
        ({"scale": "2"}, TypeError, "scale='2'"),
        ({"layers": [7]}, ValueError, "layer 7 is out of range"),
        ({"layers": None}, ValueError, "no expert layer is known"),
        ({"blur": 9}, TypeError, "blur=9"),
        ({"negative_prompt": 5}, Exception, "negative_prompt|int"),
        ({"unheard_of": 5}, TypeError, "unheard_of"),
    ],
)
def test_bad_arguments_are_named(
    pipe: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        guide(pipe, PROMPT, **{"layers": 1, **CALL, **arguments})
    assert guide(pipe, PROMPT, layers=1, **CALL).images.isfinite().all()


def test_what_cannot_be_guided(pipe: Any) -> None:
    with pytest.raises(TypeError, match="bare transformer"):
        guide(pipe.transformer, PROMPT, layers=1)
    with pytest.raises(NotImplementedError, match="Linear is not supported"):
        guide(torch.nn.Linear(1, 1), PROMPT, layers=1)
