"""`seg4diff kernels tune`: what it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seg4diff.cli.main import main
from seg4diff.kernels import measured, tune
from seg4diff.kernels.measured import Row


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return measured.user_table()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU on which cuDNN wins; the token counts that it was measured for."""
    tokens: list[int] = []

    def measurement(
        image_tokens: int, text_tokens: int, heads: int, head_dim: int, *, rounds: int, device: Any
    ) -> Row:
        tokens.append(image_tokens)
        if image_tokens == 666:
            raise RuntimeError("the kernels fail")
        evidence = {"milliseconds": {"cudnn": [0.25, 1.0]}, "rejected": {"flash-attn-2": "is not installed"}}
        return Row("sm_90", head_dim, image_tokens + text_tokens, "cudnn", "triton", evidence)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "tune", measurement)
    return tokens


def test_rows_are_added_and_replaced(gpu: list[int], table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["kernels", "tune", "--head-dims", "64", "--text-tokens", "100", "--image-tokens"]
    assert main([*words, "400", "900"]) == 0
    printed = capsys.readouterr().out
    assert "cudnn: forward    0.250 ms, with backward    1.000 ms" in printed
    assert "flash-attn-2: is not installed" in printed
    assert str(table) in printed
    assert [row.tokens for row in measured.read_rows(table)] == [500, 1000]
    assert main([*words, "900", "666"]) == 1
    assert "error: the kernels fail" in capsys.readouterr().err
    assert gpu == [400, 900, 900, 666]
    assert [row.tokens for row in measured.read_rows(table)] == [500, 1000], "what was measured is kept"
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_a_damaged_table_stays_as_it_is(
    gpu: list[int], table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.parent.mkdir()
    table.write_text("{")
    assert main(["kernels", "tune"]) == 2
    assert f"{str(table)!r} is not a table of measured attention" in capsys.readouterr().err
    assert table.read_text() == "{"
    assert not gpu


def test_options_that_mean_nothing(gpu: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--heads", "0"], "--heads 0 must be at least 1"),
        (["--head-dims", "64", "0"], "--head-dims (64, 0): give numbers from 1 on"),
    ):
        assert main(["kernels", "tune", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "tune"]) == 1
    assert "kernels tune measures on a GPU, and PyTorch sees none" in capsys.readouterr().err
