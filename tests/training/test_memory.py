"""Predicted memory against what a step on the CPU really allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.memory import peak_bytes
from seg4diff.lora.adapters import add_adapters
from seg4diff.training.memory import (
    Estimate,
    estimate_memory,
    estimate_variants,
    model_shape,
    report,
)
from seg4diff.training.objective.magnet import Batch, Magnet
from seg4diff.training.settings import TrainSettings, build_settings
from tests.support import tiny

TEXT, MASKS = 20, 3


def settings(**changes: Any) -> TrainSettings:
    values: dict[str, Any] = {"data": {"resolution": 256}, "mask": {"layers": [1]}, "lora": {"rank": 4}}
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    return build_settings(values)


def config_of(transformer: Any) -> dict[str, Any]:
    """What the transformer's config.json would hold."""
    return {**transformer.config, "_class_name": type(transformer).__name__}


def measured(transformer: Any, chosen: TrainSettings) -> int:
    """Bytes at the peak of one step: what is resident, and the profiler's book of allocations."""
    stop = chosen.mask.layers[-1] if chosen.fm_weight == 0 else None
    weights = add_adapters(transformer, chosen.lora, stop_after=stop)
    if chosen.memory.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    magnet = Magnet(transformer, chosen.mask, fm_weight=chosen.fm_weight)
    side = chosen.data.resolution // 8
    batch = Batch(
        latents=torch.randn(chosen.batch, 4, side, side),
        noise=torch.randn(chosen.batch, 4, side, side),
        sigma=torch.full((chosen.batch,), 0.5),
        text={
            "encoder_hidden_states": torch.randn(chosen.batch, TEXT, 64),
            "pooled_projections": torch.randn(chosen.batch, 64),
        },
        masks=tuple((torch.rand(MASKS, 256, 256) < 0.3).to(torch.uint8) for _ in range(chosen.batch)),
        columns=(tuple((1 + c, 2 + c) for c in range(MASKS)),) * chosen.batch,
    )
    optimizer = torch.optim.AdamW(weights)

    def step() -> None:
        magnet(batch).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return peak_bytes(step, [*magnet.parameters(), *magnet.buffers(), *states])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask": {"weight": 0.0}},
        {"memory": {"gradient_checkpointing": False}},
        {"memory": {"precision": "bfloat16"}, "batch": 2},
        {"fm_weight": 0.0, "data": {"caption_dropout": 0.0}},
    ],
    ids=str,
)
def test_within_ten_percent_of_the_measurement(changes: dict[str, Any]) -> None:
    chosen = settings(**changes)
    transformer = tiny.transformer(layers=3, heads=2, head_dim=32, sample_size=32)
    if chosen.memory.precision == "bfloat16":
        transformer.to(torch.bfloat16)
    predicted = estimate_memory(config_of(transformer), chosen, device="cpu", text_tokens=TEXT, masks=MASKS)
    assert predicted.peak == pytest.approx(measured(transformer, chosen), rel=0.1)


@pytest.mark.slow
def test_switches_save_what_they_should() -> None:
    config = config_of(tiny.transformer(layers=2, heads=2, head_dim=32))

    def peak(**changes: Any) -> Estimate:
        return estimate_memory(config, settings(**changes), text_tokens=TEXT)

    whole = peak()
    assert peak(memory={"gradient_checkpointing": False}).peak > whole.peak
    assert peak(fm_weight=0.0, data={"caption_dropout": 0.0}).peak < whole.peak
    assert peak(memory={"precision": "float32"}).parts["weights"] == 2 * whole.parts["weights"]
    assert peak(memory={"quantise": "nf4"}).parts["weights"] < whole.parts["weights"]
    assert peak(optimizer={"name": "adamw8bit"}).parts["optimizer"] == whole.parts["optimizer"] // 4
    for pairing in ("token", "head"):
        assert peak(mask={"pairing": pairing}).peak > 0
    assert peak(mask={"convolutional_head": True}).parts["LoRA"] > whole.parts["LoRA"]


def test_known_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    config, text, pixels = model_shape("stabilityai/stable-diffusion-3-medium-diffusers")
    assert (config["num_layers"], config["attention_head_dim"], text, pixels) == (24, 64, 154, 8)
    config, text, pixels = model_shape("black-forest-labs/FLUX.1-dev")
    assert (config["num_layers"], config["num_single_layers"], text, pixels) == (19, 38, 512, 8)
    with pytest.raises(ValueError, match="_class_name='UNet2DModel' .*; known: .*FluxTransformer2DModel"):
        estimate_memory({"_class_name": "UNet2DModel"}, settings())
    with pytest.raises(FileNotFoundError, match="no readable configuration"):
        model_shape(str(tmp_path))


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny.pipeline(layers=2).save_pretrained(model)
    chosen = settings(model=str(model), memory={"gradient_checkpointing": False})
    found = estimate_variants(chosen)
    assert list(found) == [
        "as configured",
        "memory.gradient_checkpointing=true",
        "memory.quantise='nf4'",
        "fm_weight=0",
        "memory.quantise='nf4', fm_weight=0",
    ]
    peaks = [estimate.peak for estimate in found.values()]
    assert peaks[0] > peaks[1] > peaks[2] > peaks[4]
    assert peaks[1] > peaks[3] > peaks[4]
    plain = estimate_variants(settings(model=str(model), mask={"weight": 0.0}))
    assert list(plain) == ["as configured", "memory.quantise='nf4'"]
    console = Console(record=True, width=120)
    console.print(report(found))
    text = console.export_text()
    assert "saved activations" in text
    assert "memory.quantise='nf4', fm_weight=0" in text
