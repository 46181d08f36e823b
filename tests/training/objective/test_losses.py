"""Focal and dice loss and the matching: the reference figures, gradients, and wrong input."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from seg4diff.training.objective.losses import dice_loss, flow_matching_loss, focal_loss
from seg4diff.training.objective.matching import mask_costs, match
from tests.support.paths import REFERENCE


@pytest.fixture(scope="module")
def figures() -> dict[str, torch.Tensor]:
    return load_file(REFERENCE)


def test_losses_of_the_public_code(figures: dict[str, torch.Tensor]) -> None:
    prediction, target = figures["loss.pred"], figures["loss.target"]
    focal = focal_loss(prediction, target, preset="reference")
    torch.testing.assert_close(focal.reshape(1), figures["loss.focal_reference"], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        dice_loss(prediction, target).reshape(1), figures["loss.dice_reference"], rtol=1e-6, atol=0
    )


def test_matching_of_the_public_code(figures: dict[str, torch.Tensor]) -> None:
    prediction, target = figures["match.pred"], figures["match.target"]
    focal, dice = mask_costs(prediction, target, preset="reference")
    torch.testing.assert_close(focal, figures["match.cost_focal"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dice, figures["match.cost_dice"], rtol=1e-6, atol=1e-7)
    rows, columns = match(prediction, target, preset="reference")
    assert torch.equal(rows, figures["match.rows"])
    assert torch.equal(columns, figures["match.cols"])


def test_focal_loss_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    masks = (torch.rand(3, 50, generator=generator) < 0.3).double()
    total = 0.0
    for x, t in zip(logits.flatten().tolist(), masks.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        p_t, alpha_t = (p, 0.25) if t == 1 else (1 - p, 0.75)
        total += -alpha_t * (1 - p_t) ** 2 * math.log(p_t)
    torch.testing.assert_close(focal_loss(logits, masks).item(), total / logits.numel())


@pytest.mark.parametrize("preset", ["default", "reference"])
def test_costs_are_the_losses_of_every_pair(preset: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 40, generator=generator)
    masks = (torch.rand(3, 40, generator=generator) < 0.5).float()
    focal, dice = mask_costs(logits, masks, preset=preset)  # type: ignore[arg-type]
    for k in range(4):
        for m in range(3):
            pair = logits[k : k + 1], masks[m : m + 1]
            torch.testing.assert_close(focal[k, m], focal_loss(*pair, preset=preset))  # type: ignore[arg-type]
            torch.testing.assert_close(dice[k, m], dice_loss(*pair))


@pytest.mark.parametrize("preset", ["default", "reference"])
def test_gradients(preset: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    masks = (torch.rand(2, 7, generator=generator) < 0.5).double()
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, masks, preset=preset), logits)  # type: ignore[arg-type]
    assert torch.autograd.gradcheck(lambda x: dice_loss(x, masks), logits)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[-1e4, 1e4, 0.0, 50.0]], requires_grad=True)
    masks = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    (focal_loss(logits, masks) + dice_loss(logits, masks)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_half_precision_is_widened() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    masks = torch.zeros(2, 30, dtype=torch.uint8)
    assert focal_loss(logits, masks).dtype == torch.float32
    assert dice_loss(logits, masks).dtype == torch.float32
    assert focal_loss(logits.double(), masks).dtype == torch.float64


def test_match_finds_the_masks_it_was_made_from() -> None:
    masks = torch.eye(4).repeat_interleave(5, dim=1)
    order = torch.tensor([2, 0, 3, 1])
    noise = torch.full((1, 20), -3.0)
    rows, columns = match(torch.cat([noise, 6 * masks[order] - 3]), masks)
    assert torch.equal(rows, torch.tensor([1, 2, 3, 4]))
    assert torch.equal(columns, order)


def test_match_with_fewer_candidates_than_masks() -> None:
    masks = torch.eye(4).repeat_interleave(5, dim=1)
    rows, columns = match(6 * masks[[3, 1]] - 3, masks)
    assert torch.equal(rows, torch.tensor([0, 1]))
    assert torch.equal(columns, torch.tensor([3, 1]))


def test_flow_matching_loss() -> None:
    latents, noise = torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
    assert flow_matching_loss(noise.bfloat16(), latents, noise).item() == 0.0
    assert flow_matching_loss(latents, latents, 2 * noise).item() == 4.0


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(3, 5), "one prediction a mask"),
        (torch.zeros(2, 5), torch.zeros(2, 6), "5 pixels, but target has 6"),
        (torch.zeros(0, 5), torch.zeros(0, 5), r"prediction has shape \[0, 5\]"),
        (torch.zeros(5), torch.zeros(5), r"expected \[masks, pixels\]"),
    ],
)
def test_wrong_shapes(prediction: torch.Tensor, target: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        focal_loss(prediction, target)
    with pytest.raises(ValueError, match=message):
        dice_loss(prediction, target)


def test_unknown_preset_and_nan() -> None:
    with pytest.raises(ValueError, match="preset='paper' is unknown; accepted: 'default', 'reference'"):
        focal_loss(torch.zeros(1, 2), torch.zeros(1, 2), preset="paper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 of 2 candidate maps hold NaN"):
        match(torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]), torch.ones(1, 2))


def test_losses_import_without_the_heavy_packages() -> None:
    import subprocess
    import sys

    program = (
        "import sys; import seg4diff.training.objective.losses, seg4diff.training.objective.matching; "
        "print(sorted({'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
