"""Files of a data set as its download leaves them: found, checked for completeness, and read.

Called by the readers of this package. It hides how missing files become one error that says where to get
them, and how values of a label map become positions in a list of classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from seg4diff.files import checked_name
from seg4diff.images import as_rgb
from seg4diff.metrics import IGNORED

_INVALID = -1


class IncompleteDatasetError(FileNotFoundError):
    """Files of a data set are missing; the message names them and where they are downloaded from."""


@dataclass(frozen=True)
class Sample:
    """A picture and the class of its pixels, read when they are needed.

    Attributes:
        name: unique in its data set; a relative path without suffix, with ``/`` between folders.
        read_image: the picture, RGB. Raises ValueError or FileNotFoundError, which name the file.
        read_labels: uint8 [height, width], positions in the data set's classes, or 255 where a pixel does not
            count. Raises as ``read_image``, also for values that stand for no class.
        prompts: names to prompt in this picture for some classes, by position, instead of the data set's.
        files: those that the picture and its labels are read from.
    """

    name: str
    read_image: Callable[[], Image.Image]
    read_labels: Callable[[], np.ndarray]
    prompts: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        checked_name(self.name, "the data set")


def require(dataset: str, root: Path, paths: Sequence[str], download: str) -> None:
    """Check that files and folders are there, and that folders hold something.

    Args:
        dataset: its name, for the message.
        root: the data root.
        paths: relative to it.
        download: what to download, from where, and where to unpack it.

    Raises:
        IncompleteDatasetError: some are not.
    """
    missing = [path for path in paths if not _is_there(root / path)]
    if missing:
        raise IncompleteDatasetError(
            f"data set {dataset!r} is incomplete under {str(root)!r}, missing: {', '.join(missing)}. "
            f"{download}"
        )


def first_present(root: Path, paths: Sequence[str]) -> str | None:
    """The first of alternative places, relative to ``root``, that is there."""
    return next((path for path in paths if _is_there(root / path)), None)


def read_split(path: Path) -> list[str]:
    """Names of a list with one to a line, the first word of each; blank lines do not count.

    Raises:
        ValueError: it is empty or not text, or a name could lead out of the data set.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no list of names ({error})") from error
    names = [checked_name(line.split()[0], f"{str(path)!r}") for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{str(path)!r} is empty: one name to a line expected")
    return names


def names_in(folder: Path, suffixes: Sequence[str], *, deep: bool = False) -> list[str]:
    """Sorted names, without suffix, of the files in a folder that end in one of ``suffixes``.

    Args:
        folder: where to look.
        suffixes: what a name may end in, any case; it is cut off.
        deep: also in folders inside it; names are then relative paths.
    """
    paths = folder.rglob("*") if deep else folder.iterdir()
    found = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        suffix = next((s for s in suffixes if name.lower().endswith(s.lower())), None)
        if suffix is not None and not path.name.startswith("."):
            found.append(name[: -len(suffix)])
    return sorted(found)


def make_samples(
    dataset: str,
    root: Path,
    names: Sequence[str],
    image: Callable[[str], Path],
    labels: Callable[[str], Path],
    read_labels: Callable[[Path], np.ndarray],
    download: str,
) -> tuple[Sample, ...]:
    """Samples of files that all exist.

    Args:
        dataset, root, download: see :func:`require`.
        names: of the samples.
        image, labels: the files of a name.
        read_labels: reads a file of labels, see :class:`Sample`.

    Raises:
        IncompleteDatasetError: files are missing; the message counts them and names the first.
        ValueError: there is no name, or one occurs twice.
    """
    if not names:
        raise IncompleteDatasetError(f"data set {dataset!r} holds no picture under {str(root)!r}. {download}")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"data set {dataset!r} lists {twice[0]!r} more than once")
    for kind, path_of in (("images", image), ("label maps", labels)):
        present: dict[Path, set[str]] = {}
        missing = []
        for name in names:
            path = path_of(name)
            if path.parent not in present:
                inside = path.parent
                present[inside] = set(os.listdir(inside)) if inside.is_dir() else set()
            if path.name not in present[path.parent]:
                missing.append(path)
        if missing:
            raise IncompleteDatasetError(
                f"data set {dataset!r} is half unpacked under {str(root)!r}: {len(missing)} of {len(names)} "
                f"{kind} are missing, the first is {missing[0].relative_to(root).as_posix()}. {download}"
            )
    return tuple(
        Sample(name, partial(as_rgb, file), partial(read_labels, of_labels), files=(file, of_labels))
        for name in names
        for file, of_labels in [(image(name), labels(name))]
    )


def value_table(classes: Mapping[int, int], ignored: Sequence[int] = (IGNORED,)) -> np.ndarray:
    """A table from values of a label map to positions in the classes.

    Args:
        classes: value -> position.
        ignored: values of pixels that do not count.

    Returns:
        int16, indexed by value; other values are invalid.
    """
    table = np.full(max([*classes, *ignored, 255]) + 1, _INVALID, np.int16)
    table[list(ignored)] = IGNORED
    for value, position in classes.items():
        table[value] = position
    return table


def read_label_map(path: Path, table: np.ndarray) -> np.ndarray:
    """Read a label map of 8 or 16 bits, with or without a palette.

    Args:
        path: a PNG whose values, not whose colours, are classes.
        table: see :func:`value_table`.

    Returns:
        uint8 [height, width], positions in the classes or 255.

    Raises:
        ValueError: the file is unreadable, holds colours, or a value that stands for no class.
    """
    try:
        with Image.open(path) as file:
            file.load()
            mode, values = file.mode, np.asarray(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"label map {str(path)!r} is unreadable ({error}); get a whole copy of it"
        ) from error
    if mode not in ("P", "L") and not mode.startswith("I"):
        raise ValueError(
            f"label map {str(path)!r} has mode {mode}: values of 8 or 16 bits expected, a class number for "
            "every pixel; colours cannot be read back safely"
        )
    return look_up(values, table, f"label map {str(path)!r}")


def look_up(values: np.ndarray, table: np.ndarray, source: str) -> np.ndarray:
    """Positions [height, width], uint8, of the classes of a label map's values.

    Raises:
        ValueError: a value that stands for no class; the message starts with ``source``.
    """
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high < len(table):
        found = table[values]
        if not (found == _INVALID).any():
            return found.astype(np.uint8)
    wrong = [v for v in np.unique(values).tolist() if not 0 <= v < len(table) or table[v] == _INVALID]
    raise ValueError(
        f"{source} holds {', '.join(map(str, wrong[:5]))}{', ...' if len(wrong) > 5 else ''}, which stand"
        f"{'s' if len(wrong) == 1 else ''} for no class; is it of this data set, and in its original values?"
    )


def _is_there(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))
