"""Guidance away from a model whose image tokens read blurred text (Seg4Diff, section 3.4 and equation 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seg4diff.attention.observer import Forward, Observer, PromptCall, attach
from seg4diff.attention.patch import patch_of
from seg4diff.attention.requests import LayerRequest, LayerResult
from seg4diff.backbones import Backbone, Pipeline
from seg4diff.editing.blur import Blur


def guide(
    pipe: Pipeline,
    prompt: str | Sequence[str] | None = None,
    *,
    scale: float = 3.0,
    layers: Sequence[int] | int | None = None,
    blur: Blur = Blur(),  # noqa: B008
    **call: Any,
) -> Any:
    """Call a pipeline with perturbed image-to-text guidance.

    Each step also predicts what the model would draw if some layers read blurred text, and moves away from
    it: with classifier-free guidance of scale g (Ho and Salimans), the prediction is

        uncond + g (cond - uncond) + scale (cond - perturbed),

    and without, cond + scale (cond - perturbed), combined as perturbed-attention guidance is in diffusers.
    The paper gives neither a scale nor a combination. Costs one more row for every image: [uncond; cond;
    perturbed] where a step is one forward, [cond; perturbed] where the branches have forwards of their own.
    The loop is the pipeline's own, so every argument of its call means what it always does; the model is
    stock again afterwards, also after an exception.

    Contexts that are open around the call apply: captures keep the rows of their branch, never the perturbed
    ones; `seg4diff.perturb` changes all rows and `seg4diff.edit` the conditional and perturbed
    ones.

    Args:
        pipe: a pipeline.
        prompt: as for the pipeline.
        scale: how far to move away; 0 is the pipeline's own call. The default is that of diffusers' pipeline
            of perturbed-attention guidance for Stable Diffusion 3.
        layers: the layers that read blurred text in the perturbed rows; the model's expert layers when None.
        blur: the perturbation, see `seg4diff.editing.blur.Blur`.
        call: everything else that the pipeline's call accepts: `guidance_scale`, `negative_prompt`,
            `generator`, `callback_on_step_end`, ...

    Returns:
        What the pipeline returns.

    Raises:
        NotImplementedError: the model family is not supported.
        TypeError: `pipe` is a bare transformer, or an argument has another type.
        ValueError: a negative or infinite scale, a layer out of range, or no expert layer is known.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "transformer"):
        raise TypeError(f"{type(pipe).__name__} is a bare transformer and draws nothing; give the pipeline")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale={scale!r} must be a number")
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale={scale!r} must be at least 0 and finite")
    if not isinstance(blur, Blur):
        raise TypeError(f"blur={blur!r} must be a seg4diff.editing.blur.Blur")
    chosen = state.layers_or_experts(layers)
    if scale == 0:
        return pipe(prompt=prompt, **call)
    guidance = _Guidance(state.backbone, float(scale), blur)
    with attach(pipe, chosen, LayerRequest(edit_text_value=guidance.edit_text_value), guidance):
        return pipe(prompt=prompt, **call)


class _Guidance(Observer):
    """Adds perturbed rows to the forwards of a pipeline call, and folds them into the others' prediction."""

    def __init__(self, backbone: Backbone, scale: float, blur: Blur) -> None:
        self._backbone = backbone
        self._scale = scale
        self._blur = blur
        self._perturbed = 0  # rows added to the forward that runs
        self._step_away: Tensor | None = None  # scale (cond - perturbed) of the step

    def begin_call(self, prompt: PromptCall) -> None:
        self._step_away = None

    def end_call(self) -> None:
        self._step_away = None

    def before_forward(self, forward: Forward, arguments: dict[str, Any]) -> dict[str, Any]:
        self._perturbed = 0
        rows = forward.rows("conditional")
        # Skip-layer guidance makes a second forward in a step.
        if forward.prompt is None or forward.call.skipped_layers or rows.stop == rows.start:
            return arguments
        self._perturbed = rows.stop - rows.start
        return self._backbone.rows_again(arguments, forward.call.batch, rows)

    def after_forward(self, forward: Forward, results: Mapping[int, LayerResult], output: Any) -> Any:
        if forward.prompt is None:
            return None
        sample = output[0] if isinstance(output, tuple) else output.sample
        listed = isinstance(sample, list)  # one entry for each row
        sample = torch.stack(sample) if listed else sample
        batch = forward.call.batch
        predicted = sample[:batch]
        if self._perturbed:
            wide = torch.promote_types(sample.dtype, torch.float32)
            own = sample[forward.rows("conditional")].to(wide)
            self._step_away = self._scale * (own - sample[batch:].to(wide))
            self._perturbed = 0
        step_away = self._step_away
        if step_away is None:
            return None
        # What is added to both branches is added to the pipeline's uncond + g (cond - uncond), whatever g is.
        # Skip-layer guidance subtracts its second forward from the conditional prediction, which has moved.
        repeats = len(predicted) // len(step_away)
        away = step_away.repeat(repeats, *(1 for _ in predicted.shape[1:]))
        moved = (predicted + away).to(sample.dtype)
        moved = list(moved.unbind()) if listed else moved
        return (moved, *output[1:]) if isinstance(output, tuple) else type(output)(sample=moved)

    def edit_text_value(self, text_value: Tensor) -> Tensor:
        if self._perturbed == 0:
            return text_value
        read, perturbed = text_value.tensor_split([len(text_value) - self._perturbed])
        return torch.cat([read, self._blur(perturbed)])
