"""Metrics: the figures that the paper's public code gives, and cases small enough to count by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.ndimage import binary_erosion

from seg4diff.metrics import (
    Counts,
    InstanceMatches,
    boundary_counts,
    confusion_matrix,
    counts_of,
    match_instances,
    matched_counts,
    rates_of,
)
from tests.support.paths import REFERENCE


def test_matched_counts_are_the_reference_figures() -> None:
    figures = load_file(REFERENCE)
    images = [
        matched_counts(regions, actual, classes=5)
        for regions, actual in zip(figures["metric.pred"], figures["metric.label"], strict=True)
    ]
    total = images[0] + images[1]
    assert total.true_positive.tolist() == figures["metric.tp"].tolist()
    assert total.false_positive.tolist() == figures["metric.fp"].tolist()
    assert total.false_negative.tolist() == figures["metric.fn"].tolist()
    assert int((total.true_positive + total.false_negative).sum()) == figures["metric.pixels"].item()


def test_regions_are_matched_whatever_their_numbers() -> None:
    actual = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]])
    assert matched_counts(torch.tensor([[3, 3, 0, 0], [3, 3, 0, 7]]), actual, classes=2).mean_iou == 1.0


def test_classes_without_region_and_regions_without_class() -> None:
    actual = torch.tensor([[0, 0, 0, 1, 1, 2]])
    one_region = matched_counts(torch.zeros(1, 6, dtype=torch.int64), actual, classes=3)
    assert one_region.true_positive.tolist() == [3, 0, 0]
    assert one_region.false_positive.tolist() == [3, 0, 0]
    assert one_region.false_negative.tolist() == [0, 2, 1]
    many = matched_counts(torch.tensor([[0, 1, 1, 2, 3, 4]]), actual, classes=3)
    assert many.true_positive.tolist() == [2, 1, 1]
    assert many.false_positive.tolist() == [0, 0, 0]
    assert many.false_negative.tolist() == [1, 1, 0]


def test_regions_left_over_may_go_to_classes_they_do_not_touch() -> None:
    actual = torch.tensor([0, 0, 0, 0])  # of 3 classes
    regions = torch.tensor([0, 0, 0, 1])
    assert matched_counts(regions, actual, classes=3).false_positive.sum() == 1
    apart = matched_counts(regions, actual, classes=3, match_disjoint=False)
    assert apart.false_positive.tolist() == [0, 0, 0]
    assert apart.true_positive.tolist() == [3, 0, 0]
    assert apart.false_negative.tolist() == [1, 0, 0]


def test_matching_maximises_the_whole_overlap() -> None:
    # class 0 overlaps most with region 0, but giving it region 1 leaves region 0 to class 1
    actual = torch.tensor([0] * 9 + [1] * 8)
    regions = torch.tensor([0] * 5 + [1] * 4 + [0] * 8)
    assert matched_counts(regions, actual, classes=2).true_positive.tolist() == [4, 8]


def test_rates_are_taken_over_the_data_set() -> None:
    small = Counts(*(torch.tensor([n, 0]) for n in (1, 0, 0)))
    large = Counts(*(torch.tensor([n, 0]) for n in (1, 3, 5)))
    assert (small + large).iou[0] == 2 / 10
    assert (small + large).iou[1].isnan()
    assert (small + large).mean_iou == pytest.approx(0.2)  # the class that never occurs does not count


def test_confusion_matrix_counts_rows_by_class() -> None:
    actual = torch.tensor([[0, 1, 255], [1, 2, 1]], dtype=torch.int32)
    predicted = torch.tensor([[0, 2, 2], [1, 2, 2]], dtype=torch.uint8)
    confusion = confusion_matrix(predicted, actual, 3)
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == [[1, 0, 0], [0, 1, 2], [0, 0, 1]]
    counts = counts_of(confusion)
    assert counts.false_positive.tolist() == [0, 0, 2]
    assert counts.false_negative.tolist() == [0, 2, 0]
    assert counts.iou.tolist() == pytest.approx([1, 1 / 3, 1 / 3])


def test_a_image_with_nothing_to_count() -> None:
    nothing = torch.full((2, 2), 255)
    counts = matched_counts(torch.zeros(2, 2, dtype=torch.int64), nothing, classes=2)
    assert counts.true_positive.tolist() == counts.false_negative.tolist() == [0, 0]
    assert torch.tensor(counts.mean_iou).isnan()


@pytest.mark.parametrize(
    ("predicted", "actual", "message"),
    [
        (torch.tensor([0, 3]), torch.tensor([0, 1]), "predicted holds labels from 0 to 3; accepted: 0 to 1"),
        (torch.tensor([0, 1]), torch.tensor([0, 2]), "actual holds labels from 0 to 2"),
        (torch.tensor([0, -1]), torch.tensor([0, 1]), "predicted holds labels from -1"),
        (torch.tensor([0]), torch.tensor([0, 1]), "bring them to one size"),
    ],
    ids=["label", "class", "negative", "shape"],
)
def test_bad_input_is_named(predicted: torch.Tensor, actual: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confusion_matrix(predicted, actual, 2)


def test_labels_are_integers() -> None:
    with pytest.raises(TypeError, match="float32"):
        confusion_matrix(torch.zeros(2), torch.zeros(2, dtype=torch.int64), 2)


def random_labels(classes: int, shape: tuple[int, ...], seed: int, void: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < void] = 255
    return labels


@pytest.mark.extra("eval", "torchmetrics")
def test_rates_are_those_of_torchmetrics() -> None:
    """On the same predictions: images of several sizes, void pixels, a class that does not occur."""
    from torchmetrics import classification

    classes = 7
    shapes = [(31, 17), (8, 40), (23, 23)]
    actual = [random_labels(classes - 1, shape, seed, void=0.2) for seed, shape in enumerate(shapes)]
    guesses = [random_labels(classes - 1, shape, 10 + seed) for seed, shape in enumerate(shapes)]
    predicted = [
        torch.where(random_labels(3, labels.shape, 20 + i) == 0, guess, labels.clamp(max=classes - 2))
        for i, (labels, guess) in enumerate(zip(actual, guesses, strict=True))
    ]
    arguments = {"num_classes": classes, "ignore_index": 255}
    library = {
        "miou": classification.MulticlassJaccardIndex(average="macro", **arguments),
        "frequency_weighted_iou": classification.MulticlassJaccardIndex(average="weighted", **arguments),
        "pixel_accuracy": classification.MulticlassAccuracy(average="micro", **arguments),
        "mean_accuracy": classification.MulticlassAccuracy(average="macro", **arguments),
    }
    per_class = classification.MulticlassJaccardIndex(average="none", **arguments)
    matrix_of_library = classification.MulticlassConfusionMatrix(**arguments)
    total = torch.zeros(classes, classes, dtype=torch.int64)
    for found, labels in zip(predicted, actual, strict=True):
        total += confusion_matrix(found, labels, classes)
        for metric in (*library.values(), per_class, matrix_of_library):
            metric.update(found.flatten(), labels.flatten())
    assert torch.equal(total, matrix_of_library.compute())
    rates = rates_of(counts_of(total))
    for name, metric in library.items():
        assert getattr(rates, name) == pytest.approx(float(metric.compute()), abs=1e-6), name
    assert list(rates.iou[:-1]) == pytest.approx(per_class.compute()[:-1].tolist(), abs=1e-6)
    assert math.isnan(rates.iou[-1])
    assert 0.4 < rates.miou < 0.9  # neither all right nor all wrong


def test_rates_counted_by_hand() -> None:
    confusion = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    rates = rates_of(counts_of(confusion))
    assert rates.iou[:2] == (6 / 9, 3 / 6)
    assert rates.miou == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert rates.frequency_weighted_iou == pytest.approx(8 / 12 * 6 / 9 + 4 / 12 * 3 / 6)
    assert rates.pixel_accuracy == pytest.approx(9 / 12)
    assert rates.mean_accuracy == pytest.approx((6 / 8 + 3 / 4) / 2)
    assert rates.boundary_iou is None


def test_labels_that_are_no_class_are_misses_and_nothing_else() -> None:
    actual = torch.tensor([0, 0, 1, 1, 255])
    predicted = torch.tensor([0, 2, 2, 1, 2])
    counts = counts_of(confusion_matrix(predicted, actual, 2, predictions=3))
    assert counts.true_positive.tolist() == [1, 1]
    assert counts.false_positive.tolist() == [0, 0]
    assert counts.false_negative.tolist() == [1, 1]
    square = confusion_matrix(predicted.clamp(max=1), actual, 2)
    assert counts_of(square).false_positive.tolist() == [0, 1]
    with pytest.raises(ValueError, match="at least as many labels"):
        counts_of(torch.zeros(3, 2, dtype=torch.int64))


def eroded_boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """Boundary zone of one mask as Boundary IoU defines it: what erosion takes away."""
    if not mask.any():
        return mask
    square = np.ones((3, 3), bool)
    return mask & ~binary_erosion(mask, square, iterations=distance, border_value=0)


@pytest.mark.parametrize(("height", "width"), [(60, 90), (7, 5), (1, 30)])
def test_boundary_counts_are_those_of_eroded_masks(height: int, width: int) -> None:
    blocks = random_labels(4, (-(-height // 10), -(-width // 10)), seed=3)
    actual = blocks.repeat_interleave(10, 0).repeat_interleave(10, 1)[:height, :width].clone()
    predicted = actual.roll((2, 3), (0, 1))
    counts = boundary_counts(predicted, actual, 4)
    distance = max(1, round(0.02 * math.hypot(height, width)))
    for label in range(4):
        found = eroded_boundary(predicted.numpy() == label, distance)
        truth = eroded_boundary(actual.numpy() == label, distance)
        assert counts.true_positive[label] == (found & truth).sum()
        assert counts.false_positive[label] == (found & ~truth).sum()
        assert counts.false_negative[label] == (truth & ~found).sum()


def test_boundary_iou_is_stricter_than_iou_and_one_for_the_truth() -> None:
    actual = torch.zeros(100, 100, dtype=torch.int64)
    actual[20:80, 20:80] = 1
    actual[18:20, 18:82] = 255  # a void border above, as Pascal has it
    shifted = torch.zeros_like(actual)
    shifted[22:82, 22:82] = 1
    moved = rates_of(counts_of(confusion_matrix(shifted, actual, 2)), boundary_counts(shifted, actual, 2))
    assert moved.boundary_iou is not None
    assert moved.boundary_iou < 0.6 < 0.8 < moved.miou
    below_void = actual.clone()
    below_void[actual == 255] = torch.randint(0, 2, (int((actual == 255).sum()),))
    assert boundary_counts(below_void, actual, 2).mean_iou == 1.0
    assert boundary_counts(torch.full_like(actual, 2), actual, 2).mean_iou == 0.0  # no class at all
    with pytest.raises(ValueError, match="the same"):
        boundary_counts(actual[:50], actual, 2)


def test_instances_by_hand() -> None:
    """Two classes: IoU 3/4 and a false instance of class 0; of class 1 an IoU of exactly 1/2, no match."""
    true = torch.tensor([[0, 0, 0, 0, 1, 1, -1, -1], [2, 2, 2, 2, 2, 2, 2, 2]])
    found = torch.tensor([[0, 0, 0, -1, 1, -1, -1, 2], [3, 3, 3, 3, 3, 3, 3, 3]])
    classes = torch.tensor([0, 1, 0, 0]), torch.tensor([0, 1, 1])
    matches = match_instances(found, classes[0], torch.tensor([0.5, 0.9, 0.8, 0.7]), true, classes[1], 3)
    assert matches.iou.tolist() == [0.75, 0, 0, 0]  # the row below is one segment, but of another class
    assert matches.truth.tolist() == [1, 2, 0]
    # class 0: ranked miss, miss, hit: precision 1/3 at every recall; PQ 0.75 / (1 + 2 / 2)
    assert matches.average_precision.tolist()[:2] == pytest.approx([1 / 3, 0])
    assert matches.panoptic_quality.tolist()[:2] == pytest.approx([0.75 / 2, 0])
    assert matches.average_precision[2].isnan()
    assert matches.panoptic_quality[2].isnan()
    twice = matches + matches
    assert twice.panoptic_quality.tolist()[:2] == pytest.approx([0.375, 0])
    assert twice.truth.tolist() == [2, 4, 0]


def test_no_instance_found_or_none_there() -> None:
    none, some = torch.full((2, 3), -1), torch.zeros(2, 3, dtype=torch.int64)
    empty, one = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    missed = match_instances(none, empty, torch.zeros(0), some, one, 1)
    assert (float(missed.average_precision[0]), float(missed.panoptic_quality[0])) == (0, 0)
    invented = match_instances(some, one, torch.ones(1), none, empty, 1)
    assert (math.isnan(invented.average_precision[0]), float(invented.panoptic_quality[0])) == (True, 0)


def test_ap50_is_that_of_coco(capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools import mask as run_lengths
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    annotations, results, total = [], [], None
    for image in range(12):
        true = np.repeat(np.repeat(rng.integers(-1, 6, (5, 5)), 8, 0), 8, 1)
        shift = tuple(rng.integers(-2, 3, 2))
        found = np.where(rng.random((40, 40)) < 0.1, -1, np.roll(true, shift, (0, 1)))
        parts = [np.unique(one, return_inverse=True) for one in (found, true)]
        found, true = (inverse.reshape(40, 40) - (values[0] == -1) for values, inverse in parts)
        of_true = rng.integers(0, 2, true.max() + 1)
        of_found = np.resize(np.where(rng.random(len(of_true)) < 0.8, of_true, 1 - of_true), found.max() + 1)
        scores = rng.permutation(1000)[: len(of_found)] + image / 100
        for maps, of_map, into in ((true, of_true, annotations), (found, of_found, results)):
            for number, index in enumerate(of_map):
                mask = run_lengths.encode(np.asfortranarray((maps == number).astype(np.uint8)))
                into.append({"id": len(into) + 1, "image_id": image, "category_id": int(index), "iscrowd": 0})
                into[-1] |= {
                    "segmentation": mask,
                    "area": float(run_lengths.area(mask)),
                    "bbox": [0, 0, 1, 1],
                }
                if into is results:
                    into[-1]["score"] = float(scores[number])
        tensors = (torch.from_numpy(part) for part in (found, of_found, scores, true, of_true))
        matches = match_instances(*tensors, 2)
        total = matches if total is None else total + matches
    coco, detections = COCO(), COCO()
    for one, content in ((coco, annotations), (detections, results)):
        images = [{"id": image, "height": 40, "width": 40} for image in range(12)]
        one.dataset = {"images": images, "categories": [{"id": 0}, {"id": 1}], "annotations": content}
        one.createIndex()
    evaluation = COCOeval(coco, detections, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    expected = evaluation.eval["precision"][0, :, :, 0, 2].mean(axis=0)
    assert isinstance(total, InstanceMatches)
    assert 0.1 < expected.min() < expected.max() < 0.9
    assert total.average_precision.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
