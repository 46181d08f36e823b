"""Checkpoints: everything a run needs to go on as if it had never stopped, one sealed file each."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seg4diff.files import DamagedFileError, read_sealed, write_sealed

logger = logging.getLogger(__name__)

PATTERN = "checkpoint-*.pt"


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after ``step`` optimizer steps.

    Attributes:
        step: number of optimizer steps done.
        weights: trained parameters by name.
        average: their running average, or empty.
        optimizer: the optimizer's ``state_dict``.
        progress: numbers of the run so far: best score, steps skipped, ...
        settings: the run's settings.
        attention: who computes attention, see `seg4diff.kernels.api.provider_identity`.
    """

    step: int
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]
    settings: dict[str, Any]
    attention: str | None = None


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint, then remove all but the ``keep`` latest.

    Raises:
        OSError: it cannot be written; the earlier ones are untouched.
    """
    buffer = io.BytesIO()
    torch.save(vars(checkpoint), buffer)
    path = write_sealed(folder / f"checkpoint-{checkpoint.step:07d}.pt", buffer.getvalue())
    for old in [*sorted(folder.glob(PATTERN))[:-keep], *folder.glob(f".{PATTERN}")]:  # and of killed writes
        old.unlink(missing_ok=True)
    return path


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The latest whole checkpoint in a folder, or None.

    Damaged ones are named in a warning and set aside under another name, so that they never count as one of
    those to keep.
    """
    for path in sorted(folder.glob(PATTERN), reverse=True):
        try:
            # weights_only alone would accept most altered files, with other numbers: hence the seal.
            content = torch.load(io.BytesIO(read_sealed(path)), map_location="cpu", weights_only=True)
        except DamagedFileError as error:
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            logger.warning("checkpoint set aside as %s, the one before it is used: %s", aside.name, error)
        else:
            return Checkpoint(**content)
    return None
