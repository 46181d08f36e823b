"""Every example in the help of every verb runs, on a tiny model and tiny data."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from seg4diff.cli.main import Verb, main, parse
from seg4diff.cli.train import Train
from seg4diff.kernels import tune
from seg4diff.kernels.measured import Row
from seg4diff.training import demo, memory, trainer
from tests.support import miniature, tiny


def examples() -> list[str]:
    found = [line.strip() for verb in get_args(Verb) for line in (verb.__doc__ or "").splitlines()]
    return [line for line in found if line.startswith("seg4diff ")]


SMALLER = {
    "generate": "--steps 1",
    "analyze": "--steps 2 --noise-levels 1",
    "rank-layers": "--limit 2 --noise-levels 8",
    "evaluate": "--limit 2",
    "clip-score": "--steps 1 --device cpu",
    "demo": "--scenes 1",
}
"""Options that make an example cheaper; what it shows stays."""


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder that the examples expect, and a tiny model of ten layers for every name."""
    from seg4diff import loading
    from seg4diff.evaluation import clip_score

    pipe = tiny.pipeline(layers=10)
    pipe.transformer.register_to_config(_seg4diff_expert_layers=[9])
    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: pipe)
    monkeypatch.setattr(clip_score, "clip_score", lambda *_, **__: 30.0)
    monkeypatch.chdir(tmp_path)
    for name in ("kitchen.jpg", "scene.png"):
        miniature.write_image(tmp_path / name, 48, 64)
    miniature.write_voc(tmp_path / "data")
    miniature.write_ade20k(tmp_path / "data")
    miniature.write_cityscapes(tmp_path / "data")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "magnet.toml").write_text(configuration())
    return tmp_path


def configuration() -> str:
    """The one in the help of `seg4diff train`."""
    text = (Train.__doc__ or "").split("example:\n")[1]
    return "".join(f"{line.strip()}\n" for line in text.splitlines())


def test_every_verb_has_an_example() -> None:
    assert {shlex.split(line)[1] for line in examples()} == {
        "segment", "regions", "discover", "generate", "analyze", "rank-layers", "evaluate", "clip-score",
        "prepare", "caption", "train", "estimate", "demo", "kernels",
    }  # fmt: skip


@pytest.mark.parametrize("line", examples())
def test_an_example_runs(
    line: str, surroundings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, verb, *words = shlex.split(line)
    asked: dict[str, Any] = {}
    if verb in ("train", "caption") or line.endswith("demo --train"):
        # A run of minutes, or a model from the hub: followed to the call of the function that does it.
        class Reached(Exception):  # noqa: N818
            pass

        def reached(*args: Any, **options: Any) -> None:
            asked.update(args=args, **options)
            raise Reached

        monkeypatch.setattr(trainer, "train", reached)
        monkeypatch.setattr(demo, "show", reached)
        monkeypatch.setattr("seg4diff.data.captioning.write_captions", reached)
        with pytest.raises(Reached):
            parse([verb, *words]).run()
        if verb == "train":
            assert asked["args"][0].data.kind == "coco"
        return
    if verb == "estimate":
        monkeypatch.setattr(memory, "estimate_variants", lambda settings, progress: {"": Sized()})
        monkeypatch.setattr(memory, "report", lambda found: "")
    if verb == "kernels":
        monkeypatch.setenv("XDG_CACHE_HOME", str(surroundings))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(tune, "tune", measurement)
    if "--lora" in words:
        where = words.index("--lora")
        del words[where : where + 2]  # its own test has a LoRA
    if "--limit" in words:
        words[words.index("--limit") + 1] = "2"
    smaller = SMALLER.get(verb, "").split()
    if "--data-root" in words:
        smaller.append("--partial")
    assert main([verb, *words, *smaller]) == 0, capsys.readouterr().err


def measurement(image_tokens: int, text_tokens: int, heads: int, head_dim: int, **options: Any) -> Row:
    evidence = {"milliseconds": {"triton": [1.0, 4.0]}, "rejected": {"cudnn": "device cpu"}}
    return Row("sm_90", head_dim, image_tokens + text_tokens, "triton", "triton", evidence)


class Sized:
    peak = 2**30


def test_the_defaults_agree() -> None:
    """Options of one name have one default; folders are named after their verb."""
    defaults: dict[str, dict[str, Any]] = {}
    for verb in get_args(Verb):
        for field in dataclasses.fields(verb):
            if field.default is not dataclasses.MISSING:
                defaults.setdefault(field.name, {})[verb.__name__] = field.default
    defaults["preset"].pop("Discover")  # which takes presets that compare image tokens
    for name in ("preset", "seed", "layers", "model", "threads", "steps", "device"):
        assert len({repr(value) for value in defaults[name].values()}) == 1, defaults[name]
    folders = {verb: value for verb, value in defaults["out"].items() if value is not None}
    folders.pop("Caption")  # a file
    dashed = {"RankLayers": "rank-layers", "ClipScore": "clip-score"}
    assert folders == {v: Path(f"{dashed.get(v, v.lower())}-output") for v in folders}
