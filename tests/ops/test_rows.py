"""Which form serves how many rows, and that the C++ kernels are compiled with the same number."""

import subprocess

import pytest
from support.helpers import activation, packed_weight

from int8fx import ops
from int8fx.ops import native, rows
from int8fx.ops.rows import FUSED_ROWS_GPU, WEIGHT_ONLY_ROWS_CPU, WEIGHT_ONLY_ROWS_GPU, Form, form

QUANTIZED, FUSED, WEIGHT_ONLY = Form.QUANTIZED, Form.FUSED, Form.WEIGHT_ONLY
CPU, GPU = WEIGHT_ONLY_ROWS_CPU, WEIGHT_ONLY_ROWS_GPU
WEIGHTS = {  # threshold, block, has_columns, is_plain
    "llm_int8": (6.0, 1, False, True),
    "plain": (None, 1, False, True),
    "weight_only": (0.0, 1, False, True),
    "columns": (6.0, 1, True, True),
    "rotated": (None, 64, False, True),
    "rotated, columns": (None, 64, True, True),
    "groups": (0.0, 1, False, False),
    "groups, int8 x": (None, 1, False, False),
    "groups, outliers": (6.0, 1, False, False),
    "groups, columns": (None, 1, True, False),
    "groups, rotated": (None, 64, False, False),
}
GPU_ROWS = {0: FUSED, 1: FUSED, 2: WEIGHT_ONLY, GPU: WEIGHT_ONLY, GPU + 1: QUANTIZED, 4096: QUANTIZED}
CPU_ROWS = {0: WEIGHT_ONLY, 1: WEIGHT_ONLY, CPU: WEIGHT_ONLY, CPU + 1: QUANTIZED, 4096: QUANTIZED}
ALL = sorted({*GPU_ROWS, *CPU_ROWS})
TABLE = {
    ("cpu", "llm_int8"): CPU_ROWS,
    ("cpu", "plain"): CPU_ROWS,
    ("cpu", "weight_only"): CPU_ROWS,
    ("cpu", "columns"): CPU_ROWS,
    ("cpu", "rotated"): dict.fromkeys(ALL, QUANTIZED),
    ("cpu", "rotated, columns"): dict.fromkeys(ALL, QUANTIZED),
    ("cuda", "llm_int8"): GPU_ROWS,
    ("cuda", "plain"): GPU_ROWS,
    ("cuda", "weight_only"): dict.fromkeys(ALL, WEIGHT_ONLY),
    ("cuda", "columns"): dict.fromkeys(ALL, QUANTIZED),
    ("cuda", "rotated"): dict.fromkeys(ALL, QUANTIZED),
    ("cuda", "rotated, columns"): dict.fromkeys(ALL, QUANTIZED),
    ("cpu", "groups"): CPU_ROWS,
    ("cpu", "groups, int8 x"): CPU_ROWS,
    ("cpu", "groups, outliers"): CPU_ROWS,
    ("cpu", "groups, columns"): CPU_ROWS,
    ("cpu", "groups, rotated"): dict.fromkeys(ALL, QUANTIZED),
    ("cuda", "groups"): dict.fromkeys(ALL, WEIGHT_ONLY),
    ("cuda", "groups, int8 x"): dict.fromkeys(ALL, WEIGHT_ONLY),
    ("cuda", "groups, outliers"): dict.fromkeys(ALL, WEIGHT_ONLY),
    ("cuda", "groups, columns"): dict.fromkeys(ALL, QUANTIZED),
    ("cuda", "groups, rotated"): dict.fromkeys(ALL, QUANTIZED),
}


@pytest.mark.parametrize(("device_type", "weight"), TABLE)
def test_the_table_of_forms(device_type, weight):
    expected = TABLE[device_type, weight]
    assert {M: form(M, device_type, *WEIGHTS[weight]) for M in expected} == expected


def test_every_weight_on_every_device_is_in_the_table():
    assert set(TABLE) == {(device, weight) for device in ("cpu", "cuda") for weight in WEIGHTS}
    assert FUSED_ROWS_GPU == 1


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_weight_in_groups_reads_quantised_x_only_where_a_plain_one_does(device_type):
    """`quantize_rowwise` asks for plain weights, whatever weights read its result."""
    for *weight, is_plain in WEIGHTS.values():
        for M in () if is_plain else ALL:
            in_groups, plain = (form(M, device_type, *weight, is_plain=value) for value in (False, True))
            assert in_groups is not QUANTIZED or plain is QUANTIZED


def test_other_devices_run_as_cpus_do():
    for weight in WEIGHTS.values():
        assert all(form(M, "mps", *weight) is form(M, "cpu", *weight) for M in ALL)


def test_the_cpp_kernels_are_compiled_with_this_number(monkeypatch, tmp_path):
    assert f"-DINT8FX_WEIGHT_ONLY_ROWS={CPU}" in native.command(native.AVX2, tmp_path / "library")
    path = native.path_of(native.AVX2, tmp_path)
    monkeypatch.setattr(native, "WEIGHT_ONLY_ROWS_CPU", CPU + 1)
    assert f"-DINT8FX_WEIGHT_ONLY_ROWS={CPU + 1}" in native.command(native.AVX2, tmp_path / "library")
    assert native.path_of(native.AVX2, tmp_path) != path  # another library


def test_the_cpp_kernels_have_no_number_of_their_own(tmp_path):
    """Without the definition they do not compile. (The preprocessor alone says so: a second.)"""
    command = [part for part in native.command(native.DEFAULT, tmp_path / "out") if "WEIGHT_ONLY_ROWS" not in part]
    done = subprocess.run([*command, "-E"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "INT8FX_WEIGHT_ONLY_ROWS is a number of rows: native.py takes it from rows.py" in done.stderr


def test_the_loaded_kernels_change_their_form_at_this_number():
    """By the one thing that shows outside: what `quantize_rowwise` computes for linear alone."""
    assert native.load()
    weight = packed_weight(8, 64)
    for M in range(1, 2 * CPU + 1):
        x = activation(M, 64, seed=M)
        x[:, 1:] = x[:, 1:].round()
        x[:, 0] = 300.5  # each row's scale is 300.5 / 127: rounding the other columns to codes shows
        exact = x.double() @ (weight[0].double() * weight[1].double()[:, None]).T
        error = (ops.linear(x, *weight).double() - exact).norm() / exact.norm()
        assert (error < 1e-5) == (rows.form(M, "cpu", None, 1, False, True) is WEIGHT_ONLY), M
        assert error < 1e-5 or error > 1e-3
