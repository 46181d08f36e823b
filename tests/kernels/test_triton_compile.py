"""Every configuration of the tuning table, compiled to machine code for its target: no GPU is needed.

A configuration that spills registers, or wants more shared memory than its target has, fails here instead of
on somebody's GPU.
"""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from seg4diff.kernels.triton import primitives, tuning
from tests.support.ahead_of_time import (
    SHARED_MEMORY_LIMITS,
    UNITS,
    Usage,
    bank_conflicts,
    compile_launch,
    launches,
    programs_at_once,
)

# Programs that a multiprocessor holds at once, at least, where two of them are to hide each other's waits.
RESIDENT = {
    ("sm_90", 64): {"attention": 2, "log_sum_exp": 2, "map": 4},
    ("sm_90", 128): {"log_sum_exp": 2},
    ("sm_80", 64): {"attention": 2, "log_sum_exp": 2},
    ("sm_86", 64): {"attention": 2, "log_sum_exp": 2},
    ("sm_100", 64): {"attention": 2, "log_sum_exp": 2},
}
# Instructions for each score in the leanest loop over full tiles, at most.
INSTRUCTIONS = {
    ("sm_80", 64, torch.bfloat16): {"attention": 7.4},
    ("sm_86", 64, torch.bfloat16): {"attention": 7.4},
    ("sm_90", 64, torch.bfloat16): {"attention": 6.2, "key_gradient": 9.6, "key_gradient_each": 9.8},
    ("sm_90", 64, torch.float16): {"attention": 7.7},
    ("sm_100", 64, torch.bfloat16): {"attention": 5.6},
    ("sm_100", 128, torch.float16): {"attention": 8.0},
}
SAMPLE = [("sm_90", 64, torch.bfloat16), ("gfx942", 64, torch.bfloat16)]  # not slow: one of each maker


@pytest.mark.parametrize(
    ("target", "head_dim", "dtype"),
    [pytest.param(*unit, marks=[] if unit in SAMPLE else pytest.mark.slow) for unit in UNITS],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_no_spills_and_within_shared_memory(
    target: str,
    head_dim: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limit = SHARED_MEMORY_LIMITS[target]
    usages: dict[str, Usage] = {}
    chosen = launches(target, head_dim, dtype, monkeypatch)
    assert set(chosen) == {
        "attention", "log_sum_exp", "map", "map_each", "mass", "value_norm", "delta",
        "query_gradient", "query_gradient_each", "query_gradient_alone",
        "key_gradient", "key_gradient_each", "key_gradient_alone",
        "delta_of_map", "query_gradient_of_map", "key_gradient_of_map",
    }  # fmt: skip
    for name, launch in chosen.items():
        usages[name] = compile_launch(launch, target)
    with capsys.disabled():
        print(f"\n{target}, head dim {head_dim}, {str(dtype)[6:]}; shared memory limit {limit}")
        for name, usage in usages.items():
            config = chosen[name].config
            tile = f"{config.rows}x{config.columns}, {config.warps} warps, {config.stages} stages"
            print(
                f"  {name:20} {tile:28} {usage.registers:4} registers {usage.spills:4} B spilled "
                f"{usage.shared_memory:7} B shared {usage.programs} at once"
            )
    wasteful = {name: usage for name, usage in usages.items() if usage.spills or usage.shared_memory > limit}
    assert not wasteful
    if dtype != torch.float32:  # products without tensor cores read unswizzled tiles
        assert not {name: usage.conflicts for name, usage in usages.items() if usage.conflicts}
    for name, least in RESIDENT.get((target, head_dim), {}).items() if dtype == torch.bfloat16 else ():
        assert (usages[name].programs or 0) >= least, name
    for name, most in INSTRUCTIONS.get((target, head_dim, dtype), {}).items():
        fullest = min(usages[name].loops, key=lambda loop: loop.per_element)
        assert fullest.per_element <= most, name
        if dtype == torch.bfloat16:
            elements = fullest.instructions / fullest.per_element
            assert fullest.special / elements == pytest.approx(1.0, abs=0.01)  # one exponential, nothing else


def test_bank_conflicts_are_seen() -> None:
    """A tile of 64 x 64 float32 without swizzling, read along rows, down columns, and as tensor cores leave
    their results, eight rows to a bank.
    """
    code = """
#along = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [1, 32],
                       warpsPerCTA = [4, 1], order = [1, 0]}>
#down = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [32, 1],
                      warpsPerCTA = [4, 1], order = [1, 0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 8]}>
#shared = #ttg.swizzled_shared<{vec = 1, perPhase = 1, maxPhase = 1, order = [1, 0]}>
#smem = #ttg.shared_memory
module attributes {"ttg.num-ctas" = 1 : i32, "ttg.num-warps" = 4 : i32, ttg.target = "cuda:80",
                   "ttg.threads-per-warp" = 32 : i32} {
  tt.func public @kernel() {
    %tile = ttg.local_alloc : () -> !ttg.memdesc<64x64xf32, #shared, #smem, mutable>
    %0 = ttg.local_load %tile : !ttg.memdesc<64x64xf32, #shared, #smem, mutable> -> tensor<64x64xf32, #along>
    %1 = ttg.local_load %tile : !ttg.memdesc<64x64xf32, #shared, #smem, mutable> -> tensor<64x64xf32, #down>
    %2 = ttg.local_load %tile : !ttg.memdesc<64x64xf32, #shared, #smem, mutable> -> tensor<64x64xf32, #mma>
    tt.return
  }
}"""
    loads = bank_conflicts(code)
    assert {name for name, _ in loads} == {"ttg.local_load tensor<64x64xf32>"}
    along, down, of_products = (degree for _, degree in loads)
    assert along == 0
    assert down == 7  # four entries at a time, eight rows a wavefront
    assert of_products == 3


def test_programs_that_a_multiprocessor_holds() -> None:
    assert programs_at_once("sm_90", 128, 8, 65_536) == 2
    assert programs_at_once("sm_90", 130, 8, 65_536) == 1
    assert programs_at_once("sm_86", 32, 4, 49_152) == 2
    assert programs_at_once("sm_100", 32, 4, 1024, tensor_memory=256) == 2


def test_every_entry_of_the_table_is_compiled() -> None:
    """A new row or head dim must not go unchecked: every table of every target shows up among the units."""
    served = {id(tuning.tuning_of(*unit)) for unit in UNITS}
    for target in tuning.TABLE:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for head_dim in range(16, 257, 8):
                assert id(tuning.tuning_of(target, head_dim, dtype)) in served


@pytest.mark.parametrize("dtype", [tl.bfloat16, tl.float32], ids=str)
@pytest.mark.parametrize("head_dim", range(16, 257, 8))
def test_parts_of_a_head_vector(head_dim: int, dtype: tl.dtype) -> None:
    """Powers of two that hold it, and nothing padded at the usual widths."""
    parts = primitives.head_parts(head_dim, dtype)
    for part in parts:
        assert part >= 16
        assert part & (part - 1) == 0
    assert list(parts) == sorted(parts, reverse=True)
    assert len(parts) <= 2
    assert head_dim <= sum(parts) < head_dim + max(16, head_dim / 3)
    if head_dim in (16, 32, 48, 64, 80, 96, 128, 160, 192, 256):
        assert sum(parts) == head_dim
