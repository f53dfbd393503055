"""``python -m int8fx.tools.audit.audit``: what every kernel compiles to on every target, without a GPU.

Nothing here ran on a GPU. Registers, spills, shared memory and instructions are the compilers'; occupancy follows from
them; the times of the second table are modelled (`cost_model`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...triton_kernels import configs
from ...triton_kernels.fused_linear import _fused_linear_kernel
from ...triton_kernels.int8_matmul import _int8_matmul_kernel
from ...triton_kernels.kept import _gather_columns_kernel
from ...triton_kernels.outliers import BLOCK_O, _extract_kernel, _gather_kernel, _mask_kernel
from ...triton_kernels.quantize_rowwise import _quantize_rowwise_kernel
from ...triton_kernels.weight_only import _weight_only_kernel
from . import cost_model
from .assembly import (
    ASYNC_COPY,
    FLOAT_MATRIX,
    FLOAT_MATRIX_NAME,
    INT8_MATRIX,
    TARGETS,
    WIDE_LOAD,
    Machine,
    compile_kernel,
)

_STRIDES = {
    "stride_xe": "i32:16", "stride_xm": "i32:16", "stride_xk": 1, "stride_we": "i32:16", "stride_wn": "i32:16",
    "stride_wk": 1, "stride_e": "i32:16", "stride_m": "i32:16", "stride_k": 1, "stride_om": "i32:16", "stride_on": 1,
}  # fmt: skip
_SIZES = {"M": "i32", "N": "i32:16", "K": "i32:16", "E": 1, "C": "i32", "pitch": "i32:16", "capacity": "i32:16"}
_CONSTANTS = {
    "INT8_MAX": 127, "TINY": 2.0**-126, "EVEN_K": True, "BLOCK_O": BLOCK_O, "BLOCK_E": 1, "GROUP_M": 8,
    "BLOCK": 1, "WHOLE_BLOCKS": True, "ONE_PART": True, "ALL_ROWS": False, "BEFORE": 8192,
}  # fmt: skip


def arguments(kernel: Any, dtype: str, **constants: Any) -> dict[str, Any]:
    """What a launch with x of ``dtype``, contiguous tensors and sizes that are multiples of 16 passes to ``kernel``."""
    of_x = {f"{name}_ptr": f"*{dtype}:16" for name in ("x", "bias", "other", "y", "panel")}
    int8 = {f"{name}_ptr": "*i8:16" for name in ("codes", "weight", "gathered")}
    floats = {f"{name}_ptr": "*fp32:16" for name in ("x_scale", "scale", "weight_scale", "partial")}
    ints = {f"{name}_ptr": "*i32:16" for name in ("columns", "count", "counter")}
    rest = {"mask_ptr": "*i1:16", "offsets_ptr": None, "rows_per_weight": "i32", "threshold": "fp32"}
    rest |= {"kept_ptr": None, "kept_weight_ptr": None}
    epilogue = {"ACTIVATION": "none", "BINARY": "none", "OUTLIERS": True}
    known = {**of_x, **int8, **floats, **ints, **rest, **_STRIDES, **_SIZES, **_CONSTANTS, **epilogue, **constants}
    return {name: known[name] for name in kernel.arg_names}


@dataclass(frozen=True)
class Variant:
    """One kernel, one tile, one dtype of x, and what its constants switch on; ``note`` says it in a word."""

    kernel: str
    config: configs.Config
    dtype: str
    constants: tuple[tuple[str, Any], ...] = ()
    note: str = ""

    def compile(self, target: str) -> Machine:
        kernel = _KERNELS[self.kernel]
        options = self.config.kernel_options()
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        constants = {**options, "SPLIT_K": self.config.SPLIT_K, "ROWS": self.config.BLOCK_M, **dict(self.constants)}
        return compile_kernel(kernel, arguments(kernel, self.dtype, **constants), target, warps, stages)

    @property
    def label(self) -> str:
        c = self.config
        split = f"/{c.SPLIT_K}" if c.SPLIT_K > 1 else ""
        tile = f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}{split}"
        return f"{self.kernel} {tile} {c.num_warps}w {c.num_stages}s {self.dtype} {self.note}".rstrip()

    def wide_loads_per_step(self, threads: int) -> float:
        """16-byte loads of the weight that a thread makes for one step of K."""
        return self.config.BLOCK_N * self.config.BLOCK_K / 16 / threads


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
PRODUCTS = ("int8_matmul", "fused_linear", "weight_only")


_PLAIN = (("other_ptr", None),)
_NO_OUTLIERS = (*_PLAIN, *((f"{name}_ptr", None) for name in ("count", "panel", "columns", "gathered")))
_ROW = ("ROWS", 1)
_HEAVY = (("ACTIVATION", "gelu"), ("BINARY", "mul"))


def _kept(dtype: str) -> tuple[tuple[str, Any], ...]:
    """What `rotated` asks of the product: no outliers of the call, and columns whose exact weights are ``dtype``."""
    return (*_NO_OUTLIERS, ("kept_ptr", "*i64:16"), ("kept_weight_ptr", f"*{dtype}:16"))


_GATHERED = (*_NO_OUTLIERS, ("kept_weight_ptr", "*bf16:16"), ("C", "i32:16"))
"""Columns kept for many rows: their values and weights stand side by side."""


def shipped(target: str) -> Iterator[Variant]:
    """Every tile of the tables for ``target``, bfloat16, as most calls use it."""
    backend = TARGETS[target].backend
    for config in configs.tiles(torch.bfloat16, target, epilogue=False):
        yield Variant("int8_matmul", config, "bf16", _PLAIN)
    for config in configs.tiles(torch.bfloat16, target, epilogue=True):
        yield Variant("int8_matmul", config, "bf16", _kept("bf16"), "kept")
        if config.BLOCK_M >= configs.MANY_ROWS:
            yield Variant("int8_matmul", config, "bf16", _GATHERED, "gathered, kept")
    yield Variant("fused_linear", configs.Config(*configs.FUSED_LINEAR[backend], SPLIT_K=4), "bf16", (*_PLAIN, _ROW))
    for row in configs.WEIGHT_ONLY[backend].values():
        yield Variant("weight_only", configs.Config(*row, SPLIT_K=4), "bf16", _PLAIN)
    yield _rotated(64)


def _rotated(block: int, K: int = 4096, whole: bool = True) -> Variant:
    """`quantize_rowwise` of a row with columns that are kept."""
    config = configs.quantize_rowwise(K, block)
    kept = (("mask_ptr", None), ("columns_ptr", "*i64:16"))
    constants = (*kept, ("BLOCK", block), ("WHOLE_BLOCKS", whole), ("ONE_PART", K <= config.BLOCK_K))
    rest = "" if whole else ", a rest"
    return Variant("quantize_rowwise", config, "bf16", constants, f"rotated {block}{rest}")


def everything(target: str) -> Iterator[Variant]:
    """`shipped`, and the other dtypes, splits, epilogues and kernels."""
    yield from shipped(target)
    backend = TARGETS[target].backend
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        for config in configs.tiles(dtype, target, epilogue=True):
            yield Variant("int8_matmul", config, name, _HEAVY, "gelu mul")
    smallest = configs.tiles(torch.bfloat16, target, epilogue=True)[-1]
    for split in (2, configs.MOST_SPLITS):
        constants = (*_kept("bf16"), *_HEAVY, ("other_ptr", "*bf16:16"))
        yield Variant("int8_matmul", replace(smallest, SPLIT_K=split), "bf16", constants, "kept gelu mul")
    for config in configs.tiles(torch.float32, target, epilogue=True):
        yield Variant("int8_matmul", config, "bf16", _kept("fp32"), "kept in fp32")
    few = [("fused_linear", configs.FUSED_LINEAR[backend], (_ROW,), "")]
    few += [("fused_linear", configs.FUSED_LINEAR[backend], (("OUTLIERS", False), _ROW), " no outliers")]
    few += [("weight_only", row, (), "") for row in configs.WEIGHT_ONLY[backend].values()]
    for kernel, row, constants, note in few:
        for split in (1, configs.MOST_SPLITS):
            config = configs.Config(*row, SPLIT_K=split)
            yield Variant(kernel, config, "fp16", (*_HEAVY, *constants), f"gelu mul{note}")
    yield Variant("fused_linear", configs.Config(*configs.FUSED_LINEAR_FLOAT32, SPLIT_K=4), "fp32", (_ROW,))
    for row in configs.WEIGHT_ONLY_FLOAT32.values():
        yield Variant("weight_only", configs.Config(*row, SPLIT_K=4), "fp32")
    for all_rows in (False, True):
        yield Variant("outlier_mask", configs.OUTLIER_MASK, "bf16", (("ALL_ROWS", all_rows),), "all rows" * all_rows)
    yield Variant("extract_outliers", configs.EXTRACT_OUTLIERS, "bf16")
    yield Variant("quantize_rowwise", configs.quantize_rowwise(8192, 1), "bf16", (("columns_ptr", None),))
    yield _rotated(64, K=14336)
    yield _rotated(64, K=20000, whole=False)
    yield _rotated(4096)
    yield Variant("gather_weight", configs.GATHER_WEIGHT, "bf16")
    gathered = (("columns_ptr", "*i64:16"), ("source_ptr", "*bf16:16"))
    yield Variant("gather_columns", configs.GATHER_COLUMNS, "bf16", gathered)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    programs: how many run on one processor at a time. int8, float16: matrix instructions in the innermost loop that has
    any. residual: the kernel's float matrix instructions. others: the loop's other instructions per step of K, of one
    warp. wide: its 16-byte loads per step, of one thread; weight_loads: how many of those the weight needs.
    """

    target: str
    kernel: str
    label: str
    registers: int
    spills: int
    shared: int
    programs: int
    int8: int
    instruction: str
    residual: str
    float16: int
    async_copies: int
    others: int
    wide: int
    weight_loads: float
    fits: bool


