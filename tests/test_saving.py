"""A file appears whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from seg4diff.saving import write_atomically


def test_writes_and_makes_folders(tmp_path):
    target = tmp_path / "new" / "folder" / "file.txt"
    assert write_atomically(str(target), lambda path: path.write_text("whole")) == target
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["file.txt"]


def test_temporary_file_is_beside_the_target_with_its_suffix(tmp_path):
    seen: list[Path] = []
    write_atomically(tmp_path / "a.png", lambda path: (seen.append(path), path.write_bytes(b"x")))
    assert seen[0].parent == tmp_path
    assert seen[0].suffix == ".png"
    assert seen[0].name != "a.png"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "file.txt"
    target.write_text("before")

    def write(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(target, write)
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_permissions_follow_the_umask(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    written = write_atomically(tmp_path / "written", lambda path: path.write_text("x"))
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_folder_in_the_way(tmp_path):
    with pytest.raises(IsADirectoryError, match="give the name of a file"):
        write_atomically(tmp_path, lambda path: path.write_text("x"))
