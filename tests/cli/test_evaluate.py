"""`seg4diff evaluate`, from the words on the command line to files and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seg4diff.cli.main import main
from tests.support import miniature


def words(model: Path, out: Path, *more: str) -> list[str]:
    given = ["evaluate", "--model", str(model), "--layers", "1", "--out", str(out), "--device", "cpu", *more]
    return given if "--dataset" in more else [*given, "--dataset", "scenes"]


def test_several_data_sets_and_protocols(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    miniature.write_voc(root)
    miniature.write_ade20k(root)
    options = [
        "--dataset",
        "voc20",
        "ade150",
        "--data-root",
        str(root),
        "--protocol",
        "oracle",
        "full",
        "--partial",
        "--preset",
        "paper",
    ]
    assert main(words(model, tmp_path / "out", *options, "--save-predictions")) == 0
    printed = capsys.readouterr().out
    assert "Pascal VOC 20" in printed
    assert "89.2" in printed
    assert "images/s" in printed
    table = (tmp_path / "out" / "report.md").read_text()
    assert table.count("| Pascal VOC 20 |") == table.count("| ADE20K-150 |") == 2
    assert "**a part**, 1 of 2000 images" in table
    for name, count in (("voc20", 2), ("ade150", 1)):
        folder = tmp_path / "out" / name
        report = json.loads((folder / "report.json").read_text())
        assert report["images"] == count
        assert report["settings"]["model"] == str(model)
        assert set(report["rates"]) == {"oracle", "full"}
        assert (folder / "contact-sheet.png").is_file()
        assert len(list((folder / "predictions" / "full").iterdir())) == count
    predicted = Image.open(tmp_path / "out" / "voc20" / "predictions" / "oracle" / "2011_003271.png")
    assert predicted.size == (3, 5)
    assert set(np.unique(predicted)) <= {7, 11, 255}  # cat and dog, and what the central square leaves out


def test_layers_may_be_chosen(model: Path, tmp_path: Path) -> None:
    command = [
        "evaluate",
        "--model",
        str(model),
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--layers",
        "auto",
    ]
    assert main([*command, "--dataset", "scenes", "--limit", "1", "--preset", "best"]) == 0
    assert json.loads((tmp_path / "scenes" / "settings.json").read_text())["layers"] == "auto"
    assert "; layers auto;" in (tmp_path / "report.md").read_text()


def test_what_is_missing_is_said_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    miniature.write_voc(tmp_path / "data")
    options = ["--dataset", "voc20", "cityscapes19", "--data-root", str(tmp_path / "data"), "--partial"]
    assert main(words(tmp_path / "no-such-model", tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err
    assert "cityscapes/leftImg8bit/val" in error
    assert "cityscapes-dataset.com" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "voc20"], "'voc20' needs a data root"),
        (["--dataset", "scenes", "scenes"], "one or several different ones"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--names", "nowhere.json"], "neither 'paper' nor 'better' nor a JSON file"),
        (["--lora", "nowhere.safetensors"], "LoRA 'nowhere.safetensors' does not exist"),
        (["--protocol", "oracle", "oracle"], "one or several different ones"),
    ],
)
def test_wrong_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(words(tmp_path / "no-such-model", tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "prepare", "rank-layers"])
def test_data_sets_are_not_overwritten(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Predictions that are the labels, a folder prepared into itself, a image called layers.png."""
    root, predictions = tmp_path / "data", tmp_path / "out" / "folder" / "predictions" / "oracle"
    miniature.write_folder(root, ["cat", "dog"], {"layers": [[0, 1]], "b": [[0, 1]]})
    given = {"evaluate": root / "labels" / "b.png", "prepare": root / "labels" / "b.png"}
    source = given.get(command, next((root / "images").glob("layers.*")))
    before = source.read_bytes()
    options = ["--dataset", "folder", "--data-root", str(root), "--out"]
    if command == "evaluate":
        predictions.parent.mkdir(parents=True)
        predictions.symlink_to(root / "labels")
        model = ["--save-predictions", "--model", str(tmp_path / "no-such-model")]
        assert main(["evaluate", *model, *options, str(tmp_path / "out")]) == 2
    elif command == "prepare":
        assert main(["prepare", *options, str(root)]) == 2
    else:
        source = source.rename(source.with_suffix(".png"))
        model = ["--model", str(tmp_path / "no-such-model")]
        assert main(["rank-layers", *model, *options, str(root / "images")]) == 2
    assert "would replace the input" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_an_unknown_class_in_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "names.json"
    names.write_text('{"appel": ["apple"]}')
    assert main(words(tmp_path / "no-such-model", tmp_path / "out", "--names", str(names))) == 2
    assert "'appel' is not a class of 'scenes'" in capsys.readouterr().err


