"""Quantised weights, other attention backends, caches that skip layers, and sharding."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import seg4diff
from seg4diff.attention.maps import maps_of
from seg4diff.kernels.types import MapRequest
from tests.support import tiny
from tests.support.families import Family, every_family, exact_maps


@torch.no_grad()
def check(family: Family, transformer: Any, inputs: dict[str, Any], exact: list[torch.Tensor]) -> None:
    """Captured maps and early stops against the oracle of the same weights; the model is stock again."""

    def run() -> torch.Tensor:
        sample = transformer(**inputs).sample
        return sample if isinstance(sample, torch.Tensor) else torch.stack(sample)

    stock = run()
    with seg4diff.capture(transformer, maps=MapRequest(heads="each")) as captured:
        torch.testing.assert_close(run(), stock, rtol=1e-5, atol=1e-5)
    for record, expected in zip(captured.records, exact, strict=True):
        assert record.maps is not None
        torch.testing.assert_close(record.maps.double(), expected, rtol=1e-5, atol=1e-8)
    early = maps_of(transformer, [1], MapRequest(heads="each"), inputs)
    torch.testing.assert_close(early[0].double(), exact[1], rtol=1e-5, atol=1e-8)
    assert torch.equal(run(), stock)


@every_family
@pytest.mark.extra("quant", "bitsandbytes")
def test_nf4(family: Family) -> None:
    from seg4diff.lora.quantise import quantise_nf4

    transformer, inputs = family.transformer(), family.inputs()
    before = exact_maps(family, transformer, inputs)
    quantise_nf4(transformer, torch.device("cpu"))
    exact = exact_maps(family, transformer, inputs)
    assert float((exact[1] - before[1]).abs().max()) > 1e-5  # other weights
    check(family, transformer, inputs, exact)


@every_family
def test_torchao(family: Family) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    transformer, inputs = family.transformer(), family.inputs()
    quantization.quantize_(transformer, quantization.Int8WeightOnlyConfig())
    check(family, transformer, inputs, exact_maps(family, transformer, inputs))


@every_family
def test_float8_storage(family: Family) -> None:
    transformer, inputs = family.transformer(), family.inputs()
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    check(family, transformer, inputs, exact_maps(family, transformer, inputs))


@pytest.fixture
def backends() -> Iterator[None]:
    """The backend that diffusers had; it is one for the whole process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@every_family
@pytest.mark.usefixtures("backends")
def test_another_attention_backend(family: Family) -> None:
    """Layers that are asked compute their own attention; the others the one that was set."""
    transformer, inputs = family.transformer(), family.inputs()
    exact = exact_maps(family, transformer, inputs)
    transformer.set_attention_backend("_native_math")
    check(family, transformer, inputs, exact)


def caches() -> dict[str, Any]:
    import diffusers

    return {
        "first block": diffusers.FirstBlockCacheConfig(threshold=1e3),
        "mag": diffusers.MagCacheConfig(
            mag_ratios=torch.ones(3), num_inference_steps=3, retention_ratio=0.1, threshold=10.0
        ),
        "pyramid": diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
        ),
        "taylor": diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    }


@pytest.mark.parametrize("cache", ["first block", "mag", "pyramid", "taylor"])
def test_caches_leave_gaps_that_are_reported(cache: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is recorded is of the step it belongs to, and every missing step is counted."""
    pipe = tiny.flux_pipeline()
    call: dict[str, Any] = {
        "num_inference_steps": 3,
        "height": 64,
        "width": 64,
        "output_type": "latent",
        "max_sequence_length": 16,
    }
    pipe.transformer.enable_cache(caches()[cache])
    stock = pipe("a cat", generator=tiny.seeded(), **call).images
    with caplog.at_level(logging.WARNING, "seg4diff"), seg4diff.capture(pipe, steps="each") as captured:
        found = pipe("a cat", generator=tiny.seeded(), **call).images
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    recorded = [sum(record.layer == layer for record in captured.records) for layer in range(4)]
    assert captured.gaps == {layer: 3 - count for layer, count in enumerate(recorded) if count < 3}
    assert captured.gaps
    assert "layers left no record in some steps" in caplog.text
    first = next(record for record in captured.records if record.layer == 1)
    times = sorted({record.timestep for record in captured.records}, reverse=True)
    assert first.timestep == times[0]
    pipe.transformer.disable_cache()
    with seg4diff.capture(pipe, steps="each") as whole:
        pipe("a cat", generator=tiny.seeded(), **call)
    assert whole.gaps == {}
    assert len(whole.records) == 12
    same = next(record for record in whole.records if record.layer == 1)  # of the first step
    torch.testing.assert_close(first.maps, same.maps, rtol=1e-5, atol=1e-8)


def test_an_analysis_names_the_cache() -> None:
    import diffusers

    pipe = tiny.flux_pipeline()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e3))
    with pytest.raises(RuntimeError, match=r"layer 1 did not run in this step: a cache .*disable_cache"):
        seg4diff.analyze(
            pipe, "a cat", noise_levels=[1], steps=3, height=64, width=64, max_sequence_length=16
        )


@pytest.mark.parametrize("kind", ["tensor", "context"])
def test_sharding_is_refused_by_name(kind: str) -> None:
    """As `enable_parallelism` leaves the model: tensor parallelism marks no processor."""
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig, TensorParallelConfig

    transformer = tiny.flux_transformer()
    transformer._parallel_config = (
        ParallelConfig(tensor_parallel_config=TensorParallelConfig(tp_degree=2))
        if kind == "tensor"
        else ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    )
    with pytest.raises(NotImplementedError, match=rf"FluxTransformer2DModel shards .*{kind} parallelism"):
        seg4diff.patch(transformer)
    transformer._parallel_config = None
    seg4diff.patch(transformer)
