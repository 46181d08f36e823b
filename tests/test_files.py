"""A file appears whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from seg4diff.files import (
    DamagedFileError,
    check_outputs,
    checked_name,
    distinct_stems,
    no_space,
    read_sealed,
    write_atomically,
    write_sealed,
)


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


def test_permissions_of_a_file_that_a_writer_puts_in_place(tmp_path):
    def write(path: Path) -> None:
        private = tmp_path / "private"
        private.touch(mode=0o600)
        private.replace(path)

    plain = tmp_path / "plain"
    plain.write_text("x")
    written = write_atomically(tmp_path / "written", write)
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_folder_in_the_way(tmp_path):
    with pytest.raises(IsADirectoryError, match="give the name of a file"):
        write_atomically(tmp_path, lambda path: path.write_text("x"))


@pytest.mark.parametrize("kind", ["same", "symlink", "hard link", "linked folder"])
def test_an_output_that_is_an_input(tmp_path, kind):
    source, output = tmp_path / "in" / "a.png", tmp_path / "out" / "b.png"
    source.parent.mkdir()
    source.write_text("x")
    if kind == "same":
        output = tmp_path / "in" / ".." / "in" / "a.png"
    elif kind == "linked folder":
        output.parent.symlink_to(source.parent)
        output = output.with_name("a.png")
    else:
        output.parent.mkdir()
        (output.symlink_to if kind == "symlink" else output.hardlink_to)(source)
    with pytest.raises(ValueError, match=f"{output}' would replace the input '{source}'; give another --out"):
        check_outputs([tmp_path / "new.png", output], [tmp_path / "gone.png", source])
    check_outputs([tmp_path / "new.png", tmp_path / "in" / "b.png"], [source])


def test_two_outputs_in_one_file(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").symlink_to(tmp_path / "one")
    for first, second in (("one/a.png", "two/a.png"), ("one/a.png", "one/A.PNG")):
        with pytest.raises(ValueError, match=f"{first}' and .*{second}' would be one file"):
            check_outputs([tmp_path / first, tmp_path / second], [])
    check_outputs([tmp_path / "one" / "a.png", tmp_path / "two" / "b.png"], [])


def test_distinct_stems():
    paths = ["x/a.png", "a-overlay.jpg", "A.jpg", "b.png", "y/a.png", "a-2.png"]
    assert distinct_stems(paths) == ["a", "a-overlay", "A-2", "b", "a-3", "a-2-2"]
    endings = ("", "-overlay")
    found = distinct_stems(paths, endings)
    assert found == ["a", "a-overlay-2", "A-2", "b", "a-3", "a-2-2"]
    files = [f"{stem}{ending}".casefold() for stem in found for ending in endings]
    assert len(set(files)) == len(files)


def test_many_images_of_one_name():
    """Hours, if every name were compared with all before it."""
    stems = distinct_stems([f"{folder}/image.jpg" for folder in range(50_000)], ("", "-overlay"))
    assert len(set(stems)) == 50_000
    assert (stems[0], stems[-1]) == ("image", "image-50000")


OUTSIDE = [
    "/etc/x",
    "../x",
    "a/../../x",
    "a/..",
    "..",
    "C:x",
    "c:/x",
    "//host/x",
    "..\\x",
    "a\\b",
    "a\0b",
    "",
    ".",
]


@pytest.mark.parametrize("name", [*OUTSIDE, 7, None, ["a"]])
def test_names_that_lead_outside(name):
    with pytest.raises(ValueError, match=r"list.txt has the name .* could lead out of the data set"):
        checked_name(name, "list.txt")


@pytest.mark.parametrize("name", ["a", "a/b.c", "a..b", "..a", "a b", "2007_000033", "ä/猫"])
def test_names_that_stay_inside(name):
    assert checked_name(name, "list.txt") == name


def test_every_flipped_bit_of_a_sealed_file_is_noticed(tmp_path):
    data = bytes(range(200))
    path = write_sealed(tmp_path / "a.bin", data)
    assert read_sealed(path) == data
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with pytest.raises(DamagedFileError, match="a.bin' is damaged"):
            read_sealed(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError):
            read_sealed(path)


def test_a_full_disk_is_said_and_other_errors_are_left_alone(tmp_path: Path) -> None:
    full = no_space(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "x.png")
    assert full.errno == errno.ENOSPC
    assert "what is done is kept" in str(full)
    other = OSError(errno.EACCES, "Permission denied")
    assert no_space(other, tmp_path) is other
