"""What Triton's interpreter gets wrong about arithmetic, repaired for this process.

NumPy has no bfloat16, so the interpreter keeps its bit patterns in 16-bit integers; it multiplies those
patterns in ``tl.dot`` and truncates where a GPU rounds to nearest even. And its ``tl.fma`` rounds twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen(patterns: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns."""
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns of float32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def repair_arithmetic() -> None:
    """Make dots and casts of bfloat16, and fused multiply-adds of float32, mean what they mean on a GPU."""
    builder: Any = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    create_dot, cast = builder.create_dot, builder.cast_impl

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        a, b = (handle(widen(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return create_dot(self, a, b, d, *options)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return handle(narrow(source.data), tl.bfloat16)
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return handle(widen(source.data), tl.float32)
        return cast(self, source, target)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return handle(exact.astype(z.data.dtype), z.dtype.scalar)

    builder.create_dot, builder.cast_impl, builder.create_fma = dot, cast_impl, fma
