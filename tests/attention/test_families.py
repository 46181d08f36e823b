"""What holds for every model family: outputs, maps against an oracle, early stops, gradients, restoration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import seg4diff
from seg4diff.attention.maps import maps_and_outputs, maps_of
from seg4diff.attention.requests import JointAnswer, LayerRequest, Place
from seg4diff.backbones import Layout, families, find_backbone
from seg4diff.kernels.types import MapRequest
from tests.support import tiny
from tests.support.compiling import compile_counter
from tests.support.families import (
    FAMILIES,
    Call,
    Family,
    cast,
    every_family,
    exact_maps,
    exact_outputs,
    joint_calls,
    take,
)

# Of norms that compute in float32 whatever the model's dtype.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


COMPILED = ("sd3", "sd3.5", "qwen", "qwen edit", "z-image", "flux", "flux kontext", "flux.2", "chroma")


def sample_of(transformer: Any, inputs: dict[str, Any]) -> Tensor:
    output = transformer(**inputs).sample
    return torch.stack(output) if isinstance(output, list) else output


def test_every_family_has_a_case() -> None:
    covered = {type(case.transformer()).__name__ for case in FAMILIES}
    assert {backbone.transformer for backbone in families()} == covered


@every_family
def test_blocks_cover_every_joint_attention(family: Family) -> None:
    """Block lists that a newer diffusers adds would be missed in silence."""
    transformer = family.transformer()
    backbone = find_backbone(transformer)
    blocks = backbone.blocks(transformer)
    assert len(blocks) == family.layers
    known = {id(backbone.attention(transformer, layer)) for layer in range(family.layers)}
    every = [m for m in transformer.modules() if hasattr(m, "processor") and getattr(m, "heads", 0)]
    others = [m for m in every if id(m) not in known]
    # Of image tokens alone: attn2 of SD3.5, attn1 beside cross-attention.
    dual = [getattr(block, name, None) for block in blocks for name in ("attn1", "attn2")]
    one_stream = [  # image or text tokens alone
        m for name, m in transformer.named_modules() if name.startswith(("noise_refiner", "context_refiner"))
    ]
    assert not [m for m in others if not any(m is other for other in (*dual, *one_stream))]


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_output_and_maps(family: Family, dtype: torch.dtype) -> None:
    """The output is the stock one to rounding; every head, row and column of every layer is the oracle's."""
    transformer = family.transformer().to(dtype)
    inputs = cast(family.inputs(), dtype)
    exact_ids = {name: value for name, value in family.inputs().items() if name in ("img_ids", "txt_ids")}
    inputs |= exact_ids  # bfloat16 would round positions
    stock = sample_of(transformer, inputs)
    exact = exact_maps(family, transformer, inputs)
    with seg4diff.capture(transformer, maps=MapRequest(heads="each")) as captured:
        output = sample_of(transformer, inputs)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output, stock, rtol=20 * eps, atol=20 * eps)
    assert [record.layer for record in captured.records] == list(range(family.layers))
    for record, expected in zip(captured.records, exact, strict=True):
        assert record.maps is not None
        assert record.grid == (4, 6)
        assert record.maps.shape == expected.shape
        # Queries and keys of the captured forward differ from stock's by the rounding of the layers before.
        bound = 1e-6 if dtype != torch.bfloat16 else 0.2 * float(expected.max())
        relative = (record.maps.double() - expected).abs().max() / expected.max()
        assert float((record.maps.double() - expected).abs().max()) < bound
        assert float(relative) < (1e-5 if dtype != torch.bfloat16 else 0.2)
    assert torch.equal(sample_of(transformer, inputs), stock)


@every_family
@torch.no_grad()
def test_the_oracle_tells_streams_and_layers_apart(family: Family) -> None:
    """Maps of another layer, of swapped rows or of other columns would be noticed."""
    transformer, inputs = family.transformer(), family.inputs()
    exact = exact_maps(family, transformer, inputs)
    scale = float(exact[1].max())
    for other in (exact[0], exact[1].flip(1), exact[1].flip(2), exact[1].flip(3), exact[1].flip(0)):
        assert float((exact[1] - other).abs().max()) > 1e-3 * scale


