"""The command ``seg4diff``. Heavy imports wait until a command runs, so that ``--help`` is instant."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import tyro

from seg4diff.commands.analyze import Analyze, run_analyze
from seg4diff.commands.generate import Generate, run_generate
from seg4diff.commands.regions import Regions, run_regions
from seg4diff.commands.segment import Segment, run_segment
from seg4diff.evaluation.commands import Evaluate, Prepare, run_evaluate, run_prepare
from seg4diff.files import check_folder
from seg4diff.magnet.commands import Caption, Train, run_caption, run_train

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: all went well; something failed; what was asked for makes no sense; Ctrl-C."""


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
                run_segment(command)
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


def _demo(options: Demo) -> None:
    if options.scenes < 1:
        raise ValueError(f"--scenes {options.scenes} must be at least 1")
    check_folder(options.out)

    from seg4diff.demo.showcase import show

    show(options.scenes, options.out, options.device)


if __name__ == "__main__":
    sys.exit(main())
