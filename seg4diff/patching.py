"""Puts our processors on the layers that need them, and takes them off again.

``patch`` checks a transformer and makes a record of it; nothing runs differently until a context
(:func:`seg4diff.capture`, :func:`seg4diff.perturb`) asks something of some layers. Only those layers then run
our processors, until the context ends: a layer of which nothing is asked is stock diffusers. The record lives
beside the transformer, not in it, so copies, ``state_dict`` and ``save_pretrained`` never see it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from seg4diff.backbones import Backbone, find_backbone, transformer_of
from seg4diff.processors import (
    RESULT_ATTRIBUTE,
    JointAttentionProcessor,
    LayerRequest,
    MapsOnlyProcessor,
    PassThrough,
)

logger = logging.getLogger(__name__)

Target = TypeVar("Target")


def patch(pipe: Target) -> Target:
    """Make a pipeline (or a bare transformer) ready for capture, segmentation and perturbation.

    Changes no output and costs nothing while nothing is asked. Idempotent; pipelines that share a transformer
    share its patch.

    Args:
        pipe: a diffusers pipeline of Stable Diffusion 3 or 3.5, or its transformer.

    Returns:
        ``pipe`` itself.

    Raises:
        NotImplementedError: the model family is not supported.
        ValueError: fused projections or an IP-Adapter are active.
    """
    backbone = find_backbone(pipe)
    transformer = transformer_of(pipe)
    backbone.check_supported(transformer)
    with _LOCK:
        if transformer not in _PATCHES:
            _PATCHES[transformer] = Patch(transformer, backbone)
    return pipe


def unpatch(pipe: Target) -> Target:
    """Undo :func:`patch`: every layer gets back the very processor it had, whatever replaced it since.

    Contexts that are still open lose their hold on the transformer. Without a patch this does nothing.

    Returns:
        ``pipe`` itself.
    """
    transformer = transformer_of(pipe)
    with _LOCK:
        state = _PATCHES.pop(transformer, None)
    if state is not None:
        state.restore()
    return pipe


def is_patched(pipe: Any) -> bool:
    """Whether :func:`patch` is in force for this pipeline or transformer."""
    return transformer_of(pipe) in _PATCHES


def patch_of(pipe: Any) -> Patch:
    """The patch of a pipeline or transformer.

    Raises:
        RuntimeError: there is none.
        NotImplementedError: the model family is not supported.
    """
    find_backbone(pipe)
    transformer = transformer_of(pipe)
    if transformer not in _PATCHES:
        raise RuntimeError(f"this {type(pipe).__name__} is not patched; call seg4diff.patch(pipe) first")
    return _PATCHES[transformer]


@dataclass(frozen=True, eq=False)
class _OpenRequest:
    """What one open context asks; ``layers`` ascend."""

    layers: tuple[int, ...]
    request: LayerRequest
    stop_early: bool


@dataclass(frozen=True)
class BlockState:
    """A block's attention processor, and stand-ins for submodules whose output nobody uses."""

    processor: Any
    stand_ins: Mapping[str, nn.Module]


