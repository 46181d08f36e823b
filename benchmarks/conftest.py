"""Results of a benchmark run, gathered and written to one file by device."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder to write <device>.json to")


def device_name() -> str:
    """The GPU's name, or the CPU's architecture and the threads that PyTorch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()} {torch.get_num_threads()} threads"


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Where a benchmark puts what it measured; written at the end if ``--results`` names a folder."""
    cases: list[dict[str, Any]] = []
    yield cases
    folder: Path | None = request.config.getoption("--results")
    if folder is None or not cases:
        return
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "device": device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cases": cases,
    }
    name = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
