"""Counts what kernels cost, without a GPU: ``python -m benchmarks.kernel_counts [--out FILE] [TARGET ...]``.

Every entry of the tuning table is compiled to machine code; for each kernel the table shows the instructions
and special-function (XU) operations per score in its leanest loop, registers, spilled bytes, shared memory
and how many programs a multiprocessor holds. Beside them stands a plain flash attention over one stream of
keys, with a running maximum, in the manner of Triton's tutorial.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from seg4diff.kernels.triton.launch import Launch, strided
from seg4diff.kernels.triton.primitives import at
from seg4diff.kernels.triton.tuning import Config
from tests.support.ahead_of_time import UNITS, Usage, compile_launch, launches

RESULTS = Path(__file__).parent / "results" / "kernel_counts.json"
# Tiles of the plain kernel by target, at head dim 64 and 128: the best of those that do not spill.
PLAIN = {
    "sm_80": (Config(128, 64, 4, 3), Config(128, 64, 8, 2)),
    "sm_90": (Config(128, 64, 4, 3), Config(128, 128, 8, 3)),
    "sm_100": (Config(128, 64, 4, 3), Config(128, 64, 8, 3)),
}


@triton.jit
def plain_kernel(
    query, key, value, out, tokens, heads, factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr
):
    """Attention of one tile of rows over all keys, as many as fill their tiles."""
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    first = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)
    entries = tl.arange(0, D)
    q = tl.load(at(query, batch, head, first) + rows * query.token + entries[None, :])
    k_at = at(key, batch, head, 0) + columns[None, :] * key.token + entries[:, None]  # [D, COLUMNS]
    v_at = at(value, batch, head, 0) + columns[:, None] * value.token + entries[None, :]
    greatest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, D], dtype=tl.float32)
    for _ in range(0, tokens, COLUMNS):
        scores = tl.dot(q, tl.load(k_at))
        raised = tl.maximum(greatest, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - raised[:, None])
        correction = tl.exp2(greatest - raised)
        total = total * correction + tl.sum(weights, 1)
        v = tl.load(v_at)
        sums = tl.dot(weights.to(v.dtype), v, sums * correction[:, None])
        greatest = raised
        k_at += COLUMNS * key.token
        v_at += COLUMNS * value.token
    out_at = at(out, batch, head, first) + rows * out.token + entries[None, :]
    tl.store(out_at, (sums / total[:, None]).to(q.dtype))


def plain_launch(head_dim: int, config: Config) -> Launch:
    """The plain kernel at Stable Diffusion 3's 1024 px, without text."""
    stream = strided(torch.empty((1, 4096, 24, head_dim), dtype=torch.bfloat16))
    arguments: dict[str, Any] = dict.fromkeys(("query", "key", "value", "out"), stream)
    arguments |= {"tokens": 4096, "heads": 24, "factor": 0.18}
    arguments |= {"ROWS": config.rows, "COLUMNS": config.columns, "D": head_dim}
    return Launch(plain_kernel, 24 * 4096 // config.rows, arguments, config)


def counted(launch: Launch, target: str) -> dict[str, Any]:
    """What goes on file: the configuration, and what the machine code says."""
    usage: Usage = compile_launch(launch, target)
    config = launch.config
    record = {name: value for name, value in asdict(config).items() if value not in (False, None)}
    record.pop("registers", None)
    record |= {
        "registers": usage.registers,
        "spilled_bytes": usage.spills,
        "shared_memory": usage.shared_memory,
        "programs": usage.programs,
    }
    if usage.loops:
        loop = min(usage.loops, key=lambda loop: loop.per_element)
        record["instructions_per_score"] = loop.per_element
        record["xu_per_score"] = round(loop.special * loop.per_element / loop.instructions, 2)
        record["instructions"] = [loop.instructions for loop in usage.loops]
    return record


def line(name: str, record: dict[str, Any]) -> str:
    tile = f"{record['rows']}x{record['columns']} w{record['warps']} s{record['stages']}"
    score = f"{record.get('instructions_per_score', '-'):>7} {record.get('xu_per_score', '-'):>6}"
    return (
        f"  {name:20} {tile:16} {score} {record['registers']:4} {record['spilled_bytes']:4} "
        f"{record['shared_memory']:7} {record['programs'] or '-':>3}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help="such as sm_90; all of the table without")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to write")
    options = parser.parse_args()
    found: dict[str, Any] = {"triton": triton.__version__, "kernels": {}}
    print(f"{'':22} {'tile':16} instr. / XU a score, registers, spilled B, shared B, programs")
    for target, head_dim, dtype in UNITS:
        if options.targets and target not in options.targets:
            continue
        unit = f"{target}, head dim {head_dim}, {str(dtype).removeprefix('torch.')}"
        print(unit)
        records: dict[str, Any] = {}
        with pytest.MonkeyPatch.context() as patch:
            chosen = launches(target, head_dim, dtype, patch)
        if target in PLAIN and dtype == torch.bfloat16 and head_dim <= 128:
            chosen["plain"] = plain_launch(head_dim, PLAIN[target][head_dim // 128])
        for name, launch in chosen.items():
            records[name] = counted(launch, target)
            print(line(name, records[name]), flush=True)
        found["kernels"][unit] = records
    partial = options.out.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    os.replace(partial, options.out)


if __name__ == "__main__":
    main()
