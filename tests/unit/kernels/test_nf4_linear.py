from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from hatrack_server.kernels.nf4_linear import choose_layout, nf4_linear, nf4_linear_reference

# bitsandbytes keeps one scale for 64 weights; the last two don't fit its packed kernel.
SHAPES = [(64, 128), (32, 64), (40, 64), (64, 96)]


def layer_of(out_features: int, in_features: int, *, bias: bool, dtype: torch.dtype) -> Linear4bit:
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features) / in_features**0.5
    layer = Linear4bit(in_features, out_features, bias=bias, compute_dtype=dtype, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    if bias:
        layer.bias = nn.Parameter(torch.linspace(-1, 1, out_features, dtype=dtype), requires_grad=False)
    return layer.to("cpu").eval()  # quantises


def inputs(rows: int, in_features: int) -> Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_canonical_layout_is_exact_in_float32(shape: tuple[int, int], rows: int, bias: bool) -> None:
    layer, x = layer_of(*shape, bias=bias, dtype=torch.float32), inputs(rows, shape[1])
    choose_layout(layer, packed=False)
    wanted = nf4_linear_reference(x, layer)
    for _ in range(2):
        torch.testing.assert_close(nf4_linear(x, layer), wanted)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_packed_layout_stays_within_bfloat16(shape: tuple[int, int], rows: int, bias: bool) -> None:
    layer, x = layer_of(*shape, bias=bias, dtype=torch.bfloat16), inputs(rows, shape[1]).bfloat16()
    wanted = nf4_linear_reference(x.float(), layer_of(*shape, bias=bias, dtype=torch.float32))
    choose_layout(layer, packed=True)
    for _ in range(2):  # the first call may repack
        torch.testing.assert_close(nf4_linear(x, layer).float(), wanted, atol=3e-2, rtol=3e-2)


@torch.inference_mode()
def test_an_unquantised_layer_is_left_as_it_is() -> None:
    layer, x = nn.Linear(5, 3), inputs(2, 5)
    choose_layout(layer, packed=True)
    torch.testing.assert_close(nf4_linear(x, layer), x @ layer.weight.T + layer.bias)


@torch.inference_mode()
def test_leading_dimensions_are_kept() -> None:
    layer, x = layer_of(64, 128, bias=True, dtype=torch.float32), inputs(6, 128)
    choose_layout(layer, packed=False)
    torch.testing.assert_close(nf4_linear(x.view(1, 6, 128), layer)[0], nf4_linear(x, layer))
