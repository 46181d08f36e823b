"""`seg4diff estimate`: amounts of memory with their units, and the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from seg4diff.cli.estimate import size_in_bytes
from seg4diff.cli.main import main
from tests.support import tiny


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 * 2**30), ("12 GB", 12e9), ("0.5gib", 2**29), (" 800 MiB ", 800 * 2**20), ("1TB", 1e12)],
)
def test_amounts(text: str, size: float) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "example"),
    [
        ("12", "12GiB"),
        ("7.5 ", "7.5GiB"),
        ("0GiB", "12GiB"),
        ("-1GB", "12GiB"),
        ("nan", "12GiB"),
        ("GB", "12GiB"),
    ],
)
def test_an_amount_needs_a_number_and_a_unit(
    text: str, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", f"--memory={text}"]) == 2
    message = f"--memory {text!r} is not an amount with its unit; write it like {example}"
    assert " ".join(message.split()) in capsys.readouterr().err


@pytest.mark.slow
def test_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.pipeline(layers=2).save_pretrained(tmp_path)
    words = ["estimate", "--set", f"model={tmp_path}", "data.resolution=256", "mask.layers=[1]", "--memory"]
    assert main([*words, "8GiB"]) == 0
    printed = capsys.readouterr()
    assert f"tracing training steps of {tmp_path}, without its weights ..." in printed.err
    assert "saved activations" in printed.out
    assert main([*words, "100 kB"]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "nothing fits in --memory 100 kB: the smallest peak is" in message
    assert "(memory.quantise='nf4', fm_weight=0)" in message
