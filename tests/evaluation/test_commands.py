"""`seg4diff evaluate` and `seg4diff prepare`, from the words on the command line to files and exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seg4diff.cli import main
from seg4diff.evaluation import generation
from tests.support import miniature, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes something: its second factor is not zero."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("lora")
    transformer = tiny.pipeline().transformer
    transformer.add_adapter(
        LoraConfig(r=2, target_modules=["attn.to_q", "attn.to_v"], init_lora_weights=False)
    )
    StableDiffusion3Pipeline.save_lora_weights(folder, get_peft_model_state_dict(transformer))
    return folder


def words(model: Path, out: Path, *more: str) -> list[str]:
    return ["evaluate", "--model", str(model), "--layers", "1", "--out", str(out), "--device", "cpu", *more]


def test_several_data_sets_and_protocols(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    miniature.write_voc(root)
    miniature.write_ade20k(root)
    options = [
        "--dataset",
        "voc20",
        "ade150",
        "--data-root",
        str(root),
        "--protocol",
        "oracle",
        "full",
        "--partial",
    ]
    assert main(words(model, tmp_path / "out", *options, "--save-predictions")) == 0
    printed = capsys.readouterr().out
    assert "Pascal VOC 20" in printed
    assert "89.2" in printed
    assert "images/s" in printed
    table = (tmp_path / "out" / "report.md").read_text()
    assert table.count("| Pascal VOC 20 |") == table.count("| ADE20K-150 |") == 2
    assert "**a part**, 1 of 2000 images" in table
    for name, count in (("voc20", 2), ("ade150", 1)):
        folder = tmp_path / "out" / name
        report = json.loads((folder / "report.json").read_text())
        assert report["images"] == count
        assert report["settings"]["model"] == str(model)
        assert set(report["rates"]) == {"oracle", "full"}
        assert (folder / "contact-sheet.png").is_file()
        assert len(list((folder / "predictions" / "full").iterdir())) == count
    predicted = Image.open(tmp_path / "out" / "voc20" / "predictions" / "oracle" / "2011_003271.png")
    assert predicted.size == (3, 5)
    assert set(np.unique(predicted)) <= {7, 11, 255}  # cat and dog, and what the central square leaves out


def test_what_is_missing_is_said_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    miniature.write_voc(tmp_path / "data")
    options = ["--dataset", "voc20", "cityscapes19", "--data-root", str(tmp_path / "data"), "--partial"]
    assert main(words(tmp_path / "no-such-model", tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err
    assert "cityscapes/leftImg8bit/val" in error
    assert "cityscapes-dataset.com" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "voc20"], "'voc20' needs a data root"),
        (["--dataset", "scenes", "scenes"], "one or several different ones"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--names", "nowhere.json"], "neither 'paper' nor 'better' nor a JSON file"),
        (["--lora", "nowhere.safetensors"], "LoRA 'nowhere.safetensors' does not exist"),
        (["--generation"], "--generation needs --prompts FILE"),
        (["--generation", "--prompts", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["--protocol", "oracle", "oracle"], "one or several different ones"),
    ],
)
def test_wrong_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(words(tmp_path / "no-such-model", tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "prepare", "analyze"])
def test_data_sets_are_not_overwritten(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Predictions that are the labels, a folder prepared into itself, a picture called layers.png."""
    root, predictions = tmp_path / "data", tmp_path / "out" / "folder" / "predictions" / "oracle"
    miniature.write_folder(root, ["cat", "dog"], {"layers": [[0, 1]], "b": [[0, 1]]})
    given = {"evaluate": root / "labels" / "b.png", "prepare": root / "labels" / "b.png"}
    source = given.get(command, next((root / "images").glob("layers.*")))
    before = source.read_bytes()
    options = ["folder", "--data-root", str(root), "--out"]
    if command == "evaluate":
        predictions.parent.mkdir(parents=True)
        predictions.symlink_to(root / "labels")
        model = ["--save-predictions", "--model", str(tmp_path / "no-such-model")]
        assert main(["evaluate", *model, "--dataset", *options, str(tmp_path / "out")]) == 2
    elif command == "prepare":
        assert main(["prepare", *options, str(root)]) == 2
    else:
        source = source.rename(source.with_suffix(".png"))
        model = ["--model", str(tmp_path / "no-such-model")]
        assert main(["analyze", *model, "--dataset", *options, str(root / "images")]) == 2
    assert "would replace the input" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_an_unknown_class_in_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "names.json"
    names.write_text('{"appel": ["apple"]}')
    assert main(words(tmp_path / "no-such-model", tmp_path / "out", "--names", str(names))) == 2
    assert "'appel' is no class of 'scenes'" in capsys.readouterr().err


