from __future__ import annotations

import math

import pytest
import torch

from hatrack_server.kernels.prefix_attention import add_prefix_attention, add_prefix_attention_reference
from hatrack_server.kernels.runs import Run

RUNS = [Run(0, 3, (1,)), Run(4, 1, (0, 1, 2)), Run(7, 2, (2,))]
TOKENS, DIM, ROWS, LENGTH = 10, 6, 3, 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_equals_the_reference(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    out, q = (torch.randn(TOKENS, heads, DIM, generator=generator).to(dtype) for _ in range(2))
    keys, values = (torch.randn(ROWS, LENGTH, kv_heads, DIM, generator=generator).to(dtype) for _ in range(2))
    wanted, found = out.clone(), out.clone()
    add_prefix_attention_reference(wanted, q, keys, values, RUNS)
    add_prefix_attention(found, q, keys, values, RUNS)
    assert torch.equal(found[[3, 9]], out[[3, 9]])
    torch.testing.assert_close(found, wanted)


def test_a_bad_adapter_touches_its_own_tokens_only() -> None:
    generator = torch.Generator().manual_seed(0)
    out, q = (torch.randn(TOKENS, 4, DIM, generator=generator) for _ in range(2))
    keys, values = (torch.randn(ROWS, LENGTH, 2, DIM, generator=generator) for _ in range(2))
    wanted = out.clone()
    add_prefix_attention(wanted, q, keys, values, RUNS)
    keys[1] = math.nan
    add_prefix_attention(out, q, keys, values, RUNS)
    own = [0, 1, 2, 5]
    others = [token for token in range(TOKENS) if token not in own]
    assert out[own].isnan().all()
    assert torch.equal(out[others], wanted[others])
