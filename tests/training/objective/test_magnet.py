"""The whole loss against an implementation that materialises every attention matrix in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from seg4diff.lora.adapters import add_adapters
from seg4diff.lora.settings import LoraSettings
from seg4diff.training.objective.magnet import Batch, Magnet, gather_columns, normalise
from seg4diff.training.settings import MaskSettings
from tests.support import tiny
from tests.support.materialised import MaterialisedProcessor

TEXT = 9


def map_entries(scores: torch.Tensor, kind: str, tokens: int) -> torch.Tensor:
    """Of [B, H, S, S] scores, the image-to-text entries that the mask loss sees: [B, H, N, T]."""
    if kind == "probability":
        scores = scores.softmax(dim=-1)
    entries = scores[:, :, :tokens, tokens:]
    return entries.softmax(dim=-1) if kind == "text_probability" else entries


def float64_losses(model: Any, batch: Batch, mask: MaskSettings, fm_weight: float) -> torch.Tensor:
    """The total loss, written out once more and without any of the library's code."""
    processors = {layer: MaterialisedProcessor() for layer in mask.layers}
    for layer, processor in processors.items():
        model.transformer_blocks[layer].attn.processor = processor
    sigma = batch.sigma.double().view(-1, 1, 1, 1)
    latents, noise = batch.latents.double(), batch.noise.double()
    velocity = model(
        hidden_states=(1 - sigma) * latents + sigma * noise,
        timestep=1000 * batch.sigma,
        return_dict=False,
        **{name: tensor.double() for name, tensor in batch.text.items()},
    )[0]
    total = fm_weight * ((velocity - (noise - latents)) ** 2).mean()
    grid = (latents.shape[2] // 2, latents.shape[3] // 2)
    for layer in mask.layers:
        scores = processors[layer].scores
        assert scores is not None
        maps = map_entries(scores, mask.scores, grid[0] * grid[1])
        for row in range(len(latents)):
            if len(batch.masks[row]) == 0:
                continue
            heads = maps[row] if mask.pairing == "head" else maps[row].mean(0, keepdim=True)
            candidates = []
            for head in heads:
                for group in batch.columns[row]:
                    entries = torch.stack([head[:, column] for column in group]).mean(0)
                    if mask.normalisation == "minmax":
                        entries = (entries - entries.min()) / (entries.max() - entries.min())
                        entries = mask.sharpness * (entries - 0.5)
                    elif mask.normalisation == "standard":
                        entries = (entries - entries.mean()) / entries.std(correction=0) * mask.sharpness / 4
                    candidates.append(entries.view(1, 1, *grid))
            masks = batch.masks[row].double()
            pairs = [(index, index) for index in range(len(masks))]
            if mask.pairing != "class":
                coarse = F.interpolate(masks[None], size=grid, mode="area")[0]
                cost = [
                    [
                        (0.02 * focal(c.flatten(), t.flatten()) + dice(c.flatten(), t.flatten())).item()
                        for t in coarse
                    ]
                    for c in candidates
                ]
                pairs = list(zip(*linear_sum_assignment(cost), strict=True))
            losses = []
            for candidate, target in pairs:
                x = F.interpolate(candidates[candidate], size=masks.shape[-2:], mode="bilinear").flatten()
                t = masks[target].flatten()
                losses.append(mask.focal_weight * focal(x, t) + mask.dice_weight * dice(x, t))
            share = mask.weight / (len(mask.layers) * len(latents) * len(losses))
            total = total + share * sum(losses)
    return total


def focal(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p = x.sigmoid()
    return -(0.25 * t * (1 - p) ** 2 * p.log() + 0.75 * (1 - t) * p**2 * (1 - p).log()).mean()


def dice(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    p = x.sigmoid()
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def make_batch(batch: int = 2, pairing: str = "class") -> Batch:
    inputs = tiny.transformer_inputs(batch=batch, text=TEXT)
    generator = torch.Generator().manual_seed(3)
    masks, columns = [], []
    for row in range(batch):
        labels = torch.randint(0, 2 + row, (12, 18), generator=generator)
        masks.append(torch.stack([labels == value for value in range(2 + row)]).to(torch.uint8))
        if pairing == "class":
            columns.append((((1, 2), (3,), (5, 6, 7)))[: 2 + row])
        else:
            columns.append(tuple((column,) for column in range(1, 7)))
    return Batch(
        latents=inputs["hidden_states"],
        noise=torch.randn(inputs["hidden_states"].shape, generator=generator),
        sigma=torch.tensor([0.3, 0.7, 0.5, 0.4])[:batch],
        text={
            "encoder_hidden_states": inputs["encoder_hidden_states"],
            "pooled_projections": inputs["pooled_projections"],
        },
        masks=tuple(masks),
        columns=tuple(columns),
    )


def adapted(dtype: torch.dtype, stop_after: int | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny transformer with adapters that are no longer zero, equal for every dtype."""
    model = tiny.transformer(layers=3)
    add_adapters(model, LoraSettings(rank=4), seed=1, stop_after=stop_after)
    generator = torch.Generator().manual_seed(5)
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    for weight in weights.values():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    model.to(dtype)
    return model, weights


CASES = [
    (scores, normalisation, pairing, 1.0)
    for scores in ("logit", "probability", "text_probability")
    for normalisation, pairing in (
        ("minmax", "class"),
        ("none", "class"),
        ("standard", "token"),
        ("minmax", "head"),
    )
] + [
    ("logit", "minmax", "class", 0.0),
    ("probability", "standard", "class", 0.0),
    ("logit", "none", "head", 0.0),
]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize(("scores", "normalisation", "pairing", "fm_weight"), CASES)
def test_gradients_of_the_whole_loss(
    scores: Any, normalisation: Any, pairing: Any, fm_weight: float, checkpointing: bool
) -> None:
    mask = MaskSettings(
        layers=(0, 1),
        scores=scores,
        normalisation=normalisation,
        pairing=pairing,
        weight=0.7,
        focal_weight=2.0,
        dice_weight=0.5,
        sharpness=4.0,
    )
    batch = make_batch(pairing=pairing)
    stop_after = 1 if fm_weight == 0 else None
    model, weights = adapted(torch.float32, stop_after)
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()
    total = Magnet(model, mask, fm_weight=fm_weight)(batch).total
    total.backward()

    expected_model, expected_weights = adapted(torch.float64, stop_after)
    expected = float64_losses(expected_model, batch, mask, fm_weight)
    expected.backward()

    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-7)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        true = expected_weights[name].grad
        assert weight.grad is not None, f"{name} got no gradient"
        assert true is not None
        scale = max(float(true.abs().max()), 1e-6)
        torch.testing.assert_close(weight.grad.double(), true, rtol=1e-3, atol=1e-4 * scale)


def test_float64_throughout() -> None:
    """The library's own path in float64 equals the materialising one to rounding."""
    mask = MaskSettings(layers=(1,), scores="probability", normalisation="minmax")
    batch = make_batch()
    model, weights = adapted(torch.float64)
    batch64 = Batch(
        batch.latents.double(),
        batch.noise.double(),
        batch.sigma.double(),
        batch.text,
        batch.masks,
        batch.columns,
    )
    total = Magnet(model, mask)(batch64).total
    total.backward()
    expected_model, expected_weights = adapted(torch.float64)
    expected = float64_losses(expected_model, batch, mask, 1.0)
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, expected_weights[name].grad, rtol=1e-4, atol=1e-9)


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, weights = adapted(torch.float32)
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        Magnet(model, MaskSettings(layers=(1,)))(make_batch()).total.backward()
        gradients.append([weight.grad for weight in weights.values()])
    for stored, recomputed in zip(*gradients, strict=True):
        assert torch.equal(stored, recomputed)


def counted(forward: Any, number: int, ran: list[int]) -> Any:
    """The forward, which tells when it runs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        ran.append(number)
        return forward(*args, **kwargs)

    return run


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_flow_loss_later_blocks_do_not_run(checkpointing: bool) -> None:
    model, _ = adapted(torch.float32, stop_after=1)
    ran: list[int] = []
    for index, block in enumerate(model.transformer_blocks):
        for module, number in ((block, index), (block.ff, 100 + index)):
            module.forward = counted(module.forward, number, ran)
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()
    losses = Magnet(model, MaskSettings(layers=(1,)), fm_weight=0.0)(make_batch())
    losses.total.backward()
    assert set(ran) == {0, 1, 100}
    assert losses.flow.item() == 0.0


def test_rows_without_masks_add_nothing_and_still_reach_every_parameter() -> None:
    model, weights = adapted(torch.float32)
    magnet = Magnet(model, MaskSettings(layers=(1,), convolutional_head=True))
    batch = make_batch()
    bare = Batch(
        batch.latents, batch.noise, batch.sigma, batch.text, tuple(m[:0] for m in batch.masks), ((), ())
    )
    losses = magnet(bare)
    losses.total.backward()
    assert losses.focal.item() == losses.dice.item() == 0.0
    assert all(w.grad is not None for w in weights.values())
    assert all(w.grad is not None for w in magnet.head.parameters())  # type: ignore[union-attr]


def test_batch_of_two_is_the_mean_of_both() -> None:
    model, _ = adapted(torch.float32)
    magnet = Magnet(model, MaskSettings(layers=(0, 2), pairing="token"))
    batch = make_batch(pairing="token")
    rows = [
        Batch(
            batch.latents[i : i + 1],
            batch.noise[i : i + 1],
            batch.sigma[i : i + 1],
            {name: tensor[i : i + 1] for name, tensor in batch.text.items()},
            batch.masks[i : i + 1],
            batch.columns[i : i + 1],
        )
        for i in range(2)
    ]
    together = magnet(batch).total
    torch.testing.assert_close(together, (magnet(rows[0]).total + magnet(rows[1]).total) / 2)


def test_convolutional_head_begins_as_nothing() -> None:
    model, _ = adapted(torch.float32)
    plain = Magnet(model, MaskSettings(layers=(1,)))(make_batch()).total
    refined = Magnet(model, MaskSettings(layers=(1,), convolutional_head=True))(make_batch()).total
    assert plain.item() == refined.item()


def test_gather_columns_and_normalise() -> None:
    maps = torch.arange(24.0).reshape(2, 4, 3)  # H, N, T'
    gathered = gather_columns(maps, [[0], [1, 2]])
    assert gathered.shape == (4, 4)
    assert torch.equal(gathered[1], maps[0, :, 1:].mean(-1))
    assert torch.equal(gathered[2], maps[1, :, 0])
    assert normalise(gathered, "minmax", sharpness=8.0).aminmax() == (-4.0, 4.0)
    assert normalise(torch.ones(1, 5), "minmax", sharpness=8.0).isfinite().all()
    assert normalise(torch.ones(1, 5), "standard", sharpness=8.0).isfinite().all()
    with pytest.raises(ValueError, match="normalisation='softmax' is unknown"):
        normalise(gathered, "softmax", sharpness=1.0)


def test_adapters_on_chosen_blocks_and_wrong_ones() -> None:
    model = tiny.transformer(layers=3)
    weights = add_adapters(model, LoraSettings(rank=2, blocks=(1,), targets=("to_q",)))
    assert [tuple(w.shape) for w in weights] == [(2, 16), (16, 2)]
    with pytest.raises(ValueError, match="has an adapter 'magnet' already"):
        add_adapters(model, LoraSettings())
    with pytest.raises(ValueError, match="block 7; this model has blocks 0 to 2"):
        add_adapters(tiny.transformer(), LoraSettings(blocks=(7,)))
    with pytest.raises(ValueError, match=r"\['to_x'\] are in no block; a block has to_q"):
        add_adapters(tiny.transformer(), LoraSettings(targets=("to_x",)))
    with pytest.raises(ValueError, match="layer 9 is out of range"):
        Magnet(tiny.transformer(), MaskSettings(layers=(9,)))
    with pytest.raises(ValueError, match="no expert layer is known"):
        Magnet(tiny.transformer(), MaskSettings())
