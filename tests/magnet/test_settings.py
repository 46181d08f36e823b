"""Settings from TOML and from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from seg4diff.magnet.commands import Train, overrides, run_train, settings_of
from seg4diff.magnet.settings import PRESETS, TrainSettings, build_settings, read_settings


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "magnet.toml"
    path.write_text('preset = "reference"\nsteps = 7\nema = 0\n[mask]\nlayers = [9, 12]\n[lora]\nrank = 8\n')
    settings = read_settings(path)
    assert settings.steps == 7
    assert settings.ema == 0.0
    assert settings.mask.layers == (9, 12)
    assert settings.mask.focal == "reference"
    assert settings.mask.convolutional_head
    assert settings.lora.rank == 8
    assert settings.data.text == "classes"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset: str) -> None:
    assert isinstance(build_settings({"preset": preset}), TrainSettings)


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "magnet.toml"
    path.write_text("steps = 7\n[mask]\nweight = 2.0\n")
    options = Train(config=path, set=("mask.weight=3", "data.kind=demo", "mask.layers=[1, 2]"), out=tmp_path)
    settings = settings_of(options)
    assert (settings.steps, settings.mask.weight, settings.data.kind) == (7, 3.0, "demo")
    assert settings.mask.layers == (1, 2)
    assert settings.out == str(tmp_path)
    assert overrides(("a.b=1", "a.c=x y")) == {"a": {"b": 1, "c": "x y"}}
    with pytest.raises(ValueError, match="'steps' is no KEY=VALUE"):
        overrides(("steps",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 5", r"'step' is no setting; did you mean 'steps'\?"),
        ("zzz = 5", "'zzz' is no setting; known: model, out"),
        ("[mask]\nweigth = 1", r"'mask.weigth' is no setting; did you mean 'mask.weight'\?"),
        ("mask = 3", r"mask=3 must be a table: \[mask\]"),
        ('steps = "5"', "steps='5' must be a int"),
        ("steps = true", "steps=True must be a int"),
        ("steps = 0", "steps=0 must be positive"),
        ("[mask]\nlayers = 3", "mask.layers=3 must be a list"),
        ('[mask]\npairing = "word"', "mask.pairing='word' is unknown; accepted: 'class', 'token', 'head'"),
        ("[data]\ncaption_dropout = 1.0", r"data.caption_dropout=1.0 must lie in \[0, 1\)"),
        ("fm_weight = 0.0", "caption_dropout=0.1 with fm_weight=0"),
        ("fm_weight = 0.0\n[mask]\nweight = 0.0", "nothing to train"),
        ("fm_weight = -1.0", "fm_weight=-1.0 must not be negative"),
        ("[mask]\nfocal_weight = 0.0\ndice_weight = 0.0", "are both 0"),
        ("[optimizer]\nbetas = [0.9]", "must be two numbers"),
        ('[optimizer]\nname = "adamw8bit"\noffload = true', "choose one of the two"),
        ("[lora]\ntargets = []", "lora.targets is empty"),
        ('preset = "best"', "preset='best' is unknown; accepted: 'default', 'reference', 'paper'"),
        ("steps = ", "is no TOML"),
    ],
)
def test_wrong_settings(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "magnet.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(path)
    with pytest.raises(ValueError, match="magnet.toml"):
        settings_of(Train(config=path))


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match="'nowhere.toml' does not exist"):
        read_settings("nowhere.toml")


def test_identity_is_of_what_decides_the_weights() -> None:
    settings = TrainSettings()
    assert settings.replaced(out="elsewhere", keep=9, data={"cache": "x"}).identity() == settings.identity()
    assert settings.replaced(mask={"weight": 2.0}).identity() != settings.identity()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Train(memory="8GiB"), "goes with --estimate only"),
        (Train(demo=True, estimate=True), "--demo has its own settings"),
        (Train(), "name a configuration with --config, or try --demo"),
    ],
)
def test_commands_that_make_no_sense(options: Train, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_train(options)


def test_settings_and_commands_import_nothing_heavy() -> None:
    program = (
        "import sys; import seg4diff.magnet.commands, seg4diff.magnet.settings; "
        "print(sorted({'torch', 'diffusers', 'accelerate', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