class Patch:
    """The record of one transformer: its own processors, and what open contexts ask of which layers."""

    def __init__(self, transformer: nn.Module, backbone: Backbone) -> None:
        self._transformer = weakref.ref(transformer)
        self.backbone = backbone
        self._stock = [backbone.joint_attention(b).processor for b in backbone.blocks(transformer)]
        self._open: list[_OpenRequest] = []
        self._replaced: dict[int, dict[str, nn.Module]] = {}  # layer -> submodules behind stand-ins
        self._stock_checkpointing: Any = None

    @property
    def transformer(self) -> nn.Module:
        transformer = self._transformer()
        if transformer is None:
            raise RuntimeError("the patched transformer no longer exists")
        return transformer

    @property
    def blocks(self) -> list[nn.Module]:
        return self.backbone.blocks(self.transformer)

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
            raise ValueError(f"layers={layers!r} names no layer; this model has layers 0 to {count - 1}")
        for layer in wanted:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise TypeError(f"layers={layers!r} must hold integers, found {layer!r}")
            if not 0 <= layer < count:
                raise ValueError(f"layer {layer} is out of range: this model has layers 0 to {count - 1}")
        return tuple(sorted(set(wanted)))

    def attention(self, layer: int) -> nn.Module:
        """The joint attention module of a layer."""
        return self.backbone.joint_attention(self.blocks[layer])

    def requests(self, layer: int) -> tuple[LayerRequest, ...]:
        """What open contexts ask of a layer, in the order they were opened (= the order of its results)."""
        return tuple(entry.request for entry in self._open if layer in entry.layers)

    @property
    def stop_after(self) -> int | None:
        """The last layer that has to run while a context stops early, else None."""
        return max((entry.layers[-1] for entry in self._open if entry.stop_early), default=None)

    def clear_results(self) -> None:
        """Forget what layers left on their attention modules."""
        for block in self.blocks:
            self.backbone.joint_attention(block).__dict__.pop(RESULT_ATTRIBUTE, None)

    @contextmanager
    def asking(
        self, layers: tuple[int, ...], request: LayerRequest, *, stop_early: bool = False
    ) -> Iterator[None]:
        """Ask ``request`` of ``layers`` for the length of the context.

        With ``stop_early`` the last of them computes its map and nothing else.
        """
        self.backbone.check_supported(self.transformer)
        entry = _OpenRequest(layers, request, stop_early)
        self._open.append(entry)
        try:
            self._install()
            yield
        finally:
            if entry in self._open:  # unless unpatch was faster
                self._open.remove(entry)
                self._install()

    def restore(self) -> None:
        """Make the transformer stock again, whatever contexts are open."""
        self._open.clear()
        self._install()

    def _install(self) -> None:
        """Make every layer run what the open contexts ask of it, and stock where they ask nothing."""
        shared: dict[tuple[LayerRequest, ...], JointAttentionProcessor] = {}
        for layer, block in enumerate(self.blocks):
            block._modules.update(self._replaced.pop(layer, {}))
            requests = self.requests(layer)
            attention = self.backbone.joint_attention(block)
            if layer == self.stop_after:
                unneeded = dict(self.backbone.unneeded_for_maps(block))
                self._replaced[layer] = unneeded
                _enter(self.backbone, block, BlockState(MapsOnlyProcessor(requests), _stand_ins(unneeded)))
            elif requests:
                processor = shared.setdefault(requests, JointAttentionProcessor(requests))
                _enter(self.backbone, block, BlockState(processor, {}))
            elif isinstance(attention.processor, nn.Module):
                logger.warning(
                    "layer %d keeps %s, which came after patch", layer, type(attention.processor).__name__
                )
            else:
                _enter(self.backbone, block, BlockState(self._stock[layer], {}))
        self.clear_results()
        self._install_checkpointing()

    def _install_checkpointing(self) -> None:
        """Make gradient checkpointing recompute a block as it ran, also after the context has ended."""
        transformer = self.transformer
        current = transformer.__dict__.get("_gradient_checkpointing_func")
        if (
            self._stock_checkpointing is not None
            and getattr(current, "stock", None) is self._stock_checkpointing
        ):
            transformer.__dict__["_gradient_checkpointing_func"] = current = self._stock_checkpointing
        self._stock_checkpointing = None
        if current is not None and self._open:
            self._stock_checkpointing = current
            transformer.__dict__["_gradient_checkpointing_func"] = _Checkpointing(current, self.backbone)


class _Checkpointing:
    """diffusers' checkpointing function, made to remember what the block ran when it was first called."""

    def __init__(self, stock: Callable[..., Any], backbone: Backbone) -> None:
        self.stock = stock
        self._backbone = backbone

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        attention = self._backbone.joint_attention(block)
        if not isinstance(attention.processor, (JointAttentionProcessor, MapsOnlyProcessor)):
            return self.stock(block, *args)
        stand_ins = {
            name: module for name, module in block._modules.items() if isinstance(module, PassThrough)
        }
        state = BlockState(attention.processor, stand_ins)
        first_run = True

        def run(*inputs: Any) -> Any:
            nonlocal first_run
            if first_run:
                first_run = False
                if not torch.is_grad_enabled():
                    raise ValueError(
                        "gradient checkpointing with use_reentrant=True cannot carry gradients of captured "
                        "maps; use transformer.enable_gradient_checkpointing() or use_reentrant=False"
                    )
                return block(*inputs)
            # Recomputation in backward: the same operations again, but its maps are not new ones.
            before = _enter(self._backbone, block, state)
            try:
                return block(*inputs)
            finally:
                _enter(self._backbone, block, before)
                attention.__dict__.pop(RESULT_ATTRIBUTE, None)

        return self.stock(run, *args)


def _enter(backbone: Backbone, block: nn.Module, state: BlockState) -> BlockState:
    """Make ``block`` run ``state``; return the state that undoes it."""
    attention = backbone.joint_attention(block)
    replaced = {name: block.get_submodule(name) for name in state.stand_ins}
    before = BlockState(attention.processor, replaced)
    attention.processor = state.processor
    block._modules.update(state.stand_ins)
    return before


def _stand_ins(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: PassThrough() for name in modules}


_PATCHES: weakref.WeakKeyDictionary[nn.Module, Patch] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
