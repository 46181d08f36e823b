"""Results of images: exact after a round trip through a job's folder, and summed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seg4diff.evaluation.results import Result, add_up, latest, read_results
from seg4diff.jobs import claim
from seg4diff.metrics import Counts


def counts(*numbers: tuple[int, int, int]) -> Counts:
    return Counts(*torch.tensor(numbers).T)


def result(index: int, scale: int = 1) -> Result:
    return Result(
        index,
        f"folder/image {index} ü",
        {
            "oracle": counts((5, 1, 2), (0, 0, 0), (3_000_000_000 * scale, 0, 1)),  # more than 32 bits hold
            "unsupervised": counts((0, 7, 0), (9 * scale, 0, 1), (0, 0, 0)),
        },
        {"oracle": counts((1, 2, 3), (0, 0, 0), (0, 0, 0))},
        group=4,
    )


def test_round_trip(tmp_path: Path) -> None:
    entry = result(3).to_entry()
    assert entry["counts"]["oracle"] == [[0, 5, 1, 2], [2, 3_000_000_000, 0, 1]]
    assert entry["boundary"] == {"oracle": [[0, 1, 2, 3]]}
    with claim(tmp_path, {}) as job:
        job.append(
            [entry, Result(1, "b", failure="is damaged").to_entry(), Result(2, "c", group=1).to_entry()]
        )
    found = read_results(tmp_path, classes=3)
    assert list(found) == [1, 2, 3]
    again = found[3]
    assert (again.name, again.failure, again.group) == ("folder/image 3 ü", None, 4)
    assert again.to_entry() == entry
    assert again.counts["oracle"].true_positive.tolist() == [5, 0, 3_000_000_000]
    assert (found[1].failure, found[1].counts, found[1].group) == ("is damaged", {}, 0)
    assert (found[2].failure, found[2].counts, found[2].group) == (None, {}, 1)


def test_sums_are_of_all_images() -> None:
    several = [result(0), result(1, 2), Result(2, "c"), Result(3, "d", failure="no")]
    total = add_up(result.counts for result in several)
    assert total["oracle"].true_positive.tolist() == [10, 0, 9_000_000_000]
    assert total["oracle"].false_negative.tolist() == [4, 0, 2]
    assert total["unsupervised"].false_positive.tolist() == [14, 0, 0]
    assert add_up(result.boundary for result in several)["oracle"].false_positive.tolist() == [4, 0, 0]
    assert add_up([Result(2, "c").counts]) == {}


@pytest.mark.parametrize("swapped", [False, True])
def test_the_largest_group_counts_and_a_failure_least(swapped: bool) -> None:
    small, large, failed = Result(0, "a", group=2), Result(0, "a", group=4), Result(0, "a", failure="damaged")
    for first, second, kept in ((small, large, large), (failed, small, small), (large, failed, large)):
        order = (second, first) if swapped else (first, second)
        assert latest(order) == {0: kept}


def test_of_equal_results_the_last_counts() -> None:
    first, second = Result(0, "a", failure="gone"), Result(0, "a", failure="damaged")
    assert latest([first, second]) == {0: second}
