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
from triton._C.libtriton import gluon_ir, ir, nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seg4diff.kernels.triton import backend, backward, statistics, tuning
from seg4diff.kernels.triton.launch import Launch
from seg4diff.kernels.triton.primitives import Strided
from seg4diff.kernels.types import STREAMS, Inputs, Request

SHARED_MEMORY_LIMITS = {  # bytes that one program may use
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
# Threads, blocks and shared memory of a streaming multiprocessor; each block takes 1 KiB for itself.
_MULTIPROCESSORS = {
    "sm_80": (2048, 32, 167_936),
    "sm_86": (1536, 16, 102_400),
    "sm_90": (2048, 32, 233_472),
    "sm_100": (2048, 32, 233_472),
    "sm_120": (1536, 24, 102_400),
}
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.MULTILINE)
_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


_WIDTHS = (64, 128, 256)
UNITS = [
    *((target, head_dim, torch.bfloat16) for target in tuning.TABLE for head_dim in _WIDTHS),
    *((target, 64, torch.float16) for target in tuning.TABLE),  # always the online softmax
    *(("sm_86", head_dim, torch.float32) for head_dim in _WIDTHS),
    ("gfx942", 256, torch.float32),
    ("sm_100", 128, torch.float16),
    ("sm_90", 96, torch.float16),  # a head vector in two parts
]
"""Target, head dim and dtype of every entry of the tuning table, and of what else is compiled."""


