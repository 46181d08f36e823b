"""Cost of the steps of "best" at Stable Diffusion 3's size: 1024 px, 4096 image tokens, random weights.

    OMP_NUM_THREADS=1 python -m benchmarks.segmentation_cost [--heads 24] [--layers 12]

Times are medians of rounds in turns. A peak is the largest resident set of a process of its own, less what
was resident before the call: weights do not count, and neither does the VAE, which is a tiny one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import seg4diff
from benchmarks.analysis_memory import resident
from benchmarks.measuring import compare
from seg4diff.segmentation.grouping import cluster_tokens
from seg4diff.segmentation.presets import PRESETS
from seg4diff.segmentation.scores import spread_scores

SIDE, HEAD_DIM, EXPERT, NAMES = 64, 64, 9, 20
PRESETS_COMPARED = ("default", "fast")


def kernel_and_ward(heads: int) -> None:
    """The output-feature kernel on 20 maps beside one attention of all heads, and Ward's clustering."""
    torch.manual_seed(0)
    tokens, width = SIDE * SIDE, heads * HEAD_DIM
    outputs, scores = torch.randn(SIDE, SIDE, width), torch.rand(NAMES, SIDE, SIDE)
    query, key, value = (torch.randn(1, heads, tokens, HEAD_DIM) for _ in range(3))
    medians = compare(
        lambda: spread_scores(scores, outputs, 0.1),
        {"SDPA": lambda: F.scaled_dot_product_attention(query, key, value)},
        rounds=5,
    )
    print(f"kernel W on {NAMES} maps: {medians['ours'] / medians['SDPA']:.2f} of one SDPA")
    stacked = torch.randn(3, tokens, width)
    clustering = PRESETS["default"].grouping
    ward = compare(
        lambda: cluster_tokens(stacked, grid=(SIDE, SIDE), clustering=clustering),  # type: ignore[arg-type]
        {},
        rounds=3,
    )
    print(f"Ward, {tokens} tokens of {3 * width} channels: {ward['ours']:.1f} s")


def pipeline(heads: int, layers: int) -> Any:
    """A random pipeline at 1024 px whose expert is layer 9."""
    from diffusers import SD3Transformer2DModel

    from tests.support import tiny

    pipe = tiny.pipeline()
    torch.manual_seed(0)
    pipe.transformer = SD3Transformer2DModel(
        sample_size=2 * SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=HEAD_DIM * heads,
        pooled_projection_dim=64,
        pos_embed_max_size=96,
    ).eval()
    pipe.default_sample_size = 2 * SIDE
    pipe.transformer.register_to_config(_seg4diff_expert_layers=[EXPERT])
    return pipe


def measure(preset: str, heads: int, layers: int) -> dict[str, float]:
    """Time and peak of one call of `segment` in this process."""
    names = ["cat", "sofa", "dog", "tree"]
    image = torch.rand(3, 1024, 1024)
    pipe = pipeline(heads, layers)
    small = torch.rand(3, 64, 64)
    warm = pipeline(1, layers)
    warm.default_sample_size = 8
    seg4diff.segment(warm, small, names, preset=preset, progress=False)  # type: ignore[arg-type]
    del warm
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    started = time.perf_counter()
    result: Any = seg4diff.segment(pipe, image, names, preset=preset, progress=False)  # type: ignore[call-overload]
    seconds = time.perf_counter() - started
    assert result.scores.shape[1:] == (SIDE, SIDE)
    return {"peak_mib": resident("VmHWM") - before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--layers", type=int, default=EXPERT + 3, help="later ones never run")
    parser.add_argument("--only", choices=("steps", "segment"), help="the kernel and Ward, or `segment`")
    parser.add_argument("--preset", help="measure in this process and print JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.preset is not None:
        print(json.dumps(measure(options.preset, options.heads, options.layers)))
        return
    if options.only != "segment":
        kernel_and_ward(options.heads)
    if options.only == "steps":
        return
    words = ["--heads", str(options.heads), "--layers", str(options.layers), "--preset"]
    # Tensors come from and go back to the system one by one, so that the resident set is what they need.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for preset in PRESETS_COMPARED:
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.segmentation_cost", *words, preset],
            check=True, capture_output=True, text=True, env=environment,
        )  # fmt: skip
        figures = json.loads(run.stdout.splitlines()[-1])
        print(f"segment, preset {preset}: peak {figures['peak_mib']:.0f} MiB, {figures['seconds']:.1f} s")


if __name__ == "__main__":
    main()
