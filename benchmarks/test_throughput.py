"""Throughput of the main verbs with the bundled model, by pytest-benchmark.

    pytest benchmarks/test_throughput.py

Ratios against rivals are in the other files of this folder, where variants take turns; this one is for
watching a machine over time (`--benchmark-save`, `--benchmark-compare`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import seg4diff
from seg4diff.demo import CLASSES, HELD_OUT, scene

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is missing: pip install 'seg4diff[dev]'")


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = seg4diff.load_pipeline("demo")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("batch", [1, 8])
def test_segment(benchmark: Any, pipe: Any, batch: int) -> None:
    """Eight held-out scenes, all names."""
    images = [scene(HELD_OUT + number).image for number in range(8)]
    found = benchmark.pedantic(
        seg4diff.segment,
        args=(pipe, images, CLASSES),
        kwargs={"batch_size": batch, "progress": False},
        rounds=5,
        warmup_rounds=1,
    )
    benchmark.extra_info["images per second"] = len(images) / benchmark.stats.stats.median
    assert len(found) == len(images)


@pytest.mark.parametrize("captured", [False, True], ids=["plain", "captured"])
@torch.no_grad()
def test_generate(benchmark: Any, pipe: Any, captured: bool) -> None:
    """One image of four steps, with and without maps of every layer."""

    def draw() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe("an apple on the sand", num_inference_steps=4, generator=generator, output_type="latent")

    def draw_captured() -> Any:
        with seg4diff.capture(pipe) as maps:
            draw()
        return maps.records

    run = draw_captured if captured else draw
    assert benchmark.pedantic(run, rounds=5, warmup_rounds=1)
