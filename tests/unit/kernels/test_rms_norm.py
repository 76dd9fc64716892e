from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hatrack_server.kernels.native import Native
from hatrack_server.kernels.rms_norm import fastest_norm

WIDTH = 80  # five vectors: not as many as there are sums


def halves(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def norm_of(kind: Callable[[int], nn.Module], width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    norm = kind(width)
    nn.init.normal_(norm.get_parameter("weight"), generator=torch.Generator().manual_seed(0))
    return norm.to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1, 1, WIDTH), (1, 7, WIDTH), (0, WIDTH), (3, WIDTH), (2, 3, 4, WIDTH)], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_c_gives_what_the_norm_gives(library: Native, shape: tuple[int, ...], size: float) -> None:
    assert library is not None
    norm = norm_of(LlamaRMSNorm)
    fast = fastest_norm(norm)
    assert fast != norm.forward
    x = halves(*shape) * size
    assert fast(x).dtype is torch.bfloat16
    torch.testing.assert_close(fast(x), norm(x), rtol=2**-7, atol=0)
    torch.testing.assert_close(fast(x.float()), norm(x.float()))  # by the norm itself
    torch.testing.assert_close(fast(x.mT.contiguous().mT), norm(x), rtol=2**-7, atol=0)


@torch.inference_mode()
def test_a_bad_token_stays_alone(library: Native) -> None:
    x = halves(3, WIDTH)
    norm = library.rms_norm(halves(WIDTH), 1e-6)
    wanted = norm(x)
    x[1, 5] = float("nan")
    found = norm(x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize(
    "norm",
    [
        norm_of(GemmaRMSNorm),  # adds one to its weight
        norm_of(nn.LayerNorm),  # subtracts the mean
        norm_of(partial(nn.RMSNorm, eps=1e-6)),  # rounds once
        norm_of(LlamaRMSNorm, 40),  # not in vectors
        norm_of(LlamaRMSNorm, dtype=torch.float32),
        nn.Identity(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_other_norms_are_left_as_they_are(norm: nn.Module) -> None:
    assert fastest_norm(norm) == norm.forward


@pytest.mark.parametrize(("width", "step"), [(WIDTH + 1, 1), (WIDTH, 2)])
def test_what_does_not_fit_is_refused(library: Native, width: int, step: int) -> None:
    with pytest.raises(ValueError, match="fit"):
        library.rms_norm(halves(WIDTH), 1e-6)(halves(2, width * step)[:, ::step])
    with pytest.raises(ValueError, match="fit"):
        library.rms_norm(halves(WIDTH * step + width % 16)[::step], 1e-6)
