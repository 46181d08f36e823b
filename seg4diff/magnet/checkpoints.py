"""Checkpoints: everything a run needs to go on as if it had never stopped, one verified file each.

Called by the trainer. A checkpoint that was cut off is told from a whole one by its checksum, and passed
over.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from seg4diff.magnet.verified_files import DamagedFileError, read_verified, write_verified

logger = logging.getLogger(__name__)

_PATTERN = "checkpoint-*.safetensors"


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
    """

    step: int
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]
    settings: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint, then remove all but the ``keep`` latest.

    Raises:
        OSError: it cannot be written; the earlier ones are untouched.
    """
    tensors = {f"weights.{name}": tensor for name, tensor in checkpoint.weights.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in checkpoint.average.items()}
    plain = _without_tensors(checkpoint.optimizer, "optimizer", tensors)
    metadata = {
        "step": str(checkpoint.step),
        "optimizer": json.dumps(plain),
        "progress": json.dumps(checkpoint.progress),
        "settings": json.dumps(checkpoint.settings),
    }
    path = write_verified(folder / f"checkpoint-{checkpoint.step:07d}.safetensors", tensors, metadata)
    for old in sorted(folder.glob(_PATTERN))[:-keep]:
        old.unlink(missing_ok=True)
    return path


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The latest whole checkpoint in a folder, or None.

    Damaged ones are named in a message and set aside under another name, so that they never count as one of
    those to keep.
    """
    for path in sorted(folder.glob(_PATTERN), reverse=True):
        try:
            return _parse(*read_verified(path))
        except (DamagedFileError, KeyError, json.JSONDecodeError) as error:
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            logger.warning("checkpoint set aside as %s, the one before it is used: %s", aside.name, error)
    return None


def _parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    def group(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    return Checkpoint(
        step=int(metadata["step"]),
        weights=group("weights."),
        average=group("average."),
        optimizer=_with_tensors(json.loads(metadata["optimizer"]), tensors),
        progress=json.loads(metadata["progress"]),
        settings=json.loads(metadata["settings"]),
    )


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON can hold it; tensors go to ``tensors``, integer keys keep their type."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[key, _without_tensors(entry, f"{name}.{key}", tensors)] for key, entry in value.items()]
        return {"items": items}
    if isinstance(value, (list, tuple)):
        return {"list": [_without_tensors(entry, f"{name}.{i}", tensors) for i, entry in enumerate(value)]}
    return {"value": value}


def _with_tensors(value: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "items" in value:
        return {key: _with_tensors(entry, tensors) for key, entry in value["items"]}
    if "list" in value:
        return [_with_tensors(entry, tensors) for entry in value["list"]]
    return value["value"]
