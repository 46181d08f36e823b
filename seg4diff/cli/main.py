"""The command `seg4diff`. Heavy imports wait until a verb runs, so that `--help` is instant."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated, Any, TypeAlias, Union, get_args

import tyro

from seg4diff.cli.analyze import Analyze
from seg4diff.cli.caption import Caption
from seg4diff.cli.clip_score import ClipScore
from seg4diff.cli.demo import Demo
from seg4diff.cli.discover import Discover
from seg4diff.cli.estimate import Estimate
from seg4diff.cli.evaluate import Evaluate
from seg4diff.cli.generate import Generate
from seg4diff.cli.kernels import Kernels
from seg4diff.cli.prepare import Prepare
from seg4diff.cli.rank_layers import RankLayers
from seg4diff.cli.regions import Regions
from seg4diff.cli.segment import Segment
from seg4diff.cli.train import Train

DONE, FAILED, WRONG_INPUT, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
"""Exit codes: all went well; something failed; an option or input makes no sense; Ctrl-C; `| head` ended."""

Verb: TypeAlias = (
    Segment
    | Regions
    | Discover
    | Generate
    | Analyze
    | RankLayers
    | Evaluate
    | ClipScore
    | Prepare
    | Caption
    | Train
    | Estimate
    | Demo
    | Kernels
)


def parse(words: Sequence[str]) -> Verb:
    """The verb that the words of a command line name, with its options.

    Raises:
        SystemExit: help was asked for (0), or the words are not a command (2); the text is printed.
    """
    given = list(words) or ["--help"]
    form: Any = Verb
    if given[0] in ("-h", "--help"):  # a list of the verbs, each with the first line of its help
        form = Union[tuple(  # noqa: UP007
            Annotated[verb, tyro.conf.subcommand(description=verb.__doc__.partition("\n")[0])]
            for verb in get_args(Verb)
        )]  # fmt: skip
    command: Verb = tyro.cli(
        form,
        args=given,
        prog="seg4diff",
        description="Words in, segmentation out: what a text-to-image transformer attends to.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after `seg4diff`; those of the process by default.

    Returns:
        An exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted, 141 broken pipe.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        from importlib.metadata import version

        print(f"seg4diff {version('seg4diff')}")
        return DONE
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a letter that the terminal lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    verb = parse(words)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of packages that are not needed here
    _show_warnings()
    try:
        verb.run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush at exit
        return BROKEN_PIPE
    except Exception as error:
        if verb.debug:
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


if __name__ == "__main__":
    sys.exit(main())
