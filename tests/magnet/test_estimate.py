"""Predicted memory against what a step on the CPU really allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.memory import peak_bytes
from seg4diff.magnet.adapters import add_adapters
from seg4diff.magnet.estimate import (
    SD3_MEDIUM,
    Estimate,
    cheapest_fit,
    estimate_memory,
    model_shape,
    parse_memory,
    shape_of,
)
from seg4diff.magnet.objective import Batch, Magnet
from seg4diff.magnet.settings import TrainSettings, build_settings
from tests.support import tiny

TEXT, MASKS = 20, 3


def settings(**changes: Any) -> TrainSettings:
    values: dict[str, Any] = {"data": {"resolution": 256}, "mask": {"layers": [1]}, "lora": {"rank": 4}}
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    return build_settings(values)


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
    predicted = estimate_memory(shape_of(transformer), chosen, device="cpu", text_tokens=TEXT, masks=MASKS)
    assert predicted.peak == pytest.approx(measured(transformer, chosen), rel=0.1)


def test_switches_save_what_they_should() -> None:
    config = shape_of(tiny.transformer(layers=2, heads=2, head_dim=32))

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


def test_cheapest_switch() -> None:
    sizes = {"whole": 100, "checkpointed": 60, "nf4": 50, "both": 20}

    def find(chosen: TrainSettings) -> Estimate:
        checkpointed = chosen.memory.gradient_checkpointing
        nf4 = chosen.memory.quantise == "nf4"
        name = (
            "both" if checkpointed and nf4 else "nf4" if nf4 else "checkpointed" if checkpointed else "whole"
        )
        return Estimate({"weights": sizes[name]}, chosen)

    start = settings(memory={"gradient_checkpointing": False})
    fit = cheapest_fit(find, start, 70)
    assert fit is not None
    assert fit[0] == "memory.gradient_checkpointing=true"
    fit = cheapest_fit(find, start, 55)
    assert fit is not None
    assert fit[0] == "memory.quantise='nf4'"
    fit = cheapest_fit(find, start, 30)
    assert fit is not None
    assert fit[0].endswith("memory.quantise='nf4'")
    assert "gradient_checkpointing" in fit[0]
    assert fit[1].peak == 20
    assert cheapest_fit(find, start, 10) is None


def test_known_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    config, text, pixels = model_shape("stabilityai/stable-diffusion-3-medium-diffusers")
    assert (config, text, pixels) == (SD3_MEDIUM, 154, 8)
    with pytest.raises(FileNotFoundError, match="no readable configuration"):
        model_shape(str(tmp_path))


def test_report_names_a_switch_that_fits(tmp_path: Any) -> None:
    from rich.console import Console

    from seg4diff.magnet.estimate import report

    tiny.pipeline(layers=2).save_pretrained(tmp_path)
    console = Console(record=True, width=120)
    chosen = settings(model=str(tmp_path), memory={"precision": "float32", "gradient_checkpointing": False})
    console.print(report(chosen, parse_memory("1MiB")))
    text = console.export_text()
    assert "saved activations" in text
    assert "Does not fit in 0.00 GiB" in text or "To fit in 0.00 GiB" in text
    console.print(report(chosen, parse_memory("8GiB")))
    assert "Fits in 8.00 GiB" in console.export_text()


def test_parse_memory() -> None:
    assert parse_memory("8GiB") == 8 * 2**30
    assert parse_memory(" 1.5 gb") == 1_500_000_000
    assert parse_memory("512MiB") == 2**29
    for text in ("", "8 bits", "lots", "-1GB"):
        with pytest.raises(ValueError, match="is no size"):
            parse_memory(text)
