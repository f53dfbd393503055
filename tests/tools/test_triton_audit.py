"""What the compilers make of the shipped tiles, without a GPU, and the arithmetic of the cost model."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from int8fx.triton_kernels import configs

from int8fx.tools.audit import assembly, audit, cost_model
from int8fx.tools.audit.assembly import ASYNC_COPY, FLOAT_MATRIX, INT8_MATRIX, WIDE_LOAD, Loop, Machine

TARGETS = {"sm_80": "IMMA", "sm_90": "IMMA|IGMMA", "gfx942": "v_mfma_i32"}  # the rest is the whole audit's


@pytest.fixture(scope="module")
def rows(request):
    """The audit's, of a process in which Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "int8fx.tools.audit.audit", "--shipped", "--json", "--targets", *TARGETS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def kept_tiles(target):
    """Tiles that add kept columns: all of them from where they stand, those for many rows gathered as well."""
    tiles = configs.tiles(torch.bfloat16, target, epilogue=True)
    return len(tiles) + sum(tile.BLOCK_M >= configs.MANY_ROWS for tile in tiles)


def test_every_shipped_tile_compiles(rows):
    expected = sum(len(configs.INT8_MATMUL[t]) + kept_tiles(t) + len(configs.WEIGHT_ONLY["cuda"]) + 2 for t in TARGETS)
    assert len(rows) == expected
    assert {row["target"] for row in rows} == set(TARGETS)


def test_no_shipped_tile_spills_or_needs_more_than_there_is(rows):
    for row in rows:
        assert row["spills"] == 0, row["label"]
        assert row["fits"], row["label"]
        assert row["programs"] >= 1, row["label"]


def of_products(rows):
    return [row for row in rows if row["kernel"] in audit.PRODUCTS]


def test_int8_products_run_on_int8_matrix_instructions(rows):
    for row in of_products(rows):
        if row["kernel"] == "weight_only":
            assert (row["int8"], row["float16"] > 0) == (0, True), row["label"]
        else:
            assert row["int8"] > 0, row["label"]
            assert row["instruction"].startswith(tuple(TARGETS[row["target"]].split("|"))), row["label"]


def test_weights_are_loaded_16_bytes_at_a_time(rows):
    for row in of_products(rows):
        assert row["wide"] >= row["weight_loads"], row["label"]
        if row["target"].startswith("sm"):
            assert row["async_copies"] >= row["weight_loads"], row["label"]


ALIKE = {"HGMMA.64xNx16.F32.BF16": "HMMA.16816.F32.BF16"}
"""Instructions whose sums are the same, bit by bit, on an H100 (`test_cuda.test_kept_columns_...`)."""


def test_every_tile_of_a_target_adds_kept_columns_by_the_same_instruction(rows):
    """So a row's result does not depend on the tile that it is computed in, whatever order the instruction sums in."""
    for target in TARGETS:
        kept = [row["residual"] for row in rows if row["target"] == target and row["label"].endswith("kept")]
        assert len(kept) == kept_tiles(target)
        shapes = {re.sub(r"64x\d+x16", "64xNx16", name) for name in kept}  # N is the width of the tile
        (shapes,) = {ALIKE.get(name, name) for name in shapes}
        assert FLOAT_MATRIX.match(shapes)


def test_the_lean_loop_is_lean(rows):
    """Beside its matrix instructions, int8_matmul's loop has no more than the loads of its tile and their addresses."""
    for row in rows:
        if row["kernel"] == "int8_matmul":
            assert row["others"] <= 110, row["label"]


# ---- reading assembly ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (INT8_MATRIX, ["IMMA.16832.S8.S8.SAT", "IGMMA.64x128x32.S8.S8", "UTCIMMA", "v_mfma_i32_32x32x16_i8"]),
        (FLOAT_MATRIX, ["HMMA.16816.F32.BF16", "HGMMA.64x128x16.F32", "UTCHMMA", "v_mfma_f32_16x16x16_f16"]),
        (ASYNC_COPY, ["LDGSTS.E.BYPASS.128 [R1], [R2]", "UTMALDG.2D", "buffer_load_dword v1, s[0:3], 0 lds"]),
        (
            WIDE_LOAD,
            ["LDG.E.128 R4, [R2]", "LDGSTS.E.BYPASS.128 [R1], [R2]", "global_load_dwordx4 v[0:3], v[4:5]"],
        ),
    ],
)
def test_kinds_of_instructions(pattern, found):
    assert all(pattern.search(line) for line in found)
    assert not any(pattern.search(line) for line in ("IMAD.WIDE R2", "FFMA R1", "LDG.E.64 R4", "v_fma_f32 v1"))


def test_the_innermost_loop_is_the_one_that_is_read():
    outer = ["HMMA.16816.F32 R1", "@P0 IADD3 R2", "IMMA.16832.S8.S8 R3", "BRA 0x10"]
    loops = assembly._loops([outer, outer[1:]])
    machine = Machine(32, 0, 0, loops, "")
    loop = machine.loop(INT8_MATRIX)
    assert loop.opcodes == Counter({"IADD3": 1, "IMMA.16832.S8.S8": 1, "BRA": 1})
    assert machine.loop(FLOAT_MATRIX).instructions == 4
    assert machine.loop(ASYNC_COPY) is None


# ---- the cost model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_80", 128, 0, 4, 4),  # 65536 / (128 * 128)
        ("sm_80", 32, 64 * 1024, 4, 2),  # 164 KiB / 65
        ("sm_80", 129, 0, 4, 3),  # registers come in blocks of 256 to a warp
        ("sm_90", 255, 196608, 8, 1),
        ("sm_89", 16, 0, 4, 12),  # 48 warps
        ("gfx942", 128, 16384, 4, 4),
    ],
)
def test_programs_on_a_processor(target, registers, shared, warps, programs):
    assert cost_model.LIMITS[target].programs(registers, shared, warps) == programs


def made_up(target, kernel, config, outliers=True, rows=0):
    """A machine whose loops have one matrix instruction and ten others."""
    kinds = {"int8_matmul": ["IMMA", "HMMA"], "fused_linear": ["IMMA"], "weight_only": ["HMMA"]}[kernel]
    loops = tuple(Loop(Counter({"IADD3": 10, kind: 1}), "\n".join([kind, *["IADD3"] * 10])) for kind in kinds)
    return Machine(64, 0, 16384, loops, "")


@pytest.mark.parametrize("gpu", cost_model.GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("M", "N"), cost_model.SHAPES)
def test_no_model_is_faster_than_the_floor(gpu, M, N):
    plain = cost_model.modelled(gpu, made_up, M, N, N, 0.0)
    some = cost_model.modelled(gpu, made_up, M, N, N, 0.01)
    assert cost_model.floor(gpu, M, N, N) < plain.seconds <= some.seconds
    assert plain.bytes >= N * N
    assert plain.launches <= 6


def test_the_floor_is_memory_for_few_rows_and_operations_for_many():
    h100 = next(gpu for gpu in cost_model.GPUS if gpu.name == "H100")
    assert cost_model.floor(h100, 1, 8192, 8192) == (8192 * 8192 + 4 * 8192) / 3.35e12
    assert cost_model.floor(h100, 2048, 8192, 8192) == 2 * 2048 * 8192 * 8192 / 1979e12


def test_the_table_has_a_line_for_every_gpu_and_shape():
    report = cost_model.report(made_up)
    assert report.startswith("modelled")
    assert len(report.splitlines()) == 1 + len(cost_model.GPUS) * len(cost_model.SHAPES)
