"""Everything a training run is told: dataclasses, read from TOML, checked before anything is loaded.

Imports nothing heavy, so that ``--help`` and a mistyped setting answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Pairing = Literal["class", "token", "head"]
Scores = Literal["logit", "probability", "text_probability"]
Normalisation = Literal["none", "minmax", "standard"]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the attention projections of the image stream (Hu et al. 2021).

    Attributes:
        rank: of every adapter.
        alpha: adapters are scaled by alpha / rank; 0 means alpha = rank.
        targets: modules within the joint attention of a block.
        blocks: transformer blocks that get adapters; empty for all.
    """

    rank: int = 16
    alpha: float = 0.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class MaskSettings:
    """The mask loss.

    Attributes:
        weight: of the mask loss beside the flow-matching loss; 0 trains a plain LoRA.
        focal_weight, dice_weight: of its two terms.
        focal: ``"default"``, or ``"reference"`` for the public code's focal loss (see ``focal_loss``).
        layers: transformer blocks whose maps are trained, each on its own; empty for the expert layers.
        pairing: ``"class"``: a class's mask belongs to the tokens of its name. ``"token"``: candidates are
            the maps of the caption's words, matched with the masks. ``"head"``: so, every head by itself.
        scores: what a map holds, see :class:`seg4diff.MapRequest`. Raw probabilities under a sigmoid hardly
            train, they are small numbers: normalise them, or use logits.
        normalisation: of every map over the picture, before the sigmoid. ``"standard"``: sharpness / 4 *
            (map - mean) / deviation, so that only a map's shape is trained and not its level, which takes
            more from the model than it gives (``benchmarks/results/magnet_seeds.md``); ``"minmax"``: to
            sharpness * [-1/2, 1/2]; ``"none"``, as the public code.
        sharpness: see ``normalisation``.
        convolutional_head: refine the maps by three small convolutions that are trained and thrown away, as
            in the public code.
        match_focal_weight, match_dice_weight: weights of the matching cost.
        max_masks: largest masks of a picture that count.
        min_area: smallest share of the picture that a mask may have.
    """

    weight: float = 1.0
    focal_weight: float = 1.0
    dice_weight: float = 1.0
    focal: Literal["default", "reference"] = "default"
    layers: tuple[int, ...] = ()
    pairing: Pairing = "class"
    scores: Scores = "logit"
    normalisation: Normalisation = "standard"
    sharpness: float = 8.0
    convolutional_head: bool = False
    match_focal_weight: float = 0.02
    match_dice_weight: float = 1.0
    max_masks: int = 32
    min_area: float = 0.005


