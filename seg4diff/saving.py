"""Where results go: files appear whole or not at all, under names that do not clash."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let ``write`` make a temporary file in the folder of ``path``, then move it to ``path`` in one step.

    The folder is made if there is none. Where ``write`` raises (a full disk, an interrupt), nothing is left
    behind and a file that was at ``path`` stays as it was.

    Args:
        path: where the file is to be.
        write: writes to the path that it is given, which has the suffix of ``path``.

    Returns:
        ``path`` as a Path.

    Raises:
        OSError: the folder cannot be made or written to.
        Exception: what ``write`` raises.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.stem[:40]}-{secrets.token_hex(6)}{path.suffix}"
    try:
        temporary.touch(exist_ok=False)  # with the permissions that the process's umask gives
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture in the format that the suffix names, see :func:`write_atomically`."""
    return write_atomically(path, picture.save)


def check_folder(out: Path) -> None:
    """Raise NotADirectoryError if ``out``, meant to be a folder of results, is a file."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {str(out)!r} is a file; give a folder")


def distinct_stems(paths: Sequence[str]) -> list[str]:
    """The stem of each path, numbered where two are alike."""
    stems: list[str] = []
    for path in paths:
        stem = name = Path(path).stem
        number = 2
        while name in stems:
            name, number = f"{stem}-{number}", number + 1
        stems.append(name)
    return stems
