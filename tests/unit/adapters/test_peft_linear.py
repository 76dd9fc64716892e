from __future__ import annotations

import pytest
import torch

from hatrack_server.adapters.peft_linear import scaled


@pytest.mark.parametrize("scale", [2.0, 1.0, 0.125, -0.5])
def test_a_power_of_two_is_folded_in_as_the_file_has_it(scale: float) -> None:
    values = torch.randn(64).bfloat16()
    folded = scaled(scale, values)
    assert folded.dtype is torch.bfloat16
    assert torch.equal(folded.float(), scale * values.float())


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1.5, torch.bfloat16), (0.0, torch.bfloat16), (2.0, torch.float16), (2.0, torch.float32)],
)
def test_what_might_be_rounded_is_folded_in_in_float32(scale: float, dtype: torch.dtype) -> None:
    values = torch.tensor([6e4, -1e-7, 3.0]).to(dtype)
    folded = scaled(scale, values)
    assert folded.dtype is torch.float32
    assert torch.equal(folded, scale * values.float())
