"""Files of a data set: found, and missing ones reported in one error with the place to get them."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from seg4diff.files import checked_name

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class IncompleteDatasetError(FileNotFoundError):
    """Files of a data set are missing; the message names them and where they are downloaded from."""


def require(dataset: str, root: Path, paths: Sequence[str], remedy: str) -> None:
    """Check that files and folders exist, and that folders are not empty.

    Args:
        dataset: its name, for the message.
        root: the data root.
        paths: relative to it.
        remedy: what to download, from where, and where to unpack it.

    Raises:
        IncompleteDatasetError: some do not.
    """
    missing = [path for path in paths if first_present(root, [path]) is None]
    if missing:
        raise IncompleteDatasetError(
            f"data set {dataset!r} is incomplete under {str(root)!r}, missing: {', '.join(missing)}. {remedy}"
        )


def first_present(root: Path, paths: Sequence[str]) -> str | None:
    """The first of these files or folders, relative to `root`, that exists and is not an empty folder."""
    for path in paths:
        place = root / path
        if place.is_file() or (place.is_dir() and any(place.iterdir())):
            return path
    return None


def require_all(
    dataset: str, root: Path, kind: str, paths: Sequence[str], present: Collection[str], remedy: str
) -> None:
    """Check that every image or label map of a data set exists.

    Args:
        dataset, root, remedy: see `require`.
        kind: what they are, for the message.
        paths: those that must exist, relative to the root.
        present: those that do.

    Raises:
        IncompleteDatasetError: files are missing; the message counts them and names the first.
    """
    missing = [path for path in paths if path not in present]
    if missing:
        raise IncompleteDatasetError(
            f"data set {dataset!r} is half unpacked under {str(root)!r}: {len(missing)} of {len(paths)} "
            f"{kind} are missing, the first is {missing[0]}. {remedy}"
        )


def read_list(path: Path) -> list[str]:
    """Names of a list with one per line, the first word of each; blank lines do not count.

    Raises:
        ValueError: it is empty or not text, or a name could lead out of the data set.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not a list of names ({error})") from error
    names = [checked_name(line.split()[0], f"{str(path)!r}") for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{str(path)!r} is empty: one name per line expected")
    return names


def files_in(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """Sorted paths, relative to a folder and with `/`, of files in it and in folders inside it.

    Args:
        folder: without it there are no files.
        suffixes: what a name must end in, in any case. Hidden files and folders are left out, and names
            that lead elsewhere on Windows.
    """
    endings = tuple(suffix.lower() for suffix in suffixes)
    found = []
    for inside, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = Path(inside).relative_to(folder).as_posix() + "/"
        prefix = "" if prefix == "./" else prefix
        found += [prefix + f for f in files if f.lower().endswith(endings) and not f.startswith(".")]
    unsafe = [path for path in found if "\\" in path or path[1:2] == ":"]  # see `checked_name`
    if unsafe:
        logger.warning(
            "%d names in %s are left out, such as %r: no backslash or drive", len(unsafe), folder, unsafe[0]
        )
    return sorted(set(found) - set(unsafe)) if unsafe else sorted(found)


def files_by_name(folder: Path, suffixes: Sequence[str]) -> dict[str, str]:
    """The paths of `files_in` by what is left of them without suffix.

    Raises:
        ValueError: two files differ in their suffix alone.
    """
    found: dict[str, str] = {}
    for path in files_in(folder, suffixes):
        suffix = next(s for s in suffixes if path.lower().endswith(s.lower()))
        name = path[: -len(suffix)]
        if name in found:
            raise ValueError(f"{str(folder)!r} holds both {found[name]!r} and {path!r}; keep one of them")
        found[name] = path
    return found