@every_family
@torch.no_grad()
def test_stopping_after_any_layer(family: Family) -> None:
    transformer, inputs = family.transformer(), family.inputs()
    stock, exact = sample_of(transformer, inputs), exact_maps(family, transformer, inputs)
    for layer in range(family.layers):
        ran: list[int] = []
        blocks = find_backbone(transformer).blocks(transformer)
        for number, block in enumerate(blocks):
            block.forward = counted(block.forward, number, ran)
        chosen = sorted({0, layer})
        maps = maps_of(transformer, chosen, MapRequest(heads="each"), inputs)
        for block in blocks:
            del block.forward
        assert ran == list(range(layer + 1))
        expected = torch.stack([exact[number] for number in chosen])
        torch.testing.assert_close(maps.double(), expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(sample_of(transformer, inputs), stock)


@every_family
@torch.no_grad()
def test_outputs_and_maps_of_one_early_stop(family: Family) -> None:
    """Every output layer, also behind the maps, before them and the same; the model is left as it was."""
    transformer, inputs = family.transformer(), family.inputs()
    stock, exact = sample_of(transformer, inputs), exact_maps(family, transformer, inputs)
    outputs = exact_outputs(family, transformer, inputs)
    blocks = find_backbone(transformer).blocks(transformer)
    for layers, wanted in (([1], [1, 2]), ([2], [0]), ([0], [0]), ([0, 2], range(family.layers))):
        ran: list[int] = []
        for number, block in enumerate(blocks):
            block.forward = counted(block.forward, number, ran)
        maps, found = maps_and_outputs(transformer, layers, MapRequest(heads="each"), inputs, wanted)
        for block in blocks:
            del block.forward
        assert ran == list(range(max(*layers, *wanted) + 1))
        expected = torch.stack([exact[layer] for layer in layers])
        torch.testing.assert_close(maps.double(), expected, rtol=1e-5, atol=1e-8)
        expected = torch.stack([outputs[layer] for layer in wanted])
        scale = float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * scale)
    for other in (outputs[0], outputs[1].flip(0), outputs[1].flip(1), outputs[1].flip(2)):
        assert float((outputs[1] - other).abs().max()) > 1e-2 * scale
    assert torch.equal(sample_of(transformer, inputs), stock)


