"""Rotated factors keep their product and stay within their dtype."""

import pytest
import torch
from random_tensors import gaussian64

from lowrank.linalg import (
    rotated,
)


def test_rotated_factors_stay_within_float16_and_keep_their_product():
    """Orthonormal columns would leave all of the size, 1e6 and more, to the other factor."""
    left, right = (gaussian64(64, 8) * 1e3).half(), (gaussian64(8, 64, seed=1) * 1e3).half()
    columns, rows = rotated(left, right, seed=0)
    expected = left.double() @ right.double()
    lost = (columns.double() @ rows.double() - expected).norm() / expected.norm()
    assert lost < 2 * torch.finfo(torch.float16).eps  # each factor is rounded once
    assert float(columns.double().norm(dim=0).std() / columns.double().norm(dim=0).mean()) < 1e-3


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6.2e4), (torch.bfloat16, 3e38)], ids=str)
def test_factors_stay_as_they_are_where_a_rotation_would_leave_the_range(dtype, size):
    """Each factor fits, but their product does not, nor a pair of factors with orthogonal columns."""
    left, right = torch.full((64, 1), size).to(dtype), torch.full((1, 64), size).to(dtype)
    columns, rows = rotated(left, right, seed=0)
    assert torch.equal(columns, left) and torch.equal(rows, right)
