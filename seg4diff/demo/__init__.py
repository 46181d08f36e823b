"""A small Stable Diffusion 3 pipeline that grounds words, and the scenes it was trained on.

`load_pipeline()` returns it, made of real diffusers classes and read from files that come with the package;
`scene(seed)` draws a picture with a caption and a label for every pixel. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .scenes import CLASSES, HELD_OUT, Scene, scene

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusion3Pipeline

__all__ = ["CLASSES", "HELD_OUT", "WEIGHTS", "Scene", "load_pipeline", "scene"]

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the bundled model, in diffusers' own format."""


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars while six small files are read, and no word on optional packages that are missing."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    verbosity = transformers_logging.get_verbosity()
    for log in shown:
        log.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for log in shown:
            log.enable_progress_bar()


def load_pipeline(
    dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> StableDiffusion3Pipeline:
    """The bundled model as a `StableDiffusion3Pipeline` without T5, float32 unless `dtype` says otherwise.

    `pipe.transformer.config["_seg4diff_expert_layers"]` lists the layers whose image-to-text attention
    segments best, as measured on training scenes.
    """
    import diffusers
    import torch

    if not (WEIGHTS / "model_index.json").is_file():
        raise FileNotFoundError(f"no demo model in {WEIGHTS}: train it with python -m seg4diff.demo.train")
    with _quiet_loading():
        pipe: StableDiffusion3Pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
            WEIGHTS,
            text_encoder_3=None,
            tokenizer_3=None,
            local_files_only=True,
            dtype=torch.float32 if dtype is None else dtype,
        )
    # Even a move to where it is makes diffusers warn of float16 on a CPU.
    return pipe if torch.device(device) == pipe.device else pipe.to(device)
