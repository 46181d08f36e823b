"""MAGNET on the bundled model, one short seed: what it does, and that the saved file holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from seg4diff.demo import HELD_OUT, scene
from seg4diff.loading import load_pipeline
from seg4diff.lora.files import FILE_NAME
from seg4diff.training import demo
from seg4diff.training.demo import Demonstration, show, zero_shot

pytestmark = pytest.mark.slow  # a training, shared by the tests

SCENES = 12


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demonstration, str, Path]:
    console = Console(record=True, width=120)
    out = tmp_path_factory.mktemp("demonstration")
    changes: dict[str, Any] = {
        "steps": 40,
        "batch": 4,
        "evaluate_every": 0,
        "mask": {"layers": [4], "weight": 1.0},
        "optimizer": {"learning_rate": 3e-3},
        "data": {"scenes": 100, "held_out_limit": 4},
    }
    return (
        show(out, changes=changes, scenes=SCENES, console=console, progress=False),
        console.export_text(),
        out,
    )


def test_the_tuned_layer_finds_names_better(shown: tuple[Demonstration, str, Path]) -> None:
    report, text, _ = shown
    assert report.layer == 4
    assert report.layer != report.expert
    assert report.after.zero_shot[4] > report.before.zero_shot[4] + 0.1
    assert report.after.zero_shot[report.expert] > report.before.zero_shot[report.expert] - 0.05
    assert report.after.hard[4] > report.before.hard[4] + 0.05
    assert 0.3 < report.before.hard[report.expert] < report.before.zero_shot[report.expert] - 0.02
    assert report.after.flow < 1.3 * report.before.flow
    for words in (
        "zero-shot mIoU %, layer 4 (tuned)",
        "(expert)",
        "on hard scenes",
        "matched unsupervised",
        "flow-matching loss",
    ):
        assert words in text


def test_the_saved_adapters_give_the_same_in_a_fresh_pipeline(shown: tuple[Demonstration, str, Path]) -> None:
    report, _, out = shown
    drawn = [scene(HELD_OUT + number) for number in range(SCENES)]
    pipe = load_pipeline("demo", "cpu")
    pipe.load_lora_weights(str(out), weight_name=FILE_NAME)  # stock diffusers
    assert zero_shot(pipe, drawn, [4]) == {4: report.after.zero_shot[4]}


def test_the_layer_to_tune_comes_after_the_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_CHOICE_SCENES", 4)
    pipe = load_pipeline("demo", "cpu")
    (expert,) = pipe.transformer.config["_seg4diff_expert_layers"]
    assert demo.layer_to_tune(pipe) > expert
