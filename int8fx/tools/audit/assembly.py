"""Compiles a kernel for a target without a GPU and reads registers, spills, shared memory and loops of its code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

INT8_MATRIX = re.compile(r"IMMA|IGMMA|UTCIMMA|v_mfma_i32")
FLOAT_MATRIX = re.compile(r"HMMA|HGMMA|UTCHMMA|DMMA|v_mfma_f32")
FLOAT_MATRIX_NAME = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA|DMMA)[\w.]*|\bv_mfma_f32\w*")
ASYNC_COPY = re.compile(r"LDGSTS|UTMALDG|UBLKCP|buffer_load_\w+ .* lds|global_load_lds")
WIDE_LOAD = re.compile(r"LDG\S*\.128|LDGSTS\S*\.128|UTMALDG|(global|buffer)_load_dwordx4")


@dataclass(frozen=True)
class Loop:
    """The instructions of one loop, by opcode; ``text`` is its listing."""

    opcodes: Counter[str]
    text: str

    def count(self, pattern: re.Pattern[str]) -> int:
        return sum(1 for line in self.text.splitlines() if pattern.search(line))

    @property
    def instructions(self) -> int:
        return self.opcodes.total()


@dataclass(frozen=True)
class Machine:
    """One kernel compiled for one target.

    registers: per thread. spills: bytes of stack that a thread spills to. shared: bytes of shared memory per program.
    loops: all loops, the shortest first. text: the listing.
    """

    registers: int
    spills: int
    shared: int
    loops: tuple[Loop, ...]
    text: str

    def loop(self, pattern: re.Pattern[str]) -> Loop | None:
        """The innermost loop with an instruction that matches."""
        return next((loop for loop in self.loops if loop.count(pattern)), None)


def compile_kernel(kernel: Any, arguments: dict[str, Any], target: str, num_warps: int, num_stages: int) -> Machine:
    """``kernel`` compiled for these arguments.

    Args:
        arguments: by name: a type like ``*i8``, ``*u8``, ``*fp16``, ``i32`` or ``fp32``, followed by ``:16`` if the
            value is a multiple of 16. Anything else is a constant.
        target: a key of `TARGETS`.
    """
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        kind, _, multiple = value.partition(":") if isinstance(value, str) else ("", "", "")
        if re.fullmatch(r"\*?(i|u|fp|bf)\d+", kind):
            signature[name] = kind
            if multiple:
                attributes[(i,)] = [["tt.divisibility", int(multiple)]]
        else:
            signature[name] = "constexpr"
            constants[(i,)] = value
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    read = _read_sass if TARGETS[target].backend == "cuda" else _read_gcn
    return read(compiled)


def _read_sass(compiled: Any) -> Machine:
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        cuobjdump = Path(knobs.nvidia.cuobjdump.path)
        dump = [str(cuobjdump), "-res-usage", "-sass", str(cubin)]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text)
    code = [(int(at, 16), line) for at, line in lines]
    branches = [(int(jump[1], 16), at) for at, line in code if (jump := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line))]
    loops = [[line for at, line in code if first <= at <= last] for first, last in branches if first < last]
    spills = usage.get("STACK", 0) + usage.get("LOCAL", 0)
    return Machine(usage["REG"], spills, compiled.metadata.shared, _loops(loops), text)


def _read_gcn(compiled: Any) -> Machine:
    text = compiled.asm["amdgcn"]
    body = [line.split(";")[0].strip() for line in text.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(body) if re.fullmatch(r"\.LBB\w+:", line)}
    branches = [
        (labels[jump[1]], i) for i, line in enumerate(body) if (jump := re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line))
    ]
    loops = [
        [line for line in body[first:last] if re.match(r"[a-z]+_\w+", line)] for first, last in branches if first < last
    ]
    fields = {name: int(value) for name, value in re.findall(r"\.(\w+_(?:count|size)):\s+(\d+)", text)}
    # Scalar registers spill into lanes of vector registers, which costs no memory.
    spills = 4 * fields.get("vgpr_spill_count", 0) + fields.get("private_segment_fixed_size", 0)
    registers = fields["vgpr_count"]  # vector and accumulation registers together
    return Machine(registers, spills, compiled.metadata.shared, _loops(loops), text)


def _loops(listings: list[list[str]]) -> tuple[Loop, ...]:
    """The shortest first, so that an inner loop comes before the loop around it."""
    loops = []
    for lines in sorted(listings, key=len):
        opcodes = Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in lines)
        loops.append(Loop(opcodes, "\n".join(lines)))
    return tuple(loops)