@dataclass(frozen=True)
class Loop:
    """One pass of a loop over tiles, by one thread.

    Attributes:
        instructions: how many are issued.
        special: of these, exponentials and others that the special-function units (XU) do.
        products: of these, products of tiles by the tensor cores.
        per_element: instructions for each score that the thread has to do with.
    """

    instructions: int
    special: int
    products: int
    per_element: float


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes.

    Attributes:
        registers, spills: registers and spilled bytes of a thread.
        shared_memory: bytes of a program.
        programs: how many programs a multiprocessor holds at once; None for AMD.
        conflicts: the most that bank conflicts add to one access of shared memory by a warp; None for AMD.
        loops: loops with exponentials, in the order of the code; none for AMD.
    """

    registers: int
    spills: int
    shared_memory: int
    programs: int | None
    conflicts: int | None
    loops: tuple[Loop, ...]


def programs_at_once(
    name: str, registers: int, warps: int, shared_memory: int, tensor_memory: int = 0
) -> int:
    """How many programs a multiprocessor holds: registers, threads, shared and tensor memory set the limit.

    Registers are given to warps by 256, and there are 65,536; tensor memory has 512 columns.
    """
    threads, blocks, memory = _MULTIPROCESSORS[name]
    by_registers = 65_536 // (triton.cdiv(32 * registers, 256) * 256 * warps)
    limits = [blocks, threads // (32 * warps), by_registers, memory // (shared_memory + 1024)]
    return min([*limits, 512 // tensor_memory] if tensor_memory else limits)


def loops_of(assembly: str, elements: float) -> tuple[Loop, ...]:
    """The innermost loops with exponentials in a disassembled kernel; ``elements``: scores of a thread."""
    code = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(assembly)]
    places = {at: index for index, (at, _, _) in enumerate(code)}
    spans = []
    for index, (at, name, rest) in enumerate(code):
        targets = re.findall(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and targets and int(targets[-1], 16) < at:
            spans.append((places[int(targets[-1], 16)], index))
    kept: list[tuple[int, int]] = []
    for first, last in sorted(spans, key=lambda span: span[1] - span[0]):
        names = [name for _, name, _ in code[first : last + 1]]
        overlaps = any(one <= last and first <= other for one, other in kept)
        if "MUFU.EX2" in names and not overlaps and "MUFU.RCP" not in names:
            kept.append((first, last))
    loops = []
    for first, last in sorted(kept):
        names = [name.split(".")[0] for _, name, _ in code[first : last + 1]]
        special = sum(name in ("MUFU", "FRND") for name in names)
        products = sum(name.endswith("MMA") for name in names)
        loops.append(Loop(len(names), special, products, round(len(names) / elements, 2)))
    return tuple(loops)


def bank_conflicts(code: str) -> list[tuple[str, int]]:
    """Every load and store of tiles in shared memory in a kernel's intermediate code for NVIDIA, and how many
    more wavefronts than necessary bank conflicts give it, by Triton's own reckoning from the two layouts.

    Not among them: asynchronous copies, operands that tensor cores fetch themselves, and exchanges between
    threads, whose layouts Triton chooses to have no conflicts.
    """
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(code)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    builder: Any = gluon_ir.GluonOpBuilder(context)
    found: list[tuple[str, int]] = []

    def visit(operation: Any) -> None:
        name = operation.get_name()
        if name == "ttg.local_load":
            registers, memory = operation.get_result(0), operation.get_operand(0)
        elif name == "ttg.local_store":
            registers, memory = operation.get_operand(0), operation.get_operand(1)
        elif name == "ttg.local_alloc" and operation.get_num_operands():
            registers, memory = operation.get_operand(0), operation.get_result(0)
        else:
            return
        of_registers = builder.get_gluon_layout_from_tensor(registers)._to_ir(builder)
        of_memory = builder.get_gluon_layout_from_memdesc(memory)._to_ir(builder)
        kind = str(registers.get_type()).split(",")[0]  # tensor<64x64xbf16
        *shape, element = kind.removeprefix("tensor<").split("x")
        bits = int(re.sub(r"\D", "", element))
        sizes = [int(size) for size in shape]
        found.append(
            (f"{name} {kind}>", builder.get_shared_bank_conflicts(of_registers, of_memory, sizes, bits))
        )

    module.walk(visit)
    return found


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


def empty(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """A tensor of the shape of one stream; its memory is reserved, never touched."""
    return torch.empty((1, tokens, heads, head_dim), dtype=dtype)


def launches(
    target: str, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Launch]:
    """What the host code would launch, by kernel: for the mean map of probabilities, and as other kernels
    `..._each` for text probabilities of each head, `..._alone` for gradients without a map, `..._of_map` for
    those of a map alone.

    Lengths are no multiple of any tile, and text values are edited: what needs most registers.
    """
    config = tuning.tuning_of(target, head_dim, dtype)
    monkeypatch.setattr(tuning, "tuning_for", lambda tensor: config)
    tokens, text_tokens, heads = 4106, 154, 24
    streams = {
        name: empty(text_tokens if name.startswith("text_") else tokens, heads, head_dim, dtype)
        for name in STREAMS
    }
    inputs = Inputs(**streams)
    maps_alone = Inputs(
        **{name: None if "value" in name else tensor for name, tensor in streams.items()}  # type: ignore[arg-type]
    )

    def run(kind: str, reduction: str, with_map: bool = True) -> list[Launch]:
        request = Request(0.125, kind, reduction, 0, text_tokens)
        with recorded(monkeypatch) as made:
            joint, lse, entries = backend.forward(inputs, request)
            outputs = request.split(joint, tokens)
            d_maps = entries if with_map else None
            backward.backward(*outputs, d_maps, inputs, *outputs, lse, request)
            backend.forward(maps_alone, request)
            statistics.attention_mass(
                streams["query"], streams["text_query"], streams["text_key"], lse, 0.125
            )
            statistics.value_norm(streams["value"])
        return made

    def run_around_another() -> list[Launch]:
        """The map's gradient alone, the rest of the attention's is another kernel's."""
        request = Request(0.125, "probability", "mean", 0, text_tokens)
        lse, d_maps = torch.empty(1, heads, tokens + text_tokens), torch.empty(1, tokens, text_tokens)
        with recorded(monkeypatch) as made:
            backend.map_gradient(d_maps, inputs, lse, request)
        return made

    chosen: dict[str, Launch] = {}
    for suffix, made, kernels in (
        ("", run("probability", "mean"), ("",)),
        ("_each", run("text_probability", "each"), ("map", "query_gradient", "key_gradient")),
        ("_alone", run("probability", "mean", False), ("query_gradient", "key_gradient")),
        ("_of_map", run_around_another(), ("delta", "query_gradient", "key_gradient")),
    ):
        for launch in made:
            name = launch.kernel.__name__.removesuffix("_kernel")
            if not name.startswith(kernels):
                continue
            if name == "attention" and not launch.arguments["OUTPUT"]:
                name = "log_sum_exp"
            chosen.setdefault(f"{name}{suffix}", launch)
    return chosen


def compile_launch(launch: Launch, name: str) -> Usage:
    """Compile to machine code and read off what the assembler says."""
    target = target_of(name)
    signature, constants, attributes = specialisation(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=launch.options)
    shared_memory = compiled.metadata.shared
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", assembly)[0])
        spills = 4 * int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)[0])
        return Usage(registers, spills, shared_memory, None, None, ())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, assembly = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    registers, spills = (int(re.findall(rf"{what}:(\d+)", resources)[-1]) for what in ("REG", "STACK"))
    config = launch.config
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0)
    return Usage(
        registers,
        spills,
        shared_memory,
        programs_at_once(name, registers, config.warps, shared_memory, tensor_memory),
        max((degree for _, degree in bank_conflicts(compiled.asm["ttgir"])), default=0),
        loops_of(assembly, config.rows * config.columns / (32 * config.warps)),
    )


def _cuobjdump(option: str, path: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [str(folder / "cuobjdump"), option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