def row(variant: Variant, target: str) -> Row:
    machine = variant.compile(target)
    device = cost_model.LIMITS[target]
    loop = machine.loop(INT8_MATRIX) or machine.loop(FLOAT_MATRIX)
    counts = [0, 0, 0, 0, 0]
    name = "-"
    if loop is not None:
        counts = [loop.count(INT8_MATRIX), loop.count(FLOAT_MATRIX), loop.count(ASYNC_COPY), loop.count(WIDE_LOAD)]
        counts.append(loop.instructions - counts[0] - counts[1])
        name = next((op for op in loop.opcodes if INT8_MATRIX.search(op)), "-")
    int8, float16, copies, wide, others = counts
    residual = ", ".join(sorted(set(FLOAT_MATRIX_NAME.findall(machine.text))))
    return Row(
        target, variant.kernel, variant.label, machine.registers, machine.spills, machine.shared,
        device.programs(machine.registers, machine.shared, variant.config.num_warps), int8, name, residual, float16,
        copies, others, wide, variant.wide_loads_per_step(variant.config.num_warps * TARGETS[target].warp_size),
        machine.shared <= device.shared_per_program,
    )  # fmt: skip


HEADER = (
    f"{'target':8}{'kernel, tile, warps, stages, x':52}{'regs':>5}{'spill':>6}{'shared':>8}{'progs':>6}"
    f"{'int8':>5}{'16bit':>6}{'async':>6}{'others':>7}{'16B':>4}  int8 instruction"
)


