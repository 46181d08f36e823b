"""Instances by outline, by connected components, and by boundaries read from attention, on the demo's scenes.

    OMP_NUM_THREADS=1 python -m benchmarks.instances --out benchmarks/results/instances.md

Labels are those of the preset "best" with the names present. Every method starts from the connected
components of the things' classes and divides them. Settings are chosen on training seeds, by the mean PQ of
touching and clean scenes; figures are of held-out ones.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, label
from scipy.stats import mannwhitneyu

from benchmarks.segmentation_ablation import segmented
from seg4diff.attention.observer import Forward, Observer, attach
from seg4diff.attention.patch import patch_of
from seg4diff.attention.requests import LayerRequest, LayerResult
from seg4diff.demo.scenes import CLASSES, HELD_OUT, SIZE, THINGS, Conditions, Scene, scene
from seg4diff.kernels.api import key_average, row_divergence
from seg4diff.loading import load_pipeline
from seg4diff.metrics import InstanceMatches, match_instances
from seg4diff.segmentation.inputs import Noising, model_inputs, views_of
from seg4diff.segmentation.instances import large_parts, outline_parts
from seg4diff.segmentation.passes import recipe_of
from seg4diff.segmentation.presets import PRESETS

GRID, CELL = 16, 8  # tokens along an axis, pixels of a token
_TOKENS = np.arange(GRID * GRID).reshape(GRID, GRID)
PAIRS = np.concatenate(
    [
        np.stack([_TOKENS[:, :-1].ravel(), _TOKENS[:, 1:].ravel()], axis=1),
        np.stack([_TOKENS[:-1].ravel(), _TOKENS[1:].ravel()], axis=1),
    ]
)
"""Neighbouring tokens, [P, 2]."""

Divide = Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray]
"""A component [height, width] and the boundary strengths of its scene, each [P] -> numbers of its parts."""


@dataclass(frozen=True)
class Case:
    """A scene, what was found in it, and how strong the boundaries of neighbouring tokens are, by name."""

    scene: Scene
    result: Any
    strengths: Mapping[str, np.ndarray]


class _Keeper(Observer):
    results: Mapping[int, LayerResult]

    def after_forward(self, forward: Forward, results: Mapping[int, LayerResult], output: Any) -> None:
        self.results = results


@torch.no_grad()
def cases_of(pipe: Any, first: int, count: int, conditions: Conditions) -> list[Case]:
    """Scenes with boundary strengths of every layer, each divided by its mean over the scene."""
    scenes = [scene(seed, conditions) for seed in range(first, first + count)]
    state, best = patch_of(pipe), PRESETS["best"]
    level = recipe_of(pipe, best).level or state.backbone.noise[1]
    layers, pairs = range(len(state.blocks)), torch.from_numpy(PAIRS)
    strengths: list[dict[str, np.ndarray]] = [{} for _ in scenes]
    for inputs in model_inputs(
        pipe,
        views_of(pipe, [one.image for one in scenes], best.fit),
        [[" ".join(one.classes)] for one in scenes],
        Noising(levels=(level,), batch_size=10),
    ):
        keeper = _Keeper()
        request = LayerRequest(output=True, observe=lambda p: (p.query, key_average(p.query, p.key)[0]))
        with attach(pipe.transformer, layers, request, keeper):
            pipe.transformer(**inputs.arguments)
        for layer, result in keeper.results.items():
            divergence = row_divergence(*result.observed, pairs)
            output = result.output
            assert output is not None
            found = {f"divergence {layer}": divergence.mean(dim=1)}
            found |= {
                f"divergence {layer}, head {head}": divergence[:, head] for head in range(divergence.shape[1])
            }
            found[f"output {layer}"] = (output[:, pairs[:, 0]] - output[:, pairs[:, 1]]).square().sum(dim=-1)
            for name, values in found.items():
                for row, index in enumerate(inputs.images):
                    strengths[index][name] = (values[row] / values[row].mean()).numpy()
    results = segmented(pipe, scenes, best, full=False)
    return [Case(*parts) for parts in zip(scenes, results, strengths, strict=True)]


def undivided(mask: np.ndarray, strengths: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.zeros(mask.shape, np.int64)


def _shares(mask: np.ndarray) -> np.ndarray:
    """Share of each token's pixels in the mask, [N]."""
    return mask.reshape(GRID, CELL, GRID, CELL).mean(axis=(1, 3)).ravel()


