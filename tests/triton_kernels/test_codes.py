"""How levels are cut into numbers that 16 bits hold. The kernels that read them: `test_weight_only.py`."""

import pytest
import torch
from int8fx.triton_kernels.codes import codebook
from support.triton import DTYPES

from int8fx.schemes.formats import FORMATS

LEVELS = {name: spec.levels for name, spec in FORMATS.items() if spec.levels is not None}
EXPECTED = {"nf4": (256, 3), "fp4_e2m1": (3, 1), "fp4_e2m1_itrex": (3, 1), "fp4_e2m1_bnb": (3, 1)}


def cut(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the kernel does: bfloat16 by dropping bits, others rounded; float64."""
    if dtype != torch.bfloat16:
        return values.float().to(dtype).double()
    return (values.float().view(torch.int32) & -(2**16)).view(torch.float32).double()


@pytest.mark.parametrize("name", LEVELS)
def test_units_and_parts(name):
    unit, parts = EXPECTED[name]
    book = codebook(LEVELS[name], torch.bfloat16)
    assert (book.unit, book.parts) == (unit, parts)
    assert codebook(LEVELS[name], torch.float16)[1:] == (unit, min(parts, 2))
    assert codebook(LEVELS[name], torch.float32) == (LEVELS[name], 1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LEVELS)
def test_the_parts_of_a_level_are_the_level(name, dtype):
    book = codebook(LEVELS[name], dtype)
    rest = torch.tensor(book.levels, dtype=torch.float64).float().double()
    sums = torch.zeros(16, dtype=torch.float64)
    for _ in range(book.parts):
        part = cut(rest, dtype)
        sums, rest = sums + part, rest - part
    level = torch.tensor(LEVELS[name], dtype=torch.float64)
    assert ((sums / book.unit - level).abs() <= 2.0**-23 * level.abs()).all()
    if book.unit == 256 and dtype != torch.float16:  # the float32 level itself
        assert torch.equal((sums / book.unit).float(), level.float())
