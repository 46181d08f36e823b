"""How much memory a training run will take, part by part, without running it.

Called by ``seg4diff train --estimate``. One training step of the model's exact shape is traced with tensors
that have shapes and no data (PyTorch's fake tensors), and every tensor's birth and death is booked; the
peak is the answer. No weight is loaded and nothing is computed, so a laptop can say what a GPU will need.
What surrounds the tensors (the driver's context, some hundred MiB, and fragmentation) is not counted.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seg4diff.backbones import find_backbone
from seg4diff.kernels.api import backend
from seg4diff.kernels.aten import backward, forward
from seg4diff.kernels.types import Inputs, Request
from seg4diff.magnet import objective
from seg4diff.magnet.adapters import add_adapters
from seg4diff.magnet.matching import mask_costs
from seg4diff.magnet.objective import Batch, Magnet
from seg4diff.magnet.settings import TrainSettings

logger = logging.getLogger(__name__)

Device = Literal["cuda", "cpu"]

PARTS = ("weights", "LoRA", "gradients", "optimizer", "saved activations", "attention", "maps", "backward")
_MIB, _GIB = 2**20, 2**30
_TYPICAL_MASKS = 8  # masks of one picture, where the settings allow as many

# Transformers whose shape is known without a file: SD3-medium, as published in its config.json.
_KNOWN = {
    "stabilityai/stable-diffusion-3-medium-diffusers": {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    }
}
SD3_MEDIUM = _KNOWN["stabilityai/stable-diffusion-3-medium-diffusers"]


@dataclass(frozen=True)
class Estimate:
    """Predicted peak memory of one training step.

    Attributes:
        parts: bytes at the moment of the peak, by part: ``weights`` (frozen), ``LoRA``, its ``gradients``,
            ``optimizer`` (what of it lives on the GPU), ``saved activations``, ``attention`` (outputs and
            workspace of attention operators), ``maps`` (maps, mask logits and mask losses), ``backward``
            (recomputation and gradients of activations).
        settings: what it is for.
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
    text_tokens: int = 154,
    pixels_per_latent: int = 8,
    masks: int = _TYPICAL_MASKS,
) -> Estimate:
    """Predict the peak memory of training.

    Args:
        config: of the transformer, as its ``config.json`` has it.
        settings: of the run; ``memory.precision="auto"`` is bfloat16 on ``"cuda"`` and float32 on ``"cpu"``.
        device: decides the attention backend whose workspace is counted.
        text_tokens: length of a prompt; 154 is SD3 without T5.
        pixels_per_latent: how much the VAE shrinks a side.
        masks: of one picture.

    Raises:
        ValueError: no expert layer is known and ``mask.layers`` names none, or the settings do not suit the
            model.
    """
    from diffusers import SD3Transformer2DModel

    precision = settings.memory.precision
    if precision == "auto":
        precision = "bfloat16" if device == "cuda" else "float32"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    with torch.device("meta"), _quiet():
        transformer: Any = SD3Transformer2DModel.from_config(dict(config)).to(dtype).eval()
        layers = objective.mask_layers(transformer, settings.mask) if settings.mask.weight > 0 else ()
        stop_after = layers[-1] if settings.fm_weight == 0 else None
        quantised = _nf4_savings(transformer, dtype) if settings.memory.quantise == "nf4" else 0
        add_adapters(transformer, settings.lora, stop_after=stop_after)
    tracker = _Tracker(counts_workspace=device == "cpu")
    with backend("aten"), FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        for patched in _without_data():
            stack.enter_context(patched)
        trained = _made_fake(transformer)
        if settings.memory.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        magnet = _Observed(transformer, settings, tracker)
        batch = _batch(settings, transformer, text_tokens, pixels_per_latent, masks)
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


