"""Which names of a vocabulary an image shows: prompts packed, names pruned, regions named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from seg4diff.backbones.text import TextSpan
from seg4diff.segmentation.grouping import cluster_tokens
from seg4diff.segmentation.presets import Clustering
from seg4diff.segmentation.prompts import PlannedPrompt, plan_prompts
from seg4diff.segmentation.scores import log_scores

PRUNED = 0.1
"""Presence among a whole vocabulary below which a name is dropped. The least of a name that was there, in 24
clean and hard training scenes of the demo model with up to 318 names, was 0.39."""

REGIONS = Clustering(threshold=2.5)
"""Parts of an image that get a name; fine, since parts of one name become one."""

_IRREGULAR = {"men": "man", "women": "woman", "children": "child", "people": "person"}


def pack_prompts(names: Sequence[str], span: TextSpan) -> tuple[tuple[PlannedPrompt, ...], list[int]]:
    """Spread names over few prompts, in any order: the longest first, each into the first prompt with room.

    A vocabulary with many names of one token needs no more than ceil(tokens / room) prompts so.

    Args:
        names: the names.
        span: the text encoder whose tokens are read.

    Returns:
        The prompts, and for the names in the order of the prompts their positions in `names`.

    Raises:
        ValueError: as `seg4diff.segmentation.prompts.plan_prompts`.
    """
    lengths = [span.token_count(name) for name in names]
    groups: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(range(len(names)), key=lambda index: -lengths[index]):
        place = next((n for n, room in enumerate(rooms) if lengths[index] <= room), len(groups))
        if place == len(groups):
            groups.append([])
            rooms.append(span.room)
        groups[place].append(index)
        rooms[place] -= lengths[index]
    plans = [plan_prompts([names[index] for index in group], span) for group in groups]
    return tuple(prompt for plan in plans for prompt in plan), [index for group in groups for index in group]


def prune(presence: Tensor, lengths: Sequence[int], room: int) -> list[int]:
    """The names that are worth a closer look: those of the largest presence that fit one prompt.

    Args:
        presence: of every name, [names].
        lengths: tokens of every name.
        room: tokens of a prompt.

    Returns:
        Their positions, ascending: at least one, and but for it none below `PRUNED`.
    """
    kept: list[int] = []
    for index in presence.argsort(descending=True, stable=True).tolist():
        if kept and (float(presence[index]) < PRUNED or lengths[index] > room):
            break
        kept.append(index)
        room -= lengths[index]
    return sorted(kept)


def name_regions(scores: Tensor, outputs: Tensor, present: Tensor) -> list[int]:
    """The names of the regions of an image, each once.

    Regions are clusters of image tokens with like attention outputs. A region has the name of the largest
    mean logarithm of the scores, among those that are present.

    Args:
        scores: of image tokens, [names, h, w].
        outputs: attention outputs of the image tokens, [h, w, C].
        present: bool [names], at least one of them true.

    Returns:
        Positions of names, ascending.
    """
    grid = (scores.shape[1], scores.shape[2])
    regions = cluster_tokens(outputs.flatten(0, 1)[None], grid=grid, clustering=REGIONS).flatten(1)
    means = (log_scores(scores).flatten(1) @ regions.T) / regions.sum(dim=1)
    names = means.masked_fill(~present[:, None], -torch.inf).argmax(dim=0)
    return sorted(set(names.tolist()))


def names_in(caption: str, vocabulary: Sequence[str]) -> list[str]:
    """The names of a vocabulary that a caption mentions, in the order of the vocabulary.

    Case does not matter. Of several names that begin at a word the longest counts, and plurals count as
    their singular: "two hot dogs" is "hot dog", and neither "dog" nor "hot".
    """
    known = {tuple(_words(name)): name for name in reversed(vocabulary)}
    longest = max(map(len, known), default=0)
    words = _words(caption)
    found: set[str] = set()
    first = 0
    while first < len(words):
        taken = 1
        for count in range(min(longest, len(words) - first), 0, -1):
            *before, last = words[first : first + count]
            match = next((known[key] for form in _forms(last) if (key := (*before, form)) in known), None)
            if match is not None:
                found.add(match)
                taken = count
                break
        first += taken
    return [name for name in vocabulary if name in found]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _forms(word: str) -> Iterator[str]:
    """A word, and what it may be the plural of."""
    yield word
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
    for ending, singular in (("ies", "y"), ("ves", "f"), ("es", ""), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            yield word.removesuffix(ending) + singular
