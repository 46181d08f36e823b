"""`seg4diff rank-layers`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import seg4diff
from seg4diff.cli.main import main


def test_measures_layers_on_labelled_images(
    stand_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from seg4diff.demo import HELD_OUT, scene

    words = f"rank-layers --dataset scenes --limit 2 --noise-levels 4 8 --out {tmp_path}/out"
    assert main(words.split()) == 0
    document = json.loads((tmp_path / "out" / "ranking.json").read_text())
    scenes = [scene(HELD_OUT + number) for number in range(2)]
    expected = seg4diff.rank_layers(
        stand_in,
        images=[s.image for s in scenes],
        labels=[s.labels for s in scenes],
        classes=[s.classes for s in scenes],
        noise_levels=[4, 8],
    )
    assert np.allclose(document["scores"], expected.scores)
    assert document["order"] == list(expected.order)
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "out" / "layers.png").is_file()
    assert "mIoU in % by layer" in capsys.readouterr().out