def cheapest_fit(
    find: Callable[[TrainSettings], Estimate], settings: TrainSettings, memory: int
) -> tuple[str, Estimate] | None:
    """The cheapest and fewest switches, in time and quality, that bring a run into ``memory``.

    Args:
        find: estimates settings.
        settings: of the run as it is; does not fit.
        memory: bytes.

    Returns:
        What to change, in words of a configuration, and the estimate then; None if nothing helps.
    """
    applicable = [(words, change) for words, change in _SWITCHES if change(settings) is not None]
    tried: list[tuple[str, Estimate]] = []
    for words, change in applicable:
        changed = change(settings)
        assert changed is not None
        found = find(changed)
        if found.peak <= memory:
            return words, found
        tried.append((words, found))
    together, names = settings, []
    for words, change in applicable:
        changed = change(together)
        if changed is None:
            continue
        together = changed
        names.append(words)
        if len(names) > 1:
            found = find(together)
            if found.peak <= memory:
                return ", ".join(names), found
    return None


def report(settings: TrainSettings, memory: int | None = None) -> Group:
    """What ``seg4diff train --estimate`` prints."""
    config, text_tokens, pixels = model_shape(settings.model)

    def find(changed: TrainSettings) -> Estimate:
        return estimate_memory(config, changed, text_tokens=text_tokens, pixels_per_latent=pixels)

    found = find(settings)
    side = settings.data.resolution
    title = f"{settings.model}, {side} x {side} pixels, batch {settings.batch}: predicted peak memory"
    table = Table()
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in found.parts.items():
        table.add_row(name, f"{size / _GIB:.2f}")
    table.add_section()
    table.add_row("peak", f"{found.peak / _GIB:.2f}", style="bold")
    lines = ["On a GPU, without its driver's context (some hundred MiB) and fragmentation."]
    if memory is not None and found.peak <= memory:
        lines.append(f"Fits in {memory / _GIB:.2f} GiB.")
    elif memory is not None:
        fit = cheapest_fit(find, settings, memory)
        if fit is None:
            lines.append(
                f"Does not fit in {memory / _GIB:.2f} GiB, whatever is switched; use a smaller resolution."
            )
        else:
            lines.append(f"To fit in {memory / _GIB:.2f} GiB: {fit[0]} ({fit[1].peak / _GIB:.2f} GiB).")
    return Group(Text(title), table, *map(Text, lines))


def model_shape(model: str) -> tuple[dict[str, Any], int, int]:
    """Configuration of a model's transformer, length of a prompt without T5, and pixels a latent covers.

    Raises:
        FileNotFoundError: the model is no folder, and its configuration cannot be fetched.
    """
    if model in _KNOWN:
        return dict(_KNOWN[model]), 154, 8
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
                f"model={model!r} is no folder, and its configuration cannot be fetched ({error})"
            ) from error
    try:
        configs = {part: json.loads(path.read_text(encoding="utf-8")) for part, path in read.items()}
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"model={model!r} has no readable configuration ({error})") from error
    return configs["transformer"], 154, 2 ** (len(configs["vae"]["block_out_channels"]) - 1)


