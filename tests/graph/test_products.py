"""What is read as a matmul with a weight, in graphs of three levels, and what is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.graphs import LEVELS, check_left, check_lowered

COMPOSITE = LEVELS[:2]

LOWERED = {
    "linear": (lambda x, w: F.linear(x, w), (4, 3), (2, 3)),
    "linear by keyword": (lambda x, w: F.linear(x, weight=w), (4, 3), (2, 3)),
    "linear of a vector": (lambda x, w: F.linear(x, w), (3,), (2, 3)),
    "operator": (lambda x, w: x @ w.t(), (2, 4, 3), (2, 3)),
    "method matmul": (lambda x, w: x.matmul(w.T), (4, 3), (2, 3)),
    "torch.matmul": (lambda x, w: torch.matmul(x, w.mT), (4, 3), (2, 3)),
    "method mm": (lambda x, w: x.mm(w.transpose(0, 1)), (4, 3), (2, 3)),
    "torch.mm on the left": (lambda x, w: torch.mm(w, x), (3, 4), (2, 3)),
    "addmm": (lambda x, w: torch.addmm(x[:, :2], x, w.t()), (4, 3), (2, 3)),
    "mv": (lambda x, w: torch.mv(w, x), (3,), (2, 3)),
    "bmm": (lambda x, w: torch.bmm(x, w.mT), (2, 4, 3), (2, 2, 3)),
    "method bmm on the left": (lambda x, w: w.bmm(x), (2, 3, 4), (2, 2, 3)),
    "baddbmm": (lambda x, w: torch.baddbmm(x[:, :, :2], x, w.permute(0, 2, 1)), (2, 4, 3), (2, 2, 3)),
    "einsum": (lambda x, w: torch.einsum("mk,nk->mn", x, w), (4, 3), (2, 3)),
    "einsum with a list": (lambda x, w: torch.einsum("mk,nk->mn", [x, w]), (4, 3), (2, 3)),
    "einsum of experts": (lambda x, w: torch.einsum("emk,enk->emn", x, w), (2, 4, 3), (2, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", LOWERED)
def test_is_lowered(name, level):
    check_lowered(LOWERED[name], level)


LEFT = {
    "transposed": (lambda x, w: x @ w, (4, 3), (3, 3)),
    "a product of activations": (lambda x, w: (x @ x.mT) * w[0, 0], (4, 3), (2, 3)),
    "one expert for a whole batch": (lambda x, w: x @ w.mT, (5, 4, 3), (1, 2, 3)),
    "alpha": (lambda x, w: torch.addmm(x[:, :2], x, w.t(), alpha=2), (4, 3), (2, 3)),
    "beta": (lambda x, w: torch.addmm(x[:, :2], x, w.t(), beta=2), (4, 3), (2, 3)),
    "an embedding": (lambda x, w: F.embedding(x.long().abs() % 2, w), (4, 3), (2, 3)),
    "einsum of a diagonal": (lambda x, w: torch.einsum("mk,kk->mk", x, w), (4, 3), (3, 3)),
    "einsum of a diagonal of x": (lambda x, w: torch.einsum("mmk,nk->mn", x, w), (4, 4, 3), (2, 3), *COMPOSITE),
    "einsum over two labels": (lambda x, w: torch.einsum("mnk,nk->m", x, w), (4, 2, 3), (2, 3)),
    "einsum that sums x first": (lambda x, w: torch.einsum("mjk,nk->mn", x, w), (4, 2, 3), (2, 3), *COMPOSITE),
    "einsum of a row for each expert": (
        lambda x, w: torch.einsum("ek,enk->en", x, w), (2, 3), (2, 2, 3), *COMPOSITE
    ),
    "einsum of a table for each expert": (
        lambda x, w: torch.einsum("eabk,enk->eabn", x, w), (2, 2, 4, 3), (2, 2, 3), *COMPOSITE
    ),
    "einsum with an ellipsis": (lambda x, w: torch.einsum("...k,kn->...n", x, w), (4, 3), (3, 3)),
    "einsum without an arrow": (lambda x, w: torch.einsum("mk,kn", x, w), (4, 3), (3, 3)),
    "experts of a matrix of unknown rank": (lambda x, w: x @ w.mT, (4, 3), (2, 2, 3), "torch"),
    "on the left of an unknown rank": (lambda x, w: w @ x, (3,), (2, 3), "torch"),
    "into a given tensor": (lambda x, w: torch.mm(x, w.t(), out=torch.empty(4, 2)), (4, 3), (2, 3), "torch"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "level"), [(name, level) for name in LEFT for level in LEFT[name][3:] or LEVELS])
def test_near_miss_is_left(name, level):
    check_left(LEFT[name], level)
