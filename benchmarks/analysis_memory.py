"""Peak memory of an analysis beside that of the same pipeline call without one, at SD3's token counts.

    python -m benchmarks.analysis_memory [--heads 4] [--rows 1] [--out
    benchmarks/results/analysis_memory.json]

A random SD3-shaped pipeline draws one step at 1024 px: 24 layers, 4096 image and 154 text tokens, at a
reduced width of HEADS x 64 (SD3-medium has 24 heads). Every run is a process of its own; its peak is the
largest resident set during the call, less what was resident before the weights were made, so weights count
and imports do not.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODES = ("plain", "mass and norms", "with projections")


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def pipeline(heads: int) -> Any:
    """A random pipeline at 1024 px with 24 layers of ``heads`` x 64."""
    import torch
    from diffusers import SD3Transformer2DModel

    from tests.support import tiny

    pipe = tiny.pipeline()
    torch.manual_seed(0)
    pipe.transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=64,
        pos_embed_max_size=96,
    ).eval()
    return pipe


def measure(mode: str, heads: int, rows: int) -> dict[str, float]:
    """Peak memory and time of one call in this process."""
    import torch

    import seg4diff

    torch.set_num_threads(1)
    warm = seg4diff.patch(pipeline(1))  # everything imported, every operator loaded
    call = {"guidance_scale": 7.5 if rows == 2 else 1.0, "height": 64, "width": 64}
    seg4diff.analyze(warm, "a cat on a sofa", noise_levels=[1], steps=1, projections=True, **call)
    del warm
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    pipe = pipeline(heads)
    weights = resident("VmRSS") - before
    call |= {"height": 1024, "width": 1024}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    start = time.perf_counter()
    if mode == "plain":
        generator = torch.Generator().manual_seed(0)
        pipe(
            "a cat on a sofa",
            num_inference_steps=1,
            max_sequence_length=77,
            output_type="latent",
            generator=generator,
            **call,
        )
    else:
        seg4diff.patch(pipe)
        report = seg4diff.analyze(
            pipe, "a cat on a sofa", noise_levels=[1], steps=1, projections=mode != "mass and norms", **call
        )
        assert report.layers == tuple(range(24))
        assert report.grid == (64, 64)
        assert report.uniform_to_text == 154 / (4096 + 154)
        assert not report.projections or report.projections["value"].shape == (1, 24, 4096, 3)
    return {
        "peak_mib": resident("VmHWM") - before,
        "weights_mib": weights,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1, choices=(1, 2), help="2: classifier-free guidance")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--mode", choices=MODES, help="measure in this process and print JSON")
    options = parser.parse_args()
    if options.mode is not None:
        print(json.dumps(measure(options.mode, options.heads, options.rows)))
        return
    words = [sys.executable, "-m", "benchmarks.analysis_memory", "--heads", str(options.heads)]
    words += ["--rows", str(options.rows), "--mode"]
    # Tensors come from and go back to the system one by one, so that the resident set is what they need.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    figures = {}
    for mode in MODES:
        run = subprocess.run([*words, mode], check=True, capture_output=True, text=True, env=environment)
        figures[mode] = json.loads(run.stdout.splitlines()[-1])
    plain = figures["plain"]["peak_mib"]
    print(f"24 layers of {options.heads} x 64, 4096 + 154 tokens, {options.rows} row(s), float32, 1 thread")
    for mode, figure in figures.items():
        print(
            f"{mode:18} peak {figure['peak_mib']:8.1f} MiB ({figure['peak_mib'] / plain:.3f} of plain), "
            f"weights {figure['weights_mib']:.1f} MiB, {figure['seconds']:.1f} s"
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"layers": 24, "heads": options.heads, "head_dim": 64, "image_tokens": 4096}
        document |= {"text_tokens": 154, "rows": options.rows, "dtype": "float32", "runs": figures}
        options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