def test_failures_are_named_and_end_in_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    miniature.write_folder(root, ["cat", "dog"], {"a": [[0, 1]], "b": [[0, 2]]})
    options = ["--dataset", "folder", "--data-root", str(root)]
    assert main(words(model, tmp_path / "out", *options)) == 1
    error = capsys.readouterr().err
    assert "1 of 2 images could not be evaluated" in error
    assert "holds 2, which stands for no class" in error
    report = json.loads((tmp_path / "out" / "folder" / "report.json").read_text())
    assert (report["images"], report["total"], list(report["failures"])) == (1, 2, ["b"])


def test_a_larger_limit_adds_images(model: Path, tmp_path: Path) -> None:

    def figures(folder: str, limit: int) -> tuple[Any, list[str]]:
        assert main(words(model, tmp_path / folder, "--limit", str(limit))) == 0
        report = json.loads((tmp_path / folder / "scenes" / "report.json").read_text())
        lines = (tmp_path / folder / "scenes" / "results-00000.jsonl").read_text().splitlines()
        return report["rates"], lines

    figures("grown", 5)
    rates, lines = figures("grown", 8)  # groups of four: the first stays, the fifth image is evaluated again
    fresh, all_lines = figures("fresh", 8)
    assert rates == fresh
    assert len(lines) == 5 + 4
    assert sorted({*lines} & {*all_lines}) == sorted(all_lines)
    assert figures("grown", 8)[1] == lines  # nothing is left to do


def test_fewer_or_other_images_need_another_folder(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, listed = tmp_path / "data", tmp_path / "listed.txt"
    miniature.write_folder(root, ["cat", "dog"], {"a": [[0, 1]], "b": [[1, 0]], "c": [[0, 0]]})
    options = ["--dataset", "folder", "--data-root", str(root)]
    assert main(words(model, tmp_path / "out", *options, "--limit", "2")) == 0
    assert main(words(model, tmp_path / "out", *options, "--limit", "1")) == 2
    error = capsys.readouterr().err
    assert "items was 2, is 1. Give another folder" in error
    listed.write_text("b\nc\n")
    assert main(words(model, tmp_path / "out", *options, "--images", str(listed))) == 2
    assert "items_sha256 was" in capsys.readouterr().err


def test_a_lora_changes_figures_and_settings(model: Path, lora: Path, tmp_path: Path) -> None:
    options = ["--limit", "2", "--protocol", "full"]
    assert main(words(model, tmp_path / "out", *options)) == 0
    assert (
        main(words(model, tmp_path / "out", *options, "--lora", str(lora))) == 2
    )  # another folder is needed
    assert main(words(model, tmp_path / "other", *options, "--lora", str(lora))) == 0
    plain, adapted = (
        json.loads((tmp_path / name / "scenes" / "report.json").read_text()) for name in ("out", "other")
    )
    assert plain["settings"]["lora"] is None
    assert adapted["settings"]["lora"]["path"] == str(lora)
    assert plain["rates"] != adapted["rates"]
