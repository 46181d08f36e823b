"""What the tuning sweep proposes for the table."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.sweep_tuning import fastest, rows
from seg4diff.kernels.triton.tuning import Config, tuning_of


def record(
    kernel: str, head_dim: int, microseconds: float, config: Config, **more: object
) -> dict[str, object]:
    return {"kernel": kernel, "head_dim": head_dim, "microseconds": microseconds, **vars(config), **more}


def test_the_fastest_right_candidate_is_proposed() -> None:
    own = {head_dim: tuning_of("sm_90", head_dim, torch.bfloat16) for head_dim in (64, 128)}
    quick, quicker = Config(64, 64, 4, 2), Config(128, 32, 4, 3)
    found = [
        record("forward", 64, 90.0, own[64].forward),
        record("forward", 64, 70.0, quick),
        record("forward", 64, 50.0, quicker, wrong=True),
        {"kernel": "scores", "head_dim": 64, "refused": "shared memory"},
        record("key_gradient", 128, 70.0, quicker),
        record("query_gradient", 128, 80.0, own[128].query_gradient),
    ]
    assert rows(fastest(found), "sm_90") == {
        64: dataclasses.replace(own[64], forward=quick),
        128: dataclasses.replace(own[128], key_gradient=quicker),
    }
