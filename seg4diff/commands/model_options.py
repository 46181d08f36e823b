"""What every command that runs a model asks for: which model, where, and how precise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of a command line."""

    model: str = "stabilityai/stable-diffusion-3-medium-diffusers"
    """A name on the Hugging Face hub, a folder in diffusers' format, or `demo` for the small bundled model,
    which knows only its own drawn scenes."""
    lora: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """A LoRA: a file or folder in diffusers' format, or a .pth file of Seg4Diff's authors."""
    device: Annotated[str | None, tyro.conf.arg(metavar="DEVICE", help_behavior_hint="")] = None
    """cpu, cuda, cuda:1, ...; by default the GPU if there is one."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16,float16}", help_behavior_hint=""),
    ] = None
    """By default bfloat16 on a GPU, float32 elsewhere."""
    offload: bool = False
    """Keep on the GPU only the part of the model that is running: slower, and fits small GPUs."""
    debug: bool = False
    """Show where an error came from."""


def model_files(options: ModelOptions) -> list[Path]:
    """Files that are read of a local model and of a LoRA."""
    places = [Path(options.model), *([] if options.lora is None else [options.lora])]
    return [file for place in places for file in (place, *place.glob("*"), *place.glob("*/*"))]


def load_model(options: ModelOptions) -> Any:
    """The pipeline that the options name, with its LoRA."""
    import seg4diff
    from seg4diff.loading import load_pipeline

    pipe = load_pipeline(options.model, options.device, options.dtype, offload=options.offload)
    if options.lora is not None:
        seg4diff.load_lora(pipe, options.lora)
    return pipe


def load_patched(options: ModelOptions) -> Any:
    """The same, ready to be watched."""
    import seg4diff

    return seg4diff.patch(load_model(options))
