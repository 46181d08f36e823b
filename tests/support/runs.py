"""Short training runs of a tiny pipeline on drawn scenes, shared by the tests of this folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from seg4diff.training import TrainSettings, build_settings
from seg4diff.training.settings import merged
from tests.support import tiny

STEPS = 5


def settings(out: Path, cache: Path | None = None, **changes: Any) -> TrainSettings:
    """Five steps on a dozen scenes; a checkpoint every other step."""
    values: dict[str, Any] = {
        "model": "tiny",
        "out": str(out),
        "steps": STEPS,
        "batch": 1,
        "checkpoint_every": 2,
        "evaluate_every": 4,
        "device": "cpu",
        "lora": {"rank": 2},
        "mask": {"layers": [1]},
        "optimizer": {"warm_up": 2, "learning_rate": 1e-2},
        "data": {
            "kind": "demo",
            "scenes": 10,
            "resolution": 64,
            "shard": 4,
            "held_out": 0.2,
            "cache": "" if cache is None else str(cache),
        },
    }
    return build_settings(merged(values, changes))


def pipeline() -> Any:
    """Equal in every process."""
    return tiny.pipeline()


def train_until_killed(out: str, cache: str, moment: str, step: int) -> None:
    """Train in this process until it kills itself.

    Args:
        out, cache: folders.
        moment: ``"after"`` a step, ``"within"`` its optimizer step, or while the checkpoint that follows it
            is ``"writing"``.
        step: which.
    """
    from seg4diff.training import trainer

    torch.set_num_threads(1)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    done = 0

    def after_step(number: int) -> None:
        nonlocal done
        done = number
        if moment == "after" and number == step:
            die()

    whole_step = torch.optim.AdamW.step

    def cut_step(self: Any, closure: Any = None) -> Any:
        if moment == "within" and done == step - 1:
            self.param_groups[0]["params"][0].data.zero_()  # half done
            die()
        return whole_step(self, closure)

    whole_write = Path.write_bytes

    def cut_write(self: Path, data: Any) -> int:
        if moment == "writing" and done == step - 1 and "checkpoint" in self.name:
            whole_write(self, bytes(data)[: len(data) // 2])
            die()
        return whole_write(self, data)

    torch.optim.AdamW.step = cut_step  # type: ignore[method-assign, assignment]
    Path.write_bytes = cut_write  # type: ignore[method-assign, assignment]
    trainer.train(settings(Path(out), Path(cache)), pipe=pipeline(), progress=False, after_step=after_step)
