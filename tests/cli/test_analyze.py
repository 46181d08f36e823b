"""`seg4diff analyze`."""

from __future__ import annotations

import json
import stat
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import seg4diff
from seg4diff.analysis import AnalysisReport
from seg4diff.cli.main import main


@pytest.mark.extra("viz", "matplotlib")
def test_analyze_prompts_prints_and_writes(
    stand_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n\n")
    words = f"analyze --prompts-file {tmp_path}/prompts.txt --steps 2 --noise-levels 1 2 --projections "
    words += f"--per-head --out {tmp_path}/out --prompts"
    assert main([*words.split(), "a cat"]) == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    figures = [
        f"{name}-{level}.png" for name in ("attention-mass", "projections", "value-norms") for level in (1, 2)
    ]
    assert written == sorted(
        [*figures, "image-000.png", "image-001.png", "report.json", "report.safetensors"]
    )
    generator = [torch.Generator().manual_seed(row) for row in range(2)]
    alone = stand_in(
        "a dog", num_inference_steps=2, guidance_scale=7.5, generator=generator[1:], max_sequence_length=77
    )
    with Image.open(tmp_path / "out" / "image-001.png") as saved:
        assert np.abs(np.asarray(saved, int) - np.asarray(alone.images[0], int)).max() <= 1
    report = AnalysisReport.load(tmp_path / "out" / "report")
    assert report.metadata["prompts"] == ["a cat", "a dog"]
    assert report.by_head is not None
    expected = seg4diff.analyze(stand_in, ["a cat", "a dog"], steps=2, noise_levels=[1, 2])
    torch.testing.assert_close(report.by_layer.image_to_text, expected.by_layer.image_to_text)
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())["by_layer"]
    assert numbers["image_to_text"] == expected.by_layer.image_to_text.tolist()
    assert set(numbers) == {field.name for field in fields(expected.by_layer)}
    printed = capsys.readouterr().out
    assert "1 steps left" in printed
    assert "2 images" in printed


def test_analyze_images(stand_in: Any, image_file: str, tmp_path: Path) -> None:
    words = ["analyze", "--images", image_file, "--prompts", "a cat", "--out", str(tmp_path / "out")]
    assert main([*words, "--noise-levels", "8", "--layers", "1"]) == 0
    report = AnalysisReport.load(tmp_path / "out" / "report")
    assert (report.layers, report.noise_levels, report.grid) == ((1,), (8,), (3, 5))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {stat.S_IMODE(Path(image_file).stat().st_mode)}  # as the umask has it


def test_without_prompts_there_are_no_values_of_a_prompt(
    stand_in: Any, image_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["analyze", "--images", image_file, "--noise-levels", "8", "--layers", "1"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    (row,) = [line.split() for line in printed.splitlines() if line.split()[:1] == ["1"]]
    assert row[-2] == "-"
    assert float(row[-1]) > 0
