"""The blur against attention matrices that are materialised and blurred; what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import seg4diff
from seg4diff.editing.blur import Blur, perturb
from seg4diff.editing.words import edit
from seg4diff.kernels.api import backend
from tests.support import tiny
from tests.support.edits import CALL, assert_same
from tests.support.materialised import materialised
from tests.support.tiny import seeded

MODELS = {"sd3": {}, "sd3.5": {"dual": (0,), "qk_norm": "rms_norm"}}
SCIPY_MODES = {"symmetric": "reflect", "reflect": "mirror"}


def blurred(sigma: float, size: int, padding: str, text: slice = slice(None)) -> Callable[[Tensor], Tensor]:
    """Blur of probabilities along the last axis, by scipy."""
    offsets = np.arange(size) - size // 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))

    def apply(probabilities: Tensor) -> Tensor:
        result = probabilities.clone()
        block = ndimage.correlate1d(
            probabilities[..., text].detach().numpy(), weights / weights.sum(), mode=SCIPY_MODES[padding]
        )
        result[..., text] = torch.from_numpy(block)
        return result

    return apply


@pytest.mark.parametrize("padding", ["symmetric", "reflect"])
@pytest.mark.parametrize("size", [1, 3, 5, 9])
@pytest.mark.parametrize("text", [slice(None), slice(2, 9)], ids=["all", "part"])
def test_matrix_is_scipys_blur(padding: Any, size: int, text: slice) -> None:
    matrix = Blur(sigma=2.5, kernel_size=size, padding=padding, text=text).matrix(12)
    rows = torch.rand(5, 12, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(rows @ matrix, blurred(2.5, size, padding, text)(rows))


def test_kernel_is_the_papers() -> None:
    middle = Blur().matrix(77)[38, 36:41]
    assert middle.tolist() == pytest.approx([0.1975, 0.2012, 0.2025, 0.2012, 0.1975], abs=5e-5)


def test_symmetric_padding_preserves_the_mass_and_reflect_does_not() -> None:
    row = torch.full((1, 77), 0.2 / 76, dtype=torch.float64)
    row[0, 0] = 0.8
    assert float((row @ Blur().matrix(77)).sum()) == pytest.approx(1.0, abs=1e-12)
    assert float((row @ Blur(padding="reflect").matrix(77)).sum()) == pytest.approx(0.68, abs=0.005)


def test_transpose_matters_where_padding_reflects() -> None:
    matrix = Blur(padding="reflect").matrix(9)
    assert not torch.allclose(matrix, matrix.T)
    symmetric = Blur().matrix(9)
    assert torch.allclose(symmetric, symmetric.T)


def test_kernel_wider_than_the_text() -> None:
    for padding in ("symmetric", "reflect"):
        rows = torch.rand(2, 3, dtype=torch.float64, generator=seeded())
        matrix = Blur(sigma=4, kernel_size=11, padding=padding).matrix(3)  # type: ignore[arg-type]
        torch.testing.assert_close(rows @ matrix, blurred(4, 11, padding)(rows))
        assert Blur(padding=padding).matrix(1).tolist() == [[pytest.approx(1.0)]]  # type: ignore[arg-type]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("attention", ["reference", "aten"])
@pytest.mark.parametrize("padding", ["symmetric", "reflect"])
@torch.no_grad()
def test_perturbed_model_equals_brute_force(model: str, attention: Any, padding: Any) -> None:
    transformer = seg4diff.patch(tiny.transformer(**MODELS[model]).double())
    inputs = {name: tensor.double() for name, tensor in tiny.transformer_inputs().items()}
    stock = transformer(**inputs).sample
    with backend(attention), perturb(transformer, [0, 1], sigma=1.5, kernel_size=3, padding=padding):
        output = transformer(**inputs).sample
    brute = blurred(1.5, 3, padding)
    with materialised(transformer, {0: brute, 1: brute}):
        expected = transformer(**inputs).sample
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    changes = (expected - stock).abs().max()
    assert changes > 1e-4  # six orders above the tolerance
    with materialised(transformer, {1: brute, 2: brute}):
        assert (transformer(**inputs).sample - output).abs().max() > 1e-2 * changes  # another layer
    with materialised(transformer, {layer: lambda p: p.roll(1, dims=-1) for layer in (0, 1)}):
        assert (transformer(**inputs).sample - output).abs().max() > 1e-2 * changes  # another token


@torch.no_grad()
def test_text_range_and_half_precision() -> None:
    transformer = seg4diff.patch(tiny.transformer())
    inputs = tiny.transformer_inputs()
    with perturb(transformer, 1, text=slice(1, 6)):
        output = transformer(**inputs).sample
    with materialised(transformer, {1: blurred(9, 5, "symmetric", slice(1, 6))}):
        expected = transformer(**inputs).sample
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    half = Blur()(torch.ones(1, 9, 2, 8, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, torch.ones_like(half))  # rounding the matrix would lose mass
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(Blur()(torch.ones(1, 9, 2, 8)), torch.ones(1, 9, 2, 8), rtol=1e-6, atol=0)


@torch.no_grad()
def test_nested_perturbations_compose_in_order() -> None:
    transformer = seg4diff.patch(tiny.transformer().double())
    inputs = {name: tensor.double() for name, tensor in tiny.transformer_inputs().items()}
    inner = blurred(9, 5, "symmetric")
    outer = blurred(1, 3, "reflect")

    # The values that image rows read are changed by the first context first: G_inner (G_outer V).
    with perturb(transformer, [0, 1], sigma=1, kernel_size=3, padding="reflect"):
        with perturb(transformer, [1, 2]):
            output = transformer(**inputs).sample
        alone = transformer(**inputs).sample
    with materialised(transformer, {0: outer, 1: lambda p: outer(inner(p)), 2: inner}):
        expected = transformer(**inputs).sample
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    with materialised(transformer, {0: outer, 1: lambda p: inner(outer(p)), 2: inner}):
        assert (transformer(**inputs).sample - output).abs().max() > 1e-8  # the other order
    with materialised(transformer, {0: outer, 1: outer}):
        expected = transformer(**inputs).sample
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_captures_inside_a_perturbation() -> None:
    """A perturbed layer's map is its softmax; later layers feel the change; either context may be outside."""
    transformer = seg4diff.patch(tiny.transformer())
    inputs = tiny.transformer_inputs()

    def maps(*contexts: Callable[[], Any]) -> tuple[list[Tensor], Tensor]:
        import contextlib

        with contextlib.ExitStack() as stack:
            entered = [stack.enter_context(context()) for context in contexts]
            output = transformer(**inputs).sample
        captured = next(c for c in entered if c is not None)
        return [record.maps for record in captured.records], output

    capture = lambda: seg4diff.capture(transformer)  # noqa: E731
    blur = lambda: perturb(transformer, 1)  # noqa: E731
    plain, _ = maps(capture)
    inside, output = maps(blur, capture)
    outside, same = maps(capture, blur)
    assert torch.equal(output, same)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(inside[0], plain[0])
    torch.testing.assert_close(inside[1], plain[1])
    assert not torch.allclose(inside[2], plain[2], rtol=1e-4)
    with perturb(transformer, 1):
        torch.testing.assert_close(transformer(**inputs).sample, output)  # a capture changes nothing


