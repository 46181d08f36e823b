"""Prompts encoded once, and kept on disk between calls."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Pipeline
from seg4diff.backbones.identity import encoders_identity
from seg4diff.files import DamagedFileError, read_sealed, write_sealed

logger = logging.getLogger(__name__)

_FORMAT = "seg4diff-text-1"


@torch.no_grad()
def encoded_texts(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, Tensor]]:
    """The transformer's text arguments of prompts, without the batch axis.

    Args:
        pipe: a pipeline.
        prompts: the prompts; equal ones are encoded once.
        cache: a folder in which each encoded prompt is a file, named by a hash of the model's identity and of
            the prompt: read where it is there, else written. A damaged file is replaced. None: no file.
        batch_size: prompts that are encoded together.

    Returns:
        For each prompt the result of `Backbone.encode_text`; from a file, on the CPU.

    Raises:
        OSError: the folder cannot be written to.
    """
    backbone = patch_of(pipe).backbone
    paths = {} if cache is None else _paths(pipe, prompts, Path(cache))
    known: dict[str, dict[str, Tensor]] = {}
    for prompt, path in paths.items():
        try:
            known[prompt] = load(bytes(read_sealed(path)))
        except FileNotFoundError:
            continue
        except DamagedFileError as error:
            logger.warning("%s; the prompt is encoded again", error)
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    for first in range(0, len(missing), batch_size):
        batch = missing[first : first + batch_size]
        for prompt, arguments in zip(batch, backbone.encode_each(pipe, batch), strict=True):
            known[prompt] = arguments
            if prompt in paths:
                stored = {name: tensor.contiguous() for name, tensor in known[prompt].items()}
                write_sealed(paths[prompt], save(stored))
    return known


def _paths(pipe: Pipeline, prompts: Sequence[str], folder: Path) -> dict[str, Path]:
    model = [_FORMAT, type(pipe).__name__, encoders_identity(pipe), str(pipe.transformer.dtype)]
    keys = {prompt: json.dumps([*model, prompt]).encode() for prompt in prompts}
    return {prompt: folder / f"{hashlib.sha256(key).hexdigest()}.safetensors" for prompt, key in keys.items()}