def _at_pixels(parts: np.ndarray) -> np.ndarray:
    """Parts of tokens [N], -1 for none, at the pixels: those of the nearest token that has one."""
    centres = np.full((SIZE, SIZE), -1)
    centres[CELL // 2 :: CELL, CELL // 2 :: CELL] = parts.reshape(GRID, GRID)
    nearest = distance_transform_edt(centres < 0, return_distances=False, return_indices=True)
    return centres[tuple(nearest)]


def by_merging(
    mask: np.ndarray, strengths: Mapping[str, np.ndarray], *, name: str, threshold: float, smallest: int = 6
) -> np.ndarray:
    """Tokens merged across the weakest mean boundary, up to a threshold; small regions whatever it is."""
    inside = _shares(mask) > 0.25
    if inside.sum() < 2 * smallest:
        return undivided(mask, strengths)
    both = inside[PAIRS].all(axis=1)
    regions = {token: {token} for token in np.flatnonzero(inside).tolist()}
    sums = {
        frozenset(pair): [value, 1]
        for pair, value in zip(PAIRS[both].tolist(), strengths[name][both].tolist(), strict=True)
    }

    def order(pair: frozenset[int]) -> tuple[bool, float]:
        return min(len(regions[one]) for one in pair) >= smallest, sums[pair][0] / sums[pair][1]

    while sums:
        pair = min(sums, key=order)
        if order(pair) > (True, threshold):
            break
        kept, gone = pair
        regions[kept] |= regions.pop(gone)
        del sums[pair]
        for old in [old for old in sums if gone in old]:
            (other,) = old - {gone}
            value, count = sums.pop(old)
            new = sums.setdefault(frozenset((kept, other)), [0.0, 0])
            new[0], new[1] = new[0] + value, new[1] + count
    parts = np.full(GRID * GRID, -1)
    for number, region in enumerate(regions.values()):
        parts[list(region)] = number
    return _at_pixels(parts)


def by_cuts(
    mask: np.ndarray, strengths: Mapping[str, np.ndarray], *, name: str | None, beta: float, threshold: float
) -> np.ndarray:
    """Normalised cuts (Shi and Malik, 2000) of the tokens, weights exp(-beta strength), and of their parts.

    A part is cut if the value times the root of its area in tokens is below the threshold: that of two equal
    halves does not depend on size.
    """
    shares = _shares(mask)
    weights = np.minimum(shares[PAIRS[:, 0]], shares[PAIRS[:, 1]])
    if name is not None:
        weights = weights * np.exp(-beta * strengths[name])
    graph = np.zeros((GRID * GRID, GRID * GRID))
    graph[PAIRS[:, 0], PAIRS[:, 1]] = weights
    graph += graph.T
    parts, count = np.full(GRID * GRID, -1), itertools.count()

    def cut(tokens: np.ndarray) -> None:
        smallest = max(3, len(tokens) // 10)
        if len(tokens) > 2 * smallest:
            within = graph[np.ix_(tokens, tokens)]
            degree = within.sum(axis=1) + 1e-9
            laplacian = np.eye(len(tokens)) - within / np.sqrt(np.outer(degree, degree))
            order = np.argsort(np.linalg.eigh(laplacian)[1][:, 1] / np.sqrt(degree))
            within, volume = within[np.ix_(order, order)], degree[order].cumsum()
            between = (np.triu(within, 1).sum(axis=1) - np.tril(within, -1).sum(axis=1)).cumsum()
            values = (between / volume + between / (volume[-1] - volume + 1e-9))[smallest - 1 : -smallest]
            if values.min() * np.sqrt(shares[tokens].sum()) < threshold:
                first = smallest + int(values.argmin())
                cut(tokens[order[:first]])
                cut(tokens[order[first:]])
                return
        parts[tokens] = next(count)

    tokens = np.flatnonzero(shares > 0.25)
    if len(tokens) < 6:
        return undivided(mask, strengths)
    cut(tokens)
    return _at_pixels(parts)


def matches_of(case: Case, divide: Divide) -> InstanceMatches:
    """Matches of the things' instances; the score of one is the mean score of its class inside of it."""
    labels, names = case.result.labels.numpy(), case.result.classes
    scores, truth = case.result.pixel_scores().numpy(), case.scene.instances
    found, of_found, how_sure = np.full(labels.shape, -1), [], []
    for index in np.unique(labels).tolist():
        if names[index] not in THINGS:
            continue
        components, count = label(labels == index)
        parts = np.zeros(labels.shape, np.int64)
        for number in range(1, count + 1):
            inside = components == number
            parts[inside] = parts.max() + 1 + divide(inside, case.strengths)[inside]
        parts = large_parts(parts)
        for part in np.unique(parts[parts > 0]):
            found[parts == part] = len(of_found)
            of_found.append(CLASSES.index(names[index]))
            how_sure.append(float(scores[index][parts == part].mean()))
    of_true = [
        CLASSES.index(case.scene.classes[case.scene.labels[truth == number][0]])
        for number in range(truth.max() + 1)
    ]
    return match_instances(
        torch.from_numpy(found),
        torch.tensor(of_found, dtype=torch.long),
        torch.tensor(how_sure),
        torch.from_numpy(truth),
        torch.tensor(of_true),
        len(CLASSES),
    )


def figures(cases: Sequence[Case], divide: Divide) -> tuple[float, float]:
    """AP50 and PQ in %, means over the classes of things."""
    total = matches_of(cases[0], divide)
    for case in cases[1:]:
        total = total + matches_of(case, divide)
    rates = (total.average_precision, total.panoptic_quality)
    ap, pq = (100 * float(rate.nanmean()) for rate in rates)
    return ap, pq


def separation(cases: Sequence[Case], name: str) -> float:
    """Probability that the strength between two things of a class is above that within one (AUC)."""
    within, between = [], []
    for case in cases:
        cells = (
            case.scene.instances.reshape(GRID, CELL, GRID, CELL).transpose(0, 2, 1, 3).reshape(-1, CELL**2)
        )
        labels = case.scene.labels.reshape(GRID, CELL, GRID, CELL).transpose(0, 2, 1, 3).reshape(cells.shape)
        tokens = np.array([np.bincount(cell + 1).argmax() - 1 for cell in cells])
        classes = np.array([np.bincount(cell).argmax() for cell in labels])
        (a, b), strength = tokens[PAIRS].T, case.strengths[name]
        counted = (a >= 0) & (b >= 0) & (classes[PAIRS[:, 0]] == classes[PAIRS[:, 1]])
        within.append(strength[counted & (a == b)])
        between.append(strength[counted & (a != b)])
    return float(mannwhitneyu(np.concatenate(between), np.concatenate(within)).statistic) / (
        sum(map(len, between)) * sum(map(len, within))
    )


def chosen(options: Mapping[str, Divide], tuning: Sequence[Sequence[Case]]) -> tuple[str, Divide]:
    """The settings of the largest PQ, mean over touching and clean scenes."""
    name = max(options, key=lambda key: sum(figures(cases, options[key])[1] for cases in tuning))
    return name, options[name]


def rectangles() -> list[str]:
    """Numbers of parts of rectangles, which are one thing each."""
    lines = ["| | 1 : 1 | 3 : 2 | 2 : 1 | 3 : 1 |", "| --- " * 5 + "|"]
    cuts = partial(by_cuts, name=None, beta=0.0, threshold=0.9)
    methods: dict[str, Divide] = {"outline": lambda mask, _: outline_parts(mask), "normalised cuts": cuts}
    for row, divide in methods.items():
        counts = []
        for ratio in (1.0, 1.5, 2.0, 3.0):
            mask = np.zeros((SIZE, SIZE), bool)
            mask[8 : 8 + round(112 / ratio), 8:120] = True
            counts.append(len(np.unique(divide(mask, {})[mask])))
        lines.append(f"| {row}, value 0.9 | " if divide is cuts else f"| {row} | ")
        lines[-1] += " | ".join(map(str, counts)) + " |"
    return lines


PAGE = """# Instances: outline, components, boundaries

`OMP_NUM_THREADS=1 python -m benchmarks.instances --out benchmarks/results/instances.md`

The demo model on the CPU, labels of the preset `best` with the names present, {count} held-out scenes each:
`touching`, two or three things of one class in contact, and `clean`, where no two things of a class occur and
every division is wrong. AP50 and PQ in %, means over the classes of things; a match has IoU above 0.5; one
run. Settings in brackets have the largest PQ, mean of both kinds of scenes, on {tuning} training scenes each.

{table}

Connected components are what a division starts from. The outline is the smoothed distance to it, divided by a
watershed (`seg4diff.segmentation.instances`), and no output of the model. Row divergences are those of
`seg4diff.kernels.api.row_divergence`, between neighbouring image tokens; outputs are squared distances of
their attention outputs; both at the level of `best`.

Normalised cuts do better than the outline here, but cut what is long: parts of a full rectangle.

{rectangles}

How well a boundary strength separates two neighbouring tokens of two things of one class from two of one
thing (area under the ROC curve, training scenes; 50 is chance):

{separations}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--tuning", type=int, default=40)
    parser.add_argument("--out", type=Path, help="write the tables here, as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_pipeline("demo", "cpu")
    conditions: tuple[Conditions, ...] = ("touching", "clean")
    tuning = [cases_of(pipe, 5_000_000, options.tuning, condition) for condition in conditions]
    held_out = [cases_of(pipe, HELD_OUT, options.scenes, condition) for condition in conditions]
    signals = {name: separation(tuning[0], name) for name in tuning[0][0].strengths}
    strongest = {
        kind: sorted((name for name in signals if name.startswith(kind)), key=lambda name: -signals[name])[:3]
        for kind in ("divergence", "output")
    }
    rows: dict[str, dict[str, Divide]] = {
        "connected components": {"": undivided},
        "**outline** (shipped)": {"": lambda mask, _: outline_parts(mask)},
        "normalised cuts, no boundaries": {
            f"value {value}": partial(by_cuts, name=None, beta=0.0, threshold=value)
            for value in (0.6, 0.7, 0.8, 0.9, 1.0)
        },
    }
    for kind, names in strongest.items():
        rows[f"normalised cuts, {kind}"] = {
            f"{name}, beta {beta}, value {value}": partial(by_cuts, name=name, beta=beta, threshold=value)
            for name, beta, value in itertools.product(names, (0.1, 0.3, 1.0), (0.7, 0.8, 0.9))
        }
        rows[f"merging of tokens, {kind}"] = {
            f"{name}, threshold {value}": partial(by_merging, name=name, threshold=value)
            for name, value in itertools.product(names, (0.3, 0.5, 0.8, 1.2, 2.0))
        }
    table = ["| | touching AP50 | touching PQ | clean AP50 | clean PQ |", "| --- " * 5 + "|"]
    for row, variants in rows.items():
        settings, divide = chosen(variants, tuning)
        cells = [f"{value:.1f}" for cases in held_out for value in figures(cases, divide)]
        table.append(f"| {row}{f' ({settings})' if settings else ''} | {' | '.join(cells)} |")
        print(table[-1], flush=True)
    heads = sorted((name for name in signals if "head" in name), key=lambda name: -signals[name])[:3]
    listed = [*(name for name in signals if "head" not in name), *heads]
    separations = ["| boundary strength, layer | AUC |", "| --- | --- |"]
    separations += [f"| {name} | {100 * signals[name]:.1f} |" for name in listed]
    text = PAGE.format(
        count=options.scenes,
        tuning=options.tuning,
        rectangles="\n".join(rectangles()),
        table="\n".join(table),
        separations="\n".join(separations),
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