@dataclass(frozen=True)
class NoiseSettings:
    """Noise levels: sigma is the sigmoid of a normal number, then shifted as the model's scheduler does.

    Attributes:
        mean, deviation: of that normal number; the public code has 0 and 0.5.
        shift: s in s sigma / (1 + (s - 1) sigma); 1 leaves sigma as it is.
    """

    mean: float = 0.0
    deviation: float = 0.5
    shift: float = 1.0


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with warm-up, cosine decay to zero and clipped gradients.

    Attributes:
        name: ``"adamw"``, or ``"adamw8bit"`` with 8-bit states (extra ``quant``).
        learning_rate: its peak.
        warm_up: optimizer steps of linear warm-up.
        betas, epsilon, weight_decay: of AdamW.
        clip: largest norm of the gradient.
        offload: keep the optimizer's states, and do its step, on the CPU.
    """

    name: Literal["adamw", "adamw8bit"] = "adamw"
    learning_rate: float = 1e-4
    warm_up: int = 100
    betas: tuple[float, ...] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    clip: float = 1.0
    offload: bool = False


@dataclass(frozen=True)
class DataSettings:
    """Pictures, masks and captions.

    Attributes:
        kind: ``"folder"``, ``"coco"``, ``"sa1b"`` or ``"demo"``; see :mod:`seg4diff.magnet.sources`.
        images: folder of the pictures.
        masks: COCO: the panoptic or stuff JSON. Others: none, masks lie beside the pictures.
        captions: COCO's captions JSON, or a JSON of picture name -> caption(s) as ``seg4diff caption``
            writes.
        resolution: side in pixels of the square that pictures are resized to, once.
        geometry: the central square (``"crop"``), or the whole picture regardless of its aspect
            (``"squash"``).
        text: train on ``"captions"``, or on the joined names of the classes present (``"classes"``).
        caption_dropout: share of the samples that see an empty prompt, and no mask loss.
        held_out: share of the pictures kept aside to choose the best checkpoint.
        held_out_limit: most pictures kept aside.
        limit: use this many pictures only; 0 for all.
        cache: folder for encoded pictures and captions; empty for ``cache`` in the run's folder.
        shard: pictures in one file of the cache.
        workers: processes that read ahead.
        scenes: of the demo scenes, how many, from seed ``first_scene`` on.
        first_scene: see ``scenes``.
    """

    kind: Literal["folder", "coco", "sa1b", "demo"] = "folder"
    images: str = ""
    masks: str = ""
    captions: str = ""
    resolution: int = 1024
    geometry: Literal["crop", "squash"] = "crop"
    text: Literal["captions", "classes"] = "captions"
    caption_dropout: float = 0.1
    held_out: float = 0.02
    held_out_limit: int = 64
    limit: int = 0
    cache: str = ""
    shard: int = 64
    workers: int = 0
    scenes: int = 512
    first_scene: int = 5_000_000


@dataclass(frozen=True)
class MemorySettings:
    """What the run trades for memory.

    Attributes:
        gradient_checkpointing: recompute activations in backward, about a quarter more time.
        precision: of the frozen weights and the activations; ``"auto"``: bfloat16 on a GPU, else float32.
            Adapters, optimizer and losses are always float32.
        quantise: ``"nf4"`` keeps the frozen weights in 4 bits (extra ``quant``).
    """

    gradient_checkpointing: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    quantise: Literal["none", "nf4"] = "none"


@dataclass(frozen=True)
class TrainSettings:
    """A training run.

    Attributes:
        model: what ``seg4diff segment --model`` takes: a hub name, a folder, or ``"demo"``.
        out: folder of the run.
        steps: optimizer steps.
        batch: pictures a process and forward.
        accumulation: forwards an optimizer step.
        fm_weight: weight of the flow-matching loss; 0 stops the model after the last trained layer.
        seed: of everything random.
        ema: decay of an average of the adapters, which is then what is saved; 0 for none.
        checkpoint_every: optimizer steps between checkpoints; the last is always written.
        keep: checkpoints to keep.
        evaluate_every: optimizer steps between looks at the held-out split; 0 for the end only.
        select: what the best checkpoint has least of, on the held-out split.
        resume: ``"latest"`` goes on where the run in ``out`` stopped, ``"never"`` refuses to.
        bad_steps: consecutive steps with a NaN or infinite loss, all skipped, after which training gives up.
        report: where losses and pictures go.
        sample_prompts: drawn at every look at the held-out split; keeps the VAE on the CPU.
        device: empty for what Accelerate finds; ``"cpu"`` forces the CPU.
    """

    model: str = "stabilityai/stable-diffusion-3-medium-diffusers"
    out: str = "magnet-output"
    steps: int = 1000
    batch: int = 1
    accumulation: int = 1
    fm_weight: float = 1.0
    seed: int = 0
    ema: float = 0.0
    checkpoint_every: int = 250
    keep: int = 2
    evaluate_every: int = 250
    select: Literal["total", "mask", "flow"] = "total"
    resume: Literal["latest", "never"] = "latest"
    bad_steps: int = 5
    report: Literal["none", "tensorboard", "wandb"] = "none"
    sample_prompts: tuple[str, ...] = ()
    device: str = ""
    lora: LoraSettings = field(default_factory=LoraSettings)
    mask: MaskSettings = field(default_factory=MaskSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)

    def __post_init__(self) -> None:
        _check(self)

    def replaced(self, **changes: Any) -> TrainSettings:
        """A copy with changes, those of a section as mapping: ``replaced(steps=5, mask={"weight": 2.0})``."""
        values = {
            name: dataclasses.replace(getattr(self, name), **value)
            if isinstance(value, Mapping) and dataclasses.is_dataclass(getattr(self, name))
            else value
            for name, value in changes.items()
        }
        return dataclasses.replace(self, **values)

    def identity(self) -> str:
        """Hash of what decides the weights that come out; a checkpoint of another identity is not resumed."""
        values = dataclasses.asdict(self)
        for name in (
            "out",
            "checkpoint_every",
            "keep",
            "resume",
            "report",
            "sample_prompts",
            "bad_steps",
            "device",
        ):
            del values[name]
        for name in ("cache", "shard", "workers"):
            del values["data"][name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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
        raise ValueError(f"configuration {str(path)!r} is no TOML: {error}") from None


def build_settings(values: Mapping[str, Any]) -> TrainSettings:
    """Settings from nested mappings, as TOML has them.

    Raises:
        ValueError: see :func:`read_settings`.
    """
    values = dict(values)
    preset = values.pop("preset", "default")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown; accepted: {', '.join(map(repr, PRESETS))}")
    result: TrainSettings = _build(TrainSettings, merged(PRESETS[preset], values), "")
    return result


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested tables as one; where both have a value, that of ``above`` counts."""
    result = dict(below)
    for name, value in above.items():
        mine = result.get(name)
        result[name] = (
            merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    kinds = get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"; did you mean {prefix + near[0]!r}?" if near else f"; known: {', '.join(kinds)}"
            raise ValueError(f"{prefix + name!r} is no setting{hint}")
        arguments[name] = _converted(kinds[name], value, prefix + name)
    return cls(**arguments)


def _converted(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r} must be a table: [{name}]")
        return _build(kind, value, name + ".")  # type: ignore[arg-type]
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        raise AssertionError(f"setting {name} has a union type")
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name}={value!r} is unknown; accepted: {', '.join(map(repr, get_args(kind)))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name}={value!r} must be a list")
        return tuple(_converted(get_args(kind)[0], item, name) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r} must be a {kind.__name__}")
    return value


