"""MAGNET on families whose texts differ in length: the loss by hand, LoRA files, a run, memory."""

from __future__ import annotations

from dataclasses import dataclass
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
from tests.support.families import FAMILIES, cast, exact_maps


@dataclass(frozen=True)
class Trained:
    """A family, and the published model whose configuration is known."""

    case: str
    pipeline: Any
    model: str
    layers: str  # name of the number of blocks in its configuration
    weights: float


CASES = (
    Trained("qwen", tiny.qwen_pipeline, "Qwen/Qwen-Image", "num_layers", 20.4e9),
    Trained("z-image", tiny.z_image_pipeline, "Tongyi-MAI/Z-Image-Turbo", "n_layers", 6.15e9),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.case)


def texts(pipe: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = find_backbone(pipe).encode_text(pipe, ["a red cat", "tree"])
    return cast(found, torch.float64)


@every_case
def test_loss_by_hand(case: Trained) -> None:
    """From the stock model's own queries and keys, and the velocity that its pipeline would follow."""
    pipe = case.pipeline()
    transformer = pipe.transformer.double()
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 8, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    batch = Batch(
        latents=latents,
        noise=noise,
        sigma=torch.tensor([0.25, 0.75], dtype=torch.float64),
        text=texts(pipe),
        masks=tuple((torch.rand(2, 16, 24, generator=generator) < 0.4).to(torch.uint8) for _ in range(2)),
        columns=(((1, 2), (3,)), ((0,), (1, 2))),
    )
    mask = MaskSettings(layers=(1,), scores="probability")
    losses = {n: float(loss.detach()) for n, loss in Magnet(transformer, mask)(batch)._asdict().items()}
    backbone = find_backbone(transformer)
    noisy = torch.lerp(latents, noise, batch.sigma.view(-1, 1, 1, 1))
    arguments = backbone.arguments(transformer, noisy, batch.sigma, batch.text)
    call = backbone.read_call(transformer, arguments)
    family = next(family for family in FAMILIES if family.name == case.case)
    text = slice(0, 512) if call.layout.text_first else slice(32, call.layout.tokens)
    image = slice(512, 536) if call.layout.text_first else slice(0, 24)
    here = type(family)(**{**vars(family), "image": image, "text": text, "tokens": call.layout.tokens})
    maps = exact_maps(here, transformer, arguments)[1].mean(1)  # [B, N, T]
    with torch.no_grad():
        output = transformer(**arguments, return_dict=False)[0]
    velocity = backbone.prediction(output, latents)
    assert losses["flow"] == pytest.approx(float(F.mse_loss(velocity, noise - latents)), rel=1e-6)
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


@every_case
@torch.no_grad()
def test_lora_files_go_into_a_stock_pipeline(case: Trained, tmp_path: Path) -> None:
    pipe = case.pipeline()
    names = adapted_modules(pipe.transformer, LoraSettings(rank=2))
    assert len(names) == 3 * 4  # three layers; no block of image or text alone
    assert {name.rpartition("to_")[2] for name in names} == {"q", "k", "v", "out.0"}
    stopped = adapted_modules(pipe.transformer, LoraSettings(rank=2), stop_after=1)
    assert sorted(name.rpartition(".")[2] for name in stopped if ".1." in name) == ["to_k", "to_q"]
    add_adapters(pipe.transformer, LoraSettings(rank=2))
    generator = torch.Generator().manual_seed(1)
    for name, weight in pipe.transformer.named_parameters():
        if ".lora_" in name:
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    inputs = next(family for family in FAMILIES if family.name == case.case).inputs()
    expected = pipe.transformer(**inputs).sample[0]
    save_lora(pipe.transformer, tmp_path)
    for load in (load_lora, lambda other, path: other.load_lora_weights(path)):
        other = case.pipeline()
        assert not torch.allclose(other.transformer(**inputs).sample[0], expected, rtol=1e-2)
        load(other, str(tmp_path))
        torch.testing.assert_close(other.transformer(**inputs).sample[0], expected)


@pytest.mark.slow
@every_case
def test_a_run(case: Trained, tmp_path: Path) -> None:
    """Encoded and trained."""
    settings = runs.settings(tmp_path / "run", tmp_path / "cache", steps=2, mask={"layers": [1]})
    pipe = case.pipeline()
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    assert trainer.train(settings, pipe=pipe, progress=False).steps == 2
    after = pipe.transformer.state_dict()
    assert any(float(w.abs().max()) > 0 for name, w in after.items() if "lora_B" in name)
    kept = {name.replace(".base_layer", ""): weight for name, weight in after.items() if ".lora_" not in name}
    assert all(torch.equal(kept[name], weight) for name, weight in before.items())


@pytest.mark.slow
@every_case
def test_memory_of_the_published_model(case: Trained) -> None:
    config, text, pixels = model_shape(case.model)
    assert (text, pixels) == (512, 8)
    changes: dict[str, Any] = {"memory": {"precision": "bfloat16"}, "mask": {"layers": [1]}}
    found = estimate_memory(config, build_settings(changes), text_tokens=text, pixels_per_latent=pixels)
    assert found.parts["weights"] / 2 == pytest.approx(case.weights, rel=0.01)
    assert found.peak > found.parts["weights"]