def counted(forward: Any, number: int, ran: list[int]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        ran.append(number)
        return forward(*args, **kwargs)

    return run


@every_family
@torch.no_grad()
def test_statistics_and_slices(family: Family) -> None:
    transformer, inputs = family.transformer(), family.inputs()
    exact = exact_maps(family, transformer, inputs)
    request, statistics = MapRequest(columns=("text", slice(2, 5))), family.keys is None
    with seg4diff.capture(transformer, 1, maps=request, statistics=statistics) as captured:
        transformer(**inputs)
    (record,) = captured.records
    assert record.maps is not None
    torch.testing.assert_close(record.maps.double(), exact[1].mean(1)[..., 2:5], rtol=1e-5, atol=1e-8)
    if not statistics:
        with (
            pytest.raises(NotImplementedError, match="by cross-attention, which has no attention mass"),
            seg4diff.capture(transformer, 1, statistics=True),
        ):
            pass
        return
    assert record.statistics is not None
    mass = record.statistics.image_to_text.double()
    torch.testing.assert_close(mass, exact[1].sum(-1), rtol=1e-5, atol=1e-8)


@every_family
@pytest.mark.parametrize("stop_early", [False, True])
@torch.no_grad()
def test_relations(family: Family, stop_early: bool) -> None:
    """Text rows that read the image, and chosen image rows, of the generated image alone."""
    transformer, inputs = family.transformer(), family.inputs()
    streams = {"image": family.image, "text": family.text}
    matrix = joint_calls(family, transformer, inputs)[1].probabilities()
    chosen = torch.tensor([7, 2])
    for rows, columns in (
        (("text", slice(None)), ("image", slice(None))),
        (("image", slice(3, 8)), ("image", slice(None))),
        (("image", chosen), ("text", slice(1, 4))),
        (("text", slice(2, 5)), ("text", slice(None))),
    ):
        request = MapRequest(heads="each", rows=rows, columns=columns)
        if family.keys is not None and not request.image_to_text:
            with (
                pytest.raises(NotImplementedError, match="no map of text rows or image columns"),
                seg4diff.capture(transformer, 1, maps=request, stop_early=stop_early),
            ):
                pass
            continue
        with seg4diff.capture(transformer, 1, maps=request, stop_early=stop_early) as captured:
            transformer(**inputs)
        maps = captured.records[0].maps
        expected = take(matrix, streams[rows[0]], 2)[:, :, rows[1]]
        expected = take(expected, streams[columns[0]], 3)[..., columns[1]]
        assert maps is not None
        assert maps.shape == expected.shape
        torch.testing.assert_close(maps.double(), expected, rtol=1e-5, atol=1e-8)


@every_family
@pytest.mark.parametrize("stop_early", [False, True])
def test_gradients_with_checkpointing(family: Family, stop_early: bool) -> None:
    """Through the map and the output; recomputation happens after the context has ended."""
    if family.name == "chroma":
        pytest.skip("diffusers leaves the mask out of single-stream blocks that are checkpointed")

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        transformer = family.transformer().double()
        inputs = cast(family.inputs(), torch.float64)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        with seg4diff.capture(transformer, [1, 2], stop_early=stop_early) as captured:
            output = sample_of(transformer, inputs)
        size = captured.records[0].maps.shape[1:]  # type: ignore[union-attr]
        weights = torch.linspace(0, 1, size.numel(), dtype=torch.float64).reshape(size)
        loss = sum((record.maps * weights).sum() for record in captured.records)  # type: ignore[operator]
        if not stop_early:
            loss = loss + output.square().sum()
        seg4diff.unpatch(transformer)
        loss.backward()
        return {n: p.grad for n, p in transformer.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert any(float(gradient.abs().max()) > 1e-6 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@every_family
def test_map_gradients_are_finite_differences(family: Family) -> None:
    """Of one weight that only the map of layer 1 depends on, by way of the keys."""
    transformer = family.transformer().double()
    inputs = cast(family.inputs(), torch.float64)
    weight = find_backbone(transformer).attention(transformer, 1).to_k.weight
    request = MapRequest(columns=("text", slice(3, 4)))

    def value() -> Tensor:
        maps = maps_of(transformer, [1], request, inputs)
        return (maps * torch.linspace(-1, 1, maps.numel(), dtype=torch.float64).view_as(maps)).sum()

    (gradient,) = torch.autograd.grad(value(), weight)
    with torch.no_grad():
        for place in ((0, 1), (3, 2)):
            step = 1e-3  # rotary embeddings and qk-norm round to float32
            weight[place] += step
            above = float(value())
            weight[place] -= 2 * step
            below = float(value())
            weight[place] += step
            assert float(gradient[place]) == pytest.approx((above - below) / (2 * step), rel=2e-2, abs=1e-7)


@pytest.mark.parametrize(
    "family",
    [
        # One of each kind of block; the others take many seconds each.
        pytest.param(case, id=case.name, marks=() if case.name in COMPILED else pytest.mark.slow)
        for case in FAMILIES
    ],
)
@torch.no_grad()
def test_compiled_whole(family: Family) -> None:
    if not family.compiles:
        pytest.skip("the stock model reads lengths on the host")
    transformer, inputs = family.transformer(), family.inputs()
    stock, exact = sample_of(transformer, inputs), exact_maps(family, transformer, inputs)
    torch._dynamo.reset()
    backend, graphs = compile_counter()
    compiled: Any = torch.compile(transformer, backend=backend, fullgraph=True)
    for _ in range(3):
        with seg4diff.capture(compiled, [1]) as captured:
            torch.testing.assert_close(sample_of(compiled, inputs), stock)
        torch.testing.assert_close(captured.records[0].maps.double(), exact[1].mean(1), rtol=1e-5, atol=1e-8)
        assert len(graphs) == 1
    torch.testing.assert_close(sample_of(compiled, inputs), stock)
    torch._dynamo.reset()


@every_family
@torch.no_grad()
def test_an_exception_at_any_module_call(family: Family) -> None:
    """Whatever fails, the model is stock again: modules, processors, hooks, every bit of its output."""
    transformer, inputs = family.transformer(), family.inputs()
    stock = sample_of(transformer, inputs)
    modules = dict(transformer.named_modules())
    before = {name: set(module.__dict__) for name, module in modules.items()}
    processors = processors_of(transformer)
    with ran_modules(transformer) as ran:
        transformer(**inputs)
    leaves = [module for module in modules.values() if module in ran and not list(module.children())]
    assert len(leaves) > 10
    for leaf in leaves:
        handle = leaf.register_forward_hook(fails)
        with pytest.raises(ZeroDivisionError), seg4diff.capture(transformer):
            transformer(**inputs)
        handle.remove()
        assert all(now is processors[name] for name, now in processors_of(transformer).items())
        assert {name: set(module.__dict__) for name, module in transformer.named_modules()} == before
        assert not transformer._forward_hooks
        assert not transformer._forward_pre_hooks
    assert torch.equal(sample_of(transformer, inputs), stock)


@contextmanager
def ran_modules(transformer: Any) -> Iterator[set[Any]]:
    ran: set[Any] = set()
    handles = [m.register_forward_hook(lambda m, *_: ran.add(m)) for m in transformer.modules()]
    yield ran
    for handle in handles:
        handle.remove()


def processors_of(transformer: Any) -> dict[str, Any]:
    return {n: m.processor for n, m in transformer.named_modules() if hasattr(m, "processor")}


def fails(*_: Any) -> None:
    raise ZeroDivisionError


@every_family
@torch.no_grad()
def test_copies_and_state_within_an_early_stop(family: Family) -> None:
    transformer, inputs = family.transformer(), family.inputs()
    stock, names = sample_of(transformer, inputs), list(transformer.state_dict())
    with seg4diff.capture(transformer, 1, stop_early=True):
        assert list(transformer.state_dict()) == names
        clone = copy.deepcopy(transformer)
    assert torch.equal(sample_of(clone, inputs), stock)
    assert torch.equal(sample_of(transformer, inputs), stock)


@every_family
@torch.no_grad()
def test_fused_projections_and_lora(family: Family) -> None:
    from peft import LoraConfig

    transformer, inputs = family.transformer(), family.inputs()
    # diffusers' own fused processor fails on SD3.5's image-only attention, and some families have none.
    if family.name != "sd3.5" and hasattr(transformer, "fuse_qkv_projections"):
        exact = exact_maps(family, transformer, inputs)
        transformer.fuse_qkv_projections()
        maps = maps_of(transformer, range(family.layers), MapRequest(heads="each"), inputs)
        torch.testing.assert_close(maps.double(), torch.stack(exact), rtol=1e-4, atol=1e-7)
        transformer.unfuse_qkv_projections()
    before = exact_maps(family, transformer, inputs)
    torch.manual_seed(0)
    if not hasattr(transformer, "add_adapter"):  # diffusers has no adapters for this family
        return
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    exact = exact_maps(family, transformer, inputs)
    assert float((exact[1] - before[1]).abs().max()) > 1e-4
    maps = maps_of(transformer, range(family.layers), MapRequest(heads="each"), inputs)
    torch.testing.assert_close(maps.double(), torch.stack(exact), rtol=1e-4, atol=1e-7)


@every_family
@pytest.mark.parametrize("how", ["leaf group", "block group", "sequential", "layerwise casting"])
@torch.no_grad()
def test_offloading_and_casting(family: Family, how: str) -> None:
    transformer, inputs = family.transformer(), family.inputs()
    cpu = torch.device("cpu")
    if how == "sequential":
        from accelerate import cpu_offload

        cpu_offload(transformer, execution_device="cpu", offload_buffers=False)
    elif how == "layerwise casting":
        transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    else:
        transformer.enable_group_offload(
            onload_device=cpu,
            offload_device=cpu,
            offload_type="leaf_level" if how == "leaf group" else "block_level",
            num_blocks_per_group=None if how == "leaf group" else 1,
        )
    stock, exact = sample_of(transformer, inputs), exact_maps(family, transformer, inputs)
    weights = {name: (p.dtype, p.device) for name, p in transformer.named_parameters()}
    with seg4diff.capture(transformer, [0, 2]) as captured:
        torch.testing.assert_close(sample_of(transformer, inputs), stock)
    for record in captured.records:
        torch.testing.assert_close(record.maps.double(), exact[record.layer].mean(1), rtol=1e-5, atol=1e-8)
    early = maps_of(transformer, [1], MapRequest(), inputs)
    torch.testing.assert_close(early[0].double(), exact[1].mean(1), rtol=1e-5, atol=1e-8)
    assert {name: (p.dtype, p.device) for name, p in transformer.named_parameters()} == weights
    torch.testing.assert_close(sample_of(transformer, inputs), stock)


@every_family
@torch.no_grad()
def test_first_block_cache(family: Family) -> None:
    """Maps of one forward are its own, not those of an earlier one that the cache takes for the same."""
    from diffusers import FirstBlockCacheConfig

    transformer, inputs = family.transformer(), family.inputs()
    other = {name: value + 1e-4 if name == "hidden_states" else value for name, value in inputs.items()}
    exact = [exact_maps(family, transformer, given) for given in (inputs, other)]
    try:
        transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    except Exception as error:  # diffusers knows the blocks of some families only
        pytest.skip(f"no first block cache for this family: {error}")
    for given, expected in zip((inputs, other), exact, strict=True):
        maps = maps_of(transformer, [2], MapRequest(heads="each"), given)
        torch.testing.assert_close(maps[0].double(), expected[2], rtol=1e-5, atol=1e-8)


def test_masks_are_refused() -> None:
    transformer, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    given = {"joint_attention_kwargs": {"attention_mask": torch.zeros(2, 1, 1, 33)}}
    with seg4diff.capture(transformer, 0), pytest.raises(ValueError, match="attention_mask is given"):
        transformer(**inputs, **given)


def test_masks_of_keys_hide_text() -> None:
    """Boolean and added masks, with a batch axis or without heads and queries; no other kind."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, 2, 8, dtype=torch.float64) for _ in range(3))
    place = Place()
    answer = JointAnswer((LayerRequest(maps=MapRequest(heads="each")),), place)
    place.layout = Layout(True, image_tokens=4, text_tokens=3, generated=4, masked=True)
    hidden = torch.ones(2, 7, dtype=torch.bool)
    hidden[0, 1] = hidden[1, 0] = False
    added = torch.zeros(2, 7).masked_fill(~hidden, -10000.0)
    added[1, 2] = 0.75
    for mask in (hidden, hidden[:, None, None], added, added[:, None, None]):
        expected = Call(*(t.transpose(1, 2) for t in (q, k, v)), mask.reshape(2, 1, 1, 7)).probabilities()
        answered = answer(q, k, v, mask, None)
        assert answered is not None
        joint, (result,) = answered
        torch.testing.assert_close(joint, (expected @ v.transpose(1, 2)).transpose(1, 2))
        assert result.maps is not None
        torch.testing.assert_close(result.maps, expected[:, :, 3:, :3])
        assert float(result.maps[0, :, :, 1].abs().max()) == 0
    of_queries, of_heads = (hidden[:, None, None].expand(2, *sizes, 7) for sizes in ((1, 7), (2, 1)))
    for wrong in (hidden[:, :6], of_queries, of_heads):
        with pytest.raises(ValueError, match="attention mask of shape"):
            answer(q, k, v, wrong, None)