def line(r: Row) -> str:
    return (
        f"{r.target:8}{r.label:52}{r.registers:5}{r.spills:6}{r.shared:8}{r.programs:6}"
        f"{r.int8:5}{r.float16:6}{r.async_copies:6}{r.others:7}{r.wide:4}  {r.instruction}"
    )


def histogram(target: str) -> str:
    """The instructions of a step of `fused_linear`'s loop, of one warp: of one row, in blocks without outliers."""
    row = configs.FUSED_LINEAR[TARGETS[target].backend]
    loop = _machine(target, "fused_linear", configs.Config(*row), False, 1).loop(INT8_MATRIX)
    assert loop is not None
    counts = ", ".join(f"{count} {opcode}" for opcode, count in loop.opcodes.most_common())
    return f"{target}: a step of fused_linear {'x'.join(map(str, row[:3]))}, {loop.instructions} instructions: {counts}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m int8fx.tools.audit.audit", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--shipped", action="store_true", help="the tiles of the tables in bfloat16 only")
    parser.add_argument("--json", action="store_true", help="one line of JSON per row, no cost model")
    parser.add_argument("--histogram", action="store_true", help="what fused_linear's loop consists of, and no more")
    args = parser.parse_args(argv)
    if args.histogram:
        print("\n".join(map(histogram, args.targets)))
        return 0
    if not args.json:
        print(HEADER)
    failed = 0
    for target in args.targets:
        for variant in (shipped if args.shipped else everything)(target):
            found = row(variant, target)
            failed += bool(found.spills) or not found.fits
            print(json.dumps(asdict(found)) if args.json else line(found), flush=True)
    if not args.json:
        print(f"\n{failed} of these spill or need more shared memory than their target has.\n")
        print(cost_model.report(_machine))
        print("\n".join(f"\n{histogram(target)}" for target in args.targets))
    return 1 if failed else 0


def _machine(target: str, kernel: str, config: configs.Config, outliers: bool = True, rows: int = 0) -> Machine:
    constants = (*(_PLAIN if outliers or kernel != "int8_matmul" else _NO_OUTLIERS), ("OUTLIERS", outliers))
    constants += (_ROW,) if rows == 1 else ()
    return Variant(kernel, config, "bf16", constants).compile(target)


if __name__ == "__main__":
    raise SystemExit(main())
