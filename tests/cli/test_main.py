"""What all verbs have in common: exit codes, errors on one line, help that loads nothing heavy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import seg4diff
from seg4diff.cli.main import Verb, main
from tests.support.paths import ROOT

VERBS = (
    "segment", "regions", "generate", "analyze", "rank-layers", "evaluate", "clip-score", "prepare",
    "caption", "train", "estimate", "demo", "kernels",
)  # fmt: skip


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that is an error, and the last."""
    *before, last = capsys.readouterr().err.splitlines()
    assert not any("error" in line or "Traceback" in line for line in before)
    assert last.startswith("seg4diff: error: ")
    return last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["segment", "nowhere.png", "--classes", "cat"], "nowhere.png"),
        (["segment", "IMAGE", "BROKEN", "--classes", "cat"], "broken.png"),
        (
            ["segment", "https://example.com/cat.jpg", "--classes", "cat"],
            "https://example.com/cat.jpg' is a URL",
        ),
        (["segment", "--classes", "cat"], "no image given"),
        (["segment", "IMAGE", "--classes", "cat", "--batch-size", "0"], "--batch-size 0"),
        (["segment", "IMAGE", "--classes", "cat", "--lora", "gone"], "LoRA 'gone' does not exist"),
        (["regions", "IMAGE", "--threshold", "0"], "--threshold 0.0 must be"),
        (["analyze"], "nothing to analyse"),
        (["analyze", "--prompts", "a", "--noise-levels", "29"], "noise level 29"),
        (["analyze", "--prompts-file", "nowhere.txt"], "nowhere.txt"),
        (["rank-layers", "--dataset", "voc20"], "'voc20' needs a data root"),
        (["rank-layers", "--dataset", "scenes", "--limit", "0"], "--limit 0"),
        (["generate", " "], "no prompt given"),
        (["generate", "a", "--perturb", "1", "--sigma", "0"], "sigma=0.0"),
        (["generate", "a", "--perturb", "1", "--kernel-size", "4"], "kernel_size=4"),
        (["generate", "a cat", "--swap", "cat"], "'cat' is not a pair"),
        (["generate", "a cat", "--weight", "cat=x"], "'x' is not a number"),
        (["generate", "a", "--words", "cat"], "add --save-maps"),
        (["generate", "a", "--steps", "0"], "--steps 0"),
        (["generate", "a", "--height", "0"], "--height 0"),
        (["generate", "a", "--guidance-scale", "nan"], "--guidance-scale nan"),
        (["generate", "a", "--seed", str(2**70)], f"seed {2**70} is out of range"),
        (["generate", "a", "--guide-layers", "1"], "--guide-layers does nothing by itself; add --guide"),
        (["generate", "a", "--sigma", "3"], "--sigma does nothing by itself; add --perturb or --guide"),
        (["segment", "IMAGE", "--classes", "cat", "--seed", "-1"], "seed -1 is out of range"),
        (["segment", "FOLDER", "--classes", "cat"], "give the images in it, such as"),
        (["clip-score", "--prompts", "TEXT", "--seeds", "0", "-1"], "seed -1 is out of range"),
        (["analyze", "--prompts-file", "BROKEN_TEXT"], "latin.txt' holds no prompts"),
        (["clip-score", "--prompts", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["demo", "--scenes", "0"], "--scenes 0 must be at least 1"),
        (["train", "--set", "steps=0"], "steps=0 must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_2_before_a_model_is_loaded(
    words: list[str],
    message: str,
    image_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load_pipeline(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("seg4diff.loading.load_pipeline", load_pipeline)
    (tmp_path / "broken.png").write_text("text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "prompts.txt").write_text("a cat")
    stand_ins = {
        "IMAGE": image_file,
        "BROKEN": str(tmp_path / "broken.png"),
        "BROKEN_TEXT": str(tmp_path / "latin.txt"),
        "TEXT": str(tmp_path / "prompts.txt"),
        "FOLDER": str(tmp_path),
    }
    assert main([stand_ins.get(word, word) for word in words] + ["--out", str(tmp_path / "out")]) == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["regions", "IMAGE", "--layers", "7"], "layer 7 is out of range"),
        (["analyze", "--prompts", "a", "--layers", "3"], "layer 3 is out of range"),
        (["generate", "a", "--perturb", "5"], "layer 5 is out of range"),
        (["generate", "a", "--guide", "-1"], "scale=-1.0"),
        (["generate", "a cat", "--drop", "zebra"], "'zebra' is not in the prompt; known words: a, cat"),
        (["generate", "a", "--save-maps", "--words", "dog", "--steps", "1"], "'dog' is not in the prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_for_the_model_is_2(
    stand_in: Any,
    words: list[str],
    message: str,
    image_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [image_file if word == "IMAGE" else word for word in words]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    "words",
    [
        "segment IMAGE --classes cat",
        "regions IMAGE",
        "generate a",
        "analyze --prompts a",
        "rank-layers --dataset scenes",
        "evaluate --dataset scenes",
        "clip-score --prompts PROMPTS",
        "prepare --dataset scenes --limit 1",
        "train --set steps=1",
        "demo",
        "demo --train",
    ],
)
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_found_first(
    words: str,
    image_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load_pipeline(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("seg4diff.loading.load_pipeline", load_pipeline)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    given = words.replace("IMAGE", image_file).replace("PROMPTS", str(tmp_path / "prompts.txt")).split()
    assert main([*given, "--out", "/proc/no/such"]) == 1
    error = error_of(capsys)
    assert "--out '/proc/no/such' cannot be written: no file can be made in '/proc'" in error
    assert main([*given, "--out", image_file]) == 2
    assert "is a file; give a folder" in error_of(capsys)
    assert main([*given, "--out", f"{image_file}/below"]) == 2
    assert f"'{image_file}' is a file; give a folder" in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("regions IMAGE", "photo.png"),
        ("analyze --images IMAGE --noise-levels 4", "attention-mass-4.png"),
        ("analyze --prompts-file IMAGE", "report.json"),
    ],
)
def test_what_is_read_is_not_replaced(
    words: str, name: str, image_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / name
    source.write_bytes(Path(image_file).read_bytes() if source.suffix == ".png" else b'["a cat"]')
    before = source.read_bytes()
    assert main([*words.replace("IMAGE", str(source)).split(), "--out", str(tmp_path)]) == 2
    assert f"{source}' would replace the input '{source}'" in error_of(capsys)
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [
        ["segment", "x.png"],
        ["nonsense"],
        ["segment", "x.png", "--classes", "cat", "--preset", "best-ever"],
        ["segment", "x.png", "--classes", "cat", "--seed", "one"],
        ["rank-layers", "--dataset", "unheard-of"],
        ["evaluate"],
    ],
)
def test_words_that_do_not_parse_are_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("layer 99 is out of range\nuse 0 to 23"), 2, "layer 99 is out of range use 0 to 23"),
        (RuntimeError("it broke"), 1, "it broke"),
        (ConnectionError("no hub"), 1, "no hub"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory while running the model; "),
        (RuntimeError(), 1, "RuntimeError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_of_the_model(
    stand_in: Any,
    image_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(seg4diff, "segment", fail, raising=False)
    out = tmp_path / "out"
    assert (
        main(["segment", image_file, "--classes", "cat", "--model", "some/model", "--out", str(out)]) == code
    )
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "loading some/model ..."
    assert len(lines) == 1
    assert message in lines[0]
    assert not out.exists()


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["segment", str(tmp_path / "gone.png"), "--classes", "cat", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from seg4diff.cli.main import main\n"
        f"for verb in {VERBS}:\n"
        "    try:\n        main([verb, '--help'])\n"
        "    except SystemExit as end:\n        assert end.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'triton', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"usage: seg4diff {verb} " in done.stdout


def test_help_lists_the_verbs_without_their_details(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert exit_.value.code == 0
        text = capsys.readouterr().out
        assert all(f" {verb} " in text for verb in VERBS)
        assert "seg4diff segment" not in text  # its example


def test_module_runs_as_a_command() -> None:
    words = [sys.executable, "-m", "seg4diff", "demo", "--scenes", "0"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "seg4diff: error: --scenes 0 must be at least 1\n"


def test_examples_in_the_help_have_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in get_args(Verb):
        name = re.sub("(?<=[a-z])(?=[A-Z])", "-", verb.__name__).lower()
        with pytest.raises(SystemExit):
            main([name, "--help"])
        printed = capsys.readouterr().out.splitlines()
        examples = [
            line for line in printed if "seg4diff " in line and not line.startswith(("usage", "\u2502"))
        ]
        own = [line for line in examples if line.startswith(f"    seg4diff {name}")]
        assert own, f"{name} has no example on a line of its own"
        assert all(line.count("seg4diff") == 1 for line in own)


STUB = """
import sys
from seg4diff.cli import kernels, main
kernels.Kernels.run = lambda self: print({text!r} * {times})
sys.exit(main.main(["kernels", "tune"]))
"""


def test_a_reader_that_ends_early_ends_the_command_quietly(tmp_path: Path) -> None:
    (tmp_path / "stub.py").write_text(STUB.format(text="x", times=10**6))
    command = f"{sys.executable} {tmp_path / 'stub.py'} | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_name_that_the_terminal_cannot_show() -> None:
    name = "\u043a\u043e\u0442.png"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-c", STUB.format(text=name, times=1)]
    ended = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)
    assert (ended.returncode, ended.stdout.strip()) == (0, rb"\u043a\u043e\u0442.png"), ended.stderr
