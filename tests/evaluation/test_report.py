"""Reports: the figures, what must be known to read them, and which images are shown."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import seg4diff
from seg4diff.data.registry import open_dataset
from seg4diff.evaluation.contact_sheet import choose, write_contact_sheet
from seg4diff.evaluation.evaluator import EvaluationSettings, Evaluator
from seg4diff.evaluation.report import EvaluationReport, markdown, write_report
from seg4diff.evaluation.results import Result
from seg4diff.evaluation.runner import evaluate
from seg4diff.metrics import Counts, Rates
from tests.support import miniature, tiny
from tests.support.images import size_of
from tests.support.painted import CLASSES, LABELS, PerfectMaps, use_maps

RATES = Rates(0.8765, 0.7, 0.9, 0.85, 0.5, (0.8, math.nan))
REPORT = EvaluationReport(
    dataset="voc20",
    title="Pascal VOC 20",
    source="VOCdevkit/VOC2012",
    images=1449,
    total=1449,
    expected=1449,
    empty=0,
    failures={},
    rates={"oracle": RATES, "full": replace(RATES, miou=0.5432, boundary_iou=None)},
    classes=("aeroplane", "bicycle"),
    settings={
        "classes": ["aeroplane", "bicycle"],
        "prompts": [["airplane"], ["bicycle"]],
        "model": "some/model",
        "lora": None,
        "preset": "paper",
        "layers": [9],
        "seed": 0,
    },
    versions={"torch": "2"},
    images_per_second=2.5,
)


def rows(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line[:1] == "|"
    ]


def test_the_papers_figures_stand_beside_ours() -> None:
    head, _, oracle, full = rows(markdown([REPORT]))
    assert dict(zip(head, oracle, strict=True)) == {
        "data set": "Pascal VOC 20", "protocol": "oracle", "images": "1449", "mIoU": "**87.6**",
        "fw IoU": "70.0",
        "pixel acc.": "90.0", "mean acc.": "85.0", "boundary IoU": "50.0", "paper: SD3": "89.2",
        "paper: SD3.5": "86.1", "paper: Flux.1-dev": "83.1", "paper: SD3+MAGNET SA-1B": "89.1",
        "paper: SD3+MAGNET COCO": "89.8",
    }  # fmt: skip
    assert full[3] == "**54.3**"
    assert full[7:] == ["-"] * 6  # nobody published a figure over the whole vocabulary


def test_unsupervised_figures_are_of_the_other_table() -> None:
    unsupervised = replace(REPORT, dataset="coco-stuff27", rates={"unsupervised": RATES})
    assert rows(markdown([unsupervised]))[2][8:] == ["49.7", "47.1", "-", "50.8", "53.5"]


def test_protocols_are_explained_and_settings_named() -> None:
    text = markdown([REPORT])
    assert "*oracle*: only the classes present in each image" in text
    assert "*full*: every class" in text
    assert "unsupervised" not in text
    assert "model some/model; LoRA none; preset paper; layers 9; seed 0" in text
    assert "1 of 2 classes prompted by other names" in text
    assert "2.50 images/s." in text


def test_what_is_left_out_is_said() -> None:
    failures = {f"image{i}": "is damaged" for i in range(12)}
    part = replace(REPORT, images=88, total=100, empty=3, failures=failures)
    text = markdown([part])
    assert rows(text)[2][2] == "88 of 100"
    assert "**a part**, 100 of 1449 images" in text
    assert "3 images have no pixel that counts" in text
    assert "**12 of 100 images could not be evaluated and were excluded: image0 (is damaged); " in text
    assert "and 2 more" in text
    assert "a part" not in markdown([REPORT])


def test_json_holds_everything_and_no_nan(tmp_path: Path) -> None:
    write_report(REPORT, tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    report = json.loads(text)
    assert report["rates"]["oracle"]["iou"] == [0.8, None]
    assert report["rates"]["full"]["miou"] == 0.5432
    assert report["settings"] == REPORT.settings
    assert report["versions"] == {"torch": "2"}
    assert (tmp_path / "report.md").read_text() == markdown([REPORT])


def scored(index: int, hits: int) -> Result:
    counts = Counts(*(torch.tensor([value]) for value in (hits, 0, 100 - hits)))
    return Result(index, f"p{index}", {"oracle": counts})


def test_best_median_and_worst() -> None:
    results = [scored(i, hits) for i, hits in enumerate([10, 90, 50, 70, 30, 20, 80, 60, 40])] + [
        Result(9, "empty")
    ]
    assert choose(results, "oracle", 1) == [("best", 1, 0.9), ("median", 2, 0.5), ("worst", 0, 0.1)]
    assert [index for _, index, _ in choose(results, "oracle", 3)] == [1, 6, 3, 7, 2, 8, 4, 5, 0]
    assert [kind for kind, *_ in choose(results[:2], "oracle", 3)] == ["best", "best"]  # each once
    assert choose([Result(0, "x")], "oracle", 3) == []


def test_contact_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniature.write_folder(tmp_path / "data", CLASSES, LABELS, painted=True)
    dataset = open_dataset("folder", tmp_path / "data")
    pipe: Any = seg4diff.patch(tiny.pipeline())
    settings = EvaluationSettings(("oracle", "full"), preset="paper", layers=(1,))
    use_maps(monkeypatch, PerfectMaps())
    evaluate(pipe, dataset, tmp_path / "out", settings, progress=False)
    path = write_contact_sheet(Evaluator(pipe, dataset, settings), dataset, tmp_path / "out")
    assert path == tmp_path / "out" / "contact-sheet.png"
    width, height = size_of(path)
    assert width > 4 * 192  # image, truth and two predictions
    assert height > 4 * 192 / 2
    assert write_contact_sheet(Evaluator(pipe, dataset, settings), dataset, tmp_path / "empty") is None
