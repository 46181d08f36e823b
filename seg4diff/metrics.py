"""Segmentation metrics: intersection over union, of named classes and of nameless regions.

Everything is counted in pixels, in int64, over a whole data set; rates are taken once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import maximum_filter, minimum_filter
from scipy.optimize import linear_sum_assignment
from torch import Tensor

IGNORED = 255
"""Label of pixels that do not count, in every data set of the papers."""


@dataclass(frozen=True, eq=False)
class Counts:
    """Pixels of each class, summed over any number of images (`+` adds).

    Attributes:
        true_positive: pixels of the class that were found, int64 [classes].
        false_positive: pixels of other classes that were given to it, int64 [classes].
        false_negative: pixels of the class that were given to another or to none, int64 [classes].
    """

    true_positive: Tensor
    false_positive: Tensor
    false_negative: Tensor

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.true_positive + other.true_positive,
            self.false_positive + other.false_positive,
            self.false_negative + other.false_negative,
        )

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, float64 [classes]; NaN where no pixel is counted at all."""
        union = self.true_positive + self.false_positive + self.false_negative
        return self.true_positive.double() / union.double()

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that have one; NaN if none has."""
        return float(self.iou.nanmean())


def confusion_matrix(
    predicted: Tensor, actual: Tensor, classes: int, *, predictions: int | None = None, ignored: int = IGNORED
) -> Tensor:
    """How many pixels of each class were given each label.

    Args:
        predicted: label of every pixel, any integer dtype and shape, in [0, `predictions`).
        actual: class of every pixel, same shape, in [0, `classes`) or `ignored`.
        classes: number of classes.
        predictions: number of labels a prediction may have; `classes` when None.
        ignored: pixels of this class do not count, whatever was predicted there.

    Returns:
        int64 [classes, predictions] on the CPU; entry (c, p) counts pixels of class c that are labelled p.

    Raises:
        ValueError: shapes differ or a value is out of range.
        TypeError: a tensor does not hold integers.
    """
    columns = classes if predictions is None else predictions
    for name, tensor in (("predicted", predicted), ("actual", actual)):
        if tensor.is_floating_point() or tensor.is_complex():
            raise TypeError(f"{name} has dtype {tensor.dtype}; labels are integers")
    if predicted.shape != actual.shape:
        raise ValueError(
            f"predicted has shape {list(predicted.shape)}, but actual has {list(actual.shape)}; "
            "bring them to one size first"
        )
    actual = actual.detach().cpu().long()
    counted = actual != ignored
    rows, labels = actual[counted], predicted.detach().cpu().long()[counted]
    for name, values, count in (("actual", rows, classes), ("predicted", labels, columns)):
        if values.numel() and not (int(values.min()) >= 0 and int(values.max()) < count):
            raise ValueError(
                f"{name} holds labels from {int(values.min())} to {int(values.max())}; "
                f"accepted: 0 to {count - 1}" + (f", and {ignored} for ignored" if name == "actual" else "")
            )
    return torch.bincount(rows * columns + labels, minlength=classes * columns).reshape(classes, columns)


def counts_of(confusion: Tensor) -> Counts:
    """Counts from a confusion matrix [classes, labels], where label c means class c, and labels from
    `classes` on mean no class.

    A pixel with such a label is a false negative of its class and a false positive of none.

    Raises:
        ValueError: there are fewer labels than classes.
    """
    classes, labels = confusion.shape
    if labels < classes:
        raise ValueError(
            f"confusion has shape {list(confusion.shape)}; at least as many labels as classes expected"
        )
    true_positive = confusion.diagonal()
    return Counts(
        true_positive, confusion.sum(dim=0)[:classes] - true_positive, confusion.sum(dim=1) - true_positive
    )


def matched_counts(
    regions: Tensor, actual: Tensor, classes: int, *, ignored: int = IGNORED, match_disjoint: bool = True
) -> Counts:
    """Counts of one image's nameless regions, matched one to one with its classes by largest overlap.

    The assignment (Hungarian method) maximises the number of pixels in matched pairs. Pixels of a class
    without region, or outside its region, are false negatives; a region without class is not a false positive
    of any. Sum the counts of all images before taking rates (Seg4Diff A.4, and as its public code counts).

    Args:
        regions: region of every pixel, integers >= 0, [height, width].
        actual, classes, ignored: as in `confusion_matrix`.
        match_disjoint: whether a region may be matched with a class that it has no pixel in common with, as
            the assignment of the public code does where regions are left over: its pixels are then false
            positives of an arbitrary class. False leaves both unmatched.

    Raises:
        ValueError, TypeError: as `confusion_matrix`.
    """
    count = int(regions.max()) + 1 if regions.numel() else 1
    confusion = confusion_matrix(regions, actual, classes, predictions=max(count, 1), ignored=ignored)
    rows, columns = (
        torch.from_numpy(side) for side in linear_sum_assignment(confusion.numpy(), maximize=True)
    )
    if not match_disjoint:
        touching = confusion[rows, columns] > 0
        rows, columns = rows[touching], columns[touching]
    true_positive = torch.zeros(classes, dtype=torch.int64)
    false_positive = torch.zeros(classes, dtype=torch.int64)
    true_positive[rows] = confusion[rows, columns]
    false_positive[rows] = confusion.sum(dim=0)[columns] - confusion[rows, columns]
    return Counts(true_positive, false_positive, confusion.sum(dim=1) - true_positive)


@dataclass(frozen=True)
class Rates:
    """Rates computed from counts; all in [0, 1], NaN where nothing was counted.

    Attributes:
        miou: mean over classes of intersection over union; classes that neither occur nor are predicted do
            not count.
        frequency_weighted_iou: the same, weighted by the pixels of each class.
        pixel_accuracy: share of pixels that got their class.
        mean_accuracy: mean over the classes that occur of the share of their pixels that got it.
        boundary_iou: mean over classes as `miou`, of pixels near boundaries alone; None if not counted.
        iou: of each class.
    """

    miou: float
    frequency_weighted_iou: float
    pixel_accuracy: float
    mean_accuracy: float
    boundary_iou: float | None
    iou: tuple[float, ...]


def rates_of(counts: Counts, boundary: Counts | None = None) -> Rates:
    """Rates of a whole data set from its summed counts, and from those near boundaries if there are any."""
    occurs = counts.true_positive + counts.false_negative
    total = occurs.sum().double()
    iou = counts.iou
    return Rates(
        miou=counts.mean_iou,
        frequency_weighted_iou=float((iou.nan_to_num() * occurs).sum() / total),
        pixel_accuracy=float(counts.true_positive.sum() / total),
        mean_accuracy=float((counts.true_positive.double() / occurs.double()).nanmean()),
        boundary_iou=None if boundary is None else boundary.mean_iou,
        iou=tuple(iou.tolist()),
    )


def boundary_counts(
    predicted: Tensor, actual: Tensor, classes: int, *, ignored: int = IGNORED, ratio: float = 0.02
) -> Counts:
    """Counts of one image's pixels near boundaries (Boundary IoU, Cheng et al., CVPR 2021, for label maps).

    A pixel is near a boundary of its label if a square of side 2 d + 1 around it holds another label or
    leaves the image; d is `ratio` of the diagonal, in whole pixels, at least 1. Intersection and union
    are of such pixels of the prediction with such pixels of the truth. Pixels that do not count are made one
    label of their own in both maps beforehand, so that a perfect prediction scores 1 whatever lies below
    them.

    Args:
        predicted, actual, classes, ignored: as in `confusion_matrix`, [height, width]; labels of
            `predicted` from `classes` on stand for no class.
        ratio: width of the zone as a share of the diagonal.

    Raises:
        ValueError: shapes differ or are not [height, width].
    """
    if predicted.shape != actual.shape or actual.dim() != 2:
        raise ValueError(
            f"predicted has shape {list(predicted.shape)} and actual {list(actual.shape)}: the same "
            "[height, width] expected"
        )
    truth = actual.detach().cpu().numpy().astype(np.int32)
    void = truth == ignored
    found = np.where(void, ignored, predicted.detach().cpu().numpy().astype(np.int32))
    distance = max(1, round(ratio * float(np.hypot(*truth.shape))))
    in_truth, in_found = (_near_boundary(labels, distance) & ~void for labels in (truth, found))

    def per_class(labels: np.ndarray) -> Tensor:
        inside = labels[labels < classes]
        return torch.from_numpy(np.bincount(inside, minlength=classes)).long()

    hits = per_class(truth[in_truth & in_found & (truth == found)])
    return Counts(hits, per_class(found[in_found]) - hits, per_class(truth[in_truth]) - hits)


def _near_boundary(labels: np.ndarray, distance: int) -> np.ndarray:
    """Whether another label, or the edge of the image, lies within `distance` pixels along both axes."""
    size = 2 * distance + 1
    lowest = minimum_filter(labels, size, mode="constant", cval=-1)
    highest = maximum_filter(labels, size, mode="constant", cval=-1)
    near: np.ndarray = lowest != highest
    return near


@dataclass(frozen=True, eq=False)
class InstanceMatches:
    """Instances that were found and those that are there, of any number of images (`+` adds).

    Instances of one image share no pixel, so at most one found and one true instance of a class overlap by
    more than a half of their union. These are matched.

    Attributes:
        classes: class of each found instance, int64 [found].
        scores: how surely each was found, float64 [found].
        iou: intersection over union of each with its match, above 0.5; 0 without match. float64 [found].
        truth: number of true instances of each class, int64 [classes].
    """

    classes: Tensor
    scores: Tensor
    iou: Tensor
    truth: Tensor

    def __add__(self, other: InstanceMatches) -> InstanceMatches:
        return InstanceMatches(
            torch.cat([self.classes, other.classes]),
            torch.cat([self.scores, other.scores]),
            torch.cat([self.iou, other.iou]),
            self.truth + other.truth,
        )

    @property
    def average_precision(self) -> Tensor:
        """AP50 of each class as COCO takes it, float64 [classes]; NaN where no instance is there.

        The mean over 101 recalls, 0, 0.01, ..., 1, of the largest precision at that recall or above, found
        instances ranked by their scores over all images.
        """
        rates = torch.full((len(self.truth),), torch.nan, dtype=torch.float64)
        recalls = torch.linspace(0, 1, 101, dtype=torch.float64)
        for index in self.truth.nonzero().flatten().tolist():
            chosen = self.classes == index
            order = self.scores[chosen].argsort(descending=True, stable=True)
            hits = (self.iou[chosen][order] > 0).cumsum(0).double()
            precision = hits / torch.arange(1, len(hits) + 1)
            envelope = precision.flip(0).cummax(0).values.flip(0)
            reached = torch.searchsorted(hits / self.truth[index], recalls)
            rates[index] = F.pad(envelope, (0, 1))[reached].mean()
        return rates

    @property
    def panoptic_quality(self) -> Tensor:
        """Panoptic quality of each class (Kirillov et al., CVPR 2019), float64 [classes].

        The sum of the IoU of all matches, divided by their number plus half that of all instances without
        match, found or true. NaN where none is found and none is there.
        """
        count = len(self.truth)
        found = torch.bincount(self.classes, minlength=count)
        total = torch.zeros(count, dtype=torch.float64).index_add_(0, self.classes, self.iou)
        return total / ((found + self.truth).double() / 2)


def match_instances(
    found: Tensor, found_classes: Tensor, scores: Tensor, true: Tensor, true_classes: Tensor, classes: int
) -> InstanceMatches:
    """Matches of one image's instances with the true ones of the same class.

    Args:
        found: the instance of every pixel, [height, width], an index into `found_classes`; -1 for none.
        found_classes: class of each found instance, int64 [found], in [0, `classes`).
        scores: how surely each was found, [found].
        true: the true instance of every pixel, as `found`.
        true_classes: class of each true instance, int64 [true].
        classes: number of classes.

    Raises:
        ValueError: shapes differ or a value is out of range.
        TypeError: a map does not hold integers.
    """
    rows, columns = len(true_classes), len(found_classes)
    overlap = confusion_matrix(
        torch.where(found < 0, columns, found),
        torch.where(true < 0, rows, true),
        rows + 1,
        predictions=columns + 1,
        ignored=-1,
    )
    union = overlap.sum(dim=1, keepdim=True) + overlap.sum(dim=0) - overlap
    iou = (overlap / union.double())[:rows, :columns]
    iou = iou.where((iou > 0.5) & (true_classes[:, None] == found_classes), 0.0)
    return InstanceMatches(
        classes=found_classes,
        scores=scores.double(),
        iou=iou.amax(dim=0) if rows else iou.new_zeros(columns),
        truth=torch.bincount(true_classes, minlength=classes),
    )
