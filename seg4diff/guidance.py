"""Guidance away from a model whose image tokens read blurred text (Seg4Diff, section 3.4 and equation 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from seg4diff.backbones import Backbone, CallInputs
from seg4diff.patching import patch_of
from seg4diff.perturbation import Blur
from seg4diff.processors import LayerRequest
from seg4diff.watching import EncodedPrompt, watching_forwards, watching_pipeline


def guide(
    pipe: Any,
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
    The paper gives neither a scale nor a combination. Costs one more row for every picture: one forward of
    [uncond; cond; perturbed] a step. The loop is the pipeline's own, so every argument of its call means what
    it always does; the model is stock again afterwards, also after an exception.

    Contexts that are open around the call apply: captures keep the rows of their branch, never the perturbed
    ones; :func:`seg4diff.perturb` changes all rows and :func:`seg4diff.edit` the conditional and perturbed
    ones.

    Args:
        pipe: a patched pipeline.
        prompt: as for the pipeline.
        scale: how far to move away; 0 is the pipeline's own call. The default is that of diffusers' pipeline
            of perturbed-attention guidance for Stable Diffusion 3.
        layers: the layers that read blurred text in the perturbed rows; the model's expert layers when None.
        blur: the perturbation, see :class:`seg4diff.perturbation.Blur`.
        call: everything else that the pipeline's call accepts: ``guidance_scale``, ``negative_prompt``,
            ``generator``, ``callback_on_step_end``, ...

    Returns:
        What the pipeline returns.

    Raises:
        RuntimeError: ``pipe`` is not patched.
        TypeError: ``pipe`` is a bare transformer, or an argument has another type.
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
        raise TypeError(f"blur={blur!r} must be a seg4diff.perturbation.Blur")
    chosen = state.layers(state.backbone.expert_layers(state.transformer) if layers is None else layers)
    if scale == 0:
        return pipe(prompt, **call)
    guidance = _Guidance(pipe, state.backbone, float(scale), blur)
    with ExitStack() as stack:
        request = LayerRequest(edit_text_value=guidance.edit_text_value)
        stack.enter_context(state.asking(chosen, request))
        stack.enter_context(watching_forwards(pipe, guidance.before_forward, guidance.after_forward))
        stack.enter_context(watching_pipeline(pipe, guidance.begin, guidance.end))
        return pipe(prompt, **call)


class _Guidance:
    """Adds perturbed rows to every forward of a pipeline call, and folds them into the others' prediction."""

    def __init__(self, pipe: Any, backbone: Backbone, scale: float, blur: Blur) -> None:
        self._pipe = pipe
        self._backbone = backbone
        self._scale = scale
        self._blur = blur
        self._encoded: EncodedPrompt | None = None
        self._inputs: CallInputs | None = None  # of the forward that runs, as the pipeline called it
        self._perturbed = 0  # rows added to it
        self._step_away: Tensor | None = None  # scale (cond - perturbed) of the step

    def begin(self, encoded: EncodedPrompt) -> None:
        self._encoded, self._step_away = encoded, None

    def end(self) -> None:
        self._encoded = self._step_away = None

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._inputs, self._perturbed = None, 0
        if self._encoded is None:
            return args, kwargs
        self._inputs = self._backbone.read_call(self._pipe.transformer, args, kwargs)
        if self._inputs.skipped_layers:  # the second forward of a step, as skip-layer guidance makes it
            return args, kwargs
        batch = self._inputs.batch
        rows = self._encoded.rows_of("conditional", batch)
        self._perturbed = rows.stop - rows.start
        return _with_rows_again(args, batch, rows), _with_rows_again(kwargs, batch, rows)

    def after_forward(self, output: Any) -> Any:
        inputs, self._inputs = self._inputs, None
        if self._encoded is None or inputs is None:
            return None
        sample = output[0] if isinstance(output, tuple) else output.sample
        predicted = sample[: inputs.batch]
        if inputs.skipped_layers:
            # Skip-layer guidance subtracts this from the conditional prediction, which has moved by a step.
            if self._step_away is None:
                return None
        else:
            rows = self._encoded.rows_of("conditional", inputs.batch)
            wide = torch.promote_types(sample.dtype, torch.float32)
            self._step_away = self._scale * (sample[rows].to(wide) - sample[inputs.batch :].to(wide))
            self._perturbed = 0
        # What is added to both branches is added to the pipeline's uncond + g (cond - uncond), whatever g is.
        away = self._step_away.repeat(len(predicted) // len(self._step_away), 1, 1, 1)
        moved = (predicted + away).to(sample.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else type(output)(sample=moved)

    def edit_text_value(self, text_value: Tensor) -> Tensor:
        if self._perturbed == 0:
            return text_value
        read, perturbed = text_value.tensor_split([len(text_value) - self._perturbed])
        return torch.cat([read, self._blur(perturbed)])


def _with_rows_again(value: Any, batch: int, rows: slice) -> Any:
    """``value`` with ``rows`` appended to every tensor in it that has ``batch`` rows."""
    if isinstance(value, Tensor):
        return torch.cat([value, value[rows]]) if value.dim() and len(value) == batch else value
    if isinstance(value, (list, tuple)):
        return type(value)(_with_rows_again(entry, batch, rows) for entry in value)
    if isinstance(value, dict):
        return {key: _with_rows_again(entry, batch, rows) for key, entry in value.items()}
    return value
