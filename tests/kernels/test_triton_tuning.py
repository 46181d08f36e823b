"""Configurations measured on a GPU come before those of the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.sweep_tuning import fastest, rows
from seg4diff.kernels.triton.tuning import MEASURED, Config, tuning_of


def record(
    kernel: str, head_dim: int, microseconds: float, config: Config, **more: object
) -> dict[str, object]:
    return {"kernel": kernel, "head_dim": head_dim, "microseconds": microseconds, **vars(config), **more}


def test_the_fastest_right_candidate_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MEASURED, raising=False)
    before = {head_dim: tuning_of("sm_90", head_dim, torch.bfloat16) for head_dim in (64, 128, 256)}
    quick, quicker = Config(64, 64, 4, 2), Config(128, 32, 4, 3)
    found = [
        record("forward", 64, 90.0, before[64].forward),
        record("forward", 64, 70.0, quick),
        record("forward", 64, 50.0, quicker, wrong=True),
        {"kernel": "scores", "head_dim": 64, "refused": "shared memory"},
        record("key_gradient", 128, 70.0, quicker),
    ]
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"table": {"sm_90": rows(fastest(found), "sm_90")}}))
    monkeypatch.setenv(MEASURED, str(path))
    assert tuning_of("sm_90", 48, torch.float16).forward == quick
    assert tuning_of("sm_90", 64, torch.bfloat16).key_gradient == before[64].key_gradient
    assert tuning_of("sm_90", 96, torch.bfloat16).key_gradient == quicker
    assert tuning_of("sm_90", 96, torch.bfloat16).forward == before[128].forward
    assert tuning_of("sm_90", 256, torch.bfloat16) == before[256]
    assert tuning_of("sm_90", 64, torch.float32).forward != quick
    assert tuning_of("sm_80", 64, torch.bfloat16).forward != quick


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"table": {"sm_90": {"64": {"forward": {"rows": 1}}}}}']
)
def test_a_file_that_is_none(content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuning.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(MEASURED, str(path))
    with pytest.raises(ValueError, match=r"SEG4DIFF_TUNING=.*tuning.json.*sweep_tuning"):
        tuning_of("sm_90", 64, torch.bfloat16)
