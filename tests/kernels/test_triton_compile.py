"""Every configuration of the tuning table, compiled to machine code for its target: no GPU is needed.

A configuration that spills registers, or wants more shared memory than its target has, fails here instead of
on somebody's GPU.
"""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from torch import Tensor

from seg4diff.kernels.triton import backend, backward, primitives, statistics, tuning
from seg4diff.kernels.triton.launch import Launch
from seg4diff.kernels.types import STREAMS, Inputs, Request
from tests.support.ahead_of_time import SHARED_MEMORY_LIMITS, Usage, compile_launch, recorded

TABLE_WIDTHS = (64, 128, 256)
UNITS = [
    *((target, head_dim, torch.bfloat16) for target in tuning.TABLE for head_dim in TABLE_WIDTHS),
    *((target, 64, torch.float16) for target in tuning.TABLE),  # always the online softmax
    *(("sm_86", head_dim, torch.float32) for head_dim in TABLE_WIDTHS),
    ("gfx942", 256, torch.float32),
    ("sm_90", 96, torch.float16),  # a head vector in two parts
]
SAMPLE = [("sm_90", 64, torch.bfloat16), ("gfx942", 64, torch.bfloat16)]  # not slow: one of each maker


def empty(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """A tensor of the shape of one stream; its memory is reserved, never touched."""
    return torch.empty((1, tokens, heads, head_dim), dtype=dtype)


def launches(
    target: str, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Launch]:
    """What the host code would launch, by kernel, for the request that needs most registers of each.

    Lengths that are no multiple of any tile, edited text values, and for the gradients the kind of map with
    most to remember; all else for the usual kind.
    """
    config = tuning.tuning_of(target, head_dim, dtype)
    monkeypatch.setattr(tuning, "tuning_for", lambda tensor: config)
    tokens, text_tokens, heads = 4106, 154, 24
    streams = {
        name: empty(text_tokens if name.startswith("text_") else tokens, heads, head_dim, dtype)
        for name in STREAMS
    }
    inputs = Inputs(**streams)
    maps_alone = Inputs(
        **{name: None if "value" in name else tensor for name, tensor in streams.items()}  # type: ignore[arg-type]
    )

    def run(kind: str, reduction: str) -> list[Launch]:
        request = Request(0.125, kind, reduction, 0, text_tokens)
        with recorded(monkeypatch) as made:
            image, text, lse, entries = backend.forward(inputs, request)
            backward.backward(image, text, entries, inputs, image, text, lse, request)
            backend.forward(maps_alone, request)
            statistics.attention_mass(
                streams["query"], streams["text_query"], streams["text_key"], lse, 0.125
            )
            statistics.value_norm(streams["value"])
        return made

    heavy = [one for one in run("text_probability", "each") if "gradient" in one.kernel.__name__]
    chosen: dict[str, Launch] = {}
    for launch in [*heavy, *run("probability", "mean")]:
        name = launch.kernel.__name__.removesuffix("_kernel")
        if name == "attention" and not launch.arguments["OUTPUT"]:
            name = "log_sum_exp"
        chosen.setdefault(name, launch)
    assert chosen["delta"].arguments["KIND"] == "probability"
    return chosen


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
        "attention", "log_sum_exp", "map", "mass", "value_norm", "delta", "query_gradient", "key_gradient",
    }  # fmt: skip
    for name, launch in chosen.items():
        usages[name] = compile_launch(launch, target)
    with capsys.disabled():
        print(f"\n{target}, head dim {head_dim}, {str(dtype)[6:]}; shared memory limit {limit}")
        for name, usage in usages.items():
            config = chosen[name].config
            tile = f"{config.rows}x{config.columns}, {config.warps} warps, {config.stages} stages"
            print(
                f"  {name:15} {tile:28} {usage.registers:4} registers {usage.spills:4} B spilled "
                f"{usage.shared_memory:7} B shared"
            )
    wasteful = {name: usage for name, usage in usages.items() if usage.spills or usage.shared_memory > limit}
    assert not wasteful


def test_every_entry_of_the_table_is_compiled() -> None:
    """A new row or head dim must not go unchecked: every table of every target shows up among the units."""
    served = {id(tuning.tuning_of(*unit)) for unit in UNITS}
    for target in tuning.TABLE:
        for dtype in (torch.bfloat16, torch.float32):
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
