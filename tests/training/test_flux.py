"""MAGNET on Flux.1: the loss by hand, adapters on both block lists, a run, and LoRA files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from seg4diff.backbones import find_backbone
from seg4diff.lora.adapters import adapted_modules, add_adapters
from seg4diff.lora.files import load_lora, save_lora
from seg4diff.lora.settings import LoraSettings
from seg4diff.training import trainer
from seg4diff.training.memory import estimate_memory, model_shape
from seg4diff.training.objective.losses import dice_loss, focal_loss
from seg4diff.training.objective.magnet import Batch, Magnet, normalise
from seg4diff.training.settings import MaskSettings, build_settings
from tests.support import runs, tiny
from tests.support.families import attention_calls


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        latents=torch.randn(2, 4, 8, 12, generator=generator, dtype=torch.float64),
        noise=torch.randn(2, 4, 8, 12, generator=generator, dtype=torch.float64),
        sigma=torch.tensor([0.25, 0.75], dtype=torch.float64),
        text={
            "encoder_hidden_states": torch.randn(2, 9, 32, generator=generator, dtype=torch.float64),
            "pooled_projections": torch.randn(2, 24, generator=generator, dtype=torch.float64),
        },
        masks=tuple((torch.rand(2, 16, 24, generator=generator) < 0.4).to(torch.uint8) for _ in range(2)),
        columns=(((1, 2), (5,)), ((3,), (4, 6))),
    )


def tuned(stop_after: int | None = None) -> tuple[Any, list[Any]]:
    transformer = tiny.flux_transformer().double()
    weights = add_adapters(transformer, LoraSettings(rank=2), stop_after=stop_after)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in weights:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return transformer, weights


@pytest.mark.parametrize("layer", [1, 2], ids=["double", "single"])
def test_loss_by_hand(layer: int) -> None:
    """From the stock model's own queries and keys, and its own prediction of the packed latents."""
    transformer, _ = tuned()
    batch, mask = make_batch(), MaskSettings(layers=(layer,), scores="probability")
    losses = Magnet(transformer, mask)(batch)._asdict()
    losses = {name: float(loss.detach()) for name, loss in losses.items()}
    backbone = find_backbone(transformer)
    noisy = torch.lerp(batch.latents, batch.noise, batch.sigma.view(-1, 1, 1, 1))
    arguments = backbone.arguments(transformer, noisy, batch.sigma, batch.text)
    assert torch.equal(arguments["timestep"], batch.sigma)
    with attention_calls() as calls, torch.no_grad():
        output = transformer(**arguments).sample
    velocity = output.view(2, 4, 6, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 12)
    flow = F.mse_loss(velocity, batch.noise - batch.latents)
    assert losses["flow"] == pytest.approx(float(flow), rel=1e-6)
    query, key = calls[layer]
    maps = (query @ key.transpose(-1, -2) / 4).softmax(-1)[:, :, 9:, :9].mean(1)  # [B, N, T]
    focal = dice = 0.0
    for row in range(2):
        candidates = torch.stack([maps[row][:, list(group)].mean(-1) for group in batch.columns[row]])
        logits = normalise(candidates, mask.normalisation, sharpness=mask.sharpness).view(2, 1, 4, 6)
        logits = F.interpolate(logits, size=(16, 24), mode="bilinear").flatten(1)
        target = batch.masks[row].flatten(1).double()
        focal += float(focal_loss(logits, target, preset=mask.focal)) / 2
        dice += float(dice_loss(logits, target)) / 2
    assert losses["focal"] == pytest.approx(focal, rel=1e-4)
    assert losses["dice"] == pytest.approx(dice, rel=1e-4)


