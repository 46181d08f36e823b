"""`seg4diff generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import seg4diff
from seg4diff.cli.main import main
from seg4diff.editing.blur import Blur
from tests.support.images import size_of


def drawn(tmp_path: Path, words: str) -> np.ndarray:
    """What ``generate`` writes for a prompt and more options."""
    out = tmp_path / f"out{abs(hash(words))}"
    command = ["generate", "a cat on a sofa", "--steps", "2", "--out", str(out), *words.split()]
    assert main(command) == 0
    return np.asarray(Image.open(out / "000.png"))


def test_draws_what_the_library_draws(stand_in: Any, tmp_path: Path) -> None:
    pipe = stand_in
    for block in pipe.transformer.transformer_blocks:  # so that words matter to 8 bits
        block.attn.add_v_proj.weight.data.mul_(300)
        block.attn.add_k_proj.weight.data.mul_(10)
    call = {"num_inference_steps": 2, "guidance_scale": 7.0}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    plain = drawn(tmp_path, "--seed 3")
    prompt = "a cat on a sofa"
    assert np.array_equal(plain, np.asarray(pipe(prompt, **call, generator=seeded()).images[0]))
    with seg4diff.perturb(pipe, [0, 2], sigma=2, kernel_size=9, padding="reflect"):
        expected = np.asarray(pipe(prompt, **call, generator=seeded()).images[0])
    blur = "--sigma 2 --kernel-size 9 --padding reflect"
    perturbed = drawn(tmp_path, f"--seed 3 --perturb 0 2 {blur}")
    assert np.array_equal(perturbed, expected)
    assert not np.array_equal(perturbed, plain)
    guided = drawn(tmp_path, f"--seed 3 --guide 2 --guide-layers 1 {blur}")
    blurred = Blur(2, 9, "reflect")
    output = seg4diff.guide(pipe, prompt, scale=2, layers=1, blur=blurred, **call, generator=seeded())
    assert np.array_equal(guided, np.asarray(output.images[0]))
    assert not np.array_equal(guided, plain)
    edited = drawn(tmp_path, "--seed 3 --drop on --swap cat=sofa --weight a=2.5")
    with seg4diff.edit(pipe, drop="on", swap={"cat": "sofa"}, weights={"a": 2.5}):
        expected = np.asarray(pipe(prompt, **call, generator=seeded()).images[0])
    assert np.array_equal(edited, expected)
    assert not np.array_equal(edited, plain)
    replaced = drawn(tmp_path, "--seed 3 --replace dog=cat --replace-until 0.5")
    with seg4diff.edit(pipe, replace={"dog": "cat"}, replace_until=0.5):
        expected = np.asarray(pipe(prompt, **call, generator=seeded()).images[0])
    assert np.array_equal(replaced, expected)
    assert not np.array_equal(replaced, plain)


def test_saves_maps_of_words_and_continues_numbers(
    stand_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["generate", "a cat on a sofa", "--steps", "1", "--images", "2", "--save-maps", "--out", str(out)]
    assert main(words) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "000-maps.png", "000.png", "001-maps.png", "001.png",
    ]  # fmt: skip
    first = (out / "000.png").read_bytes()
    whole = size_of(out / "000-maps.png")
    assert main([*words, "--words", "cat", "--guide", "1"]) == 0
    assert size_of(out / "002-maps.png")[0] < whole[0]
    assert (out / "000.png").read_bytes() == first
    assert (
        f"'a cat on a sofa', seed 1 -> {out / '003.png'}, {out / '003-maps.png'}" in capsys.readouterr().out
    )


def test_images_carry_what_they_were_made_from(stand_in: Any, tmp_path: Path) -> None:
    words = [
        "generate",
        "a cat on a sofa",
        "ein Kätzchen",
        "--steps",
        "1",
        "--seed",
        "7",
        "--perturb",
        "0",
        "2",
    ]
    assert main([*words, "--steps", "1", "--model", "some/model", "--out", str(tmp_path)]) == 0
    for number, prompt in enumerate(("a cat on a sofa", "ein Kätzchen")):
        with Image.open(tmp_path / f"{number:03}.png") as image:
            assert image.info == {
                "prompt": prompt,
                "seed": str(7 + number),
                "model": "some/model",
                "steps": "1",
                "perturb": "0 2",
            }


def test_numbers_continue_after_a_lone_sheet(stand_in: Any, tmp_path: Path) -> None:
    for name in ("004-maps.png", "1000.png", "12x.png"):
        (tmp_path / name).write_bytes(b"mine")
    assert main(["generate", "a cat", "--steps", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "1001.png").is_file()
    assert (tmp_path / "1000.png").read_bytes() == b"mine"
