"""Block sizes by architecture, head dim and precision: a short table, so that a first call is a fast call.

No entry was measured on a GPU. Each starts from the figures published for kernels of this shape, prefers
large tiles, and is held to no register spills and to the shared memory of its target by ahead-of-time
compilation (``tests/kernels/test_triton_compile.py``). ``benchmarks/sweep_tuning.py`` measures alternatives
on a GPU and prints what to write here.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Query rows and key columns of a tile, warps of a program, stages of its software pipeline.

    The forward and its log-sum-exp have more to choose: whether the first tiles settle the shift of a softmax
    (never done in float16); in how many parts the total of a row is kept, 8 for those of the entries that one
    thread holds of a tensor-core product up to Hopper. ``registers`` is how many a thread may take (NVIDIA):
    to fit one more program, or where the compiler would rather spill to fit one.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    shifted: bool = False
    lanes: int = 1
    registers: int | None = None


@dataclass(frozen=True)
class Tuning:
    """Configurations of the heavy kernels, and one for the passes over the scores of text columns."""

    forward: Config
    log_sum_exp: Config
    query_gradient: Config
    key_gradient: Config
    scores: Config


def _rows(*configs: tuple[Config, Config, Config, Config, Config]) -> dict[int, Tuning]:
    return {head_dim: Tuning(*row) for head_dim, row in zip((64, 128, 256), configs, strict=True)}


# By the greatest head dim that an entry serves, for 16-bit tensors first. In the order of `Tuning`: forward,
# log-sum-exp, gradient of the queries, gradient of the keys and values, scores of text columns.
_HOPPER = _rows(
    (  # up to 128 registers, two programs of 8 warps share a multiprocessor
        Config(128, 64, 8, 3, True, 8, 128), Config(128, 128, 8, 3, True, 8, 128),
        Config(128, 64, 8, 2), Config(64, 128, 8, 2), Config(64, 64, 4, 3),
    ),
    (
        Config(128, 128, 8, 2, True, 8), Config(128, 128, 8, 2, True, 8, 128),
        Config(128, 64, 8, 2), Config(32, 128, 8, 2), Config(64, 64, 4, 2),
    ),
    (
        Config(128, 32, 8, 2, True, 8), Config(64, 64, 4, 2, True, 8),
        Config(32, 64, 4, 2), Config(32, 32, 8, 2), Config(64, 32, 4, 2),
    ),
)  # fmt: skip
_BLACKWELL = {
    # Four warps: a row to each thread, so that no row sum needs an exchange.
    64: replace(
        _HOPPER[64],
        forward=Config(128, 64, 4, 3, True),
        log_sum_exp=Config(128, 128, 4, 3, True),
        query_gradient=Config(128, 64, 8, 2, registers=168),
    ),
    128: replace(_HOPPER[128], forward=Config(128, 64, 8, 2, True), log_sum_exp=Config(128, 64, 4, 2, True)),
    256: replace(
        _HOPPER[256],
        forward=Config(128, 32, 8, 2, True),
        log_sum_exp=Config(128, 64, 4, 2, True),
        query_gradient=Config(64, 64, 8, 2),
    ),
}
_ADA = _rows(  # 99 KiB of shared memory
    (
        Config(128, 64, 4, 2, True, 8), Config(128, 64, 4, 2, True, 8),
        Config(128, 32, 8, 2), Config(32, 128, 8, 2), Config(64, 64, 4, 2),
    ),
    (
        Config(128, 32, 8, 2, True, 8), Config(64, 64, 4, 2, True, 8),
        Config(64, 32, 4, 2, registers=224), Config(32, 64, 8, 2), Config(64, 32, 4, 2),
    ),
    (
        Config(64, 32, 8, 2, True), Config(64, 32, 4, 2, True, 8),
        Config(64, 16, 8, 1), Config(16, 32, 8, 1), Config(32, 32, 4, 2),
    ),
)  # fmt: skip
_AMPERE = {**_ADA, 256: replace(_ADA[256], forward=Config(64, 64, 8, 2, True, 8))}  # 163 KiB
_GEFORCE_BLACKWELL = {**_ADA, 64: replace(_ADA[64], forward=Config(128, 64, 8, 2, True, 8))}  # 4 warps spill
_CDNA = _rows(
    (
        Config(128, 64, 4, 1, True, 8), Config(64, 64, 4, 1, True, 8),
        Config(64, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 64, 4, 1),
    ),
    (
        Config(128, 32, 4, 1, True, 8), Config(64, 32, 4, 1, True, 8),
        Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(64, 32, 4, 1),
    ),
    (
        Config(64, 32, 4, 1, True, 8), Config(32, 32, 4, 1, True, 8),
        Config(32, 32, 4, 1), Config(16, 32, 4, 1), Config(32, 32, 4, 1),
    ),
)  # fmt: skip
# float32 is multiplied without rounding its operands, so on NVIDIA without tensor cores: whatever the
# architecture, registers set the tile.
_FLOAT32 = _rows(
    (
        Config(64, 32, 8, 2, True), Config(32, 32, 8, 2, True),
        Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1),
    ),
    (
        Config(32, 32, 8, 2, True), Config(32, 32, 8, 2, True),
        Config(32, 32, 8, 1), Config(16, 32, 8, 1), Config(32, 32, 8, 1),
    ),
    (
        Config(16, 32, 8, 2, True), Config(32, 32, 8, 2, True),
        Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(32, 32, 8, 2),
    ),
)  # fmt: skip
_CDNA_FLOAT32 = {
    256: Tuning(
        Config(16, 32, 4, 1, True), Config(32, 32, 4, 1, True),
        Config(16, 16, 4, 1), Config(16, 16, 4, 1), Config(32, 32, 4, 1),
    ),
}  # fmt: skip

# What differs in float16, whose softmax is always online.
_FLOAT16 = {
    "sm_90": {64: replace(_HOPPER[64], forward=Config(128, 64, 4, 3, lanes=8))},
    "sm_100": {128: replace(_BLACKWELL[128], forward=Config(128, 128, 8, 2))},
}

TABLE = {
    "sm_80": _AMPERE,
    "sm_86": _ADA,  # and sm_89
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_120": _GEFORCE_BLACKWELL,  # the instructions and the 99 KiB of sm_89
    "gfx942": _CDNA,
}
INTERPRETER = Tuning(
    Config(64, 32, 4, 1, True, 8), Config(64, 32, 4, 1, True),
    Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(64, 32, 4, 1),
)  # fmt: skip
VALUE_NORM = Config(64, 1, 4, 1)


def interpreting() -> bool:
    """Whether this process runs kernels under Triton's interpreter; decided when kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def target_of(device: torch.device) -> str | None:
    """Which row of the table serves a GPU; None for one that none serves."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = str(properties.gcnArchName).split(":")[0]
        return "gfx942" if name in ("gfx90a", "gfx942", "gfx950") else None
    major, minor = properties.major, properties.minor
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"
    return {9: "sm_90", 10: "sm_100", 11: "sm_120", 12: "sm_120"}.get(major)


def tuning_of(target: str, head_dim: int, dtype: torch.dtype) -> Tuning:
    """The configurations of a row of the table for a head dim up to 256 and a dtype."""
    table = TABLE[target]
    if dtype == torch.float16:
        table = {**table, **_FLOAT16.get(target, {})}
    elif dtype == torch.float32:
        table = _CDNA_FLOAT32 if target == "gfx942" else _FLOAT32
    return next(tuning for greatest, tuning in table.items() if head_dim <= greatest)


def tuning_for(tensor: Tensor) -> Tuning:
    """The configurations for tensors like ``tensor`` [B, tokens, H, D].

    Raises:
        ValueError: no row of the table serves its device.
    """
    if interpreting():
        return INTERPRETER
    target = target_of(tensor.device)
    if target is None:
        raise ValueError(f"no configuration for {tensor.device}")
    return tuning_of(target, tensor.shape[-1], tensor.dtype)
