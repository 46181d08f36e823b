"""How much memory a training run will take, part by part, without running it.

One training step of the model's exact shape is traced with tensors that have shapes and no data (PyTorch's
fake tensors); allocations and frees are tracked, and the peak is the estimate. No weight is loaded and
nothing is computed, so a laptop can tell what a GPU will need. The driver's context (some hundred MiB) and
fragmentation are not counted.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from seg4diff.backbones import Backbone, families, find_backbone
from seg4diff.kernels.api import backend as kernel_backend
from seg4diff.kernels.aten import backward, forward
from seg4diff.kernels.operators import backward_arguments
from seg4diff.kernels.types import Inputs, Request
from seg4diff.lora.adapters import add_adapters
from seg4diff.training.objective.magnet import Batch, Magnet, mask_layers
from seg4diff.training.objective.matching import mask_costs
from seg4diff.training.settings import TrainSettings

logger = logging.getLogger(__name__)

Device = Literal["cuda", "cpu"]

PARTS = ("weights", "LoRA", "gradients", "optimizer", "saved activations", "attention", "maps", "backward")
_GIB = 2**30
_TYPICAL_MASKS = 8  # masks per image, where the settings allow as many


@dataclass(frozen=True)
class Estimate:
    """Predicted peak memory of one training step.

    Attributes:
        parts: bytes at the moment of the peak, by part: ``weights`` (frozen), ``LoRA``, its ``gradients``,
            ``optimizer`` (what of it lives on the GPU), ``saved activations``, ``attention`` (outputs and
            workspace of attention operators), ``maps`` (maps, mask logits and mask losses), ``backward``
            (recomputation and gradients of activations).
        settings: the run that is estimated.
    """

    parts: Mapping[str, int]
    settings: TrainSettings

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


def estimate_memory(
    config: Mapping[str, Any],
    settings: TrainSettings,
    *,
    device: Device = "cuda",
    text_tokens: int | None = None,
    pixels_per_latent: int = 8,
    masks: int = _TYPICAL_MASKS,
) -> Estimate:
    """Predict the peak memory of training.

    Args:
        config: of the transformer, as its ``config.json`` has it, the name of its class included.
        settings: of the run; ``memory.precision="auto"`` is bfloat16 on ``"cuda"`` and float32 on ``"cpu"``.
        device: decides the attention backend whose workspace is counted.
        text_tokens: length of a prompt; that of the family, without optional text encoders, when None.
        pixels_per_latent: how much the VAE shrinks a side.
        masks: of one image.

    Raises:
        ValueError: no expert layer is known and ``mask.layers`` names none, or the settings do not suit the
            model.
    """
    import diffusers

    backbone = _family(config)
    precision = settings.memory.precision
    if precision == "auto":
        precision = "bfloat16" if device == "cuda" else "float32"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    with torch.device("meta"), _quiet():
        transformer: Any = getattr(diffusers, backbone.transformer).from_config(dict(config)).to(dtype).eval()
        layers = mask_layers(transformer, settings.mask) if settings.mask.weight > 0 else ()
        stop_after = layers[-1] if layers and settings.fm_weight == 0 else None
        quantised = _nf4_savings(transformer, dtype) if settings.memory.quantise == "nf4" else 0
        add_adapters(transformer, settings.lora, stop_after=stop_after)
    tracker = _Tracker(counts_workspace=device == "cpu")
    with kernel_backend("aten"), FakeTensorMode(allow_non_fake_inputs=True):
        trained = _made_fake(transformer)
        if settings.memory.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        magnet = _Observed(transformer, settings, tracker)
        batch = _batch(settings, transformer, text_tokens or backbone.text_tokens, pixels_per_latent, masks)
        resident = _bytes_of(weight for weight in transformer.parameters() if not weight.requires_grad)
        resident += _bytes_of(transformer.buffers())
        adapters = _bytes_of(trained)
        tracker.leave_out([*magnet.parameters(), *magnet.buffers()])
        with tracker:
            total = magnet(batch).total
            tracker.phase = "backward"
            total.backward()
    head = _bytes_of(magnet.head.parameters()) if magnet.head is not None else 0
    parts = {
        "weights": resident - quantised,
        "LoRA": adapters + head,
        "optimizer": _optimizer_bytes(adapters + head, settings),
        **tracker.at_peak,
    }
    # All gradients live when the optimizer steps; at the peak in backward only some of them do.
    gradients = adapters + head
    booked = parts["backward"]
    parts["gradients"] = min(gradients, booked)
    parts["backward"] = booked - parts["gradients"]
    return Estimate({name: int(parts.get(name, 0)) for name in PARTS}, settings)


_VARIANTS: dict[str, dict[str, Any]] = {
    "as configured": {},
    "memory.gradient_checkpointing=true": {"memory": {"gradient_checkpointing": True}},
    "memory.quantise='nf4'": {"memory": {"gradient_checkpointing": True, "quantise": "nf4"}},
    "fm_weight=0": {
        "memory": {"gradient_checkpointing": True},
        "fm_weight": 0.0,
        "data": {"caption_dropout": 0.0},
    },
    "memory.quantise='nf4', fm_weight=0": {
        "memory": {"gradient_checkpointing": True, "quantise": "nf4"},
        "fm_weight": 0.0,
        "data": {"caption_dropout": 0.0},
    },
}


def estimate_variants(settings: TrainSettings, *, progress: bool = False) -> dict[str, Estimate]:
    """Estimates of a run as it is configured, and with what saves memory, by the settings that change.

    Args:
        settings: of the run.
        progress: whether to show a bar.

    Raises:
        FileNotFoundError: see :func:`model_shape`.
        ValueError: see :func:`estimate_memory`.
    """
    config, text_tokens, pixels = model_shape(settings.model)
    found: dict[str, Estimate] = {}
    for name, changes in tqdm(_VARIANTS.items(), desc="configurations", disable=None if progress else True):
        if settings.mask.weight == 0 and "fm_weight" in changes:
            continue  # nothing would be left to train
        changed = settings.replaced(**changes)
        if all(changed != estimate.settings for estimate in found.values()):
            found[name] = estimate_memory(config, changed, text_tokens=text_tokens, pixels_per_latent=pixels)
    return found


def report(found: Mapping[str, Estimate]) -> Group:
    """What ``seg4diff estimate`` prints of the estimates of :func:`estimate_variants`."""
    first, *_ = found.values()
    settings, side = first.settings, first.settings.data.resolution
    title = f"{settings.model}, {side} x {side} pixels, batch {settings.batch}: predicted peak memory"
    tables = []
    for head, sizes in (
        ("part", first.parts),
        ("configuration", {name: estimate.peak for name, estimate in found.items()}),
    ):
        table = Table()
        table.add_column(head)
        table.add_column("GiB", justify="right")
        for name, size in sizes.items():
            table.add_row(name, f"{size / _GIB:.2f}")
        tables.append(table)
    note = "On a GPU, without its driver's context (some hundred MiB) and fragmentation."
    return Group(Text(title), *tables, Text(note))


def model_shape(model: str) -> tuple[dict[str, Any], int, int]:
    """Configuration of a model's transformer, length of a prompt, and pixels a latent covers.

    Raises:
        FileNotFoundError: the model is not a folder, and its configuration cannot be fetched.
    """
    for backbone in families():
        if model in backbone.configurations:
            return dict(backbone.configurations[model]), backbone.text_tokens, 8
    folder = Path(model)
    if model == "demo":
        from seg4diff.demo import WEIGHTS

        folder = WEIGHTS
    if folder.is_dir():
        read = {part: folder / part / "config.json" for part in ("transformer", "vae")}
    else:
        from huggingface_hub import hf_hub_download

        try:
            read = {
                p: Path(hf_hub_download(model, "config.json", subfolder=p)) for p in ("transformer", "vae")
            }
        except Exception as error:
            raise FileNotFoundError(
                f"model={model!r} is not a folder, and its configuration cannot be fetched ({error})"
            ) from error
    try:
        configs = {part: json.loads(path.read_text(encoding="utf-8")) for part, path in read.items()}
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"model={model!r} has no readable configuration ({error})") from error
    text_tokens = _family(configs["transformer"]).text_tokens
    return configs["transformer"], text_tokens, 2 ** (len(configs["vae"]["block_out_channels"]) - 1)


class _Tracker(TorchDispatchMode):
    """Books the storage of every tensor that is made while it is on, by the part it belongs to."""

    def __init__(self, *, counts_workspace: bool) -> None:
        super().__init__()
        self.phase = "forward"
        self.label = ""
        self.live: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {"saved activations": 0, "attention": 0, "maps": 0, "backward": 0}
        self._peak = 0
        self._known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._counts_workspace = counts_workspace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "aten::_local_scalar_dense":  # a look at a value; there are none
            return 0.0
        ours = name.startswith("seg4diff::")
        if self._counts_workspace and name.startswith("seg4diff::aten_"):
            with self.labelled("attention"), self:
                return _run_aten(name, args)
        result = func(*args, **(kwargs or {}))
        tensors = tree_leaves(result)
        returns = [returned.name for returned in func._schema.returns] if ours else [""] * len(tensors)
        attention = ours or "scaled_dot_product" in name
        for returned, tensor in zip(returns, tensors, strict=True):
            if isinstance(tensor, Tensor):
                self._book(tensor, "maps" if returned == "maps" else "attention" if attention else self.label)
        return result

    def leave_out(self, tensors: Sequence[Tensor]) -> None:
        """Book nothing for these, nor for views of them."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = True

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """What is made meanwhile belongs to ``label``."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def _book(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        part = label or ("backward" if self.phase == "backward" else "saved activations")
        size = storage.nbytes()
        self.live[part] += size
        weakref.finalize(storage, self._forget, part, size)
        total = sum(self.live.values())
        if total > self._peak:
            self._peak = total
            self.at_peak = {name: self.live[name] for name in self.at_peak}

    def _forget(self, part: str, size: int) -> None:
        self.live[part] -= size


def _run_aten(name: str, args: Sequence[Any]) -> Any:
    """The function behind an operator of the aten backend, whose workspace is then seen."""
    if name.endswith("forward"):
        return forward.forward(Inputs(*args[:8]), Request(*args[8:]))
    return backward.backward(*backward_arguments(*args))


class _Observed(Magnet):
    """The objective without data, its maps and mask losses booked as such."""

    def __init__(self, transformer: nn.Module, settings: TrainSettings, tracker: _Tracker) -> None:
        layers = settings.mask
        super().__init__(transformer, layers, fm_weight=settings.fm_weight)
        self._tracker = tracker

    def _mask_losses(self, maps: Tensor, grid: tuple[int, int], batch: Batch) -> tuple[Tensor, Tensor]:
        with self._tracker.labelled("maps"):
            return super()._mask_losses(maps, grid, batch)

    def _match(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        mask_costs(prediction, target, preset=self.mask.focal)
        chosen = torch.arange(min(len(prediction), len(target)))
        return chosen, chosen


def _family(config: Mapping[str, Any]) -> Backbone:
    """The family of a transformer with this configuration.

    Raises:
        ValueError: it is of none.
    """
    name = config.get("_class_name")
    for backbone in families():
        if backbone.transformer == name:
            return backbone
    known = ", ".join(backbone.transformer for backbone in families())
    raise ValueError(f"_class_name={name!r} of the transformer's configuration is unknown; known: {known}")


def _batch(
    settings: TrainSettings, transformer: nn.Module, text_tokens: int, pixels_per_latent: int, masks: int
) -> Batch:
    """A batch of the run's shape, without data."""
    rows, side = settings.batch, settings.data.resolution // pixels_per_latent
    backbone = find_backbone(transformer)
    channels = backbone.latent_channels(transformer)
    small = min(settings.data.resolution, 256)
    masks = min(masks, settings.mask.max_masks)
    group = (
        tuple((column,) for column in range(1, min(backbone.name_tokens, text_tokens)))
        if settings.mask.pairing != "class"
        else None
    )
    columns: tuple[tuple[int, ...], ...] = group or tuple((1 + c, 2 + c) for c in range(masks))
    return Batch(
        latents=torch.empty(rows, channels, side, side),
        noise=torch.empty(rows, channels, side, side),
        sigma=torch.empty(rows),
        text=backbone.empty_text(transformer, rows, text_tokens),
        masks=tuple(torch.empty(masks, small, small, dtype=torch.uint8) for _ in range(rows)),
        columns=(columns,) * rows,
    )


def _made_fake(transformer: nn.Module) -> list[nn.Parameter]:
    """Turn meta parameters and buffers into fake ones on the CPU; returns the trained ones."""
    trained = []
    for module in transformer.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
                if weight.requires_grad:
                    trained.append(module._parameters[name])
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return [weight for weight in trained if weight is not None]


def _nf4_savings(transformer: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that NF4 weights save: 4 bits a weight, 8 bits a scale of 64 (Dettmers 2023)."""
    linear = {
        id(layer.weight): layer.weight.numel()
        for block in find_backbone(transformer).blocks(transformer)
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    }
    largest = max(linear.values()) * dtype.itemsize  # one layer at a time is widened to be multiplied
    count = sum(linear.values())
    return int(count * dtype.itemsize - count * (0.5 + 1 / 64) - largest)


def _optimizer_bytes(trained: int, settings: TrainSettings) -> int:
    """Two moments of every float32 parameter, where they are."""
    moments = trained // 2 if settings.optimizer.name == "adamw8bit" else 2 * trained
    return moments + (trained if settings.ema > 0 else 0)


def _bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers warns of casts that do not matter to a model without data."""
    log = logging.getLogger("diffusers.models.modeling_utils")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
