from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from hatrack_server.kernels.low_rank import BatchLowRank
from hatrack_server.kernels.native import Native
from hatrack_server.kernels.nf4_linear import (
    PackedLinear,
    keep_canonical,
    nf4_linear,
    nf4_linear_reference,
    nf4_tensors,
    pack,
)
from hatrack_server.kernels.runs import Run

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
    keep_canonical(layer)
    wanted = nf4_linear_reference(x, layer)
    for _ in range(2):
        torch.testing.assert_close(nf4_linear(x, layer), wanted)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fastest_layout_stays_within_bfloat16(
    shape: tuple[int, int], rows: int, bias: bool, dtype: torch.dtype
) -> None:
    x = inputs(rows, shape[1])
    canonical = layer_of(*shape, bias=bias, dtype=torch.float32)
    wanted = nf4_linear_reference(x.bfloat16().float(), canonical)
    keep_canonical(canonical)
    layer = pack(canonical)
    found = nf4_linear(x.to(dtype), layer)
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), wanted, atol=3e-2, rtol=3e-2)


@pytest.fixture
def packed_layer() -> PackedLinear:
    layer = pack(layer_of(96, 192, bias=False, dtype=torch.bfloat16))
    if not isinstance(layer, PackedLinear):
        pytest.skip("no packed layout on this machine")
    return layer


def by_bitsandbytes(x: Tensor, layer: PackedLinear) -> Tensor:
    return torch.ops.bitsandbytes.gemv_4bit(x, layer.weight.data, (96, 192), layer.scales, layer.code, 64)


# In vectors, eight tokens are taken at a time; 192 inputs are three blocks.
@pytest.fixture(params=["tiles", "vectors"])
def product(
    request: pytest.FixtureRequest, packed_layer: PackedLinear, library: Native, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Tensor], Tensor]:
    if not (library.has_nf4_product and (library.has_tiles or request.param == "vectors")):
        pytest.skip(f"no {request.param} on this machine")
    monkeypatch.setattr(library, "has_tiles", request.param == "tiles")
    return library.nf4_product(packed_layer.weight, packed_layer.scales, packed_layer.code)


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 32, 33, 70, 256, 300])
def test_the_product_in_c_is_that_of_bitsandbytes_kernel(
    tokens: int, packed_layer: PackedLinear, product: Callable[[Tensor], Tensor]
) -> None:
    x = inputs(tokens, 192).bfloat16()
    wanted = by_bitsandbytes(x, packed_layer) if tokens else torch.empty(0, 96, dtype=torch.bfloat16)
    torch.testing.assert_close(product(x), wanted, rtol=2**-7, atol=1e-4)  # sums in another order


@torch.inference_mode()
def test_a_tokens_product_does_not_depend_on_its_neighbours(product: Callable[[Tensor], Tensor]) -> None:
    x = inputs(300, 192).bfloat16()
    together = product(x)
    for tokens in (1, 3, 4, 5, 9, 33, 299):
        assert torch.equal(product(x[:tokens]), together[:tokens])
        assert torch.equal(product(x[-tokens:]), together[-tokens:])


def low_rank(
    runs: list[Run], *, inputs: int = 192, outputs: int = 96, dtype: torch.dtype = torch.bfloat16
) -> BatchLowRank:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(5, 12, inputs, generator=generator) / 8, torch.randn(5, 12, outputs, generator=generator) / 8
    return BatchLowRank(a.to(dtype), b.to(dtype), runs)


