"""Files of results: they appear whole or not at all, under names that do not clash."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Let `write` make a temporary file in the folder of `path`, then move it to `path` in one step.

    The folder is made if there is none. Where `write` raises (a full disk, an interrupt), nothing is left
    behind and a file that was at `path` stays as it was.

    Args:
        path: where the file is to be.
        write: writes to the path that it is given, which has the suffix of `path`.

    Returns:
        `path` as a Path.

    Raises:
        OSError: the folder cannot be made or written to.
        Exception: what `write` raises.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.stem[:40]}-{secrets.token_hex(6)}{path.suffix}"
    try:
        temporary.touch(exist_ok=False)  # with the permissions that the process's umask gives
        permissions = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(permissions)  # `write` may have put another file in its place, as safetensors does
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


class DamagedFileError(ValueError):
    """A sealed file was cut off or altered."""


SEAL_BYTES = hashlib.sha256().digest_size
"""Length of the hash that ends a sealed file."""


def write_sealed(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` and then its SHA-256, see `write_atomically`."""
    seal = hashlib.sha256(data).digest()
    return write_atomically(path, lambda temporary: temporary.write_bytes(data + seal))


def read_sealed(path: str | os.PathLike[str]) -> memoryview:
    """The data of a file that `write_sealed` wrote, after a comparison with its hash.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedFileError: a bit of it, of the data or of the hash, is not as it was written.
    """
    content = memoryview(Path(path).read_bytes())
    data, seal = content[:-SEAL_BYTES], content[-SEAL_BYTES:]
    if hashlib.sha256(data).digest() != seal:
        raise DamagedFileError(f"{str(path)!r} is damaged: it was cut off or altered after it was written")
    return data


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write an image in the format that the suffix names, see `write_atomically`."""
    try:
        return write_atomically(path, image.save)
    except OSError as error:
        raise no_space(error, Path(path)) from error


def check_folder(out: Path) -> None:
    """Check, before any work is done, that ``out`` is, or can become, a folder of results.

    Raises:
        NotADirectoryError: it, or a folder that it would be in, is a file.
        PermissionError: files cannot be made there.
    """
    existing = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise NotADirectoryError(
            f"--out {str(out)!r}: {str(existing)!r} is a file; give a folder"
            if existing != out
            else f"--out {str(out)!r} is a file; give a folder"
        )
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise PermissionError(
            f"--out {str(out)!r} cannot be written: no file can be made in {str(existing)!r} "
            f"({error.strerror}); give another folder"
        ) from error


def check_outputs(outputs: Iterable[Path], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Check, before any work is done, that no file that is to be written replaces an input or another output.

    Inputs are recognised through links and in any spelling. Outputs whose names differ in case alone count as
    one file, as they are on some file systems.

    Args:
        outputs: the files that will be written.
        inputs: the files that are read; those that do not exist are skipped.

    Raises:
        ValueError: an output is an input, or two outputs are one file; the message names both.
    """
    read: dict[tuple[int, int] | None, str | os.PathLike[str]] = {_identity(path): path for path in inputs}
    read.pop(None, None)
    written: dict[tuple[str, str], Path] = {}
    for path in outputs:
        if (known := read.get(_identity(path))) is not None:
            raise ValueError(
                f"the output {str(path)!r} would replace the input {os.fspath(known)!r}; give another --out"
            )
        other = written.setdefault((os.path.realpath(path.parent), path.name.casefold()), path)
        if other is not path:
            raise ValueError(
                f"the outputs {str(other)!r} and {str(path)!r} would be one file; rename one of their inputs"
            )


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """What tells a file from others, None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def checked_name(name: object, source: str) -> str:
    """A name that a file lists, if it stays inside the folder that it will be joined to.

    Raises:
        ValueError: it is not text, empty, absolute, or holds `..`, a drive, a backslash or a NUL; the
            message starts with `source`.
    """
    if (
        not isinstance(name, str)
        or not PurePosixPath(name).parts
        or PurePosixPath(name).is_absolute()
        or ".." in PurePosixPath(name).parts
        or PureWindowsPath(name).drive
        or "\\" in name
        or "\0" in name
    ):
        raise ValueError(
            f"{source} has the name {name!r}, which could lead out of the data set: relative names without "
            "'..', drive or backslash expected"
        )
    return name


def distinct_stems(paths: Sequence[str], endings: Sequence[str] = ("",)) -> list[str]:
    """The stem of each path, numbered where files STEM + ending of two paths would share a name.

    Names that differ in case alone count as shared.
    """
    stems: list[str] = []
    taken: set[str] = set()
    numbers: dict[str, int] = defaultdict(lambda: 1)
    for path in paths:
        stem = name = Path(path).stem
        while not taken.isdisjoint(files := [f"{name}{ending}".casefold() for ending in endings]):
            numbers[stem] += 1
            name = f"{stem}-{numbers[stem]}"
        taken.update(files)
        stems.append(name)
    return stems


def no_space(error: OSError, path: Path) -> OSError:
    """The error with what to do about it, where it says that a disk is full; else as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return OSError(
        error.errno,
        f"no space left for {str(path)!r}; what is done is kept: make room and run the same command again",
    )
