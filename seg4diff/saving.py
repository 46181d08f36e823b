"""Files appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


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
