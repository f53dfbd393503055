"""What Triton's compilers produce for the shipped tiles, without a GPU."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from int8fx.triton_kernels import tiles

from int8fx.tools.audit import assembly, audit
from int8fx.tools.audit.assembly import ASYNC_COPY, FLOAT_MATRIX, INT8_MATRIX, WIDE_LOAD, Machine

TARGETS = {"sm_80": "IMMA", "sm_90": "IMMA|IGMMA", "gfx942": "v_mfma_i32"}  # the command compiles three more


@pytest.fixture(scope="module")
def rows():
    """The audit's, of a process in which Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "int8fx.tools.audit", "--shipped", "--json", "--targets", *TARGETS]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def column_tiles(target):
    """How many rows of the audit add unquantised columns: one per tile, and a second where columns are gathered."""
    with_epilogue = tiles.int8_matmul_tiles(torch.bfloat16, target, epilogue=True)
    return len(with_epilogue) + sum(tile.BLOCK_M >= tiles.MANY_ROWS for tile in with_epilogue)


@pytest.mark.slow
def test_every_shipped_tile_compiles(rows):
    weight_only = len(tiles.WEIGHT_ONLY["cuda"]) * (1 + len(audit.SHIPPED_WEIGHTS))
    expected = sum(len(tiles.INT8_MATMUL[target]) + column_tiles(target) + weight_only + 2 for target in TARGETS)
    assert len(rows) == expected
    assert {row["target"] for row in rows} == set(TARGETS)


@pytest.mark.slow
def test_no_shipped_tile_spills_or_needs_more_shared_memory_than_there_is(rows):
    for row in rows:
        assert row["spills"] == 0, row["label"]
        assert row["fits"], row["label"]


def matmuls(rows):
    return [row for row in rows if row["kernel"] in audit.MATMULS]


@pytest.mark.slow
def test_int8_matmuls_run_on_int8_matrix_instructions(rows):
    for row in matmuls(rows):
        if row["kernel"] == "weight_only":
            assert (row["int8"], row["float16"] > 0) == (0, True), row["label"]
        else:
            assert row["int8"] > 0, row["label"]
            assert row["instruction"].startswith(tuple(TARGETS[row["target"]].split("|"))), row["label"]


@pytest.mark.slow
def test_weights_are_loaded_16_bytes_at_a_time(rows):
    """But those in groups: a step of 32 columns of 4 bits has 16 bytes of a channel."""
    notes = tuple(weight.note for weight in audit.SHIPPED_WEIGHTS)
    for row in (row for row in matmuls(rows) if not row["label"].endswith(notes)):
        assert row["wide"] >= row["weight_loads"], row["label"]
        if row["target"].startswith("sm"):
            assert row["async_copies"] >= row["weight_loads"], row["label"]


ALIKE = {"HGMMA.64xNx16.F32.BF16": "HMMA.16816.F32.BF16"}
"""Instructions whose sums are equal in every bit on an H100: `test_cuda.test_unquantised_columns_...` compares them."""


@pytest.mark.slow
def test_every_tile_of_a_target_adds_unquantised_columns_by_the_same_instruction(rows):
    """So a row's result does not depend on the tile that computes it, whatever order the instruction sums in."""
    for target in TARGETS:
        names = [row["residual"] for row in rows if row["target"] == target and row["label"].endswith("columns")]
        assert len(names) == column_tiles(target)
        shapes = {re.sub(r"64x\d+x16", "64xNx16", name) for name in names}  # N is the width of the tile
        (shapes,) = {ALIKE.get(name, name) for name in shapes}
        assert FLOAT_MATRIX.match(shapes)


@pytest.mark.slow
def test_codes_of_4_bits_are_read_by_few_instructions(rows):
    """With scales, zero points, addresses and the parts of levels. A tree of selections alone has 15 for a code."""
    for note, most in zip((weight.note for weight in audit.SHIPPED_WEIGHTS), (14, 18), strict=True):
        found = [row for row in rows if row["label"].endswith(note) and re.search("weight_only (16|32)x", row["label"])]
        assert len(found) == 2 * len(TARGETS)
        for row in found:
            assert row["others"] <= most * row["codes"], row["label"]


def test_every_format_and_every_kind_of_scale_is_audited():
    weights = (*audit.SHIPPED_WEIGHTS, *audit.OTHER_WEIGHTS)
    assert {weight.format for weight in weights} >= {"int8", "int4_clip", "nf4", "fp4_e2m1"}
    kinds = {(weight.group > 0, weight.even) for weight in weights}
    assert kinds == {(False, True), (False, False), (True, True), (True, False)}
    for field in ("zeros", "has_range"):
        assert {getattr(weight, field) for weight in weights} == {False, True}


@pytest.mark.slow
def test_the_lean_loop_is_lean(rows):
    """The loop of int8_matmul has its matrix instructions, the loads of its tile, their addresses, and little else."""
    for row in rows:
        if row["kernel"] == "int8_matmul":
            assert row["others"] <= 110, row["label"]


# ---- reading assembly ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "instructions"),
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
def test_kinds_of_instructions(pattern, instructions):
    assert all(pattern.search(line) for line in instructions)
    assert not any(pattern.search(line) for line in ("IMAD.WIDE R2", "FFMA R1", "LDG.E.64 R4", "v_fma_f32 v1"))


def test_the_innermost_loop_is_the_one_that_is_read():
    outer = ["HMMA.16816.F32 R1", "@P0 IADD3 R2", "IMMA.16832.S8.S8 R3", "BRA 0x10"]
    loops = assembly._loops([outer, outer[1:]])
    machine = Machine(32, 0, 0, loops, "")
    loop = machine.loop(INT8_MATRIX)
    assert loop.opcodes == Counter({"IADD3": 1, "IMMA.16832.S8.S8": 1, "BRA": 1})
    assert machine.loop(FLOAT_MATRIX).instructions == 4
    assert machine.loop(ASYNC_COPY) is None
