"""`seg4diff regions`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import seg4diff
from seg4diff.cli.main import main


def test_regions_writes_labels_and_overlay(
    stand_in: Any, image_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["regions", image_file, "--out", str(out), "--threshold", "1e-4", "--formats", "png", "npz"]
    assert main(words) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "image-overlay.png",
        "image.npz",
        "image.png",
    ]
    expected = seg4diff.segment_unsupervised(stand_in, Image.open(image_file), threshold=1e-4)
    assert isinstance(expected, seg4diff.Segmentation)
    assert np.array_equal(np.asarray(Image.open(out / "image.png")), expected.labels.numpy())
    assert f"image.png: {len(expected.classes)} region" in capsys.readouterr().out


def test_a_number_of_regions_and_layers_that_are_chosen(
    stand_in: Any, image_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["regions", image_file, "--out", str(out), "--regions", "3", "--layers", "auto"]) == 0
    expected = seg4diff.segment_unsupervised(stand_in, Image.open(image_file), regions=3, layers="auto")
    assert isinstance(expected, seg4diff.Segmentation)
    assert np.array_equal(np.asarray(Image.open(out / "image.png")), expected.labels.numpy())
    assert len(expected.classes) == 3
    assert main(["regions", image_file, "--out", str(out), "--regions", "0"]) == 2
    assert "--regions 0 must be at least 1" in capsys.readouterr().err
