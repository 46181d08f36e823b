"""Settings of a training run: dataclasses, read from TOML and checked before anything is loaded.

Imports nothing heavy, so that `--help` and a mistyped setting answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from seg4diff.data.settings import DataSettings
from seg4diff.lora.settings import LoraSettings
from seg4diff.settings import CHECKED, Count, Flag, Name, Number, Positive, Seed, Share, Weight, Whole

Pairing = Literal["class", "token", "head"]
Scores = Literal["logit", "probability", "text_probability"]
Normalisation = Literal["none", "minmax", "standard"]


@dataclass(frozen=True, config=CHECKED)
class MaskSettings:
    """The mask loss.

    Attributes:
        weight: weight of the mask loss beside the flow-matching loss; 0 trains a plain LoRA.
        focal_weight, dice_weight: weights of the two terms of the mask loss.
        focal: ``"default"``, or ``"reference"`` for the public code's focal loss (see ``focal_loss``).
        layers: transformer blocks whose maps are trained, one loss per block; empty for the expert layers.
        pairing: ``"class"``: the mask of a class belongs to the tokens of its name. ``"token"``: the maps of
            the caption's words are matched with the masks. ``"head"``: as ``"token"``, separately per head.
        scores: kind of map, see :class:`seg4diff.MapRequest`. Raw probabilities are small numbers and hardly
            train under a sigmoid: normalise them, or use logits.
        normalisation: how each map is normalised over the image, before the sigmoid. ``"standard"``:
            sharpness / 4 * (map - mean) / deviation, which trains a map's shape and leaves its level alone;
            training the level costs more image quality than it gains
            (``benchmarks/results/magnet_seeds.md``). ``"minmax"``: to sharpness * [-1/2, 1/2]. ``"none"``:
            as in the public code.
        sharpness: scale of the mask logits, see ``normalisation``.
        convolutional_head: refine the maps by three small convolutions that are trained and thrown away, as
            in the public code.
        match_focal_weight, match_dice_weight: weights of the matching cost.
        max_masks: number of masks per image that are used, the largest first.
        min_area: smallest area of a mask, as a share of the image.
    """

    weight: Weight = 1.0
    focal_weight: Weight = 1.0
    dice_weight: Weight = 1.0
    focal: Literal["default", "reference"] = "default"
    layers: tuple[Whole, ...] = ()
    pairing: Pairing = "class"
    scores: Scores = "logit"
    normalisation: Normalisation = "standard"
    sharpness: Positive = 8.0
    convolutional_head: Flag = False
    match_focal_weight: Weight = 0.02
    match_dice_weight: Weight = 1.0
    max_masks: Count = 32
    min_area: Share = 0.005


@dataclass(frozen=True, config=CHECKED)
class NoiseSettings:
    """Noise levels: sigma is the sigmoid of a normal number, then shifted as the model's scheduler does.

    Attributes:
        mean, deviation: mean and standard deviation of that normal number; the public code has 0 and 0.5.
        shift: the s in s sigma / (1 + (s - 1) sigma); 1 leaves sigma as it is.
    """

    mean: Number = 0.0
    deviation: Weight = 0.5
    shift: Positive = 1.0


@dataclass(frozen=True, config=CHECKED)
class OptimizerSettings:
    """AdamW with warm-up, cosine decay to zero and clipped gradients.

    Attributes:
        name: ``"adamw"``, or ``"adamw8bit"`` with 8-bit states (extra ``quant``).
        learning_rate: peak learning rate.
        warm_up: number of optimizer steps of linear warm-up.
        betas, epsilon, weight_decay: parameters of AdamW.
        clip: maximum gradient norm.
    """

    name: Literal["adamw", "adamw8bit"] = "adamw"
    learning_rate: Positive = 1e-4
    warm_up: Whole = 100
    betas: Annotated[tuple[Share, ...], Field(min_length=2, max_length=2)] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    weight_decay: Weight = 1e-4
    clip: Positive = 1.0


@dataclass(frozen=True, config=CHECKED)
class MemorySettings:
    """What a run gives up to save memory.

    Attributes:
        gradient_checkpointing: recompute activations in backward, about a quarter more time.
        precision: dtype of the frozen weights and the activations; ``"auto"``: bfloat16 on a GPU, else
            float32. Adapters, optimizer and losses are always float32.
        quantise: ``"nf4"`` keeps the frozen weights in 4 bits (extra ``quant``).
    """

    gradient_checkpointing: Flag = True
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    quantise: Literal["none", "nf4"] = "none"


@dataclass(frozen=True, config=CHECKED)
class TrainSettings:
    """A training run.

    Attributes:
        model: what ``seg4diff segment --model`` takes: a hub name, a folder, or ``"demo"``.
        out: folder of the run.
        steps: number of optimizer steps.
        batch: images per forward pass on each process.
        accumulation: forward passes per optimizer step.
        fm_weight: weight of the flow-matching loss; 0 stops the model after the last trained layer.
        seed: seed of everything random.
        ema: decay of the running average of the adapters, which is then what is saved; 0 for none.
        checkpoint_every: optimizer steps between checkpoints; the last step always writes one.
        keep: number of checkpoints to keep.
        evaluate_every: optimizer steps between evaluations of the held-out split; 0 for the end only.
        select: held-out loss that selects the best adapters.
        resume: ``"latest"`` continues the run in ``out``, ``"never"`` refuses a folder that holds a run.
        bad_steps: consecutive steps with a NaN or infinite loss, all skipped, after which training gives up.
        report: tracker that receives losses and images.
        sample_prompts: prompts to generate images from at every evaluation; keeps the VAE on the CPU.
        device: ``"auto"`` for the device that Accelerate finds; ``"cpu"`` forces the CPU.
    """

    model: Name = "stabilityai/stable-diffusion-3-medium-diffusers"
    out: Name = "magnet-output"
    steps: Count = 1000
    batch: Count = 1
    accumulation: Count = 1
    fm_weight: Weight = 1.0
    seed: Seed = 0
    ema: Share = 0.0
    checkpoint_every: Count = 250
    keep: Count = 2
    evaluate_every: Whole = 250
    select: Literal["total", "mask", "flow"] = "total"
    resume: Literal["latest", "never"] = "latest"
    bad_steps: Count = 5
    report: Literal["none", "tensorboard", "wandb"] = "none"
    sample_prompts: tuple[str, ...] = ()
    device: Literal["auto", "cpu"] = "auto"
    lora: LoraSettings = field(default_factory=LoraSettings)
    mask: MaskSettings = field(default_factory=MaskSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)

    def __post_init__(self) -> None:
        mask, dropout = self.mask, self.data.caption_dropout
        if self.fm_weight == 0 and mask.weight == 0:
            raise ValueError("fm_weight and mask.weight are both 0: there is nothing to train")
        if mask.weight > 0 and mask.focal_weight == mask.dice_weight == 0:
            raise ValueError(
                "mask.focal_weight and mask.dice_weight are both 0; set mask.weight=0 for no mask loss"
            )
        if self.fm_weight == 0 and dropout > 0:
            raise ValueError(
                f"data.caption_dropout={dropout!r} with fm_weight=0: samples without caption would train "
                "nothing; set data.caption_dropout=0"
            )

    def replaced(self, **changes: Any) -> TrainSettings:
        """A copy with changes, those of a section as mapping: ``replaced(steps=5, mask={"weight": 2.0})``."""
        return build_settings(merged(dataclasses.asdict(self), changes))

    def by_name(self) -> dict[str, Any]:
        """Every setting by its dotted name, such as ``mask.weight``."""
        values = dataclasses.asdict(self)
        sections = {name: values.pop(name) for name in [*values] if isinstance(values[name], dict)}
        return values | {
            f"{name}.{part}": value for name in sections for part, value in sections[name].items()
        }

    def changed_in(self, other: TrainSettings) -> dict[str, tuple[Any, Any]]:
        """What differs in ``other``, (own value, other's) by name, of what decides the trained weights."""
        mine, others = self.by_name(), other.by_name()
        return {
            name: (value, others[name])
            for name, value in mine.items()
            if name not in _WITHOUT_EFFECT and value != others[name]
        }


_WITHOUT_EFFECT = {
    *("out", "checkpoint_every", "keep", "resume", "report", "sample_prompts", "bad_steps", "device"),
    *("data.cache", "data.shard", "data.workers"),
}
"""Settings that a resumed run may change: they do not decide the weights that come out."""

# What the public code of Seg4Diff does (section 4.3, appendix A), and what the paper states: another learning
# rate, captions instead of class names, and matching.
_REFERENCE: dict[str, Any] = {
    "steps": 3000,
    "batch": 8,
    "mask": {
        "weight": 1.0,
        "focal_weight": 0.1,
        "dice_weight": 0.2,
        "focal": "reference",
        "pairing": "class",
        "scores": "logit",
        "normalisation": "none",
        "convolutional_head": True,
    },
    "optimizer": {"learning_rate": 1e-4, "warm_up": 500, "clip": 0.01, "weight_decay": 1e-4},
    "data": {"text": "classes", "caption_dropout": 0.0},
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "reference": _REFERENCE,
    "paper": {
        **_REFERENCE,
        "batch": 4,
        "accumulation": 4,
        "mask": {
            "pairing": "token",
            "focal_weight": 0.1,
            "dice_weight": 0.2,
            "scores": "logit",
            "normalisation": "none",
        },
        "optimizer": {**_REFERENCE["optimizer"], "learning_rate": 1e-5},
        "data": {"text": "captions", "caption_dropout": 0.0},
    },
}
"""Named sets of choices a TOML file can start from with ``preset = "..."``."""


def read_settings(path: Path | str) -> TrainSettings:
    """Settings from a TOML file.

    Keys are the attributes of :class:`TrainSettings`, its sections tables; ``preset`` names what the rest
    overrides.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not TOML, or a key or value is wrong; the message names it and what is accepted.
    """
    values = read_table(path)
    try:
        return build_settings(values)
    except ValueError as error:
        raise ValueError(f"configuration {str(path)!r}: {error}") from None


def read_table(path: Path | str) -> dict[str, Any]:
    """What a TOML file holds, unchecked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"configuration {str(path)!r} does not exist; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"configuration {str(path)!r} is not TOML: {error}") from None


def build_settings(values: Mapping[str, Any]) -> TrainSettings:
    """Settings from nested mappings, as TOML has them.

    Raises:
        ValueError: see :func:`read_settings`.
    """
    values = dict(values)
    preset = values.pop("preset", "default")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown; accepted: {', '.join(map(repr, PRESETS))}")
    try:
        return _adapter().validate_python(merged(PRESETS[preset], values))
    except ValidationError as error:
        raise ValueError("; ".join(map(_in_words, error.errors()))) from None


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested tables as one; where both have a value, that of ``above`` counts."""
    result = dict(below)
    for name, value in above.items():
        mine = result.get(name)
        result[name] = (
            merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
        )
    return result


@cache
def _adapter() -> TypeAdapter[TrainSettings]:
    return TypeAdapter(TrainSettings)


def _in_words(error: Any) -> str:
    """One error of pydantic, with the setting's dotted name, its value and what is accepted."""
    names = [part for part in error["loc"] if isinstance(part, str)]
    name = ".".join(names)
    if error["type"] == "unexpected_keyword_argument":
        section = TrainSettings() if len(names) == 1 else getattr(TrainSettings(), names[0])
        known = [entry.name for entry in dataclasses.fields(section)]
        near = difflib.get_close_matches(names[-1], known, n=1)
        path = "".join(f"{part}." for part in names[:-1])
        return f"unknown setting {name!r}; " + (
            f"did you mean {path + near[0]!r}?" if near else f"accepted: {', '.join(known)}"
        )
    if error["type"] == "dataclass_type":
        return f"{name}={error['input']!r} must be a table: [{name}]"
    if error["type"] == "value_error":  # of settings that do not go together
        return str(error["ctx"]["error"])
    wanted = re.sub(r"^(Input|Tuple|String) should", "must", error["msg"]).replace("tuple", "list")
    return f"{name}={error['input']!r} {wanted}"
