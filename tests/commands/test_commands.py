"""``seg4diff regions``, ``analyze`` and ``generate`` on tiny pipelines: what they write, say and refuse."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import seg4diff
from seg4diff.analysis import AnalysisReport
from seg4diff.cli import main
from tests.support import tiny
from tests.support.images import size_of


@pytest.fixture(autouse=True)
def pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What --model stands for, whatever it says."""
    from seg4diff import loading

    pipe = tiny.pipeline()
    pipe.transformer.register_to_config(_seg4diff_expert_layers=[1])
    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: pipe)
    return pipe


def test_regions_writes_labels_and_overlay(
    pipe: Any, image_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["regions", image_file, "--out", str(out), "--threshold", "1e-4", "--formats", "png", "npz"]
    assert main(words) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "image-overlay.png",
        "image.npz",
        "image.png",
    ]
    expected = seg4diff.segment_unsupervised(pipe, Image.open(image_file), threshold=1e-4)
    assert isinstance(expected, seg4diff.Segmentation)
    assert np.array_equal(np.asarray(Image.open(out / "image.png")), expected.labels.numpy())
    assert f"image.png: {len(expected.classes)} region" in capsys.readouterr().out


@pytest.mark.extra("viz", "matplotlib")
def test_analyze_prompts_prints_and_writes(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n\n")
    words = f"analyze --prompts-file {tmp_path}/prompts.txt --steps 2 --noise-levels 1 2 --projections "
    words += f"--per-head --out {tmp_path}/out --prompts"
    assert main([*words.split(), "a cat"]) == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    figures = [
        f"{name}-{level}.png" for name in ("attention-mass", "projections", "value-norms") for level in (1, 2)
    ]
    assert written == sorted([*figures, "report.json", "report.safetensors"])
    report = AnalysisReport.load(tmp_path / "out" / "report")
    assert report.metadata["prompts"] == ["a cat", "a dog"]
    assert report.by_head is not None
    expected = seg4diff.analyze(pipe, ["a cat", "a dog"], steps=2, noise_levels=[1, 2])
    torch.testing.assert_close(report.by_layer.image_to_text, expected.by_layer.image_to_text)
    printed = capsys.readouterr().out
    assert "1 steps left" in printed
    assert "2 images" in printed


def test_analyze_images(image_file: str, tmp_path: Path) -> None:
    words = ["analyze", "--images", image_file, "--prompts", "a cat", "--out", str(tmp_path / "out")]
    assert main([*words, "--noise-levels", "8", "--layers", "1"]) == 0
    report = AnalysisReport.load(tmp_path / "out" / "report")
    assert (report.layers, report.noise_levels, report.grid) == ((1,), (8,), (3, 5))


def test_analyze_measures_layers_on_labelled_pictures(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from seg4diff.demo import HELD_OUT, scene

    assert main(f"analyze --dataset scenes --limit 2 --noise-levels 4 8 --out {tmp_path}/out".split()) == 0
    document = json.loads((tmp_path / "out" / "ranking.json").read_text())
    scenes = [scene(HELD_OUT + number) for number in range(2)]
    expected = seg4diff.expert_layers(
        pipe,
        images=[s.image for s in scenes],
        labels=[s.labels for s in scenes],
        classes=[s.classes for s in scenes],
        noise_levels=[4, 8],
    )
    assert np.allclose(document["scores"], expected.scores)
    assert document["order"] == list(expected.order)
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "out" / "layers.png").is_file()
    assert "mIoU in % by layer" in capsys.readouterr().out


def drawn(tmp_path: Path, words: str) -> np.ndarray:
    """What ``generate`` writes for a prompt and more options."""
    out = tmp_path / f"out{abs(hash(words))}"
    command = ["generate", "a cat on a sofa", "--steps", "2", "--out", str(out), *words.split()]
    assert main(command) == 0
    return np.asarray(Image.open(out / "000.png"))


def test_generate_draws_what_the_library_draws(pipe: Any, tmp_path: Path) -> None:
    for block in pipe.transformer.transformer_blocks:  # so that words matter to 8 bits
        block.attn.add_v_proj.weight.data.mul_(300)
        block.attn.add_k_proj.weight.data.mul_(10)
    call = {"num_inference_steps": 2, "guidance_scale": 7.0}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    plain = drawn(tmp_path, "--seed 3")
    prompt = "a cat on a sofa"
    assert np.array_equal(plain, np.asarray(pipe(prompt, **call, generator=seeded()).images[0]))
    seg4diff.patch(pipe)
    with seg4diff.perturb(pipe, [0, 2], sigma=2, kernel_size=9, padding="reflect"):
        expected = np.asarray(pipe(prompt, **call, generator=seeded()).images[0])
    blur = "--sigma 2 --kernel-size 9 --padding reflect"
    perturbed = drawn(tmp_path, f"--seed 3 --perturb 0 2 {blur}")
    assert np.array_equal(perturbed, expected)
    assert not np.array_equal(perturbed, plain)
    guided = drawn(tmp_path, f"--seed 3 --guide 2 --guide-layers 1 {blur}")
    blurred = seg4diff.editing.blur.Blur(2, 9, "reflect")
    output = seg4diff.guide(pipe, prompt, scale=2, layers=1, blur=blurred, **call, generator=seeded())
    assert np.array_equal(guided, np.asarray(output.images[0]))
    assert not np.array_equal(guided, plain)
    edited = drawn(tmp_path, "--seed 3 --drop on --swap cat=sofa --weight a=2.5")
    with seg4diff.edit(pipe, drop="on", swap={"cat": "sofa"}, weights={"a": 2.5}):
        expected = np.asarray(pipe(prompt, **call, generator=seeded()).images[0])
    assert np.array_equal(edited, expected)
    assert not np.array_equal(edited, plain)


def test_generate_saves_maps_of_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["generate", "a cat on a sofa", "--steps", "1", "--images", "2", "--save-maps", "--out", str(out)]
    assert main(words) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "000-maps.png", "000.png", "001-maps.png", "001.png",
    ]  # fmt: skip
    whole = size_of(out / "000-maps.png")
    assert main([*words, "--words", "cat", "--guide", "1"]) == 0
    assert size_of(out / "000-maps.png")[0] < whole[0]
    assert "'a cat on a sofa', seed 1 ->" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["regions", "nowhere.png"], "nowhere.png"),
        (["regions", "PICTURE", "--threshold", "0"], "threshold=0.0 must be"),
        (["regions", "PICTURE", "--layers", "7"], "layer 7 is out of range"),
        (["regions", "PICTURE", "--batch-size", "0"], "--batch-size 0"),
        (["analyze"], "nothing to analyse"),
        (["analyze", "--prompts", "a", "--noise-levels", "29"], "noise level 29"),
        (["analyze", "--prompts", "a", "--layers", "3"], "layer 3 is out of range"),
        (["analyze", "--prompts-file", "nowhere.txt"], "nowhere.txt"),
        (["analyze", "--dataset", "unheard-of"], "'unheard-of' is unknown"),
        (["analyze", "--dataset", "scenes", "--prompts", "a"], "brings its own pictures"),
        (["generate", " "], "no prompt given"),
        (["generate", "a", "--perturb", "5"], "layer 5 is out of range"),
        (["generate", "a", "--perturb", "1", "--sigma", "0"], "sigma=0.0"),
        (["generate", "a", "--kernel-size", "4"], "kernel_size=4"),
        (["generate", "a", "--guide", "-1"], "scale=-1.0"),
        (["generate", "a cat", "--drop", "zebra"], "'zebra' is not in the prompt; known words: a, cat"),
        (["generate", "a cat", "--swap", "cat"], "'cat' is no pair"),
        (["generate", "a cat", "--weight", "cat=x"], "'x' is no number"),
        (["generate", "a", "--words", "cat"], "add --save-maps"),
        (["generate", "a", "--save-maps", "--words", "dog", "--steps", "1"], "'dog' is not in the prompt"),
        (["generate", "a", "--steps", "0"], "--steps 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_2_and_one_line(
    words: list[str], message: str, image_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [image_file if word == "PICTURE" else word for word in words]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seg4diff: error:")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("regions PICTURE", "photo.png"),
        ("analyze --images PICTURE --noise-levels 4", "attention-mass-4.png"),
        ("analyze --prompts-file PICTURE", "report.json"),
        ("generate a --lora PICTURE", "000.png"),
        ("generate a b --save-maps --lora PICTURE", "001-maps.png"),
    ],
)
def test_what_is_read_is_not_replaced(
    words: str, name: str, image_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / name
    source.write_bytes(Path(image_file).read_bytes() if source.suffix == ".png" else b"a cat")
    before = source.read_bytes()
    assert main([*words.replace("PICTURE", str(source)).split(), "--out", str(tmp_path)]) == 2
    assert f"{source}' would replace the input '{source}'" in capsys.readouterr().err
    assert source.read_bytes() == before


@pytest.mark.parametrize("command", ["regions", "analyze", "generate"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.count(f"seg4diff {command} ") >= 2  # the usage line, and an example to copy
    assert "--model" in text