@torch.no_grad()
def test_everything_is_restored(pipe: Any) -> None:
    before = pipe(**CALL, generator=seeded()).images
    processors = dict(pipe.transformer.attn_processors)

    def fails(*_: Any) -> Any:
        raise RuntimeError("a callback")

    for context in (lambda: perturb(pipe, 1), lambda: edit(pipe, drop="cat")):
        with pytest.raises(RuntimeError, match="a callback"), context():
            pipe(**CALL, generator=seeded(), callback_on_step_end=fails)
        assert pipe.transformer.attn_processors == processors
        assert "encode_prompt" not in vars(pipe)
        assert not pipe.transformer._forward_hooks
        assert not pipe.transformer._forward_pre_hooks
        assert torch.equal(pipe(**CALL, generator=seeded()).images, before)


@torch.no_grad()
def test_layers_not_named_are_stock(pipe: Any) -> None:
    with perturb(pipe, 1):
        now = [block.attn.processor for block in pipe.transformer.transformer_blocks]
    stock = [block.attn.processor for block in pipe.transformer.transformer_blocks]
    assert [one is other for one, other in zip(now, stock, strict=True)] == [True, False, True]


@torch.no_grad()
def test_perturbation_changes_both_halves(pipe: Any, stock: Tensor) -> None:
    blur = blurred(9, 5, "symmetric")
    with perturb(pipe, [1]):
        output = pipe(**CALL, generator=seeded()).images
    with materialised(pipe.transformer, {1: blur}):
        expected = pipe(**CALL, generator=seeded()).images
    assert_same(output, expected, stock)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": 3}, ValueError, "layer 3 is out of range: this model has layers 0 to 2"),
        ({"layers": []}, ValueError, "is empty"),
        ({"sigma": 0}, ValueError, "sigma=0 must be above 0"),
        ({"sigma": -1.0}, ValueError, "sigma=-1.0"),
        ({"sigma": float("nan")}, ValueError, "sigma=nan"),
        ({"sigma": "9"}, TypeError, "sigma='9'"),
        ({"kernel_size": 4}, ValueError, "kernel_size=4 must be odd"),
        ({"kernel_size": -1}, ValueError, "kernel_size=-1"),
        ({"kernel_size": 5.0}, TypeError, "kernel_size=5.0"),
        ({"padding": "zeros"}, ValueError, "'zeros' is unknown; accepted: 'symmetric', 'reflect'"),
        ({"text": slice(0, 9, 2)}, ValueError, "has a step"),
        ({"text": 5}, TypeError, "a slice of its tokens"),
    ],
)
def test_bad_perturbations_are_named(
    pipe: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), perturb(pipe, **{"layers": 1, **arguments}):
        pass  # pragma: no cover
    assert pipe(**CALL, generator=seeded()).images.isfinite().all()


