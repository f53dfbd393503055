"""``python -m int8fx.tools.audit``: the compiled code of every Triton kernel for every target, without a GPU.

Registers, spills, shared memory and instructions are read from it. No kernel runs, and no time is predicted.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...schemes.formats import FORMATS
from ...schemes.quantize import INT8_MAX, TINY
from ...triton_kernels import tiles
from ...triton_kernels.codes import codebook
from ...triton_kernels.columns import _gather_columns_kernel
from ...triton_kernels.fused_linear import _fused_linear_kernel
from ...triton_kernels.int8_matmul import _int8_matmul_kernel
from ...triton_kernels.outliers import _extract_kernel, _gather_kernel, _mask_kernel
from ...triton_kernels.quantize_rowwise import _quantize_rowwise_kernel
from ...triton_kernels.tiles import BLOCK_O, Decoding, Tile
from ...triton_kernels.weight_only import _weight_only_kernel
from .assembly import (
    ASYNC_COPY,
    FLOAT_MATRIX,
    FLOAT_MATRIX_NAME,
    INT8_MATRIX,
    TARGETS,
    WIDE_LOAD,
    Loop,
    Machine,
    compile_kernel,
)

SHARED_LIMIT = {
    target: kib * 1024
    for target, kib in {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx90a": 64, "gfx942": 64}.items()
}
"""Bytes of shared memory that one program may have."""

_STRIDES = {
    "stride_xe": "i32:16", "stride_xm": "i32:16", "stride_xk": 1, "stride_we": "i32:16", "stride_wn": "i32:16",
    "stride_wk": 1, "stride_e": "i32:16", "stride_m": "i32:16", "stride_k": 1, "stride_om": "i32:16", "stride_on": 1,
}  # fmt: skip
_SIZES = {"M": "i32", "N": "i32:16", "K": "i32:16", "E": 1, "C": "i32", "G": "i32", "pitch": "i32:16"}
_SIZES |= {"capacity": "i32:16", "depth": "i32:16"}
_CONSTANTS = {
    "INT8_MAX": INT8_MAX, "TINY": TINY, "EVEN_K": True, "BLOCK_O": BLOCK_O, "BLOCK_E": 1, "GROUP_M": 8,
    "BLOCK": 1, "REGULAR": True, "WHOLE_BLOCKS": True, "ONE_PART": True, "ALL_ROWS": False, "BEFORE": 8192,
    "ACTIVATION": "none", "BINARY": "none", "OUTLIERS": True, "BITS": 8, "ZERO": 0, "LEVELS": None, "UNIT": 1,
    "PARTS": 1, "GROUP": 0, "STEPS": 0,
}  # fmt: skip


def arguments(kernel: Any, dtype: str, **constants: Any) -> dict[str, Any]:
    """What a launch with x of ``dtype``, contiguous tensors and sizes that are multiples of 16 passes to ``kernel``."""
    in_x_dtype = {f"{name}_ptr": f"*{dtype}:16" for name in ("x", "bias", "other", "y", "panel", "outlier")}
    int8 = {f"{name}_ptr": "*i8:16" for name in ("codes", "weight", "gathered")}
    float32 = {f"{name}_ptr": "*fp32:16" for name in ("x_scale", "scale", "weight_scale", "partial")}
    int32 = {f"{name}_ptr": "*i32:16" for name in ("outlier_columns", "count", "counter")}
    names = ("offsets", "columns", "columns_weight", "zero_point", "scale_range")
    absent = {f"{name}_ptr": None for name in names}
    others = {"mask_ptr": "*i1:16", "rows_per_weight": "i32", "threshold": "fp32"}
    defaults = {**in_x_dtype, **int8, **float32, **int32, **absent, **others, **_STRIDES, **_SIZES, **_CONSTANTS}
    return {name: (defaults | constants)[name] for name in kernel.arg_names}


@dataclass(frozen=True)
class Variant:
    """One kernel, one tile, one dtype of x, and the constants that differ from the defaults; ``note`` names them."""

    kernel: str
    tile: Tile
    dtype: str
    constants: tuple[tuple[str, Any], ...] = ()
    note: str = ""

    def compile(self, target: str) -> Machine:
        kernel = _KERNELS[self.kernel]
        options = self.tile.options()
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        constants = {**options, "SPLIT_K": self.tile.SPLIT_K, "ROWS": self.tile.BLOCK_M, **dict(self.constants)}
        return compile_kernel(kernel, arguments(kernel, self.dtype, **constants), target, warps, stages)

    @property
    def label(self) -> str:
        tile = self.tile
        split = f"/{tile.SPLIT_K}" if tile.SPLIT_K > 1 else ""
        sizes = f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}{split}"
        return f"{self.kernel} {sizes} {tile.num_warps}w {tile.num_stages}s {self.dtype} {self.note}".rstrip()

    def wide_loads_per_step(self, threads: int) -> float:
        """16-byte loads of the weight that a thread makes for one step of K."""
        return self.tile.BLOCK_N * self.tile.BLOCK_K * dict(self.constants).get("BITS", 8) / 128 / threads


_KERNELS = {
    "int8_matmul": _int8_matmul_kernel,
    "fused_linear": _fused_linear_kernel,
    "weight_only": _weight_only_kernel,
    "outlier_mask": _mask_kernel,
    "quantize_rowwise": _quantize_rowwise_kernel,
    "extract_outliers": _extract_kernel,
    "gather_weight": _gather_kernel,
    "gather_columns": _gather_columns_kernel,
}
MATMULS = ("int8_matmul", "fused_linear", "weight_only")


_PLAIN = (("other_ptr", None),)
_NO_OUTLIERS = (*_PLAIN, *((f"{name}_ptr", None) for name in ("count", "outlier", "outlier_columns", "gathered")))
_ROW = ("ROWS", 1)
_HEAVY = (("ACTIVATION", "gelu"), ("BINARY", "mul"))


def _columns(dtype: str) -> tuple[tuple[str, Any], ...]:
    """The matmul of `rotated`: no outliers, and unquantised columns whose weights are ``dtype``."""
    return (*_NO_OUTLIERS, ("columns_ptr", "*i64:16"), ("columns_weight_ptr", f"*{dtype}:16"))


_GATHERED = (*_NO_OUTLIERS, ("columns_weight_ptr", "*bf16:16"), ("C", "i32:16"))
"""Unquantised columns of many rows, whose values and weights `gather_columns` has made contiguous."""


@dataclass(frozen=True)
class _Weight:
    """A weight that is not plain: a format, the size of its groups (0: a row), scales, zero points, a range of scales.

    K is even if steps of K divide groups.
    """

    format: str
    group: int = 0
    scale: str = "fp32"
    zeros: bool = False
    has_range: bool = False
    even: bool = True

    @property
    def note(self) -> str:
        parts = (f"in {self.group}" * (self.group > 0), "zeros" * self.zeros, "range" * self.has_range)
        return " ".join(filter(None, (self.format, *parts, "uneven" * (not self.even))))

    def variant(self, rows: int, dtype: str, target: str) -> Variant | None:
        """`weight_only` with the tile of so many rows; None if such weights take no tile of so many."""
        if rows > tiles.MANY_ROWS and self.has_range:
            return None
        spec, torch_dtype = FORMATS[self.format], _DTYPES[dtype]
        book = None if spec.levels is None else codebook(spec.levels, torch_dtype)
        table = tiles.WEIGHT_ONLY_FLOAT32 if dtype == "fp32" else tiles.WEIGHT_ONLY[TARGETS[target].backend]
        decoding = Decoding(self.group, book.parts if book else 1, self.has_range)
        tile = decoding.fit(Tile(*table[rows], SPLIT_K=4), 4096 if self.even else 4095)
        codes = "*i8:16" if spec.bits == 8 else "*u8:16"
        constants = {
            "BITS": spec.bits, "ZERO": spec.zero_point, "GROUP": self.group, "STEPS": -(-self.group // tile.BLOCK_K),
            "EVEN_K": self.even, "weight_ptr": codes, "zero_point_ptr": codes if self.zeros else None,
            "weight_scale_ptr": "*u8:16" if self.has_range else f"*{self.scale}:16",
            "scale_range_ptr": "*fp32:16" if self.has_range else None,
        }  # fmt: skip
        if book is not None:
            constants |= {"LEVELS": book.levels, "UNIT": book.unit, "PARTS": book.parts}
        return Variant("weight_only", tile, dtype, (*_PLAIN, *constants.items()), self.note)


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHIPPED_WEIGHTS = (_Weight("int4_clip", 32, "fp16", zeros=True), _Weight("nf4", 64))
OTHER_WEIGHTS = (
    _Weight("int4_clip"),
    _Weight("int4_clip", even=False),
    _Weight("int4_clip", 128),
    _Weight("int4_clip", 7, zeros=True, even=False),
    _Weight("int4_clip", 200, even=False),
    _Weight("nf4"),
    _Weight("nf4", even=False),
    _Weight("nf4", 64, has_range=True),
    _Weight("nf4", 200, even=False),
    _Weight("nf4", 7, has_range=True, even=False),
    _Weight("fp4_e2m1", 32),
    _Weight("int8", 128, zeros=True),
    _Weight("int8", 128, zeros=True, has_range=True),
    _Weight("int8", 200, zeros=True, has_range=True, even=False),
)


def _variants(weights: tuple[_Weight, ...], dtype: str, target: str) -> Iterator[Variant]:
    table = tiles.WEIGHT_ONLY_FLOAT32 if dtype == "fp32" else tiles.WEIGHT_ONLY[TARGETS[target].backend]
    found = (weight.variant(rows, dtype, target) for weight in weights for rows in table)
    return (variant for variant in found if variant is not None)


def shipped(target: str) -> Iterator[Variant]:
    """Every tile of the tables for ``target``, in bfloat16, with the arguments of most calls."""
    backend = TARGETS[target].backend
    for tile in tiles.int8_matmul_tiles(torch.bfloat16, target, epilogue=False):
        yield Variant("int8_matmul", tile, "bf16", _PLAIN)
    for tile in tiles.int8_matmul_tiles(torch.bfloat16, target, epilogue=True):
        yield Variant("int8_matmul", tile, "bf16", _columns("bf16"), "columns")
        if tile.BLOCK_M >= tiles.MANY_ROWS:
            yield Variant("int8_matmul", tile, "bf16", _GATHERED, "gathered columns")
    yield Variant("fused_linear", Tile(*tiles.FUSED_LINEAR[backend], SPLIT_K=4), "bf16", (*_PLAIN, _ROW))
    for row in tiles.WEIGHT_ONLY[backend].values():
        yield Variant("weight_only", Tile(*row, SPLIT_K=4), "bf16", _PLAIN)
    yield from _variants(SHIPPED_WEIGHTS, "bf16", target)
    yield _rotated(256)


def _rotated(block: int, K: int = 4096, whole_blocks: bool = True) -> Variant:
    """`quantize_rowwise` of a row with unquantised columns."""
    tile = tiles.for_quantize_rowwise(K, block)
    columns = (("mask_ptr", None), ("columns_ptr", "*i64:16"))
    constants = (*columns, ("BLOCK", block), ("WHOLE_BLOCKS", whole_blocks), ("ONE_PART", K <= tile.BLOCK_K))
    note = f"rotated {block}" if whole_blocks else f"rotated {block}, partial block"
    return Variant("quantize_rowwise", tile, "bf16", constants, note)


def everything(target: str) -> Iterator[Variant]:
    """`shipped`, and the other dtypes, splits, epilogues and kernels."""
    yield from shipped(target)
    backend = TARGETS[target].backend
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        for tile in tiles.int8_matmul_tiles(dtype, target, epilogue=True):
            yield Variant("int8_matmul", tile, name, _HEAVY, "gelu mul")
    smallest = tiles.int8_matmul_tiles(torch.bfloat16, target, epilogue=True)[-1]
    for split in (2, tiles.MAX_SPLITS):
        constants = (*_columns("bf16"), *_HEAVY, ("other_ptr", "*bf16:16"))
        yield Variant("int8_matmul", replace(smallest, SPLIT_K=split), "bf16", constants, "columns gelu mul")
    for tile in tiles.int8_matmul_tiles(torch.float32, target, epilogue=True):
        yield Variant("int8_matmul", tile, "bf16", _columns("fp32"), "columns in fp32")
    few_rows: list[tuple[str, Any, tuple, str]]
    few_rows = [("fused_linear", tiles.FUSED_LINEAR[backend], (_ROW,), "")]
    few_rows += [("fused_linear", tiles.FUSED_LINEAR[backend], (("OUTLIERS", False), _ROW), " no outliers")]
    few_rows += [("weight_only", row, (), "") for row in tiles.WEIGHT_ONLY[backend].values()]
    for kernel, row, constants, note in few_rows:
        for split in (1, tiles.MAX_SPLITS):
            tile = Tile(*row, SPLIT_K=split)
            yield Variant(kernel, tile, "fp16", (*_HEAVY, *constants), f"gelu mul{note}")
    yield Variant("fused_linear", Tile(*tiles.FUSED_LINEAR_FLOAT32, SPLIT_K=4), "fp32", (_ROW,))
    for row in tiles.WEIGHT_ONLY_FLOAT32.values():
        yield Variant("weight_only", Tile(*row, SPLIT_K=4), "fp32")
    yield from _variants(OTHER_WEIGHTS, "bf16", target)
    for dtype_name in ("fp16", "fp32"):
        yield from _variants((*SHIPPED_WEIGHTS, _Weight("nf4", 64, has_range=True)), dtype_name, target)
    for all_rows in (False, True):
        yield Variant("outlier_mask", tiles.OUTLIER_MASK, "bf16", (("ALL_ROWS", all_rows),), "all rows" * all_rows)
    yield Variant("extract_outliers", tiles.EXTRACT_OUTLIERS, "bf16", (("columns_ptr", "*i32:16"),))
    yield Variant("quantize_rowwise", tiles.for_quantize_rowwise(8192, 1), "bf16")
    yield _rotated(64)
    yield _rotated(256, K=14336)
    yield _rotated(256, K=20000, whole_blocks=False)
    yield _rotated(4096)
    yield Variant("gather_weight", tiles.GATHER_WEIGHT, "bf16", (("columns_ptr", "*i32:16"),))
    gathered = (("columns_ptr", "*i64:16"), ("source_ptr", "*bf16:16"))
    yield Variant("gather_columns", tiles.GATHER_COLUMNS, "bf16", gathered)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    int8, float16: matrix instructions of the innermost loop that has any. instruction: its int8 matrix instruction.
    residual: all float matrix instructions of the kernel. others: the loop's other instructions, per warp and step of
    K. wide: its 16-byte loads, per thread and step; weight_loads: those for the weight; codes: of the weight, likewise.
    fits: the shared memory is within `SHARED_LIMIT`.
    """

    target: str
    kernel: str
    label: str
    registers: int
    spills: int
    shared: int
    int8: int
    instruction: str
    residual: str
    float16: int
    async_copies: int
    others: int
    wide: int
    weight_loads: float
    codes: float
    fits: bool


