"""The rotation: its matrix, its error against the derived bound, and that a row does not depend on other rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import activations, generator, rotation_error, seeds

from int8fx.schemes.rotate import rotate, rotation_blocks

blocks = st.sampled_from((1, 2, 4, 8, 16, 32, 64, 128, -2, -4, -8, -16, -32, -64, -128, -256))
H2 = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
H4 = torch.tensor([[1, 1, 1, -1], [1, -1, 1, 1], [1, 1, -1, 1], [-1, 1, 1, 1]], dtype=torch.float64)


def hadamard(n: int, is_regular: bool) -> torch.Tensor:
    """Kronecker powers, without the factor: of H4 as often as n allows and of H2 once, or of H2 only."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if is_regular and n >= 4:
        quarter = hadamard(n // 4, True)
        return torch.kron(quarter, H4)
    return torch.kron(hadamard(n // 2, False), H2)


def largest_rotation(t: torch.Tensor, block: int) -> torch.Tensor:
    """How large the rotation of a tensor can be, whose elements are at most ``t`` in size."""
    largest = torch.zeros_like(t)
    for i, n in rotation_blocks(t.shape[-1], block):
        largest[..., i : i + n] = t[..., i : i + n].sum(-1, keepdim=True) / math.sqrt(n) * (1 + 2**-40)
    return largest


@given(st.integers(0, 400), blocks)
def test_blocks_are_powers_of_two_that_cover_every_column_once(K, block):
    parts = rotation_blocks(K, block)
    assert [i for i, _ in parts] == [sum(n for _, n in parts[:j]) for j in range(len(parts))]
    assert sum(n for _, n in parts) == K
    assert all(n & (n - 1) == 0 and n <= abs(block) for _, n in parts)
    assert [n for _, n in parts[: K // abs(block)]] == [abs(block)] * (K // abs(block))


@given(st.integers(1, 200), blocks)
def test_the_matrix_is_hadamards_block_by_block(K, block):
    expected = torch.block_diag(*(hadamard(n, block < 0) / math.sqrt(n) for _, n in rotation_blocks(K, block)))
    matrix = rotate(torch.eye(K, dtype=torch.float64), block)
    torch.testing.assert_close(matrix, expected, rtol=2**-51, atol=0)


@given(st.integers(1, 200), st.integers(0, 9), blocks, seeds)
def test_products_of_rotated_rows_are_exact_in_float64(K, M, block, seed):
    x, w = (torch.randn(M, K, generator=generator(seed + i), dtype=torch.float64) for i in range(2))
    rx, rw = rotate(x, block), rotate(w, block)
    error = (rx @ rw.T - x @ w.T).abs()
    tx, tw = (rotation_error(t, block, torch.float64) for t in (x, w))
    sums = (K + 1) * 2**-53 * (rx.abs() @ rw.abs().T + x.abs() @ w.abs().T)
    assert (error <= tx @ rw.abs().T + rx.abs() @ tw.T + tx @ tw.T + sums).all()
    back = (rotate(rx, block) - x).abs()
    assert (back <= rotation_error(rx, block, torch.float64) + largest_rotation(tx, block)).all()


@given(activations(lead=(7,), values=("normal", "zero_rows", "denormal", "huge")), blocks)
def test_float32_rotations_are_within_the_derived_bound(x, block):
    x = x.float()
    error = (rotate(x, block).double() - rotate(x.double(), block)).abs()
    of_float64 = rotation_error(x, block, torch.float64)
    assert (error <= rotation_error(x, block, torch.float32) + of_float64).all()


@given(st.integers(1, 300), blocks, seeds)
def test_a_rotation_does_not_depend_on_the_other_rows(K, block, seed):
    x = torch.randn(33, K, generator=generator(seed))
    y = rotate(x, block)
    for rows in (1, 2, 7, 32):
        assert torch.equal(rotate(x[:rows], block), y[:rows])


@pytest.mark.parametrize("n", [4, 16, 64, 256, 1024])
def test_a_regular_block_of_equal_values_stays_as_it_is(n):
    x = torch.full((1, n), 3.0)
    assert torch.equal(rotate(x, -n), x)
    assert rotate(x, n)[0].tolist() == [3 * math.sqrt(n)] + [0] * (n - 1)  # Sylvester's: one outlier


@pytest.mark.parametrize("n", [2, 8, 32, 128])
def test_equal_values_in_a_block_that_has_no_regular_matrix_fill_its_first_half(n):
    y = rotate(torch.full((1, n), 3.0), -n)[0]
    torch.testing.assert_close(y, torch.tensor([3 * math.sqrt(2)] * (n // 2) + [0.0] * (n // 2)), rtol=2**-22, atol=0)


def test_the_regular_matrix_is_sylvesters_with_signs_of_columns_and_rows():
    signs = torch.tensor([1.0, 1, 1, -1], dtype=torch.float64)
    signs = torch.kron(torch.kron(signs, signs), signs)
    x = torch.randn(5, 64, generator=generator(0), dtype=torch.float64)
    assert torch.equal(rotate(x, -64), rotate(x * signs, 64) * signs)


def test_block_1_is_no_rotation():
    x = torch.randn(3, 5)
    assert rotate(x, 1) is x


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,)])
def test_nothing_rotates_to_nothing(shape):
    assert rotate(torch.zeros(shape), 64).shape == shape


def test_an_outlier_spreads_over_its_block():
    x = torch.zeros(1, 128)
    x[0, 70] = 64.0
    for block in (64, -64):
        y = rotate(x, block)
        assert (y[0, :64] == 0).all()
        assert (y[0, 64:].abs() == 8).all()