def test_text_beyond_the_prompt_is_named_when_the_model_runs(pipe: Any) -> None:
    with perturb(pipe, 1, text=slice(0, 400)), pytest.raises(ValueError, match="the 154 text tokens"):
        pipe(**CALL)
    assert pipe(**CALL, generator=seeded()).images.isfinite().all()


def test_gradients_flow_through_the_edited_values() -> None:
    transformer = seg4diff.patch(tiny.transformer().double())
    inputs = {name: tensor.double() for name, tensor in tiny.transformer_inputs().items()}
    inputs["encoder_hidden_states"].requires_grad_(True)
    with perturb(transformer, 1, padding="reflect"):
        transformer(**inputs).sample.square().sum().backward()
    ours = inputs["encoder_hidden_states"].grad.clone()
    inputs["encoder_hidden_states"].grad = None
    matrix = Blur(padding="reflect").matrix(9)
    with materialised(transformer, {1: lambda p: p @ matrix}):
        transformer(**inputs).sample.square().sum().backward()
    torch.testing.assert_close(ours, inputs["encoder_hidden_states"].grad)


@torch.no_grad()
def test_compiled_blocks_run_perturbed() -> None:
    transformer = seg4diff.patch(tiny.transformer())
    inputs = tiny.transformer_inputs()
    with perturb(transformer, 1):
        expected = transformer(**inputs).sample
        counter = CompileCounter()
        transformer.transformer_blocks[1].compile(backend=counter, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(transformer(**inputs).sample, expected)
        assert counter.frame_count == 1


def test_perturbing_the_demo_models_expert_layer_changes_the_image_most() -> None:
    """The causal check of the paper in miniature; `python -m benchmarks.causal` has the figures."""
    from seg4diff.loading import load_pipeline

    pipe = seg4diff.patch(load_pipeline("demo", "cpu"))
    pipe.set_progress_bar_config(disable=True)
    (expert,) = pipe.transformer.config["_seg4diff_expert_layers"]
    call = {**CALL, "prompt": "a zebra on grass", "num_inference_steps": 3, "guidance_scale": 3.0}
    plain = pipe(**call, generator=seeded()).images
    changes = []
    for layer in range(pipe.transformer.config.num_layers):
        with perturb(pipe, layer):
            changes.append(float((pipe(**call, generator=seeded()).images - plain).square().mean()))
    assert changes.index(max(changes)) == expert
    assert max(changes) > 4 * sorted(changes)[-2]
