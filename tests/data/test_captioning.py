"""Captions from a tiny random image-to-text model of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from seg4diff import jobs
from seg4diff.data.annotations import read_captions
from seg4diff.data.captioning import write_captions
from seg4diff.jobs import FolderInUseError, lock

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "cat", "dog", "on", "sofa", "red")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(WORDS) + 8, "encoder_hidden_size": 16, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 5, "eos_token_id": 3, "pad_token_id": 0, "sep_token_id": 3}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    captioner = BlipForConditionalGeneration(
        BlipConfig(
            text_config={**text, **tokens, "projection_dim": 8}, vision_config={**vision, "projection_dim": 8}
        )
    )
    folder = tmp_path_factory.mktemp("captioner")
    captioner.save_pretrained(folder)
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    BlipProcessor(processor, tokenizer).save_pretrained(folder)
    return str(folder)


def write_images(folder: Path, count: int) -> None:
    for number in range(count):
        Image.new("RGB", (40, 30), (number * 40, 0, 0)).save(folder / f"{number}.png")


def test_every_image_gets_a_caption(model: str, tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    out = write_captions(
        tmp_path, model, tmp_path / "captions.json", batch_size=2, max_tokens=5, progress=False
    )
    captions = read_captions(out)
    assert captions.texts.keys() == {"0.png", "1.png", "2.png"}


def test_captions_that_are_there_stay(model: str, tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    out = tmp_path / "captions.json"
    out.write_text(json.dumps({"0.png": "written by hand"}))
    write_captions(tmp_path, model, out, prompt="a red", progress=False)
    captions = json.loads(out.read_text())
    assert captions["0.png"] == "written by hand"
    assert "1.png" in captions
    before = out.stat().st_mtime_ns
    write_captions(tmp_path, "no model is needed", out, progress=False)
    assert out.stat().st_mtime_ns == before


def test_killed_and_resumed_equals_uninterrupted(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, 5)
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    options: dict[str, Any] = {"batch_size": 2, "max_tokens": 5, "progress": False}
    whole = write_captions(tmp_path, model, tmp_path / "whole.json", **options)
    out, part = tmp_path / "cut.json", tmp_path / "cut.json.part"
    append = jobs.Job.append

    def killed(self: jobs.Job, entries: Iterable[Any]) -> None:
        append(self, list(entries)[:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(jobs.Job, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            write_captions(tmp_path, model, out, **options)
    assert not out.exists()
    assert part.is_dir()
    with pytest.raises(ValueError, match="max_tokens was 5, is 6"):
        write_captions(tmp_path, model, out, **options | {"max_tokens": 6})
    with lock(part / "results-00000.jsonl"), pytest.raises(FolderInUseError):
        write_captions(tmp_path, model, out, **options)
    write_captions(tmp_path, model, out, **options)
    assert out.read_bytes() == whole.read_bytes()
    assert len(json.loads(out.read_text())) == 5
    assert not part.exists()


def test_wrong_input(model: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        write_captions(tmp_path / "nowhere", model, tmp_path / "c.json")
    with pytest.raises(FileNotFoundError, match="holds no image"):
        write_captions(tmp_path, model, tmp_path / "c.json")
    write_images(tmp_path, 1)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold captions"):
        write_captions(tmp_path, model, tmp_path / "other.json")
    with pytest.raises(ValueError, match="cannot be loaded as an image-to-text model"):
        write_captions(tmp_path, str(tmp_path), tmp_path / "c.json", progress=False)
    assert not (tmp_path / "c.json.part").exists()
    with pytest.raises(ValueError, match="device='gpu' is unknown"):
        write_captions(tmp_path, model, tmp_path / "c.json", device="gpu", progress=False)
    with pytest.raises(ValueError, match="batch_size=0"):
        write_captions(tmp_path, model, tmp_path / "c.json", batch_size=0)
