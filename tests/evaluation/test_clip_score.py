"""Images from prompts and their CLIPScore, with a tiny random CLIP and a tiny random model."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seg4diff import files
from seg4diff.evaluation import clip_score as scoring
from seg4diff.evaluation.clip_score import (
    GenerationSettings,
    check_names,
    clip_score,
    generate,
    markdown,
    read_prompts,
    sample_path,
)
from seg4diff.jobs import Share, results_in
from tests.support import tiny

PROMPTS = ("a red cat", "a dog on a sofa", "a tree")
SETTINGS = GenerationSettings(seeds=(0, 7), steps=2, batch_size=2)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def drawn(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "base"
    generate(pipe, PROMPTS, folder, SETTINGS, progress=False)
    return folder


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: Image.open(path).tobytes() for path in sorted(folder.rglob("*.png"))}


def test_one_picture_for_each_prompt_and_seed(pipe: Any, drawn: Path) -> None:
    assert sorted(images(drawn)) == [f"{number:05d}-{seed}.png" for number in range(3) for seed in (0, 7)]
    assert len(set(images(drawn).values())) == 6  # all different
    whole = pipe(
        ["a dog on a sofa", "a dog on a sofa"],
        num_inference_steps=2,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 7)],
    ).images
    assert images(drawn)["00001-7.png"] == whole[1].tobytes()
    listed = {entry["name"]: (entry["prompt"], entry["seed"]) for entry in results_in(drawn)}
    assert listed == {f"{n:05d}-{seed}.png": (PROMPTS[n], seed) for n in range(3) for seed in (0, 7)}


def test_an_interrupted_run_draws_what_is_missing(
    pipe: Any, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = scoring.save_image
    saved: list[str] = []

    def interrupted(image: Image.Image, path: Path) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(image, path)

    monkeypatch.setattr(scoring, "save_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, PROMPTS, tmp_path, SETTINGS, progress=False)
    first = tmp_path / "00000-0.png"
    age = first.stat().st_mtime_ns
    monkeypatch.setattr(scoring, "save_image", save)
    generate(pipe, PROMPTS, tmp_path, SETTINGS, progress=False)
    assert images(tmp_path) == images(drawn)
    assert first.stat().st_mtime_ns == age


def test_processes_share_the_pictures(pipe: Any, drawn: Path, tmp_path: Path) -> None:
    for process in (0, 1):
        before = len(images(tmp_path))
        generate(pipe, PROMPTS, tmp_path, SETTINGS, share=Share(process, 2), progress=False)
        assert len(images(tmp_path)) - before == (4, 2)[process]
    assert images(tmp_path) == images(drawn)


def test_pictures_of_other_settings_are_not_mixed(pipe: Any, drawn: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings: items was 3, is 2; steps was 2, is 3"):
        generate(
            pipe, PROMPTS[:2], drawn, GenerationSettings(seeds=(0, 7), steps=3, batch_size=2), progress=False
        )


def test_the_progress_bar_of_the_pipeline_is_as_before(pipe: Any, drawn: Path) -> None:
    generate(pipe, PROMPTS, drawn, SETTINGS, progress=False)
    assert pipe._progress_bar_config == {"disable": True}  # as the tiny pipeline is made


@pytest.mark.extra("eval", "torchmetrics")
def test_clip_score_is_the_mean_cosine(drawn: Path) -> None:
    """Against the cosines of the model's own features."""
    score = clip_score(PROMPTS, drawn, SETTINGS, tiny.clip, progress=False)
    model, processor = tiny.clip()
    cosines = []
    for number, prompt in enumerate(PROMPTS):
        for seed in SETTINGS.seeds:
            image = Image.open(drawn / f"{number:05d}-{seed}.png")
            with torch.no_grad():
                image = model.vision_model(processor(images=[image], return_tensors="pt")["pixel_values"])
                words = processor(text=[prompt], return_tensors="pt", padding=True)
                text = model.text_model(**words)
                features = (
                    model.visual_projection(image.pooler_output),
                    model.text_projection(text.pooler_output),
                )
            cosines.append(float(torch.nn.functional.cosine_similarity(*features)))
    assert score == pytest.approx(100 * float(np.mean(cosines)), abs=1e-3)
    assert abs(score - clip_score(PROMPTS[::-1], drawn, SETTINGS, tiny.clip, progress=False)) > 1e-2


def test_prompts_from_files(tmp_path: Path) -> None:
    path = tmp_path / "color_val.txt"
    path.write_text("a green bench\tval\n\n  a blue bowl \n")
    assert read_prompts(path) == ("a green bench", "a blue bowl")
    listed = tmp_path / "prompts.json"
    listed.write_text('["a cat", "ein Hund"]')
    assert read_prompts(listed) == ("a cat", "ein Hund")
    for content, message in (("", "holds no prompts"), ("[", "holds no prompts"), ('{"a": 1}', "JSON list")):
        listed.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(listed)
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")


def test_names_of_t2i_compbench(tmp_path: Path) -> None:
    """Its tools read the prompt before the first underscore and the number after the last."""
    settings = GenerationSettings(seeds=(42, 43), layout="compbench")
    names = [sample_path(tmp_path, PROMPTS, n, s, settings).name for n in range(3) for s in range(2)]
    assert names[3] == "a dog on a sofa_000003.png"
    assert [name.split("_")[0] for name in names] == [p for p in PROMPTS for _ in range(2)]
    assert [int(name.split("_")[-1].split(".")[0]) for name in names] == list(range(6))
    assert sample_path(tmp_path, PROMPTS, 0, 0, settings).parent == tmp_path / "samples"
    with pytest.raises(ValueError, match="cannot carry"):
        check_names(["either/or"], settings)
    with pytest.raises(ValueError, match="too long for a file name"):
        check_names(["x" * 250], settings)
    check_names(["either/or", "x" * 250], GenerationSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**settings)


def test_no_space_left(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, write: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    generate(pipe, PROMPTS[:1], tmp_path, SETTINGS, progress=False)
    (tmp_path / "00000-7.png").unlink()
    monkeypatch.setattr(files, "write_atomically", full_disk)
    with pytest.raises(OSError, match="no space left for .*00000-0.png"):
        generate(pipe, PROMPTS[:1], tmp_path, SETTINGS, progress=False)


def test_one_table_for_all_models() -> None:
    table = markdown({"base": {"clip": 26.5}, "lora": {"clip": 26.75}}, 3, SETTINGS)
    assert "| base | 26.5000 |" in table
    assert "| lora | 26.7500 |" in table
    assert "3 prompts, seeds 0, 7, 2 steps, guidance scale 7.5." in table
    assert "| SD3 | 27.0252 | 26.0638 | 28.3422 | 27.1437 |" in table


@pytest.mark.extra("eval", "torchmetrics")
def test_a_clip_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"CLIP model '.*nowhere' cannot be loaded .* the images are kept"):
        clip_score(["a cat"], tmp_path, GenerationSettings(), str(tmp_path / "nowhere"))
