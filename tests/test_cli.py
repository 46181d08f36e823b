"""The command line, through ``main``: what it writes, what it says, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import seg4diff
from seg4diff.cli import main
from seg4diff.segmentation.result import Segmentation
from tests.support import tiny
from tests.support.images import size_of
from tests.support.paths import ROOT


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the model: the left half is the first class. Collects what it was asked."""
    from seg4diff import loading

    seen = []

    def load_pipeline(model, device, dtype, *, offload):
        seen.append({"model": model, "device": device, "dtype": dtype, "offload": offload})
        return "pipe"

    def segment(pipe, images, classes, **options):
        seen.append({"pipe": pipe, "images": len(images), "classes": classes, **options})
        results = []
        for image in images:
            labels = torch.full((image.height, image.width), len(classes) - 1)
            labels[:, : image.width // 2] = 0
            scores = torch.stack([(labels == index).float() for index in range(len(classes))])
            results.append(Segmentation(labels, scores, tuple(classes), image))
        return results

    monkeypatch.setattr(loading, "load_pipeline", load_pipeline)
    monkeypatch.setattr(seg4diff, "load_lora", lambda pipe, path: seen.append({"lora": path}), raising=False)
    monkeypatch.setattr(seg4diff, "patch", lambda pipe: pipe, raising=False)
    monkeypatch.setattr(seg4diff, "segment", segment, raising=False)
    return seen


def test_segment_writes_labels_and_overlay(image_file, tmp_path, calls, capsys):
    out = tmp_path / "out"
    assert main(["segment", image_file, "--classes", "cat", "red sofa", "--out", str(out)]) == 0
    assert sorted(os.listdir(out)) == ["image-overlay.png", "image.png"]
    labels = np.asarray(Image.open(out / "image.png"))
    assert labels.shape == (48, 80)
    assert (labels[:, :40] == 0).all()
    assert (labels[:, 40:] == 1).all()
    assert calls[0] == {
        "model": "stabilityai/stable-diffusion-3-medium-diffusers",
        "device": None,
        "dtype": None,
        "offload": False,
    }
    assert calls[1]["classes"] == ["cat", "red sofa"]
    assert calls[1]["preset"] == "default"
    assert calls[1]["layers"] is None
    assert "image.png: cat 50%, red sofa 50%" in capsys.readouterr().out


def test_every_option_arrives(image_file, tmp_path, calls):
    words = f"segment {image_file} --classes cat sofa --model demo --lora {tmp_path}/a.b "
    words += f"--out {tmp_path / 'out'} "
    words += "--device cpu --dtype bfloat16 --preset paper --layers 3 4 --seed 7 --batch-size 2 --offload "
    words += "--formats npz json"
    assert main(words.split()) == 0
    assert calls[0] == {"model": "demo", "device": "cpu", "dtype": "bfloat16", "offload": True}
    assert calls[1] == {"lora": tmp_path / "a.b"}
    assert calls[2] == {
        "pipe": "pipe",
        "images": 1,
        "classes": ["cat", "sofa"],
        "preset": "paper",
        "layers": (3, 4),
        "seed": 7,
        "batch_size": 2,
        "progress": False,
    }
    assert Segmentation.load(tmp_path / "out" / "image.npz").classes == ("cat", "sofa")
    assert json.loads((tmp_path / "out" / "image.json").read_text())["categories"][1]["name"] == "sofa"


def test_pictures_of_one_name_do_not_overwrite_each_other(tmp_path, calls):
    paths = []
    for folder, suffix, width in (("a", "png", 10), ("b", "png", 20), ("b", "bmp", 30)):
        paths.append(tmp_path / folder / f"x.{suffix}")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.new("RGB", (width, 5)).save(paths[-1])
    words = ["segment", *map(str, paths), str(paths[0]), "--classes", "a", "b", "--batch-size", "2"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    sizes = {name: size_of(tmp_path / "out" / f"{name}.png")[0] for name in ("x", "x-2", "x-3")}
    assert sizes == {"x": 10, "x-2": 20, "x-3": 30}
    assert len(os.listdir(tmp_path / "out")) == 6
    assert [call["images"] for call in calls[1:]] == [2, 1]


def test_an_overlay_and_labels_of_one_name(tmp_path, calls):
    for name, width in (("a", 10), ("a-overlay", 20), ("A", 30)):
        Image.new("RGB", (width, 5)).save(tmp_path / f"{name}.png")
    words = [str(tmp_path / f"{name}.png") for name in ("a", "a-overlay", "A")]
    assert main(["segment", *words, "--classes", "a", "b", "--out", str(tmp_path / "out")]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "A-2-overlay.png", "A-2.png", "a-overlay-2-overlay.png", "a-overlay-2.png", "a-overlay.png", "a.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "out" / "a-overlay-2.png") as labels:
        assert labels.width == 20


def test_results_never_replace_what_was_read(tmp_path, calls, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("photo.png", "photo-overlay.png", "photo.jpg", "weights.png"):
        Image.new("RGB", (10, 5), "red").save(out / name)
    Image.new("RGB", (10, 5)).save(tmp_path / "weights.bmp")
    (tmp_path / "linked.png").symlink_to(out / "photo.png")
    (tmp_path / "photo.png").hardlink_to(out / "photo.png")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    lora = ["--lora", str(out / "weights.png")]
    for words, message in (
        ([str(out / "photo.png")], "photo.png' would replace the input"),
        ([str(out / "photo.jpg"), str(out / "photo-overlay.png")], "photo-overlay.png' would replace"),
        ([str(tmp_path / "photo.png")], "photo.png' would replace"),
        ([str(out / "photo.jpg"), str(tmp_path / "linked.png")], "photo.png' would replace"),
        ([str(tmp_path / "weights.bmp"), *lora], "weights.png' would replace"),
    ):
        code, line = failure(["segment", *words, "--classes", "a", "--out", str(out)], capsys)
        assert code == 2
        assert message in line
        assert "give another --out" in line
    assert calls == []
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def failure(words, capsys):
    """Exit code and the one line on stderr."""
    code = main(words)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("seg4diff: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return code, captured.err


def test_wrong_input_is_2_and_names_the_value(image_file, tmp_path, calls, capsys):
    (tmp_path / "broken.png").write_text("text")
    for words, message in (
        (["segment", str(tmp_path / "gone.png"), "--classes", "cat"], "gone.png"),
        (["segment", image_file, str(tmp_path / "broken.png"), "--classes", "cat"], "broken.png"),
        (["segment", "--classes", "cat"], "no picture given"),
        (["segment", image_file, "--classes", "cat", "--batch-size", "0"], "--batch-size 0"),
        (["segment", image_file, "--classes", "cat", "--out", image_file], "is a file; give a folder"),
        (["demo", "--scenes", "0"], "--scenes 0"),
    ):
        code, line = failure(words, capsys)
        assert code == 2
        assert message in line
    assert calls == []  # nothing large was loaded before the input was checked


@pytest.mark.parametrize(
    "words",
    [
        ["segment", "x.png"],
        ["nonsense"],
        ["segment", "x.png", "--classes", "cat", "--preset", "best-ever"],
        ["segment", "x.png", "--classes", "cat", "--seed", "one"],
    ],
)
def test_wrong_words_are_2(words, capsys):
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
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            1,
            "out of memory while running the model; ",
        ),
        (RuntimeError(), 1, "RuntimeError"),
    ],
)
def test_errors_of_the_model(image_file, tmp_path, calls, capsys, monkeypatch, error, code, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(seg4diff, "segment", fail)
    found, line = failure(["segment", image_file, "--classes", "cat", "--out", str(tmp_path / "out")], capsys)
    assert found == code
    assert message in line
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["segment", str(tmp_path / "gone.png"), "--classes", "cat", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt(image_file, calls, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(seg4diff, "segment", interrupt)
    assert main(["segment", image_file, "--classes", "cat", "--out", str(tmp_path / "out")]) == 130


def test_end_to_end_with_a_model_folder(image_file, tmp_path):
    pipe = tiny.pipeline(layers=2)
    pipe.save_pretrained(tmp_path / "model")
    words = [
        "segment",
        image_file,
        "--classes",
        "cat",
        "sofa",
        "--model",
        str(tmp_path / "model"),
        "--layers",
        "1",
    ]
    assert main([*words, "--out", str(tmp_path / "out"), "--formats", "npz", "--device", "cpu"]) == 0
    written = Segmentation.load(tmp_path / "out" / "image.npz")
    direct = seg4diff.segment(seg4diff.patch(pipe), image_file, ["cat", "sofa"], layers=[1], seed=0)
    torch.testing.assert_close(written.scores, direct.scores)
    assert direct.scores.std() > 0
    assert written.metadata["layers"] == [1]


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from seg4diff.cli import main\n"
        "try:\n    main(['segment', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'triton', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--classes" in done.stdout


def test_module_runs_as_a_command():
    words = [sys.executable, "-m", "seg4diff", "demo", "--scenes", "0"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "seg4diff: error: --scenes 0 must be at least 1\n"
