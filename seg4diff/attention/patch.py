"""The record of a patched transformer: what open contexts ask of which layers, and how layers answer.

`patch` checks a transformer and makes the record; nothing runs differently until a context
(`seg4diff.capture`, `seg4diff.perturb`, ...) asks something of some layers. Only those layers then run an
intercepted processor, until the context ends: a layer of which nothing is asked is stock diffusers. The
record lives beside the transformer, not in it, so `state_dict` and `save_pretrained` never see it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from seg4diff.attention.checkpointing import Checkpointing
from seg4diff.attention.interception import (
    RESULT_ATTRIBUTE,
    Interceptor,
    can_intercept,
    stock_of,
)
from seg4diff.attention.mode import Mode
from seg4diff.attention.requests import JointAnswer, LayerRequest, LayerResult, Place
from seg4diff.attention.stand_ins import SkippedBlock, skipped_modules
from seg4diff.backbones import Backbone, Layout, Pipeline, TransformerCall, find_backbone, transformer_of

logger = logging.getLogger(__name__)

Target = TypeVar("Target", bound=Pipeline | nn.Module)


def patch(pipe: Target) -> Target:
    """Check that a pipeline (or a bare transformer) can be captured, segmented and perturbed.

    Optional: everything that needs a patch makes it by itself. Changes no output and costs nothing while
    nothing is asked. Idempotent; pipelines that share a transformer share its patch.

    Args:
        pipe: a diffusers pipeline of a supported family, or its transformer.

    Returns:
        `pipe` itself.

    Raises:
        NotImplementedError: the model family is not supported, or its tokens are sharded over devices.
        ValueError: an attention processor that cannot be intercepted is active.
        TypeError: `pipe` has no transformer.
    """
    patch_of(pipe)
    return pipe


def unpatch(pipe: Target) -> Target:
    """Undo `patch`: every layer gets back the very processor it had.

    Open contexts stop having any effect. Without a patch this does nothing.

    Returns:
        `pipe` itself.
    """
    with _LOCK:
        state = _PATCHES.pop(transformer_of(pipe), None)
    if state is not None:
        state.restore()
    return pipe


def is_patched(pipe: Pipeline | nn.Module) -> bool:
    """Whether `patch` is in force for this pipeline or transformer."""
    return transformer_of(pipe) in _PATCHES


def patch_of(pipe: Pipeline | nn.Module) -> Patch:
    """The patch of a pipeline or transformer, made if there is none.

    Raises:
        NotImplementedError, ValueError, TypeError: as `patch`.
    """
    backbone = find_backbone(pipe)
    transformer = transformer_of(pipe)
    with _LOCK:
        if transformer not in _PATCHES:
            state = Patch(transformer, backbone)
            state.check_supported()
            _PATCHES[transformer] = state
        return _PATCHES[transformer]


@dataclass(frozen=True, eq=False)
class _OpenRequest:
    """What one open context asks, and the thread that opened it; `layers` ascend."""

    layers: tuple[int, ...]
    request: LayerRequest
    stop_early: bool
    thread: int


class Patch:
    """The record of one transformer."""

    def __init__(self, transformer: nn.Module, backbone: Backbone) -> None:
        self._transformer = weakref.ref(transformer)
        self.backbone = backbone
        self._open: list[_OpenRequest] = []
        self._modes: dict[int, Mode] = {}  # by layer
        self._attentions: list[nn.Module] = []  # of all layers, while a context is open
        self._interceptors: dict[type, Interceptor] = {}
        self._place = Place()

    @property
    def transformer(self) -> nn.Module:
        transformer = self._transformer()
        if transformer is None:
            raise RuntimeError("the patched transformer no longer exists")
        return transformer

    @property
    def blocks(self) -> list[nn.Module]:
        return self.backbone.blocks(self.transformer)

    def check_supported(self) -> None:
        """Raise, with the remedy, if the transformer is in a state in which its attention is out of reach.

        Raises:
            NotImplementedError: its tokens or heads are sharded over devices.
            ValueError: a processor that cannot be intercepted.
        """
        attentions = self._joint_attentions()
        # Context parallelism marks processors as well; tensor parallelism marks the model alone.
        for part in (self.transformer, *(stock_of(attention.processor) for attention in attentions)):
            config = getattr(part, "_parallel_config", None)
            if config is not None:
                sharded = getattr(config, "tensor_parallel_config", None) is not None
                kind = "heads over devices (tensor" if sharded else "tokens over devices (context"
                raise NotImplementedError(
                    f"{type(part).__name__} shards its {kind} parallelism), so no device has whole maps; "
                    "load the transformer without enable_parallelism()"
                )
        for layer, attention in enumerate(attentions):
            processor = stock_of(attention.processor)
            name = type(processor).__name__
            if not can_intercept(processor):
                raise ValueError(
                    f"layer {layer} runs the attention processor {name}, which is not known; "
                    "use a stock processor of diffusers (transformer.set_default_attn_processor())"
                )

    def layers(self, layers: Sequence[int] | int | None) -> tuple[int, ...]:
        """Validated layer numbers in ascending order; None means all.

        Raises:
            TypeError: something that is not an integer.
            ValueError: a layer out of range, or none at all.
        """
        count = len(self.blocks)
        if layers is None:
            return tuple(range(count))
        wanted = [layers] if isinstance(layers, int) else list(layers)
        if not wanted:
            raise ValueError(f"layers={layers!r} is empty; this model has layers 0 to {count - 1}")
        for layer in wanted:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise TypeError(f"layers={layers!r} must hold integers, found {layer!r}")
            if not 0 <= layer < count:
                raise ValueError(f"layer {layer} is out of range: this model has layers 0 to {count - 1}")
        return tuple(sorted(set(wanted)))

    def layers_or_experts(self, layers: Sequence[int] | int | None) -> tuple[int, ...]:
        """`layers`, with the model's expert layers for None.

        Raises:
            TypeError, ValueError: as `layers`; or no expert layer is known.
        """
        return self.layers(self.backbone.expert_layers(self.transformer) if layers is None else layers)

    def requests(self, layer: int) -> tuple[LayerRequest, ...]:
        """What open contexts ask of a layer, in the order they were opened (= the order of its results)."""
        return tuple(entry.request for entry in self._open if layer in entry.layers)

    @property
    def stop_after(self) -> int | None:
        """The last layer that has to run while a context stops early, else None."""
        return max((entry.layers[-1] for entry in self._open if entry.stop_early), default=None)

    @contextmanager
    def asking(
        self, layers: tuple[int, ...], request: LayerRequest, *, stop_early: bool = False
    ) -> Iterator[None]:
        """Ask `request` of `layers` for the length of the context.

        With `stop_early` the last of them computes what is asked and nothing else, and later ones nothing.

        Raises:
            RuntimeError: another thread has a context open, and both would get mixed results.
            NotImplementedError, ValueError: as `check_supported`.
        """
        self.check_supported()
        if self.backbone.cross_attention:
            request.check_cross_attention(self.backbone.name)
        entry = _OpenRequest(layers, request, stop_early, threading.get_ident())
        with _LOCK:
            if any(other.thread != entry.thread for other in self._open):
                raise RuntimeError(
                    "another thread is using this pipeline; use one thread for each pipeline, or a lock"
                )
            self._open.append(entry)
        try:
            self._install()
            yield
        finally:
            with _LOCK:
                if entry in self._open:  # unpatch() may have removed it already
                    self._open.remove(entry)
                    self._install()

    def restore(self) -> None:
        """Make the transformer stock again, whatever contexts are open."""
        self._open.clear()
        self._install()

    def begin_forward(self, call: TransformerCall) -> None:
        """Forget the results of the forward before, and learn where the tokens of this one lie."""
        self._place.layout = call.layout
        for layer in self._modes:
            setattr(self._attentions[layer], RESULT_ATTRIBUTE, None)

    def results(self, request: LayerRequest) -> dict[int, LayerResult]:
        """What layers returned to `request` in the latest forward; those that did not run have nothing."""
        found = {}
        for layer, mode in self._modes.items():
            results = getattr(self._attentions[layer], RESULT_ATTRIBUTE, None)
            for position, asked in enumerate(mode.requests):
                if asked is request and results is not None:
                    found[layer] = results[position]
        return found

    def mode_of(self, block: nn.Module) -> Mode | None:
        """How `block` runs at the moment; None for stock."""
        layer = next((layer for layer, other in enumerate(self.blocks) if other is block), None)
        return None if layer is None else self._modes.get(layer)

    @property
    def layout(self) -> Layout | None:
        """Where the tokens of the forward that runs lie."""
        return self._place.layout

    def _joint_attentions(self) -> list[nn.Module]:
        entries = self.backbone.block_lists(self.transformer)
        return [b.get_submodule(e.attention) for b, e in zip(self.blocks, entries, strict=True)]

    def _install(self) -> None:
        """Make every layer run what the open contexts ask of it, and stock where they ask nothing."""
        for layer, mode in reversed(self._modes.items()):
            mode.leave(layer)
        self._modes.clear()
        for attention in self._attentions:
            attention.__dict__.pop(RESULT_ATTRIBUTE, None)
        self._attentions = self._joint_attentions() if self._open else []
        if self._open:
            self._enter_modes()
        else:
            self._place.layout = None
        self._install_checkpointing()

    def _enter_modes(self) -> None:
        stop = self.stop_after
        shared: dict[Any, Any] = {}
        entries = self.backbone.block_lists(self.transformer)
        for layer, (block, entry) in enumerate(zip(self.blocks, entries, strict=True)):
            attention, requests = self._attentions[layer], self.requests(layer)
            if stop is not None and layer > stop:
                mode = Mode(self._place, stand_ins=(SkippedBlock(block, entry.returns),))
            elif requests:
                stock = stock_of(attention.processor)
                # Processors of one class that hold the same things are one object, which compiles once.
                held = tuple((name, id(value)) for name, value in vars(stock).items())
                key = (requests, layer == stop, type(stock), held)
                if key not in shared:
                    shared[key] = self._interceptor(type(stock)).intercepted(
                        stock, JointAnswer(requests, self._place, last=layer == stop)
                    )
                left_out: tuple[str, ...] = ()
                if layer == stop:
                    left_out = entry.unneeded
                    if not any(request.output for request in requests):
                        left_out += entry.values
                    if not any(request.needs_text_rows for request in requests):
                        left_out += entry.text_queries
                stand_ins = tuple(skipped_modules(block, left_out))
                mode = Mode(self._place, attention, stock, shared[key], requests, stand_ins)
            else:
                continue
            mode.enter()
            self._modes[layer] = mode

    def _interceptor(self, stock: type) -> Interceptor:
        if stock not in self._interceptors:
            self._interceptors[stock] = Interceptor(stock)
        return self._interceptors[stock]

    def _install_checkpointing(self) -> None:
        """Make gradient checkpointing recompute a block as it ran, also after the context has ended."""
        own = self.transformer.__dict__
        if isinstance(own.get("_gradient_checkpointing_func"), Checkpointing):
            own["_gradient_checkpointing_func"] = own["_gradient_checkpointing_func"].stock
        if self._open and own.get("_gradient_checkpointing_func") is not None:
            own["_gradient_checkpointing_func"] = Checkpointing(own["_gradient_checkpointing_func"], self)


_PATCHES: weakref.WeakKeyDictionary[nn.Module, Patch] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