def row(variant: Variant, target: str) -> Row:
    machine = variant.compile(target)
    threads = variant.tile.num_warps * TARGETS[target].warp_size
    loop = machine.loop(INT8_MATRIX) or machine.loop(FLOAT_MATRIX) or Loop(Counter(), "")
    int8, float16 = loop.count(INT8_MATRIX), loop.count(FLOAT_MATRIX)
    return Row(
        target=target,
        kernel=variant.kernel,
        label=variant.label,
        registers=machine.registers,
        spills=machine.spills,
        shared=machine.shared,
        int8=int8,
        instruction=next((opcode for opcode in loop.opcodes if INT8_MATRIX.search(opcode)), "-"),
        residual=", ".join(sorted(set(FLOAT_MATRIX_NAME.findall(machine.text)))),
        float16=float16,
        async_copies=loop.count(ASYNC_COPY),
        others=loop.instructions - int8 - float16,
        wide=loop.count(WIDE_LOAD),
        weight_loads=variant.wide_loads_per_step(threads),
        codes=variant.tile.BLOCK_N * variant.tile.BLOCK_K / threads,
        fits=machine.shared <= SHARED_LIMIT[target],
    )


HEADER = (
    f"{'target':8}{'kernel, tile, warps, stages, x':56}{'regs':>5}{'spill':>6}{'shared':>8}"
    f"{'int8':>5}{'16bit':>6}{'async':>6}{'others':>7}{'16B':>4}  int8 instruction"
)


def line(row: Row) -> str:
    return (
        f"{row.target:8}{row.label:56}{row.registers:5}{row.spills:6}{row.shared:8}"
        f"{row.int8:5}{row.float16:6}{row.async_copies:6}{row.others:7}{row.wide:4}  {row.instruction}"
    )


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 1 if a kernel spills or needs more shared memory than its target has."""
    parser = argparse.ArgumentParser(prog="python -m int8fx.tools.audit", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--shipped", action="store_true", help="only the tiles of the tables, in bfloat16")
    parser.add_argument("--json", action="store_true", help="one line of JSON per row")
    args = parser.parse_args(argv)
    if not args.json:
        print(HEADER)
    failures = 0
    for target in args.targets:
        for variant in (shipped if args.shipped else everything)(target):
            result = row(variant, target)
            failures += bool(result.spills) or not result.fits
            print(json.dumps(asdict(result)) if args.json else line(result), flush=True)
    if not args.json:
        print(f"\n{failures} of these spill or need more shared memory than their target has.")
    return 1 if failures else 0
