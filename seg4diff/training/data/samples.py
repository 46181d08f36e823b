"""What every step trains on, as a function of the seed and the sample's position alone.

Order, prompt, noise, noise level and caption dropout of a sample depend on nothing
that ran before it, so a resumed run sees what the interrupted one would have seen, and two processes with
half the batch see what one process sees.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset

from seg4diff.training.data.cache import Description, EncodedText, Encodings, areas, decode_masks
from seg4diff.training.objective.magnet import Batch
from seg4diff.training.settings import NoiseSettings, TrainSettings

logger = logging.getLogger(__name__)


def split(encodings: Encodings, settings: TrainSettings) -> tuple[list[int], list[int], Counter[str]]:
    """Images to train on, images held out, and how many are of use for neither, by reason.

    An image is held out by a hash of its name: the split does not change when images are added.

    Raises:
        ValueError: nothing is left to train on.
    """
    data = settings.data
    unusable: Counter[str] = Counter()
    ranked = []
    for index, description in enumerate(encodings.descriptions):
        if settings.mask.weight > 0 and not _has_pairs(description, settings):
            if settings.fm_weight == 0:
                unusable["no mask has a name in a caption"] += 1
                continue
            unusable["no mask has a name in a caption (flow matching only)"] += 1
        ranked.append((_hash("held out", description.name) / 2**63, index))
    held_out = sorted(index for share, index in ranked if share < data.held_out)[: data.held_out_limit]
    if not held_out and data.held_out > 0 and len(ranked) > 1:
        held_out = [min(ranked)[1]]
    kept_aside = set(held_out)
    training = [index for _, index in ranked if index not in kept_aside]
    if not training:
        raise ValueError(
            f"no image is left to train on: {len(encodings)} encoded, {len(held_out)} held out, "
            f"{dict(unusable)}; lower data.held_out or check the captions"
        )
    return training, held_out, unusable


class TrainingSamples(Dataset[Batch]):
    """Batches of one by position; positions run over epoch after epoch without end."""

    def __init__(self, encodings: Encodings, indices: Sequence[int], settings: TrainSettings) -> None:
        self._encodings = encodings
        self._indices = list(indices)
        self._settings = settings

    def __getitem__(self, position: int) -> Batch:
        settings = self._settings
        epoch, offset = divmod(position, len(self._indices))
        index = self._indices[_permutation(len(self._indices), settings.seed, epoch)[offset]]
        generator = torch.Generator().manual_seed(_hash("sample", settings.seed, position))
        texts = len(self._encodings.descriptions[index].texts)
        number = int(torch.randint(texts, (1,), generator=generator))
        dropped = bool(torch.rand((), generator=generator) < settings.data.caption_dropout)
        text = self._encodings.empty_text() if dropped else self._encodings.text(index, number)
        return _sample(self._encodings, index, text, settings, generator)


class HeldOutSamples:
    """The held-out images, each with one prompt, noise and noise level that never change."""

    def __init__(self, encodings: Encodings, indices: Sequence[int], settings: TrainSettings) -> None:
        self._encodings = encodings
        self.indices = list(indices)
        self._settings = settings

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Batch:
        index = self.indices[number]
        name = self._encodings.descriptions[index].name
        generator = torch.Generator().manual_seed(_hash("held-out sample", self._settings.seed, name))
        return _sample(self._encodings, index, self._encodings.text(index, 0), self._settings, generator)


def positions(forwards: range, batch: int, *, process: int = 0, processes: int = 1) -> list[list[int]]:
    """Positions of the samples of one process, a list of `batch` for each of its forwards."""
    starts = ((forward * processes + process) * batch for forward in forwards)
    return [list(range(start, start + batch)) for start in starts]


def collate(samples: Sequence[Batch]) -> Batch:
    """One batch from several."""
    return Batch(
        latents=torch.cat([sample.latents for sample in samples]),
        noise=torch.cat([sample.noise for sample in samples]),
        sigma=torch.cat([sample.sigma for sample in samples]),
        text={name: torch.cat([sample.text[name] for sample in samples]) for name in samples[0].text},
        masks=tuple(mask for sample in samples for mask in sample.masks),
        columns=tuple(groups for sample in samples for groups in sample.columns),
        names=tuple(name for sample in samples for name in sample.names),
    )


def draw_sigma(noise: NoiseSettings, generator: torch.Generator) -> Tensor:
    """One noise level [1] in (0, 1): logit-normal, then shifted (Esser et al. 2024, 3.1 and 5.3.2)."""
    sigma = torch.sigmoid(noise.mean + noise.deviation * torch.randn(1, generator=generator))
    return noise.shift * sigma / (1.0 + (noise.shift - 1.0) * sigma)


def _sample(
    encodings: Encodings, index: int, text: EncodedText, settings: TrainSettings, generator: torch.Generator
) -> Batch:
    latents = encodings.latents(index).float()[None]
    sigma = draw_sigma(settings.noise, generator)
    masks, columns = _pairs(encodings.descriptions[index], text, settings)
    return Batch(
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator),
        sigma=sigma,
        text={name: tensor[None] for name, tensor in text.arguments.items()},
        masks=(masks,),
        columns=(columns,),
        names=(encodings.descriptions[index].name,),
    )


def _pairs(
    description: Description, text: EncodedText, settings: TrainSettings
) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """The masks of a sample [M, height, width] and its groups of text columns, see `Batch`."""
    size = description.masks[0]["size"]
    nothing = torch.zeros(0, *size, dtype=torch.uint8), ()
    if settings.mask.weight == 0 or not text.content:
        return nothing
    by_class = settings.mask.pairing == "class"
    usable = [
        (mask, name)
        for mask, name in zip(description.masks, description.classes, strict=True)
        if not by_class or text.classes.get(name)
    ]
    sizes = areas([mask for mask, _ in usable])
    large = [position for position, size in enumerate(sizes) if size >= settings.mask.min_area]
    chosen = sorted(large, key=lambda position: -sizes[position])[: settings.mask.max_masks]
    if not chosen:
        return nothing
    decoded = decode_masks([usable[position][0] for position in chosen])
    if by_class:
        return decoded, tuple(text.classes[usable[position][1]] for position in chosen)
    return decoded, tuple((column,) for column in text.content)


def _has_pairs(description: Description, settings: TrainSettings) -> bool:
    if settings.mask.pairing != "class":
        return any(text["content"] for text in description.texts)
    names = set(description.classes)
    return any(names & set(text["classes"]) for text in description.texts)


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(_hash("order", seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def _hash(*parts: object) -> int:
    """A number in [0, 2**63) that depends on the parts alone, in every process and on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
