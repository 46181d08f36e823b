"""The command ``seg4diff``. Heavy imports wait until a command runs, so that ``--help`` is instant."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, cast

import tyro

from seg4diff.commands.analyze import Analyze, run_analyze
from seg4diff.commands.generate import Generate, run_generate
from seg4diff.commands.regions import Regions, run_regions
from seg4diff.evaluation.commands import Evaluate, Prepare, run_evaluate, run_prepare
from seg4diff.magnet.commands import Caption, Train, run_caption, run_train
from seg4diff.saving import check_folder, distinct_stems, save_picture

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: all went well; something failed; what was asked for makes no sense; Ctrl-C."""


@dataclass(frozen=True)
class Segment:
    """Find things by name in pictures.

    For each picture NAME this writes NAME.png (the labels, with a palette), NAME-overlay.png (to look at) and
    what --formats asks for. Put the pictures before --classes:

        seg4diff segment kitchen.jpg --classes cat "wooden table" sofa
    """

    images: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)"),
    ]
    """The pictures, in any format that Pillow reads."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")]
    """What to look for. Every pixel gets the name that fits best, so name the background too."""
    model: str = "stabilityai/stable-diffusion-3-medium-diffusers"
    """A name on the Hugging Face hub, a folder in diffusers' format, or `demo` for the small bundled model,
    which knows only its own drawn scenes."""
    out: Path = Path("segmentation-output")
    """Folder for what is written."""
    formats: tuple[Literal["png", "npz", "json"], ...] = ("png",)
    """Labels as palette PNG; labels and scores for numpy; COCO run-length masks as JSON."""
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
    preset: Literal["default", "paper", "reference"] = "default"
    """`default` keeps the picture whole, `paper` crops it to a square, `reference` squashes it to one."""
    layers: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="")] = (
        None
    )
    """Transformer layers whose attention is read; by default the model's expert layer."""
    batch_size: int = 1
    """Pictures in one pass through the model."""
    seed: int = 0
    """Seed of the noise; the same seed gives the same result."""
    debug: bool = False
    """Show where an error came from."""


@dataclass(frozen=True)
class Demo:
    """Segment drawn scenes with the small bundled model: pictures to look at, and numbers."""

    scenes: int = 24
    """How many of the scenes that training never saw."""
    out: Path = Path("demo-output")
    """Folder for the pictures."""
    device: Annotated[str | None, tyro.conf.arg(metavar="DEVICE", help_behavior_hint="")] = None
    """cpu, cuda, cuda:1, ...; by default the GPU if there is one."""
    debug: bool = False
    """Show where an error came from."""


Command: TypeAlias = (
    Annotated[Segment, tyro.conf.subcommand("segment")]
    | Annotated[Regions, tyro.conf.subcommand("regions")]
    | Annotated[Analyze, tyro.conf.subcommand("analyze")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Caption, tyro.conf.subcommand("caption")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after ``seg4diff``; those of the process by default.

    Returns:
        An exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        from importlib.metadata import version

        print(f"seg4diff {version('seg4diff')}")
        return DONE
    command: Segment | Regions | Analyze | Generate | Demo | Evaluate | Prepare | Train | Caption = tyro.cli(
        Command,
        args=words or ["--help"],
        prog="seg4diff",
        description="Words in, segmentation out: what a text-to-image transformer attends to.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of packages that are not needed here
    _show_warnings()
    try:
        match command:
            case Segment():
                _segment(command)
            case Regions():
                run_regions(command)
            case Analyze():
                run_analyze(command)
            case Generate():
                run_generate(command)
            case Demo():
                _demo(command)
            case Evaluate():
                run_evaluate(command)
            case Prepare():
                run_prepare(command)
            case Train():
                run_train(command)
            case Caption():
                run_caption(command)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if command.debug:
            traceback.print_exc()
        return _report(error)
    return DONE


def _show_warnings() -> None:
    """This library's warnings on stderr; other libraries bring their own handlers."""
    ours = logging.getLogger("seg4diff")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        ours.addHandler(handler)


def _report(error: Exception) -> int:
    """One line on stderr, and the exit code."""
    wrong_input = (ValueError, TypeError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
    code = WRONG_INPUT if isinstance(error, wrong_input) else FAILED
    message = " ".join(str(error).split()) or type(error).__name__
    if code == FAILED:
        from seg4diff.loading import is_out_of_memory, out_of_memory_remedy

        if is_out_of_memory(error) and "out of memory while" not in message:
            message = f"{out_of_memory_remedy('running the model')} ({message})"
    print(f"seg4diff: error: {message}", file=sys.stderr)
    return code


def _segment(options: Segment) -> None:
    if not options.images:
        raise ValueError("no picture given; put at least one before --classes")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} must be at least 1")
    check_folder(options.out)

    from seg4diff.images import as_rgb

    paths = list(dict.fromkeys(options.images))
    for path in paths:  # before anything large is loaded
        as_rgb(path)

    from tqdm import tqdm

    import seg4diff
    from seg4diff.loading import load_pipeline
    from seg4diff.segmentation import Segmentation

    pipe = load_pipeline(options.model, options.device, options.dtype, offload=options.offload)
    if options.lora is not None:
        seg4diff.load_lora(pipe, options.lora)
    seg4diff.patch(pipe)
    targets = dict(zip(paths, distinct_stems(paths), strict=True))
    with tqdm(total=len(targets), unit="picture", disable=None) as progress:
        for batch in _batches(paths, options.batch_size):
            results = seg4diff.segment(
                pipe,
                [as_rgb(path) for path in batch],
                list(options.classes),
                preset=options.preset,
                layers=options.layers,
                seed=options.seed,
                batch_size=options.batch_size,
                progress=False,
            )
            for path, result in zip(batch, cast(list[Segmentation], results), strict=True):
                for suffix in options.formats:
                    result.save(options.out / f"{targets[path]}.{suffix}")
                save_picture(result.overlay(), options.out / f"{targets[path]}-overlay.png")
                progress.write(f"{path}: {_shares(result)} -> {options.out / targets[path]}-overlay.png")
                progress.update()


def _demo(options: Demo) -> None:
    if options.scenes < 1:
        raise ValueError(f"--scenes {options.scenes} must be at least 1")
    check_folder(options.out)

    from seg4diff.demo.showcase import show

    show(options.scenes, options.out, options.device)


def _batches(paths: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return (paths[start : start + size] for start in range(0, len(paths), size))


def _shares(result: object) -> str:
    text = repr(result)
    return text[text.index(": ") + 2 : -1] if ": " in text else text


if __name__ == "__main__":
    sys.exit(main())
