"""`seg4diff clip-score`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from seg4diff.cli.main import main
from seg4diff.evaluation import clip_score
from tests.support import tiny


@pytest.mark.extra("eval", "torchmetrics")
def test_with_and_without_a_lora(
    model: Path,
    lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = clip_score._tensor_clip
    asked: list[Any] = []
    monkeypatch.setattr(clip_score, "_tensor_clip", lambda clip: asked.append(clip) or load(tiny.clip))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na dog\n")
    options = [
        "--prompts",
        str(prompts),
        "--lora",
        str(lora),
        "--steps",
        "2",
        "--layout",
        "compbench",
    ]
    options += ["--seeds", "0", "1", "--clip-models", "some/clip", "--device", "cpu"]
    arguments = ["clip-score", "--model", str(model), "--out", str(tmp_path / "out"), *options]
    assert main(arguments) == 0
    assert asked == ["some/clip", "some/clip"]
    names = [
        f"{prompt}_{number:06d}.png"
        for number, prompt in enumerate(["a red cat", "a red cat", "a dog", "a dog"])
    ]
    for arm in ("base", "lora"):
        assert sorted(path.name for path in (tmp_path / "out" / arm / "samples").iterdir()) == sorted(names)
    before, after = ((tmp_path / "out" / arm / "samples" / names[0]).read_bytes() for arm in ("base", "lora"))
    assert before != after
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["clip_score"]) == {"base", "lora"}
    assert report["clip_score"]["base"] != report["clip_score"]["lora"]
    assert report["versions"]["torch"] == torch.__version__
    assert "| lora |" in (tmp_path / "out" / "report.md").read_text()
    assert "some/clip" in capsys.readouterr().out