def test_failures_are_named_and_end_in_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    miniature.write_folder(root, ["cat", "dog"], {"a": [[0, 1]], "b": [[0, 2]]})
    options = ["--dataset", "folder", "--data-root", str(root)]
    assert main(words(model, tmp_path / "out", *options)) == 1
    error = capsys.readouterr().err
    assert "1 of 2 images are at fault" in error
    assert "holds 2, which stands for no class" in error
    report = json.loads((tmp_path / "out" / "folder" / "report.json").read_text())
    assert (report["images"], report["total"], report["failures"][0]["name"]) == (1, 2, "b")


def test_a_lora_changes_figures_and_settings(model: Path, lora: Path, tmp_path: Path) -> None:
    options = ["--limit", "2", "--protocol", "full"]
    assert main(words(model, tmp_path / "out", *options)) == 0
    assert (
        main(words(model, tmp_path / "out", *options, "--lora", str(lora))) == 2
    )  # another folder is needed
    assert main(words(model, tmp_path / "other", *options, "--lora", str(lora))) == 0
    plain, adapted = (
        json.loads((tmp_path / name / "scenes" / "report.json").read_text()) for name in ("out", "other")
    )
    assert plain["settings"]["lora"] is None
    assert adapted["settings"]["lora"]["path"] == str(lora)
    assert plain["rates"] != adapted["rates"]


@pytest.mark.extra("eval", "torchmetrics")
def test_generation_with_and_without_a_lora(
    model: Path,
    lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = generation._tensor_clip
    asked: list[Any] = []
    monkeypatch.setattr(generation, "_tensor_clip", lambda clip: asked.append(clip) or load(tiny.clip))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na dog\n")
    options = [
        "--generation",
        "--prompts",
        str(prompts),
        "--lora",
        str(lora),
        "--steps",
        "2",
        "--layout",
        "compbench",
    ]
    arguments = words(model, tmp_path / "out", *options, "--seeds", "0", "1", "--clip-models", "some/clip")
    assert main(arguments) == 0
    assert asked == ["some/clip", "some/clip"]
    names = [
        f"{prompt}_{number:06d}.png"
        for number, prompt in enumerate(["a red cat", "a red cat", "a dog", "a dog"])
    ]
    for arm in ("base", "lora"):
        assert sorted(path.name for path in (tmp_path / "out" / arm / "samples").iterdir()) == sorted(names)
    before, after = ((tmp_path / "out" / arm / "samples" / names[0]).read_bytes() for arm in ("base", "lora"))
    assert before != after
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["clip_score"]) == {"base", "lora"}
    assert report["clip_score"]["base"] != report["clip_score"]["lora"]
    assert report["versions"]["torch"] == torch.__version__
    assert "| lora |" in (tmp_path / "out" / "report.md").read_text()
    assert "some/clip" in capsys.readouterr().out


def test_prepare_counts_and_writes_a_folder_that_reads_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from seg4diff.evaluation.datasets import open_dataset

    root = tmp_path / "data"
    miniature.write_cityscapes(root)
    out = tmp_path / "plain"
    assert main(["prepare", "cityscapes19", "--data-root", str(root), "--out", str(out), "--partial"]) == 0
    printed = capsys.readouterr().out
    # 2 pictures of 12 pixels, 4 of which do not count; the road has one in each
    assert any(
        line.split()[1:6:2] == ["road", "2", "8.33"] for line in printed.splitlines() if "road" in line
    )
    assert "33.33" in printed
    official, plain = open_dataset("cityscapes19", root, partial=True), open_dataset("folder", out)
    assert plain.classes == official.classes
    for one, other in zip(official.samples, plain.samples, strict=True):
        assert one.name == other.name
        assert np.array_equal(one.read_labels(), other.read_labels())
        assert one.read_image().tobytes() == other.read_image().tobytes()


def test_prepare_names_what_is_at_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    miniature.write_folder(tmp_path, ["cat"], {"a": [[0]], "b": [[7]]})
    assert main(["prepare", "folder", "--data-root", str(tmp_path)]) == 1
    assert "1 of 2 images are at fault" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "labels")
    assert main(["prepare", "folder", "--data-root", str(tmp_path)]) == 2


def test_help_does_not_wait_for_torch() -> None:
    script = (
        "import sys, seg4diff.cli\n"
        "for command in ('evaluate', 'prepare'):\n"
        "    try: seg4diff.cli.main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    assert "--data-root" in done.stdout
