"""Results of a benchmark run, gathered and written to files named after the device."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from benchmarks.measuring import device_name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder to write <device>.json and others to")
    parser.addoption(
        "--full-size",
        action="store_true",
        help="MAGNET's memory at SD3-medium's exact size on a CPU too: ten minutes, 16 GiB",
    )


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Where the benchmarks of joint attention put what they measured, for ``<device>.json``."""
    cases: list[dict[str, Any]] = []
    yield cases
    write(request.config.getoption("--results"), "", {"cases": cases})


@pytest.fixture(scope="session")
def training(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Where the benchmarks of MAGNET put what they measured, for ``<device>-training[-full-size].json``."""
    found: dict[str, Any] = {}
    yield found
    suffix = "-training-full-size" if request.config.getoption("--full-size") else "-training"
    write(request.config.getoption("--results"), suffix, found)


def write(folder: Path | None, suffix: str, found: dict[str, Any]) -> None:
    """One file of results with device and versions, if there is a folder and anything was found."""
    if folder is None or not any(found.values()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "device": device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        **found,
    }
    name = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    (folder / f"{name}{suffix}.json").write_text(json.dumps(report, indent=1) + "\n")
