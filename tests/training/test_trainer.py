"""Training runs: exact resumption, processes, failures, and what comes out of them."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import itertools
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seg4diff.kernels.api import backend
from seg4diff.training import TrainResult, train
from seg4diff.training.checkpoints import Checkpoint, latest_checkpoint, write_checkpoint
from seg4diff.training.optimizers import learning_rate
from seg4diff.training.settings import OptimizerSettings, TrainSettings, build_settings
from tests.support import runs
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums of several threads may differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("magnet") / "cache"


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("magnet") / "whole"
    result = train(runs.settings(out, cache), pipe=runs.pipeline(), progress=False)
    assert result.steps == runs.STEPS
    assert result.best_step in (4, 5)
    assert set(result.held_out) == {"total", "flow", "focal", "dice"}
    return out


@pytest.fixture(scope="module")
def forkserver() -> Any:
    """Processes that start in no time, because the server they are forked from has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.support.runs", "seg4diff.training.trainer", "diffusers", "transformers"]
    )
    return context


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def assert_same_run(out: Path, whole: Path) -> None:
    for name in ("pytorch_lora_weights.safetensors", "last/pytorch_lora_weights.safetensors"):
        assert_same_bits(load_file(out / name), load_file(whole / name))
    mine, expected = (latest_checkpoint(folder / "checkpoints") for folder in (out, whole))
    assert mine is not None
    assert expected is not None
    assert mine.progress == expected.progress
    assert_same_bits(mine.weights, expected.weights)
    for index, state in expected.optimizer["state"].items():
        assert_same_bits(mine.optimizer["state"][index], state)


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("within", 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("after", 1), ("after", 4), ("writing", 4), ("writing", 5)]
        ),
    ],
)
def test_killed_and_resumed_is_bit_identical(
    moment: str, step: int, cache: Path, whole: Path, tmp_path: Path, forkserver: Any
) -> None:
    process = forkserver.Process(
        target=runs.train_until_killed, args=(str(tmp_path), str(cache), moment, step)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "last").exists()
    assert (len(list((tmp_path / "checkpoints").glob(".*"))) == 1) == (moment == "writing")
    train(runs.settings(tmp_path, cache), pipe=runs.pipeline(), progress=False)
    assert_same_run(tmp_path, whole)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["checkpoint-0000004.pt", "checkpoint-0000005.pt"]


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_a_cut_checkpoint_is_passed_over(
    kept: int, cache: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(runs.settings(tmp_path, cache), pipe=runs.pipeline(), progress=False, after_step=stop)
    latest = tmp_path / "checkpoints" / "checkpoint-0000004.pt"
    latest.write_bytes(latest.read_bytes()[:kept])
    steps: list[int] = []
    with caplog.at_level(logging.WARNING, logger="seg4diff"):
        train(runs.settings(tmp_path, cache), pipe=runs.pipeline(), progress=False, after_step=steps.append)
    assert steps == [3, 4, 5]
    assert "the one before it is used" in caplog.text
    assert_same_run(tmp_path, whole)


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    weight = torch.randn(3, 5, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    progress = {"best": 1.25, "best_step": 7, "held_out": {"flow": 0.5}}
    written = Checkpoint(
        step=7,
        weights={"a": weight.detach()},
        average={},
        optimizer=optimizer.state_dict(),
        progress=progress,
        settings=dataclasses.asdict(TrainSettings()),
    )
    path = write_checkpoint(tmp_path, written, keep=2)
    whole = path.read_bytes()
    read = latest_checkpoint(tmp_path)
    assert read is not None
    assert (read.step, read.progress, read.settings) == (7, progress, written.settings)
    assert build_settings(read.settings) == TrainSettings()
    assert_same_bits(read.optimizer["state"][0], optimizer.state_dict()["state"][0])
    assert_same_bits(read.weights, written.weights)
    positions = {*range(0, len(whole), 37), *range(40), *range(len(whole) - 40, len(whole))}
    for position in sorted(positions):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        path.write_bytes(altered)
        assert latest_checkpoint(tmp_path) is None, position
        assert path.with_suffix(".damaged").is_file()


def test_a_finished_run_trains_no_further(cache: Path, whole: Path) -> None:
    steps: list[int] = []
    before = load_file(whole / "pytorch_lora_weights.safetensors")
    train(runs.settings(whole, cache), pipe=runs.pipeline(), progress=False, after_step=steps.append)
    assert steps == []
    assert_same_bits(load_file(whole / "pytorch_lora_weights.safetensors"), before)


def test_other_settings_are_not_resumed(cache: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings \(mask.weight: 1.0, now 2.0\)"):
        train(runs.settings(whole, cache, mask={"weight": 2.0}), pipe=runs.pipeline(), progress=False)
    other = r"other settings \(attention kernels: None, now 'aten'\)"
    with backend("aten"), pytest.raises(ValueError, match=other):
        train(runs.settings(whole, cache), pipe=runs.pipeline(), progress=False)
    with pytest.raises(ValueError, match="holds a run already"):
        train(runs.settings(whole, cache, resume="never"), pipe=runs.pipeline(), progress=False)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match="is a file; give a folder"):
        train(runs.settings(file, cache), pipe=runs.pipeline(), progress=False)


def test_accumulation_equals_a_larger_batch(cache: Path, tmp_path: Path) -> None:
    found = []
    for name, changes in {"batch": {"batch": 4}, "sum": {"batch": 1, "accumulation": 4}}.items():
        result = train(
            runs.settings(tmp_path / name, cache, **changes, steps=2), pipe=runs.pipeline(), progress=False
        )
        found.append(load_file(result.last))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    runs.pipeline().save_pretrained(tmp_path / "model")
    config = tmp_path / "magnet.toml"
    config.write_text(
        f"""
        model = "{tmp_path / "model"}"
        steps = 3
        accumulation = 2
        device = "cpu"
        lora = {{ rank = 2 }}
        mask = {{ layers = [1], convolutional_head = true }}
        optimizer = {{ warm_up = 1, learning_rate = 1e-2 }}
        [data]
        kind = "demo"
        scenes = 10
        resolution = 64
        held_out = 0.2
        cache = "{tmp_path / "cache"}"
        """
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # "--multi_gpu" makes Accelerate start the processes itself; without GPUs they talk through gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(port), "-m", "seg4diff", "train", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    two = subprocess.run(
        [*launch, "--out", str(tmp_path / "two")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert two.returncode == 0, two.stderr[-3000:]
    from seg4diff.training.settings import read_settings

    one = train(read_settings(config).replaced(out=str(tmp_path / "one"), batch=2), pipe=None, progress=False)
    expected = load_file(one.last)
    found = load_file(tmp_path / "two" / "last" / "pytorch_lora_weights.safetensors")
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)
    assert any(weight.abs().max() > 1e-4 for name, weight in expected.items() if "lora_B" in name)


@pytest.fixture(scope="module")
def two_steps(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Trained weights after two steps with the settings as they are."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("magnet") / "two-steps"
    train(runs.settings(out, cache, steps=2), pipe=runs.pipeline(), progress=False)
    return state_of(out).weights


def state_of(out: Path) -> Checkpoint:
    checkpoint = latest_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def blocks_of(state: Checkpoint) -> set[str]:
    return {name.split("transformer_blocks.")[1][0] for name in state.weights if "transformer_blocks" in name}


Effect = Callable[[TrainResult, Checkpoint], bool]


@pytest.mark.parametrize(
    ("changes", "effect"),
    [
        (
            {"fm_weight": 0.0, "data": {"caption_dropout": 0.0}},
            lambda result, state: result.held_out["flow"] == 0 and blocks_of(state) == {"0", "1"},
        ),
        (
            {"mask": {"weight": 0.0}},
            lambda result, state: result.held_out["dice"] == 0 and blocks_of(state) == {"0", "1", "2"},
        ),
        ({"mask": {"pairing": "token"}}, None),
        ({"mask": {"pairing": "head", "layers": [0, 2]}}, None),
        (
            {"mask": {"convolutional_head": True, "focal": "reference", "normalisation": "none"}},
            lambda result, state: any("head.layers" in name and w.any() for name, w in state.weights.items()),
        ),
        ({"noise": {"shift": 3.0}}, None),
        ({"data": {"held_out": 0.0}}, lambda result, state: result.held_out == {}),
        ({"data": {"text": "classes"}}, None),
        ({"optimizer": {"weight_decay": 0.5}}, None),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "effect" if value else "trains",
)
def test_every_switch_trains_and_has_an_effect(
    changes: dict[str, Any], effect: Effect | None, cache: Path, two_steps: Any, tmp_path: Path
) -> None:
    own_cache = cache if "text" not in changes.get("data", {}) else tmp_path / "cache"
    result = train(
        runs.settings(tmp_path / "run", own_cache, **changes, steps=2), pipe=runs.pipeline(), progress=False
    )
    weights = load_file(result.lora)
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert all(weight.isfinite().all() for weight in weights.values())
    state = state_of(tmp_path / "run")
    assert any(
        not torch.equal(state.weights[name], two_steps[name]) for name in state.weights.keys() & two_steps
    )
    assert effect is None or effect(result, state)


@pytest.mark.parametrize(
    "changes", [{"memory": {"gradient_checkpointing": False}}, {"data": {"workers": 1}}], ids=str
)
def test_switches_of_time_and_memory_change_no_bit(
    changes: dict[str, Any], cache: Path, two_steps: Any, tmp_path: Path
) -> None:
    train(runs.settings(tmp_path, cache, **changes, steps=2), pipe=runs.pipeline(), progress=False)
    assert_same_bits(state_of(tmp_path).weights, two_steps)


def test_the_average_is_what_is_saved(cache: Path, two_steps: Any, tmp_path: Path) -> None:
    pipe = runs.pipeline()
    result = train(runs.settings(tmp_path, cache, ema=0.9, steps=2), pipe=pipe, progress=False)
    state = state_of(tmp_path)
    assert_same_bits(state.weights, two_steps)
    saved = load_file(result.last)
    for name, average in state.average.items():
        key = name.removeprefix("transformer.").replace(".magnet.", ".")
        assert torch.equal(saved[f"transformer.{key}"], average)
    assert any(not torch.equal(state.average[name], weight) for name, weight in two_steps.items())


@pytest.mark.parametrize("select", ["mask", "flow"])
def test_the_best_is_chosen_by_what_is_selected(select: str, cache: Path, tmp_path: Path) -> None:
    settings = runs.settings(tmp_path, cache, select=select, steps=2)
    result = train(settings, pipe=runs.pipeline(), progress=False)
    held_out, mask = result.held_out, settings.mask
    expected = {
        "flow": held_out["flow"],
        "mask": mask.focal_weight * held_out["focal"] + mask.dice_weight * held_out["dice"],
    }
    assert state_of(tmp_path).progress["best"] == pytest.approx(expected[select], rel=1e-12)


def test_bfloat16_weights_and_float32_adapters(cache: Path, tmp_path: Path) -> None:
    pipe = runs.pipeline()
    pipe.transformer.to(torch.bfloat16)
    result = train(runs.settings(tmp_path, cache, steps=2), pipe=pipe, progress=False)
    assert pipe.transformer.transformer_blocks[0].ff.net[2].weight.dtype == torch.bfloat16
    adapter = pipe.transformer.transformer_blocks[0].attn.to_q.lora_A["magnet"].weight
    assert adapter.dtype == torch.float32
    assert result.skipped_steps == 0


@pytest.mark.extra("quant", "bitsandbytes")
@pytest.mark.parametrize("switch", ["adamw8bit", "nf4"])
def test_bitsandbytes(switch: str, cache: Path, tmp_path: Path) -> None:
    pipe = runs.pipeline()
    changes: dict[str, Any] = {"optimizer": {"name": "adamw8bit"}}
    if switch == "nf4":
        changes = {"memory": {"quantise": "nf4"}}
        pipe.transformer.to(torch.bfloat16)
    result = train(runs.settings(tmp_path / "run", cache, **changes, steps=2), pipe=pipe, progress=False)
    assert all(weight.isfinite().all() for weight in load_file(result.last).values())
    if switch == "nf4":
        block = pipe.transformer.transformer_blocks[0]
        assert block.ff.net[2].weight.dtype == block.attn.to_q.base_layer.weight.dtype == torch.uint8
    fresh = runs.pipeline()
    fresh.load_lora_weights(str(result.last.parent), weight_name=result.last.name)


@pytest.mark.extra("train", "tensorboard")
def test_tensorboard_gets_losses_and_pictures(cache: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        runs.settings(tmp_path, cache, steps=2, report="tensorboard", sample_prompts=["a cat"]),
        pipe=runs.pipeline(),
        progress=False,
    )
    events = EventAccumulator(str(tmp_path / "magnet")).Reload()
    assert {"train/total", "train/gradient_norm", "held-out/dice"} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"masks", "samples"}


# What goes wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report": "wandb"}, "report='wandb' needs wandb: pip install 'wandb'"),
        (
            {"memory": {"quantise": "nf4"}},
            r"quantise='nf4' needs bitsandbytes: pip install 'seg4diff\[quant\]'",
        ),
        ({"optimizer": {"name": "adamw8bit"}}, "name='adamw8bit' needs bitsandbytes"),
    ],
)
def test_missing_packages_are_named_before_anything_is_encoded(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=message):
        train(runs.settings(tmp_path, tmp_path / "cache", **changes), pipe=runs.pipeline(), progress=False)
    assert not (tmp_path / "cache").exists()


def test_nan_is_skipped_and_counted(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seg4diff.training.data.samples import TrainingSamples

    whole_sample = TrainingSamples.__getitem__

    def poisoned(self: Any, position: int) -> Any:
        sample = whole_sample(self, position)
        return dataclasses.replace(sample, latents=sample.latents * float("nan")) if position == 1 else sample

    monkeypatch.setattr(TrainingSamples, "__getitem__", poisoned)
    with caplog.at_level(logging.WARNING, logger="seg4diff"):
        result = train(runs.settings(tmp_path, cache, steps=3), pipe=runs.pipeline(), progress=False)
    assert result.skipped_steps == 1
    assert "step 2 (scene-" in caplog.text
    assert all(weight.isfinite().all() for weight in load_file(result.last).values())


def test_lasting_nan_is_an_error_and_loses_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seg4diff.training.data.samples import TrainingSamples

    whole_sample = TrainingSamples.__getitem__

    def poisoned(self: Any, position: int) -> Any:
        sample = whole_sample(self, position)
        return dataclasses.replace(sample, latents=sample.latents * float("nan")) if position >= 2 else sample

    monkeypatch.setattr(TrainingSamples, "__getitem__", poisoned)
    with pytest.raises(FloatingPointError, match=r"2 consecutive steps.*lower optimizer.learning_rate=0.01"):
        train(
            runs.settings(tmp_path, cache, bad_steps=2, mask={"pairing": "token"}),
            pipe=runs.pipeline(),
            progress=False,
        )
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 2


def test_full_disk(
    cache: Path,
    whole: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint that cannot be written is an error in the log; the earlier one stays."""
    full = False
    whole_write = Path.write_bytes

    def write(self: Path, data: Any) -> int:
        if full and "checkpoint" in self.name:
            whole_write(self, bytes(data)[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole_write(self, data)

    def stop(step: int) -> None:
        nonlocal full
        full = step >= 2
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", write)
    with caplog.at_level(logging.ERROR, logger="seg4diff"), pytest.raises(KeyboardInterrupt):
        train(runs.settings(tmp_path, cache), pipe=runs.pipeline(), progress=False, after_step=stop)
    assert "could not save" in caplog.text
    assert "No space left" in caplog.text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-0000002.pt"]
    full = False
    train(runs.settings(tmp_path, cache), pipe=runs.pipeline(), progress=False)
    assert_same_run(tmp_path, whole)


def test_full_disk_at_the_end(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seg4diff.training import run as run_module

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "save_lora", full)
        with pytest.raises(OSError, match="the run goes on from its latest checkpoint"):
            train(runs.settings(tmp_path, cache, steps=2), pipe=runs.pipeline(), progress=False)
    steps: list[int] = []
    result = train(
        runs.settings(tmp_path, cache, steps=2), pipe=runs.pipeline(), progress=False, after_step=steps.append
    )
    assert steps == []
    assert result.last.is_file()


def test_learning_rate() -> None:
    settings = OptimizerSettings(learning_rate=1.0, warm_up=4)
    rates = [learning_rate(step, 12, settings) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)
    assert all(first >= second for first, second in itertools.pairwise(rates[4:]))
    assert learning_rate(0, 2, OptimizerSettings(warm_up=100)) == pytest.approx(0.5e-4)