def _check(settings: TrainSettings) -> None:
    """Raise ValueError for values that make no sense, alone or together."""
    lora, mask, data, optimizer = settings.lora, settings.mask, settings.data, settings.optimizer
    for name, value in {
        "steps": settings.steps,
        "batch": settings.batch,
        "accumulation": settings.accumulation,
        "checkpoint_every": settings.checkpoint_every,
        "keep": settings.keep,
        "bad_steps": settings.bad_steps,
        "lora.rank": lora.rank,
        "mask.max_masks": mask.max_masks,
        "mask.sharpness": mask.sharpness,
        "data.resolution": data.resolution,
        "data.shard": data.shard,
        "data.scenes": data.scenes,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.clip": optimizer.clip,
    }.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be positive")
    for name, value in {
        "fm_weight": settings.fm_weight,
        "evaluate_every": settings.evaluate_every,
        "lora.alpha": lora.alpha,
        "mask.weight": mask.weight,
        "mask.focal_weight": mask.focal_weight,
        "mask.dice_weight": mask.dice_weight,
        "noise.deviation": settings.noise.deviation,
        "optimizer.warm_up": optimizer.warm_up,
        "data.limit": data.limit,
        "data.workers": data.workers,
        "data.first_scene": data.first_scene,
    }.items():
        if not value >= 0:
            raise ValueError(f"{name}={value!r} must not be negative")
    for name, value in {
        "ema": settings.ema,
        "data.caption_dropout": data.caption_dropout,
        "data.held_out": data.held_out,
        "mask.min_area": mask.min_area,
    }.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} must lie in [0, 1)")
    if settings.noise.shift <= 0:
        raise ValueError(f"noise.shift={settings.noise.shift!r} must be positive")
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ValueError(f"optimizer.betas={list(optimizer.betas)!r} must be two numbers in [0, 1)")
    if settings.fm_weight == 0 and mask.weight == 0:
        raise ValueError("fm_weight and mask.weight are both 0: there is nothing to train")
    if mask.weight > 0 and mask.focal_weight == mask.dice_weight == 0:
        raise ValueError(
            "mask.focal_weight and mask.dice_weight are both 0; set mask.weight=0 for no mask loss"
        )
    if settings.fm_weight == 0 and data.caption_dropout > 0:
        raise ValueError(
            f"data.caption_dropout={data.caption_dropout!r} with fm_weight=0: samples without caption would "
            "train nothing; set data.caption_dropout=0"
        )
    if optimizer.offload and optimizer.name == "adamw8bit":
        raise ValueError(
            "optimizer.offload with adamw8bit: 8-bit states live on the GPU; choose one of the two"
        )
    if not lora.targets:
        raise ValueError("lora.targets is empty; name modules such as to_q")
