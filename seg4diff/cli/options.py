"""Groups of options that several verbs share."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import tyro

from seg4diff.data.names import DatasetName
from seg4diff.files import check_folder

if TYPE_CHECKING:
    from seg4diff.backbones import Pipeline
    from seg4diff.data.registry import Dataset

# The forms of options whose absence has a meaning; without the hint, the help would show `(default: None)`.
OptionalPath: TypeAlias = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalNumber: TypeAlias = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
OptionalText: TypeAlias = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Layers: TypeAlias = Annotated[
    tuple[int, ...] | None, tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="")
]
LayersOrAuto: TypeAlias = Annotated[
    tuple[int, ...] | Literal["auto"] | None,
    tyro.conf.arg(metavar="N [N ...]|auto", help_behavior_hint=""),
]
Device: TypeAlias = Annotated[str | None, tyro.conf.arg(metavar="DEVICE", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class DebugOptions:
    """Options of every verb."""

    debug: bool = False
    """Show where an error came from."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(DebugOptions):
    """Which model, where, and how precise."""

    model: str = "stabilityai/stable-diffusion-3-medium-diffusers"
    """A name on the Hugging Face hub, a folder in diffusers' format, or `demo` for the small bundled model,
    which knows only its own drawn scenes."""
    lora: OptionalPath = None
    """A LoRA: a file or folder in diffusers' format, or a .pth file of Seg4Diff's authors."""
    device: Device = None
    """cpu, cuda, cuda:1, mps, ...; by default the GPU if there is one."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        tyro.conf.arg(metavar="{float32,bfloat16,float16}", help_behavior_hint=""),
    ] = None
    """By default bfloat16 on a GPU, float32 elsewhere."""
    offload: bool = False
    """Keep on the GPU only the part of the model that is running: slower, and fits small GPUs."""

    def check(self, out: Path) -> None:
        """Check what can be checked before a model is loaded.

        Raises:
            FileNotFoundError: the LoRA does not exist.
            ValueError: a seed is out of range.
            OSError: the folder of results cannot be written to.
        """
        if self.lora is not None and not self.lora.exists():
            raise FileNotFoundError(f"LoRA {str(self.lora)!r} does not exist; check the path")
        for seed in (getattr(self, "seed", 0), *getattr(self, "seeds", ())):
            if not 0 <= seed < 2**63:
                raise ValueError(f"seed {seed} is out of range; give one from 0 to 2**63 - 1")
        check_folder(out)

    def files(self) -> list[Path]:
        """Files that are read of a local model and of a LoRA."""
        places = [Path(self.model), *([] if self.lora is None else [self.lora])]
        return [file for place in places for file in (place, *place.glob("*"), *place.glob("*/*"))]

    def load(self, *, lora: bool = True) -> Pipeline:
        """The pipeline, with its LoRA unless `lora` is false.

        Each of several processes of `accelerate launch` gets a GPU of its own.
        """
        announce(f"loading {self.model}")
        import torch

        import seg4diff

        device = self.device
        if device is None and "LOCAL_RANK" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
        pipe = seg4diff.load_pipeline(self.model, device, self.dtype, offload=self.offload)
        if lora and self.lora is not None:
            seg4diff.load_lora(pipe, self.lora)
        return pipe


@dataclass(frozen=True, kw_only=True)
class DataOptions(DebugOptions):
    """How a data set is read."""

    data_root: OptionalPath = None
    """Folder that holds VOCdevkit, coco, ADEChallengeData2016, cityscapes; of `folder` the folder itself."""
    limit: OptionalNumber = None
    """Only the first N images."""
    partial: bool = False
    """Accept a data set of which images are missing."""

    def open(self, name: DatasetName) -> Dataset:
        """The data set, its files found and not read; the caller applies `limit` after other choices.

        Raises:
            ValueError, IncompleteDatasetError: see `seg4diff.data.open_dataset`.
        """
        from seg4diff.data.registry import open_dataset

        at_least_one(self, "limit")
        return open_dataset(name, self.data_root, partial=self.partial)


def at_least_one(options: DebugOptions, *names: str) -> None:
    """Raise ValueError if one of these options is a number below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")


def announce(action: str) -> None:
    """Say on stderr what is about to take a while, in one process of several."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{action} ...", file=sys.stderr, flush=True)


def end_processes() -> None:
    """Leave the group of processes that `accelerate launch` started, if this is one of them."""
    if "RANK" in os.environ:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
