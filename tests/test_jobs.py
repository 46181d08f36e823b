"""Jobs: stopped anywhere and continued, shared, and refused where results would be mixed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from seg4diff.jobs import ALONE, FolderInUseError, Job, Share, claim, lock, results_in

IDENTITY = {"model": "one", "seed": 1}
NAMES = tuple(f"image {number}" for number in range(7))
GROUPS = [NAMES[first : first + 2] for first in range(0, len(NAMES), 2)]


def work(job: Job, stop_after: int | None = None) -> None:
    """Append the length of every name that is not done; die after so many groups."""
    done = {entry["name"] for entry in results_in(job.folder)}
    for number, group in enumerate(job.pending(GROUPS, done)):
        if number == stop_after:
            os.kill(os.getpid(), signal.SIGKILL)
        job.append({"name": name, "length": len(name)} for name in group)


def run(folder: Path, share: Share = ALONE, stop_after: int | None = None) -> None:
    with claim(folder, IDENTITY, NAMES, share=share) as job:
        work(job, stop_after)


def lines(folder: Path) -> list[str]:
    return sorted(line for path in folder.glob("results-*.jsonl") for line in path.read_text().splitlines())


def in_a_process(folder: Path, share: Share = ALONE, stop_after: int | None = None) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=run, args=(folder, share, stop_after))
    process.start()
    process.join(timeout=60)
    return process.exitcode


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, stop_after: int) -> None:
    run(tmp_path / "whole")
    assert in_a_process(tmp_path / "cut", stop_after=stop_after) == -signal.SIGKILL
    assert len(lines(tmp_path / "cut")) == 2 * stop_after
    run(tmp_path / "cut")  # the lock of a killed process is gone
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    run(tmp_path / "cut")  # nothing is left to do
    assert len(lines(tmp_path / "cut")) == len(NAMES)


def test_processes_share_the_groups(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    for index in (1, 0):
        assert in_a_process(tmp_path / "shared", Share(index, 2)) == 0
    first, second = (
        [json.loads(line)["name"] for line in path.read_text().splitlines()]
        for path in sorted((tmp_path / "shared").glob("results-*.jsonl"))
    )
    assert (first, second) == ([*GROUPS[0], *GROUPS[2]], [*GROUPS[1], *GROUPS[3]])
    assert lines(tmp_path / "shared") == lines(tmp_path / "whole")


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "settings.json").read_bytes()
    other = {"model": "two", "layers": (1, 2)}
    with (
        pytest.raises(
            ValueError,
            match=r"layers was None, is \[1, 2\]; model was 'one', is 'two'; seed was 1, is None\. Give",
        ),
        claim(tmp_path, other, NAMES),
    ):
        pass
    assert (tmp_path / "settings.json").read_bytes() == before
    assert len(lines(tmp_path)) == len(NAMES)
    with claim(tmp_path, other, NAMES, overwrite=True) as job:
        assert job.settings["layers"] == [1, 2]
        assert lines(tmp_path) == []


def test_items_may_be_added_and_not_removed_or_replaced(tmp_path: Path) -> None:
    run(tmp_path)
    with claim(tmp_path, IDENTITY, (*NAMES, "one more")) as job:
        assert job.pending([["one more"], NAMES], set(NAMES)) == [["one more"]]
    for names, message in ((NAMES, "items was 8, is 7"), (("x", *NAMES, "y"), "items_sha256 was")):
        with pytest.raises(ValueError, match=message), claim(tmp_path, IDENTITY, names):
            pass


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with claim(tmp_path, IDENTITY, NAMES) as job:
        job.append([{"name": NAMES[0]}])
        with pytest.raises(FolderInUseError, match="another run works in"), claim(tmp_path, IDENTITY, NAMES):
            pass
        with (
            pytest.raises(FolderInUseError),
            claim(tmp_path, {"model": "two"}, overwrite=True),
        ):
            pass
        assert in_a_process(tmp_path) == 1
        with claim(tmp_path, IDENTITY, NAMES, share=Share(1, 2)):  # another process of the same job
            pass
    assert len(lines(tmp_path)) == 1
    run(tmp_path)
    with lock(tmp_path / ".lock"), pytest.raises(FolderInUseError), lock(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:-9],  # cut off
        lambda line: b"",
        lambda line: line.replace(b'"length":7', b'"length":8'),
        lambda line: line.replace(b"image 6", b"image 5"),
        lambda line: b"\xff\x00" + line,
        lambda line: b"[" * 5000 + b"\n",
    ],
    ids=["cut", "gone", "number", "name", "bytes", "deep"],
)
def test_a_damaged_last_line_is_done_again(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "damaged")
    path = tmp_path / "damaged" / "results-00000.jsonl"
    *kept, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept) + damage(last))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING, logger="seg4diff"):
        assert [entry["name"] for entry in results_in(tmp_path / "damaged")] == list(NAMES[:-1])
    assert ("1 lines of" in caplog.text) == bool(damage(last))  # type: ignore[operator]
    run(tmp_path / "damaged")
    assert list(results_in(tmp_path / "damaged")) == list(results_in(tmp_path / "whole"))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 5000, None])
def test_damaged_or_missing_settings_are_refused(tmp_path: Path, content: str | None) -> None:
    run(tmp_path)
    path = tmp_path / "settings.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=r"settings.json' is (damaged|missing)"):
        run(tmp_path)
    assert len(lines(tmp_path)) == len(NAMES)


def test_hostile_names_and_values_come_back(tmp_path: Path) -> None:
    entries = [
        {"name": name} for name in ("ü\u2028\x85\n", '"},{"', os.fsdecode(b"\xff.png"), ',"crc32":"0"}')
    ]
    with claim(tmp_path, {}, [entry["name"] for entry in entries]) as job:
        job.append(entries)
        job.append([])
    assert list(results_in(tmp_path)) == entries
    assert len((tmp_path / "results-00000.jsonl").read_bytes().splitlines()) == len(entries)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"), claim(tmp_path / "file", {}):
        pass


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    message = "no space left for .*run the same command again"
    with open("/dev/full", "ab", buffering=0) as full, pytest.raises(OSError, match=message):
        Job(tmp_path, ALONE, {}, full).append([{"name": "a"}])


def test_settings_without_results_do_not_bind(tmp_path: Path) -> None:
    """A run that fails before its first result leaves nothing; one that is killed, nothing that binds."""
    with pytest.raises(RuntimeError, match="no model"), claim(tmp_path / "job", IDENTITY):
        raise RuntimeError("no model")
    assert not (tmp_path / "job").exists()
    assert in_a_process(tmp_path / "job", stop_after=0) == -signal.SIGKILL
    with claim(tmp_path / "job", {"model": "two"}) as job:
        assert job.settings["model"] == "two"


def test_a_lock_may_be_waited_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")

    def wait() -> None:
        with lock(tmp_path / ".lock", wait=True) as file:
            file.write(b"second")

    process = context.Process(target=wait)
    with lock(tmp_path / ".lock") as file:
        process.start()
        process.join(timeout=0.3)
        assert process.is_alive()
        file.write(b"first ")
    process.join(timeout=60)
    assert process.exitcode == 0
    assert (tmp_path / ".lock").read_bytes() == b"first second"


def test_a_finished_job_leaves_nothing_but_the_files_of_others(tmp_path: Path) -> None:
    for others in ([], ["mine.txt"]):
        folder = tmp_path / f"{len(others)}"
        with claim(folder, {}) as job:
            for name in others:
                (folder / name).write_text("")
            job.append([{"name": "a"}])
            job.remove()
        assert folder.exists() == bool(others)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
