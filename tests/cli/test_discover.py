"""`seg4diff discover`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import seg4diff
from seg4diff.cli.main import main
from seg4diff.data import captioning


def test_discover_writes_what_is_found(
    stand_in: Any, image_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, out = tmp_path / "names.txt", tmp_path / "out"
    names.write_text("cat\nred sofa\nzebra\n")
    options = ["--out", str(out), "--vocabulary", str(names), "--cache", str(tmp_path / "texts")]
    assert (
        main(["discover", image_file, *options, "--formats", "npz", "--preset", "best", "--seed", "3"]) == 0
    )
    expected = seg4diff.discover(
        stand_in, Image.open(image_file), ["cat", "red sofa", "zebra"], preset="best", seed=3
    )
    found = seg4diff.Segmentation.load(out / "image.npz")
    assert found.classes == expected.classes
    assert np.array_equal(found.labels, expected.labels)
    assert found.metadata["forwards"] == {"coarse": 0, "fine": 2}
    assert (out / "image-overlay.png").exists()
    assert list((tmp_path / "texts").iterdir())
    assert "(2 forwards)" in capsys.readouterr().out


def test_a_captioner_is_loaded_by_name(
    stand_in: Any, image_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    class Stub:
        def __init__(self, model: str, device: str | None) -> None:
            loaded.append(model)

        def __call__(self, images: Sequence[Image.Image]) -> list[str]:
            return ["two cats"] * len(images)

    monkeypatch.setattr(captioning, "Captioner", Stub)
    words = ["discover", image_file, "--out", str(tmp_path), "--captioner", "some/model", "--formats", "npz"]
    assert main(words) == 0
    result = seg4diff.Segmentation.load(tmp_path / "image.npz")
    assert (loaded, result.classes) == (["some/model"], ("cat",))
    assert result.metadata["caption"] == "two cats"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "auto"], "--layers auto is not for discover; give numbers"),
        (["--vocabulary", "absent.txt"], "vocabulary='absent.txt' is neither 'coco'"),
    ],
)
def test_bad_options(
    options: list[str], message: str, stand_in: Any, image_file: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["discover", image_file, "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
