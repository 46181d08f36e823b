"""Settings from TOML."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

from seg4diff.training.settings import PRESETS, TrainSettings, build_settings, read_settings


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes = 5", r"unknown setting 'stpes'; did you mean 'steps'\?"),
        ("zzz = 5", "unknown setting 'zzz'; accepted: model, out"),
        ("[mask]\nweigth = 1", r"unknown setting 'mask.weigth'; did you mean 'mask.weight'\?"),
        ("mask = 3", r"mask=3 must be a table: \[mask\]"),
        ("steps = 0\n[mask]\nweight = -1", "steps=0 must be greater than 0; mask.weight=-1 must be greater"),
        ('steps = "5"', "steps='5' must be a valid integer"),
        ("steps = true", "steps=True must be a valid integer"),
        ("steps = 5.0", "steps=5.0 must be a valid integer"),
        ("fm_weight = true", "fm_weight=True must be a valid number"),
        ("[lora]\nblocks = [1, true]", "lora.blocks=True must be a valid integer"),
        ("[mask]\nconvolutional_head = 1", "mask.convolutional_head=1 must be a valid boolean"),
        ("[mask]\nlayers = 3", "mask.layers=3 must be a valid list"),
        ("[mask]\nlayers = [-1]", "mask.layers=-1 must be greater than or equal to 0"),
        ('[mask]\npairing = "word"', "mask.pairing='word' must be 'class', 'token' or 'head'"),
        ("[data]\ncaption_dropout = 1.0", "data.caption_dropout=1.0 must be less than 1"),
        ("fm_weight = 0.0", "caption_dropout=0.1 with fm_weight=0"),
        ("fm_weight = 0.0\n[mask]\nweight = 0.0", "nothing to train"),
        ("[mask]\nfocal_weight = 0.0\ndice_weight = 0.0", "are both 0"),
        ("[optimizer]\nbetas = [0.9]", r"optimizer.betas=\[0.9\] must have at least 2 items"),
        ("[optimizer]\nbetas = [0.9, 1]", "optimizer.betas=1 must be less than 1"),
        ('device = "bogus"', "device='bogus' must be 'auto' or 'cpu'"),
        ('out = ""', "out='' must have at least 1 character"),
        ('preset = "best"', "preset='best' is unknown; accepted: 'default', 'reference', 'paper'"),
        ("steps = ", "is not TOML"),
    ],
)
def test_wrong_settings(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "magnet.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(path)


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match="'nowhere.toml' does not exist"):
        read_settings("nowhere.toml")


def numbers() -> list[tuple[str, type]]:
    """Name and type of every setting that is a number, or a list of numbers."""
    listed = [(name, value[0] if name == "optimizer.betas" else value) for name, value in SETTINGS.items()]
    listed += [("lora.blocks", 1), ("mask.layers", 1)]
    return [(name, type(value)) for name, value in listed if type(value) in (int, float)]


SETTINGS = TrainSettings().by_name()


@pytest.mark.parametrize(("name", "kind"), numbers())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1, -1e-9, 10**400])
def test_numbers_out_of_range(name: str, kind: type, value: float) -> None:
    if name == "noise.mean" and -1 <= value < 0:
        return  # the one number that may be negative
    given = [value, value] if isinstance(SETTINGS[name], tuple) else value
    table: Any = given
    for part in reversed(name.split(".")):
        table = {part: table}
    with pytest.raises(ValueError, match=f"{name}=.*must be"):
        build_settings(table)
    with pytest.raises(ValueError, match="must be|should be"):
        TrainSettings().replaced(**table)


def test_what_a_resumed_run_may_change() -> None:
    settings = TrainSettings()
    assert settings.changed_in(settings.replaced(out="elsewhere", keep=9, data={"cache": "x"})) == {}
    changed = settings.changed_in(settings.replaced(steps=3, mask={"weight": 2.0}))
    assert changed == {"steps": (1000, 3), "mask.weight": (1.0, 2.0)}


def test_tyro_parses_nested_settings() -> None:
    words = [
        "--mask.weight",
        "2",
        "--mask.layers",
        "3",
        "4",
        "--optimizer.betas",
        "0.5",
        "0.9",
        "--steps",
        "7",
    ]
    settings = tyro.cli(TrainSettings, args=words)
    assert settings == TrainSettings().replaced(
        steps=7, mask={"weight": 2.0, "layers": [3, 4]}, optimizer={"betas": [0.5, 0.9]}
    )


def test_settings_import_nothing_heavy() -> None:
    program = (
        "import sys; import seg4diff.training.settings; "
        "print(sorted({'torch', 'diffusers', 'accelerate', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
