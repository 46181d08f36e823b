"""Compiling the launches that the host code would make, for GPUs that are not there."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seg4diff.kernels.triton.launch import Launch
from seg4diff.kernels.triton.primitives import Strided

SHARED_MEMORY_LIMITS = {  # bytes that one program may use
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers and spilled bytes of a thread, shared memory in bytes."""

    registers: int
    spills: int
    shared_memory: int


def target_of(name: str) -> GPUTarget:
    """Triton's target for ``"sm_90"`` or ``"gfx942"``."""
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


@contextlib.contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """The launches that host code makes in the meantime; none of them runs."""
    launches: list[Launch] = []
    with monkeypatch.context() as patch:
        patch.setattr(Launch, "start", lambda launch: launches.append(launch))
        yield launches


def specialisation(
    launch: Launch,
) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and attributes as Triton's own just-in-time compilation would derive them.

    Constants and attributes are found by place: parameter, or parameter and field of a :class:`Strided`.
    """
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, place: tuple[int, ...], parameter: Any = None) -> Any:
        if isinstance(value, Strided):
            return Strided(*(kind(field, (*place, index)) for index, field in enumerate(value)))
        plain = parameter is not None and parameter.do_not_specialize
        constant = parameter is not None and parameter.is_constexpr
        if constant or value is None or (type(value) is int and value == 1 and not plain):
            constants[place] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if plain:
            return "i32"
        if (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return _TYPES[value.dtype]
        return "i32" if abs(value) < 2**31 else "i64"

    signature = {
        parameter.name: kind(launch.arguments[parameter.name], (index,), parameter)
        for index, parameter in enumerate(launch.kernel.params)
    }
    return signature, constants, attributes


def compile_launch(launch: Launch, name: str) -> Usage:
    """Compile to machine code and read off what the assembler says."""
    target = target_of(name)
    signature, constants, attributes = specialisation(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=launch.options)
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", assembly)[0])
        spills = 4 * int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)[0])
    else:
        folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(folder / "cuobjdump"), "-res-usage", file.name]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        registers, spills = (int(re.findall(rf"{what}:(\d+)", text)[-1]) for what in ("REG", "STACK"))
    return Usage(registers, spills, compiled.metadata.shared)
