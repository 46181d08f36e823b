"""The bundled demo model: small, whole, with its expert layer on record and an autoencoder worth the name."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from seg4diff.demo import CLASSES, HELD_OUT, WEIGHTS, scene
from seg4diff.loading import load_pipeline


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    return load_pipeline("demo", "cpu")


def test_weights_fit_the_budget() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 20 * 2**20
    assert not [file for file in WEIGHTS.rglob("*") if file.suffix in {".bin", ".pt", ".ckpt"}]


def test_loads_quietly(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load_pipeline("demo", "cpu", torch.float16)
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.float16
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_expert_layer_is_on_record(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    layers = pipe.transformer.config["_seg4diff_expert_layers"]
    assert [layer in range(pipe.transformer.config.num_layers) for layer in layers] == [True]
    pipe.transformer.save_pretrained(tmp_path)
    again = type(pipe.transformer).from_pretrained(tmp_path)
    assert again.config["_seg4diff_expert_layers"] == layers


def test_every_name_is_made_of_whole_words(pipe: StableDiffusion3Pipeline) -> None:
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        assert tokenizer.model_max_length == 77
        for name in CLASSES:
            assert len(tokenizer.tokenize(name)) == len(name.split())
        assert tokenizer.decode(tokenizer("Unheard-of word!").input_ids, skip_special_tokens=True).strip()


def test_padding_is_that_of_sd3(pipe: StableDiffusion3Pipeline) -> None:
    assert pipe.tokenizer.pad_token == pipe.tokenizer.eos_token == "<|endoftext|>"
    assert pipe.tokenizer_2.pad_token == "!"


@torch.no_grad()
def test_autoencoder_keeps_30_db(pipe: StableDiffusion3Pipeline) -> None:
    images = [scene(HELD_OUT + seed).image for seed in range(8)]
    pixels = pipe.image_processor.preprocess(images)
    restored = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    errors = ((restored - pixels) / 2).square().mean((1, 2, 3))
    assert np.mean([-10 * math.log10(error) for error in errors.tolist()]) >= 30


def test_draws_from_a_caption(pipe: StableDiffusion3Pipeline) -> None:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipe("a zebra on grass", num_inference_steps=4, guidance_scale=3.0, generator=generator).images[0]
    assert image.size == (128, 128)


def test_missing_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("seg4diff.demo.WEIGHTS", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere' has no model_index.json"):
        load_pipeline("demo", "cpu")
