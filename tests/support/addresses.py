"""Watches under Triton's interpreter whether kernels read and write inside the tensors they were given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter


@dataclass
class Accesses:
    """Loads and stores of the launches so far.

    Attributes:
        loads, stores: how many there were; each is of a whole tile.
        stray: what they touched outside every tensor of their launch, one line each.
    """

    loads: int = 0
    stores: int = 0
    stray: list[str] = field(default_factory=list)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the first after it, whatever lies between in the same memory."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    steps = (stride * (length - 1) for stride, length in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (sum(steps) + 1) * tensor.element_size()


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accesses]:
    """Every load and store of the kernels that run in the meantime; masked-out lanes count as no access."""
    seen = Accesses()
    extents: list[tuple[int, int]] = []
    name = ""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store

    def launched(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal name
        name = self.fn.__name__
        extents[:] = [_extent(tensor) for tensor in _tensors((*arguments, *named.values()))]
        return launch(self, *arguments, **named)

    def check(what: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.broadcast_arrays(pointers.data, mask.data)
        touched = addresses[0][addresses[1].astype(bool)].astype(np.uint64)
        inside = np.zeros(touched.shape, dtype=bool)
        for first, end in extents:
            inside |= (touched >= first) & (touched + np.uint64(size) <= end)
        if not inside.all():
            seen.stray.append(f"{what} of {int((~inside).sum())} elements outside every tensor of {name}")

    def loaded(self: Any, pointers: Any, mask: Any, *options: Any) -> Any:
        seen.loads += 1
        check("load", pointers, mask)
        return load(self, pointers, mask, *options)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        seen.stores += 1
        check("store", pointers, mask)
        return store(self, pointers, value, mask, *options)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "__call__", launched)
        patch.setattr(builder, "create_masked_load", loaded)
        patch.setattr(builder, "create_masked_store", stored)
        yield seen
