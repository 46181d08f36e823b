"""`seg4diff segment`."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import seg4diff
from seg4diff.cli.main import main
from seg4diff.segmentation.result import Segmentation
from tests.support import tiny
from tests.support.images import size_of


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for the model: the left half is the first class. Collects how many images ran together."""
    from seg4diff import loading

    seen: list[int] = []

    def segment(pipe: Any, images: Any, classes: Any, **_: Any) -> list[Segmentation]:
        seen.append(len(images))
        results = []
        for image in images:
            labels = torch.full((image.height, image.width), len(classes) - 1)
            labels[:, : image.width // 2] = 0
            scores = torch.stack([(labels == index).float() for index in range(len(classes))])
            results.append(Segmentation(labels, scores, tuple(classes), image))
        return results

    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: "pipe")
    monkeypatch.setattr(seg4diff, "segment", segment, raising=False)
    return seen


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and the one line on stderr."""
    code = main(words)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("seg4diff: error: ")
    assert captured.err.count("\n") == 1
    return code, captured.err


def test_segment_writes_labels_and_overlay(
    image_file: str, tmp_path: Path, calls: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["segment", image_file, "--classes", "cat", "red sofa", "--out", str(out)]) == 0
    assert sorted(os.listdir(out)) == ["image-overlay.png", "image.png"]
    labels = np.asarray(Image.open(out / "image.png"))
    assert labels.shape == (48, 80)
    assert (labels[:, :40] == 0).all()
    assert (labels[:, 40:] == 1).all()
    assert "image.png: cat 50%, red sofa 50%" in capsys.readouterr().out


def test_instances_are_written_beside_the_labels(
    image_file: str, tmp_path: Path, calls: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["segment", image_file, "--classes", "cat", "red sofa", "--out", str(tmp_path / "out")]
    code, line = refused([*words, "--instances", "dog"], capsys)
    assert (code, calls) == (2, [])
    assert "--instances 'dog' is not among --classes cat, red sofa" in line
    assert main([*words, "--instances", "red sofa"]) == 0
    written = sorted(os.listdir(tmp_path / "out"))
    assert written == ["image-overlay.png", "image-panoptic.json", "image-panoptic.png", "image.png"]
    document = json.loads((tmp_path / "out" / "image-panoptic.json").read_text(encoding="utf-8"))
    assert document["annotations"][0]["file_name"] == "image-panoptic.png"
    assert [category["isthing"] for category in document["categories"]] == [0, 1]
    ids = np.asarray(Image.open(tmp_path / "out" / "image-panoptic.png"))
    assert (ids[:, :40] == [1, 0, 0]).all()
    assert (ids[:, 40:] == [2, 0, 0]).all()


def test_images_of_one_name_do_not_overwrite_each_other(tmp_path: Path, calls: list[int]) -> None:
    paths = []
    for folder, suffix, width in (("a", "png", 10), ("b", "png", 20), ("b", "bmp", 30)):
        paths.append(tmp_path / folder / f"x.{suffix}")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.new("RGB", (width, 5)).save(paths[-1])
    words = ["segment", *map(str, reversed(paths)), str(paths[0]), "--classes", "a", "b", "--batch-size", "2"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    sizes = {name: size_of(tmp_path / "out" / f"{name}.png")[0] for name in ("x", "x-2", "x-3")}
    assert sizes == {"x": 10, "x-2": 30, "x-3": 20}  # in the order of the paths, however they are given
    assert len(os.listdir(tmp_path / "out")) == 6
    assert calls == [2, 1]


def test_an_overlay_and_labels_of_one_name(tmp_path: Path, calls: list[int]) -> None:
    for name, width in (("a", 10), ("a-overlay", 20), ("A", 30)):
        Image.new("RGB", (width, 5)).save(tmp_path / f"{name}.png")
    words = [str(tmp_path / f"{name}.png") for name in ("a", "a-overlay", "A")]
    assert main(["segment", *words, "--classes", "a", "b", "--out", str(tmp_path / "out")]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "A-overlay.png", "A.png", "a-2-overlay.png", "a-2.png", "a-overlay-2-overlay.png", "a-overlay-2.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "out" / "a-overlay-2.png") as labels:
        assert labels.width == 20


def test_results_never_replace_what_was_read(
    tmp_path: Path, calls: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("photo.png", "photo-overlay.png", "photo.jpg", "weights.png"):
        Image.new("RGB", (10, 5), "red").save(out / name)
    Image.new("RGB", (10, 5)).save(tmp_path / "weights.bmp")
    (tmp_path / "linked.png").symlink_to(out / "photo.png")
    (tmp_path / "photo.png").hardlink_to(out / "photo.png")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    lora = ["--lora", str(out / "weights.png")]
    for words, message in (
        ([str(out / "photo.png")], "photo.png' would replace the input"),
        ([str(out / "photo.jpg"), str(out / "photo-overlay.png")], "photo-overlay.png' would replace"),
        ([str(tmp_path / "photo.png")], "photo.png' would replace"),
        ([str(out / "photo.jpg"), str(tmp_path / "linked.png")], "photo.png' would replace"),
        ([str(tmp_path / "weights.bmp"), *lora], "weights.png' would replace"),
    ):
        code, line = refused(["segment", *words, "--classes", "a", "--out", str(out)], capsys)
        assert code == 2
        assert message in line
        assert "give another --out" in line
    assert calls == []
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_is_written_is_what_the_library_finds(
    image_file: str, model: Path, lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = f"segment {image_file} --classes cat sofa --model {model} --lora {lora} --device cpu --out {out} "
    words += "--preset paper --layers 1 2 --seed 7 --formats npz json"
    assert main(words.split()) == 0
    written = Segmentation.load(out / "image.npz")
    pipe = seg4diff.load_lora(tiny.pipeline(), lora)
    direct = seg4diff.segment(pipe, image_file, ["cat", "sofa"], layers=[1, 2], seed=7, preset="paper")
    assert isinstance(direct, Segmentation)
    torch.testing.assert_close(written.scores, direct.scores)
    assert direct.scores.std() > 0
    assert (written.classes, written.metadata["layers"]) == (("cat", "sofa"), [1, 2])
    assert json.loads((out / "image.json").read_text())["categories"][1]["name"] == "sofa"


def test_a_comma_in_a_name(
    image_file: str, tmp_path: Path, calls: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["segment", image_file, "--out", str(tmp_path / "out"), "--classes"]
    with caplog.at_level(logging.WARNING, "seg4diff"):
        assert main([*words, "plum, red lava", "grass"]) == 0
    message = "--classes 'plum, red lava' is one name with a comma; for several names: plum \"red lava\""
    assert [record.getMessage() for record in caplog.records] == [message]
