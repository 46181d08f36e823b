"""Metrics: the figures that the paper's public code gives, and cases small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seg4diff.evaluation.metrics import Counts, confusion_matrix, counts_of, matched_counts

REFERENCE = Path(__file__).parents[1] / "data" / "reference.safetensors"


def test_matched_counts_are_the_reference_figures() -> None:
    figures = load_file(REFERENCE)
    pictures = [
        matched_counts(regions, actual, classes=5)
        for regions, actual in zip(figures["metric.pred"], figures["metric.label"], strict=True)
    ]
    total = pictures[0] + pictures[1]
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
    apart = matched_counts(regions, actual, classes=3, match_apart=False)
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


def test_a_picture_with_nothing_to_count() -> None:
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
    with pytest.raises(ValueError, match="classes, classes"):
        counts_of(torch.zeros(2, 3, dtype=torch.int64))