@pytest.mark.parametrize("fm_weight", [0.0, 1.0])
def test_gradients_are_finite_differences_with_checkpointing(fm_weight: float) -> None:
    stop = 2 if fm_weight == 0 else None
    transformer, weights = tuned(stop_after=stop)
    transformer.enable_gradient_checkpointing()
    batch, mask = make_batch(), MaskSettings(layers=(2,))
    magnet = Magnet(transformer, mask, fm_weight=fm_weight)
    magnet(batch).total.backward()
    assert all(weight.grad is not None for weight in weights)
    with torch.no_grad():
        for number in (0, len(weights) - 1):
            weight = weights[number]
            place = (0,) * weight.dim()
            step = 1e-3  # rotary embeddings round to float32
            weight[place] += step
            above = float(magnet(batch).total)
            weight[place] -= 2 * step
            below = float(magnet(batch).total)
            weight[place] += step
            slope = (above - below) / (2 * step)
            assert float(weight.grad[place]) == pytest.approx(slope, rel=2e-2, abs=1e-6)


def test_adapters_on_both_lists() -> None:
    transformer = tiny.flux_transformer()
    names = adapted_modules(transformer, LoraSettings(rank=2))
    assert "transformer_blocks.0.attn.to_out.0" in names
    assert "single_transformer_blocks.1.attn.to_v" in names
    assert len(names) == 2 * 4 + 2 * 3  # single-stream blocks have no output projection of their attention
    stopped = adapted_modules(transformer, LoraSettings(rank=2), stop_after=2)
    assert [name for name in stopped if "single" in name] == [
        "single_transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.attn.to_k",
    ]


@torch.no_grad()
def test_lora_files_go_into_a_stock_pipeline(tmp_path: Path) -> None:
    pipe = tiny.flux_pipeline()
    add_adapters(pipe.transformer, LoraSettings(rank=2))
    generator = torch.Generator().manual_seed(1)
    for name, weight in pipe.transformer.named_parameters():
        if ".lora_" in name:
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    inputs = tiny.flux_inputs()
    expected = pipe.transformer(**inputs).sample
    save_lora(pipe.transformer, tmp_path)
    for load in (load_lora, lambda other, path: other.load_lora_weights(path)):
        other = tiny.flux_pipeline()
        assert not torch.allclose(other.transformer(**inputs).sample, expected, rtol=1e-2)
        load(other, str(tmp_path))
        torch.testing.assert_close(other.transformer(**inputs).sample, expected)


@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    """Encoded, trained, interrupted and resumed to the same bits, with sample images."""
    changes: dict[str, Any] = {"steps": 4, "sample_prompts": ["a red apple"], "evaluate_every": 4}
    whole = runs.settings(tmp_path / "whole", tmp_path / "cache", **changes)
    result = trainer.train(whole, pipe=tiny.flux_pipeline(), progress=False)
    assert result.steps == 4

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    parts = runs.settings(tmp_path / "parts", tmp_path / "cache", **changes)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(parts, pipe=tiny.flux_pipeline(), progress=False, after_step=stop)
    trainer.train(parts, pipe=tiny.flux_pipeline(), progress=False)
    ours, other = (
        load_state(folder / "lora") if (folder / "lora").exists() else load_state(folder)
        for folder in (tmp_path / "whole", tmp_path / "parts")
    )
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    assert any(float(tensor.abs().max()) > 0 for name, tensor in ours.items() if "lora_B" in name)


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = sorted(folder.rglob("pytorch_lora_weights.safetensors"))[:1]
    return load_file(file)


@pytest.mark.slow
def test_memory_of_flux_dev() -> None:
    """11.9 billion weights in bfloat16, and what a step adds to them."""
    config, text, pixels = model_shape("black-forest-labs/FLUX.1-dev")
    settings = build_settings({"memory": {"precision": "bfloat16"}})
    found = estimate_memory(config, settings, text_tokens=text, pixels_per_latent=pixels)
    assert found.parts["weights"] / 2 == pytest.approx(11.9e9, rel=0.01)
    assert 0 < found.peak - found.parts["weights"] < 4 * 2**30