def parse_memory(text: str) -> int:
    """Bytes from words such as ``8GiB``, ``24GB`` or ``512MiB``.

    Raises:
        ValueError: it is no such word.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": _MIB, "GIB": _GIB}
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in units:
        raise ValueError(f"memory={text!r} is no size; use 8GiB, 24GB, 512MiB, ...")
    return int(float(found[1]) * units[found[2].upper()])


def _switch(**changes: Any) -> Callable[[TrainSettings], TrainSettings | None]:
    def change(settings: TrainSettings) -> TrainSettings | None:
        try:
            changed = settings.replaced(**changes)
        except ValueError:
            return None
        return None if changed == settings else changed

    return change


def _smaller_batch(settings: TrainSettings) -> TrainSettings | None:
    if settings.batch == 1:
        return None
    return settings.replaced(batch=1, accumulation=settings.accumulation * settings.batch)


def _smaller_pictures(settings: TrainSettings) -> TrainSettings | None:
    if settings.data.resolution < 512:
        return None
    return settings.replaced(data={"resolution": settings.data.resolution // 2})


# From the cheapest to the dearest, in time and then in what is learned.
_SWITCHES: tuple[tuple[str, Callable[[TrainSettings], TrainSettings | None]], ...] = (
    ("memory.precision='bfloat16'", _switch(memory={"precision": "bfloat16"})),
    ("batch=1 with more accumulation", _smaller_batch),
    ("optimizer.name='adamw8bit'", _switch(optimizer={"name": "adamw8bit"})),
    ("memory.gradient_checkpointing=true", _switch(memory={"gradient_checkpointing": True})),
    ("memory.quantise='nf4'", _switch(memory={"quantise": "nf4"})),
    ("half the data.resolution", _smaller_pictures),
    ("fm_weight=0", _switch(fm_weight=0.0, data={"caption_dropout": 0.0})),
)


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
        kwargs = kwargs or {}
        name = func.name()
        if self._counts_workspace and name.startswith("seg4diff::aten_"):
            with self.labelled("attention"), self:
                if name.endswith("forward"):
                    result: Any = forward.forward(Inputs(*args[:7]), Request(*args[7:]))
                else:
                    inputs, request = Inputs(*args[3:10]), Request(*args[13:])
                    image, text, lse = args[10:13]
                    result = backward.backward(args[0], args[1], args[2], inputs, image, text, lse, request)
            return result
        result = func(*args, **kwargs)
        attention = name.startswith("seg4diff::") or "scaled_dot_product" in name
        for position, tensor in enumerate(tree_leaves(result)):
            if isinstance(tensor, Tensor):
                is_map = name.startswith("seg4diff::") and name.endswith("forward") and position == 3
                self._book(tensor, "maps" if is_map else "attention" if attention else self.label)
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


class _Observed(Magnet):
    """The objective, its maps and mask losses booked as such."""

    def __init__(self, transformer: nn.Module, settings: TrainSettings, tracker: _Tracker) -> None:
        layers = settings.mask
        super().__init__(transformer, layers, fm_weight=settings.fm_weight)
        self._tracker = tracker

    def _mask_losses(self, maps: Tensor, grid: tuple[int, int], batch: Batch) -> tuple[Tensor, Tensor]:
        with self._tracker.labelled("maps"):
            return super()._mask_losses(maps, grid, batch)


def _batch(
    settings: TrainSettings, transformer: Any, text_tokens: int, pixels_per_latent: int, masks: int
) -> Batch:
    """A batch of the run's shape, without data."""
    rows, side = settings.batch, settings.data.resolution // pixels_per_latent
    config = transformer.config
    small = min(settings.data.resolution, 256)
    masks = min(masks, settings.mask.max_masks)
    group = (
        tuple((column,) for column in range(1, min(77, text_tokens)))
        if settings.mask.pairing != "class"
        else None
    )
    columns: tuple[tuple[int, ...], ...] = group or tuple((1 + c, 2 + c) for c in range(masks))
    return Batch(
        latents=torch.empty(rows, config.in_channels, side, side),
        noise=torch.empty(rows, config.in_channels, side, side),
        sigma=torch.empty(rows),
        text={
            "encoder_hidden_states": torch.empty(rows, text_tokens, config.joint_attention_dim),
            "pooled_projections": torch.empty(rows, config.pooled_projection_dim),
        },
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


def _without_data() -> list[Any]:
    """Stand-ins for the few places that look at values."""

    def match(
        prediction: Tensor, target: Tensor, *, preset: Any = "default", **_: Any
    ) -> tuple[Tensor, Tensor]:
        mask_costs(prediction, target, preset=preset)
        chosen = torch.arange(min(len(prediction), len(target)))
        return chosen, chosen

    return [
        mock.patch.object(FakeTensor, "tolist", lambda tensor: [0.0] * tensor.numel()),
        mock.patch.object(objective, "match", match),
    ]


def _nf4_savings(transformer: Any, dtype: torch.dtype) -> int:
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


def shape_of(transformer: Any) -> dict[str, Any]:
    """Configuration of a transformer in memory, for :func:`estimate_memory`."""
    return copy.deepcopy(dict(transformer.config))
