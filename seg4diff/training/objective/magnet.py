"""MAGNET's training objective: one forward of the transformer, its flow-matching loss and its mask loss.

It hides which maps are captured, how they become mask logits, and which map stands for which mask (Seg4Diff,
section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seg4diff.attention.maps import forward_with_maps
from seg4diff.attention.patch import patch_of
from seg4diff.kernels.types import MapRequest
from seg4diff.training.objective.losses import dice_loss, flow_matching_loss, focal_loss
from seg4diff.training.objective.matching import match
from seg4diff.training.settings import MaskSettings


@dataclass(frozen=True)
class Batch:
    """What one forward trains on.

    Attributes:
        latents: clean latents, [B, C, height, width].
        noise: same shape.
        sigma: noise levels in [0, 1], [B].
        text: the transformer's text arguments by name, first axis B.
        masks: for each row its masks [M, mask height, mask width], values 0 and 1; M may be 0.
        columns: for each row, groups of text columns. With pairing ``"class"`` one group for each mask, else
            one for each candidate; a group's map is the mean over its columns.
        names: names of the images.
    """

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    text: dict[str, Tensor]
    masks: tuple[Tensor, ...]
    columns: tuple[tuple[tuple[int, ...], ...], ...]
    names: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("latents", "noise", "sigma"):
            moved[name] = moved[name].to(device, non_blocking=True)
        moved["text"] = {name: tensor.to(device, non_blocking=True) for name, tensor in self.text.items()}
        moved["masks"] = tuple(mask.to(device, non_blocking=True) for mask in self.masks)
        return Batch(**moved)


class Losses(NamedTuple):
    """Scalars of one forward; ``total`` is what is trained, the parts are not weighted."""

    total: Tensor
    flow: Tensor
    focal: Tensor
    dice: Tensor


class Magnet(nn.Module):
    """The transformer with its adapters, and the loss on it.

    A module of its own, so that data-parallel wrappers see every parameter that a loss depends on, also those
    that only the maps reach.
    """

    def __init__(
        self,
        transformer: nn.Module,
        mask: MaskSettings,
        *,
        fm_weight: float = 1.0,
    ) -> None:
        """Train ``transformer``.

        Args:
            transformer: a transformer of a supported family.
            mask: the mask loss; its empty ``layers`` mean the expert layers.
            fm_weight: weight of the flow-matching loss; with 0 the model stops after the last layer trained.

        Raises:
            ValueError: a layer out of range, or none is known.
        """
        super().__init__()
        self.transformer = transformer
        self.mask = mask
        self.fm_weight = fm_weight
        self.layers = mask_layers(transformer, mask)
        self.head = ConvolutionalHead() if mask.convolutional_head else None

    @property
    def stops_early(self) -> bool:
        """Whether blocks after the last layer trained are left out."""
        return self.fm_weight == 0

    def forward(self, batch: Batch) -> Losses:
        maps, velocity = self._run(batch, stop_early=self.stops_early)
        zero = batch.latents.new_zeros((), dtype=torch.float32)
        flow = zero if velocity is None else flow_matching_loss(velocity, batch.latents, batch.noise)
        focal = dice = zero
        for layer_maps in maps:
            layer_focal, layer_dice = self._mask_losses(layer_maps, self._grid(batch), batch)
            focal = focal + layer_focal / len(maps)
            dice = dice + layer_dice / len(maps)
        mask = self.mask.focal_weight * focal + self.mask.dice_weight * dice
        return Losses(self.fm_weight * flow + self.mask.weight * mask, flow, focal, dice)

    def predict(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Mask logits of each row and the masks they stand for, [M', P] both, from the last layer.

        Rows without masks have none, [0, 1].
        """
        maps, _ = self._run(batch, stop_early=True, always=True)
        return [
            self.predictions(row_maps, self._grid(batch), masks, columns)
            if len(masks) and columns
            else (row_maps.new_zeros(0, 1), row_maps.new_zeros(0, 1))
            for row_maps, masks, columns in zip(maps[-1], batch.masks, batch.columns, strict=True)
        ]

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        """Arguments of the transformer's call on the noisy latents."""
        dtype: torch.dtype = self.transformer.dtype  # type: ignore[assignment]
        noisy = torch.lerp(batch.latents, batch.noise, batch.sigma.view(-1, 1, 1, 1)).to(dtype)
        text = {name: tensor.to(dtype) for name, tensor in batch.text.items()}
        arguments = patch_of(self.transformer).backbone.arguments(self.transformer, noisy, batch.sigma, text)
        return {**arguments, "return_dict": False}

    def _grid(self, batch: Batch) -> tuple[int, int]:
        """Tokens of the image along each axis."""
        patch = patch_of(self.transformer).backbone.patch
        return batch.latents.shape[-2] // patch, batch.latents.shape[-1] // patch

    def _run(
        self, batch: Batch, *, stop_early: bool, always: bool = False
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Maps of the layers that are trained, each [B, (H,) N, T'], and the velocity that is predicted.

        Maps reach up to the last text column that some mask needs; there are none without a mask loss, unless
        ``always`` asks for them. There is no velocity where the forward stops early.
        """
        arguments = self._arguments(batch)
        maps: Sequence[Tensor] = ()
        if self.mask.weight > 0 or always:
            last = max((column for row in batch.columns for group in row for column in group), default=0)
            request = MapRequest(
                kind=self.mask.scores,
                heads="each" if self.mask.pairing == "head" else "mean",
                columns=("text", slice(0, last + 1)),
            )
            maps, output = forward_with_maps(
                self.transformer, self.layers, request, arguments, stop_early=stop_early
            )
        else:
            output = self.transformer(**arguments)
        backbone = patch_of(self.transformer).backbone
        return maps, None if stop_early else backbone.prediction(output[0], batch.latents)

    def _mask_losses(self, maps: Tensor, grid: tuple[int, int], batch: Batch) -> tuple[Tensor, Tensor]:
        """Focal and dice loss of one layer's maps [B, (H,) N, T'], mean over rows; no masks, no loss."""
        focal = dice = maps.new_zeros(())
        used = False
        for row_maps, masks, columns in zip(maps, batch.masks, batch.columns, strict=True):
            if len(masks) == 0 or not columns:
                continue
            used = True
            prediction, target = self.predictions(row_maps, grid, masks, columns)
            focal = focal + focal_loss(prediction, target, preset=self.mask.focal)
            dice = dice + dice_loss(prediction, target)
        if not used:  # every parameter takes part in every step, or data-parallel wrappers wait for it
            focal = focal + 0.0 * maps.sum()
            if self.head is not None:
                focal = focal + 0.0 * sum(weight.sum() for weight in self.head.parameters())
        return focal / len(maps), dice / len(maps)

    def predictions(
        self, maps: Tensor, grid: tuple[int, int], masks: Tensor, columns: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Mask logits [M', P] and the masks [M', P] they stand for, from one row's map [(H,) N, T']."""
        candidates = normalise(
            gather_columns(maps, columns), self.mask.normalisation, sharpness=self.mask.sharpness
        )
        candidates = rearrange(candidates, "k (h w) -> k h w", h=grid[0])
        if self.head is not None:
            candidates = self.head(candidates)
        size = tuple(masks.shape[-2:])
        target = masks.to(candidates.dtype)
        if self.mask.pairing == "class":
            return resize(candidates, size).flatten(1), target.flatten(1)
        # Candidates are many and masks large: they meet on the grid, and only those chosen are enlarged.
        fine = self.mask.focal == "reference"
        # What is NaN makes the loss NaN, which the trainer handles; it must not stop the matching.
        compared = candidates.detach().nan_to_num(posinf=0.0, neginf=0.0)
        compared = resize(compared, size) if fine else compared
        coarse = target if fine else F.interpolate(target[None], size=grid, mode="area")[0]
        rows, columns_ = self._match(compared.flatten(1), coarse.flatten(1))
        rows, columns_ = rows.to(maps.device), columns_.to(maps.device)
        return resize(candidates[rows], size).flatten(1), target[columns_].flatten(1)

    def _match(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`seg4diff.training.objective.matching.match`."""
        return match(
            prediction,
            target,
            preset=self.mask.focal,
            focal_weight=self.mask.match_focal_weight,
            dice_weight=self.mask.match_dice_weight,
        )


class ConvolutionalHead(nn.Module):
    """Three convolutions that refine a map, added to it; begins as the identity.

    The public code trains such a head beside the adapters and throws it away.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )
        last: Any = self.layers[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, maps: Tensor) -> Tensor:
        """[K, height, width] to the same shape."""
        refined: Tensor = maps + self.layers(maps[:, None])[:, 0]
        return refined


def mask_layers(transformer: nn.Module, mask: MaskSettings) -> tuple[int, ...]:
    """The layers whose maps are trained, ascending.

    Raises:
        ValueError: a layer out of range, or none is named and none known for this model.
    """
    return patch_of(transformer).layers_or_experts(mask.layers or None)


def gather_columns(maps: Tensor, columns: Sequence[Sequence[int]]) -> Tensor:
    """Candidate maps [K, N] of one row's map [N, T'] or [H, N, T']: the mean over each group of columns.

    With a head axis K is heads times groups, heads outermost.
    """
    groups = maps.new_zeros(maps.shape[-1], len(columns))
    for position, group in enumerate(columns):
        groups[list(group), position] = 1.0 / len(group)
    return rearrange(maps @ groups, "... n k -> (... k) n")


def normalise(maps: Tensor, how: str, *, sharpness: float) -> Tensor:
    """Mask logits [K, N] from maps [K, N], each normalised over its N places; see ``MaskSettings``."""
    if how == "none":
        return maps
    if how == "minmax":
        low, high = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
        return sharpness * ((maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny) - 0.5)
    if how == "standard":
        centred = maps - maps.mean(dim=1, keepdim=True)
        deviation = centred.square().mean(dim=1, keepdim=True).add(torch.finfo(maps.dtype).tiny).sqrt()
        return sharpness / 4.0 * centred / deviation
    raise ValueError(f"normalisation={how!r} is unknown; accepted: 'none', 'minmax', 'standard'")


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """[K, height, width] to another size, bilinear."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
