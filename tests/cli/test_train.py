"""`seg4diff train`: settings from a file and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seg4diff.cli.main import main
from seg4diff.cli.train import Train, overrides


def test_nothing_to_train_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "name a configuration with --config, or try demo --train" in capsys.readouterr().err


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    config = tmp_path / "magnet.toml"
    config.write_text('steps = 3\nout = "elsewhere"\n[mask]\nweight = 1.0\nmax_masks = 5\n')
    settings = Train(config=config, set=("mask.weight=2.5", "model=demo")).settings(out="here")
    assert (settings.steps, settings.out, settings.model) == (3, "here", "demo")
    assert (settings.mask.weight, settings.mask.max_masks) == (2.5, 5)
    assert overrides(("a.b=1", "a.c=x y")) == {"a": {"b": 1, "c": "x y"}}
    assert overrides(('a=C:\\x "y" é🙂',)) == {"a": 'C:\\x "y" é🙂'}
    for word in ("steps", "=3", "a b=c"):
        with pytest.raises(ValueError, match=f"{word!r} is not KEY=VALUE"):
            overrides((word,))
    config.write_text("stpes = 3")
    with pytest.raises(ValueError, match=r"magnet.toml.*stpes"):
        Train(config=config).settings()


def test_data_is_looked_for_before_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_pipeline(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("seg4diff.loading.load_pipeline", load_pipeline)
    words = [
        "train",
        "--out",
        str(tmp_path / "out"),
        "--set",
        "data.kind=folder",
        "data.images=no-such-folder",
    ]
    assert main([*words, "device=cpu"]) == 2
    assert "data.images='no-such-folder'" in capsys.readouterr().err
