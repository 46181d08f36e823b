"""`seg4diff prepare`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from seg4diff.cli.main import main
from tests.support import miniature


def test_counts_and_writes_a_folder_that_reads_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from seg4diff.data.registry import open_dataset

    root = tmp_path / "data"
    miniature.write_cityscapes(root)
    out = tmp_path / "plain"
    assert (
        main(
            ["prepare", "--dataset", "cityscapes19", "--data-root", str(root), "--out", str(out), "--partial"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    # 2 pictures of 12 pixels, 4 of which do not count; the road has one in each
    assert any(
        line.split()[1:6:2] == ["road", "2", "8.33"] for line in printed.splitlines() if "road" in line
    )
    assert "33.33" in printed
    official, plain = open_dataset("cityscapes19", root, partial=True), open_dataset("folder", out)
    assert plain.classes == official.classes
    for one, other in zip(official.items, plain.items, strict=True):
        assert one.name == other.name
        assert np.array_equal(one.labels(), other.labels())
        assert one.image().tobytes() == other.image().tobytes()


def test_names_what_is_at_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    miniature.write_folder(tmp_path, ["cat"], {"a": [[0]], "b": [[7]]})
    assert main(["prepare", "--dataset", "folder", "--data-root", str(tmp_path)]) == 1
    assert "1 of 2 images could not be evaluated" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "labels")
    assert main(["prepare", "--dataset", "folder", "--data-root", str(tmp_path)]) == 2
