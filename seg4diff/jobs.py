"""Jobs that may stop at any moment and go on later: a folder with what the job is and what is done.

`settings.json` is the identity of a job: a folder is not taken for a job of other settings. Each process
appends its results to a file of its own, one JSON object per line, and keeps that file locked while it works.
A line ends in its checksum, so a line that was cut off or altered counts as not written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from seg4diff.files import no_space, write_atomically

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SETTINGS = "settings.json"
_RESULTS = "results-*.jsonl"
_CHECKSUM = b',"crc32":"%08x"}'


class FolderInUseError(RuntimeError):
    """Another run works in the folder."""


@dataclass(frozen=True)
class Share:
    """One of the processes that share a job.

    Attributes:
        index: number of this process, from 0.
        count: number of processes.
    """

    index: int = 0
    count: int = 1


ALONE = Share()


@dataclass(frozen=True)
class Job:
    """A folder that this process may write to; made by `claim`.

    Attributes:
        folder: of the job.
        share: this process among those of the job.
        settings: content of `settings.json`.
    """

    folder: Path
    share: Share
    settings: Mapping[str, Any]
    _file: BinaryIO

    def pending(self, groups: Sequence[Sequence[T]], done: Container[T]) -> list[Sequence[T]]:
        """The groups of this process that have a member which is not in `done`.

        Which groups are a process's own does not depend on what is done, so processes need not wait for each
        other.
        """
        mine = groups[self.share.index :: self.share.count]
        return [group for group in mine if not all(item in done for item in group)]

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Add results, and return when they are on the disk.

        Raises:
            OSError: they cannot be written; earlier results are kept.
        """
        rest = memoryview(b"".join(map(_to_line, entries)))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise no_space(error, Path(self._file.name)) from error

    def remove(self) -> None:
        """Delete the files of the job, and its folder if nothing else is in it."""
        for path in (*self.folder.glob(_RESULTS), self.folder / _SETTINGS):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.folder.rmdir()


def results_in(folder: Path) -> Iterator[dict[str, Any]]:
    """What all processes of a job have appended, read line by line."""
    for path in sorted(folder.glob(_RESULTS)):
        damaged = 0
        with open(path, "rb") as file:
            for line in file:
                entry = _read_line(line)
                if entry is not None:
                    yield entry
                elif line.strip():
                    damaged += 1
        if damaged:
            logger.warning("%d lines of %s were cut off or altered and do not count", damaged, str(path))


@contextmanager
def claim(
    folder: Path,
    identity: Mapping[str, Any],
    items: Iterable[str] = (),
    *,
    share: Share = ALONE,
    overwrite: bool = False,
) -> Iterator[Job]:
    """Begin a job in a folder, or go on with it, and keep other runs out of the folder for as long.

    Of several processes that overwrite, number 0 must enter first.

    Args:
        folder: of the job; made if there is none.
        identity: everything that decides the results, as JSON can hold it.
        items: names of all items in order. A later run may have more of them, if it begins with the same.
        share: this process among those of the job.
        overwrite: forget what earlier runs have done (by process 0).

    Raises:
        ValueError: the folder has results of other settings (the message has both values), or damaged
            settings.
        FolderInUseError: another run works in the folder.
        NotADirectoryError: `folder` is a file.
        OSError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / _RESULTS.replace("*", f"{share.index:05d}")) as file:
        if overwrite and share.index == 0:
            (folder / _SETTINGS).unlink(missing_ok=True)
            for path in folder.glob(_RESULTS):
                os.truncate(path, 0)
        settings = _settle(folder, identity, items)
        if file.seek(0, os.SEEK_END) and not _ends_line(file):
            file.write(b"\n")
        job = Job(folder, share, settings, file)
        try:
            yield job
        finally:
            if share == ALONE and not _has_results(folder):
                job.remove()


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[BinaryIO]:
    """A file that is open for reading and appending, made if there is none; no other process can lock it.

    Args:
        path: the file.
        wait: until a run that has locked it ends.

    Raises:
        FolderInUseError: another run has locked it, and `wait` is false.
        OSError: it cannot be written.
    """
    with open(path, "ab+", buffering=0) as file:
        try:
            _lock(file, wait)
        except (BlockingIOError, PermissionError) as error:
            raise FolderInUseError(
                f"another run works in {str(path.parent)!r}; wait for its end, or give another folder"
            ) from error
        except OSError as error:  # some network file systems
            logger.warning("%r cannot be locked (%s); start one run at a time", str(path), error)
        try:
            yield file
        finally:
            _unlock(file)


def _lock(file: BinaryIO, wait: bool) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _unlock(file: BinaryIO) -> None:
    """Unlock a file also for processes that were forked meanwhile; elsewhere closing it does."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def _ends_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _to_line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return text[:-1] + _CHECKSUM % zlib.crc32(text) + b"\n"


def _read_line(line: bytes) -> dict[str, Any] | None:
    """The object of a line, None if the line was cut off or altered."""
    length = len(_CHECKSUM % 0) + 1
    text = line[:-length] + b"}"
    if line[-length:] != _CHECKSUM % zlib.crc32(text) + b"\n":
        return None
    entry: dict[str, Any] = json.loads(text)
    return entry


def _settle(folder: Path, identity: Mapping[str, Any], items: Iterable[str]) -> dict[str, Any]:
    """Compare the settings of a job with those in its folder, write them, and return them."""
    names = tuple(items)
    settings: dict[str, Any] = json.loads(json.dumps(identity))
    settings |= {"items": len(names), "items_sha256": _digest(names)}
    earlier = _read_settings(folder)
    if earlier is not None:
        count = earlier.get("items")
        if isinstance(count, int) and 0 <= count <= len(names):
            if earlier.get("items_sha256") == _digest(names[:count]):  # the same, or more of them
                earlier |= {name: settings[name] for name in ("items", "items_sha256")}
        else:
            earlier["items_sha256"] = settings["items_sha256"]  # the count is difference enough
        different = [
            f"{name} was {_short(earlier.get(name))}, is {_short(settings.get(name))}"
            for name in sorted({*earlier, *settings})
            if earlier.get(name) != settings.get(name)
        ]
        if different:
            raise ValueError(
                f"{str(folder)!r} has results of other settings: {'; '.join(different)}. Give another "
                "folder, or remove this one to start anew"
            )
    text = json.dumps(settings, indent=1)
    write_atomically(folder / _SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))
    return settings


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings in a folder, None if nothing was done there yet."""
    if not _has_results(folder):
        return None
    path = folder / _SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        problem = "missing, though there are results"
    except (ValueError, RecursionError) as error:
        problem = f"damaged ({error})"
    else:
        return settings
    raise ValueError(f"{str(path)!r} is {problem}; give another folder, or remove this one to start anew")


def _has_results(folder: Path) -> bool:
    return any(path.stat().st_size for path in folder.glob(_RESULTS))


def _digest(names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
