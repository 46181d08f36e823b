"""Results on disk: exact after a round trip, and safe where writing was cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seg4diff.evaluation.results import (
    Result,
    Tally,
    add_up,
    append_results,
    failures_of,
    read_results,
)
from seg4diff.metrics import Counts, counts_of, rates_of


def counts(*numbers: tuple[int, int, int]) -> Counts:
    return Counts(*torch.tensor(numbers).T)


def result(index: int, scale: int = 1) -> Result:
    confusion = torch.tensor([[5, 0, 2], [1, 3_000_000_000, 0]]) * scale  # more than 32 bits hold
    return Result(
        index,
        f"folder/picture {index} ü",
        {
            "oracle": Tally(confusion, boundary=counts((1, 2, 3), (0, 0, 0))),
            "unsupervised": Tally(matched=counts((0, 7, 0), (9, 0, 1))),
        },
    )


def test_round_trip() -> None:
    line = result(3).to_line()
    assert "\n" not in line
    again = Result.from_line(line, 2)
    assert (again.index, again.name, again.failure) == (3, "folder/picture 3 ü", None)
    assert again.tallies["oracle"].confusion is not None
    assert again.tallies["oracle"].confusion.to_dense().tolist() == [[5, 0, 2], [1, 3_000_000_000, 0]]
    assert again.to_line() == line
    failed = Result.from_line(Result(1, "b", failure="is damaged").to_line(), 2)
    assert (failed.failure, failed.tallies) == ("is damaged", {})


def test_sums_are_of_all_pictures() -> None:
    total = add_up(
        [result(0), result(1, 2), Result(2, "c"), Result(3, "d", failure="no")], ["oracle", "unsupervised"]
    )
    assert total["oracle"].confusion is not None
    assert total["oracle"].confusion.tolist() == [[15, 0, 6], [3, 9_000_000_000, 0]]
    assert total["oracle"].boundary is not None
    assert total["oracle"].boundary.false_negative.tolist() == [6, 0]
    assert total["unsupervised"].counts.true_positive.tolist() == [0, 18]
    assert total["oracle"].rates == rates_of(
        counts_of(torch.tensor([[15, 0, 6], [3, 9_000_000_000, 0]])), total["oracle"].boundary
    )
    assert add_up([Result(2, "c")], ["oracle"]) == {}


def test_results_of_several_processes_come_together(tmp_path: Path) -> None:
    append_results(tmp_path, 0, [result(0), result(2)])
    append_results(tmp_path, 11, [result(1)])
    append_results(tmp_path, 0, [result(3)])
    found = read_results(tmp_path, 2)
    assert sorted(found) == [0, 1, 2, 3]
    assert found[3].to_line() == result(3).to_line()


@pytest.mark.parametrize(
    "rest", ['{"index":4,"na', '{"index":4,"name":"x"', "\x00\x00", '{"index":4}', "[1]"]
)
def test_a_line_that_was_cut_off_is_left_out_and_not_continued(tmp_path: Path, rest: str) -> None:
    append_results(tmp_path, 0, [result(0)])
    path = tmp_path / "results-00000.jsonl"
    with open(path, "a") as file:
        file.write(rest)
    assert sorted(read_results(tmp_path, 2)) == [0]
    append_results(tmp_path, 0, [result(4)])
    found = read_results(tmp_path, 2)
    assert sorted(found) == [0, 4]
    assert found[4].to_line() == result(4).to_line()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="results-00000"):
        append_results(tmp_path / "nowhere", 0, [result(0)])


def test_a_failure_gives_way_to_a_result(tmp_path: Path) -> None:
    append_results(tmp_path, 0, [Result(0, "a", failure="damaged"), Result(1, "b", failure="damaged")])
    append_results(tmp_path, 1, [result(0)])
    found = read_results(tmp_path, 2)
    assert found[0].failure is None
    assert [failure.name for failure in failures_of(found.values())] == ["b"]


def test_lines_are_json_of_what_was_counted() -> None:
    entry = json.loads(result(0).to_line())
    assert entry["tallies"]["oracle"]["confusion"] == [[0, 0, 5], [0, 2, 2], [1, 0, 1], [1, 1, 3_000_000_000]]
    assert entry["tallies"]["oracle"]["boundary"] == [[0, 1, 2, 3]]


def test_the_larger_group_is_kept_then_the_one_without_failure(tmp_path: Path) -> None:
    failed = Result(0, "a", failure="damaged", group=4)
    for first, second, kept in (
        (Result(0, "a", group=2), Result(0, "a", group=4), 4),
        (Result(0, "a", group=4), Result(0, "a", group=2), 4),
        (failed, Result(0, "a", group=4), 4),
        (Result(0, "a", group=4), failed, 4),
    ):
        (tmp_path / "results-00000.jsonl").write_text(f"{first.to_line()}\n{second.to_line()}\n")
        (found,) = read_results(tmp_path, 2).values()
        assert (found.group, found.failure) == (kept, None)
