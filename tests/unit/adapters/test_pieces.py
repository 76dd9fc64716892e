from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hatrack_server.adapters.pieces import LowRank


def placed_b(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What a pool of that dtype holds of `b`."""
    piece = LowRank(torch.zeros(len(b), 3), b, scale)
    rows = tuple(torch.full(shape, torch.nan, dtype=dtype) for shape in piece.shapes)  # as of whoever was there before
    piece.write(rows)
    assert not rows[0].any()
    return rows[1]


@pytest.mark.parametrize("scale", [2.0, 1.0, 0.125, -0.5, 1.5, 0.0, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_scale_is_folded_in_with_one_rounding_at_most(
    scale: float, dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    b = torch.tensor([[6e4, -1e-7, 3.0, 0.1], [1.0, 5e-3, -7.7, 250.0]]).to(dtype)
    exact = (scale * b.double()).float() if dtype is torch.float64 else scale * b.float()
    assert torch.equal(placed_b(b, scale, pool_dtype), exact.to(pool_dtype))


def test_the_scale_leaves_the_piece_and_its_padding_alone() -> None:
    b = torch.randn(3, 5).bfloat16()
    before = b.clone()
    placed = placed_b(b, 2.0, torch.bfloat16)
    assert placed.shape == (4, 5)
    assert torch.equal(placed[:3], 2 * before)
    assert not placed[3].any()
    assert torch.equal(b, before)


def test_a_copy_keeps_the_scale() -> None:
    copied = LowRank(torch.ones(2, 3), torch.ones(2, 5), 4.0).with_tensors(torch.clone)
    assert copied.scale == 4.0
    assert [tuple(tensor.shape) for tensor in copied.tensors] == [(2, 3), (2, 5)]