DECODES = [Run(1, 1, (3, 0, 4)), Run(4, 3, (1, 2)), Run(11, 1, (0,))]
MIXED = [*DECODES, Run(12, 200, (2,))]  # its tokens are too many for the C kernel
LAYERS = {
    "packed": lambda: pack(layer_of(96, 192, bias=False, dtype=torch.bfloat16)),
    "packed, with a bias": lambda: pack(layer_of(96, 192, bias=True, dtype=torch.bfloat16)),
    "as bitsandbytes has it": lambda: layer_of(96, 192, bias=False, dtype=torch.bfloat16),
    "dense": lambda: nn.Linear(192, 96, dtype=torch.bfloat16),
}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("runs", [DECODES, MIXED, []], ids=["decodes", "mixed", "none"])
@pytest.mark.parametrize("kind", LAYERS)
def test_low_ranks_on_the_way_are_those_of_a_call_of_their_own(kind: str, runs: list[Run], dtype: torch.dtype) -> None:
    if kind == "dense" and dtype is torch.float32:
        pytest.skip("a dense layer takes no dtype but its own")
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    keep_canonical(layer)
    added, x = low_rank(runs), inputs(300, 192).to(dtype)
    wanted = nf4_linear(x, layer)
    before = wanted.clone()
    added(wanted, x)
    assert torch.equal(wanted, before) == (not runs)
    assert torch.equal(nf4_linear(x, layer, added), wanted)
    assert torch.equal(nf4_linear(x[None], layer, added), wanted[None])


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.usefixtures("two_threads")
def test_threads_wait_for_each_other(tokens: int) -> None:
    """Three groups of outputs, which leave one of two threads with twice as much to do."""
    layer = pack(layer_of(96, 8192, bias=False, dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 12, 8192, generator=generator) / 90, torch.randn(2, 12, 96, generator=generator)
    added = BatchLowRank(a.bfloat16(), b.bfloat16(), [Run(0, 1, tuple(range(tokens)))])
    for n in range(20):
        x = inputs(tokens, 8192).bfloat16() * (1 + n % 2)  # so that what the last call has left is wrong
        product, alone = nf4_linear(x, layer), torch.zeros(tokens, 96, dtype=torch.bfloat16)
        added(alone, x)
        wanted = torch.einsum("ti,tri,tro->to", x.float(), a[:tokens], b[:tokens])
        torch.testing.assert_close(alone.float(), wanted, rtol=2**-5, atol=0.05)
        added(product, x)
        assert torch.equal(nf4_linear(x, layer, added), product)


def test_low_ranks_of_another_layer_are_refused(packed_layer: PackedLinear, library: Native) -> None:
    if not library.has_nf4_product:
        pytest.skip("no product in C on this machine")
    wrong = (11, low_rank(DECODES)), (12, low_rank(DECODES, inputs=128)), (12, low_rank(DECODES, outputs=95))
    for tokens, added in wrong:
        with pytest.raises(ValueError, match="fit"):
            nf4_linear(inputs(tokens, 192).bfloat16(), packed_layer, added)


def test_operands_that_dont_fit_are_refused(packed_layer: PackedLinear, library: Native) -> None:
    if not library.has_nf4_product:
        pytest.skip("no product in C on this machine")
    packed, scales, code = packed_layer.weight, packed_layer.scales, packed_layer.code
    for wrong in (
        (packed[:33], scales[:, :33].contiguous(), code),
        (packed[:, :48].contiguous(), scales[:1], code),
        (packed, scales[:2], code),
        (packed, scales.float(), code),
        (packed, scales, code[:8]),
    ):
        with pytest.raises(ValueError, match="fit"):
            library.nf4_product(*wrong)
    product = library.nf4_product(packed, scales, code)
    for x in (inputs(2, 192), inputs(2, 128).bfloat16(), inputs(2, 384).bfloat16()[:, ::2]):
        with pytest.raises(ValueError, match="fit"):
            product(x)


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_without_the_c_kernel_bitsandbytes_answers(
    tokens: int, packed_layer: PackedLinear, monkeypatch: pytest.MonkeyPatch, library: Native
) -> None:
    x = inputs(tokens, 192)
    wanted = nf4_linear(x, packed_layer)
    monkeypatch.setattr(library, "has_nf4_product", False)
    layer = pack(layer_of(96, 192, bias=False, dtype=torch.bfloat16))
    torch.testing.assert_close(nf4_linear(x, layer), wanted, rtol=2**-7, atol=1e-4)
    assert nf4_linear(x[None], layer).shape == (1, tokens, 96)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 4, 7, 8, 9])  # the last is PyTorch's
def test_a_dense_layer_is_that_of_pytorch(tokens: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(100, 67, bias=bias, dtype=torch.bfloat16)  # neither in whole vectors nor in fours
    x = inputs(tokens, 104).bfloat16()[:, 4:]
    torch.testing.assert_close(nf4_linear(x, layer), layer(x), rtol=2**-7, atol=4e-3)
    assert nf4_linear(x[None], layer).shape == (1, tokens, 67)


@torch.inference_mode()
def test_an_unquantised_layer_is_left_as_it_is() -> None:
    layer, x = nn.Linear(5, 3), inputs(2, 5)
    assert pack(layer) is layer
    torch.testing.assert_close(nf4_linear(x, layer), x @ layer.weight.T + layer.bias)


@torch.inference_mode()
def test_leading_dimensions_are_kept() -> None:
    layer, x = layer_of(64, 128, bias=True, dtype=torch.float32), inputs(6, 128)
    keep_canonical(layer)
    torch.testing.assert_close(nf4_linear(x.view(1, 6, 128), layer)[0], nf4_linear(x, layer))
    packed = pack(layer)
    torch.testing.assert_close(nf4_linear(x.view(1, 6, 128), packed)[0], nf4_linear(x, packed))
    torch.testing.assert_close(nf4_linear(x.T.contiguous().T, packed), nf4_linear(x, packed))
    assert nf4_linear(x[:0], packed).shape == (0, 64)


@pytest.mark.parametrize("packed", [False, True])
def test_a_weight_takes_little_more_than_4_bits(packed: bool) -> None:
    layer: nn.Module = layer_of(256, 512, bias=True, dtype=torch.bfloat16)
    if packed:
        layer = pack(layer)
    bits = 8 * sum(tensor.nbytes for tensor in nf4_tensors(layer)) / (256 * 512)
    assert 4.1 < bits < 4.3


# QLoRA, Dettmers et al. 2023, appendix E.
NF4_CODES = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0,
             0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]  # fmt: skip


def test_nf4_is_that_of_the_paper() -> None:
    codes = get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(codes, torch.tensor(NF4_CODES, dtype=codes.dtype), rtol=0, atol=1e-7)
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=True)
    error = dequantize_4bit(packed, state) - values
    assert error.abs().mean().item() == pytest.approx(0.0728, abs=4e-4)
    assert error.square().mean().sqrt().item() == pytest.approx(0.0920, abs=4e-4)
    bits = 8 * (packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes) / values.numel()
    assert bits == pytest.approx(4.127, abs=1e-3)


def test_nf4_is_nearer_to_normal_weights_than_other_kinds_of_4_bits() -> None:
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    fp4 = dequantize_4bit(*quantize_4bit(values, blocksize=64, quant_type="fp4"))
    blocks = values.view(-1, 64)
    step = blocks.abs().amax(1, keepdim=True) / 7
    int4 = ((blocks / step).round() * step).view(-1)
    for found, absolute, square in ((fp4, 0.0966, 0.1220), (int4, 0.0914, 0.1077)):
        error = found - values
        assert error.abs().mean().item() == pytest.approx(absolute, abs=4e-4)
        assert error.square().mean().sqrt().item() == pytest.approx(square, abs=4e-4)
