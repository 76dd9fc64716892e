"""Every GEMM against the frozen base goes through `nf4_linear`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from hatrack_server.kernels.low_rank import BatchLowRank
from hatrack_server.kernels.native import NF4Product, native

PACKED_ROWS = 32  # bitsandbytes' packed CPU kernel crashes unless out_features is a multiple of this
BLOCK = 64  # inputs to a scale, as the C kernel takes them

# Tokens up to which PyTorch's product with a dense bfloat16 weight leaves much of the memory's bandwidth unused. On two
# cores of a Zen 5, a head of 32000x2048 takes 4.1, 4.5 and 5.3 ms for 1, 8 and 16 tokens, in C 2.9, 3.2 and 4.8.
FEW = 8


class PackedLinear(nn.Module):
    """An NF4 layer in the layout of bitsandbytes' fast CPU kernel.

    The layout rounds block scales to bfloat16, and every product is in bfloat16 whatever comes in; digests are
    therefore taken from the checkpoint's files.
    """

    bias: nn.Parameter | None
    scales: Tensor  # bfloat16 [in/64, out]
    code: Tensor  # float32 [16]

    def __init__(self, layer: Linear4bit) -> None:
        """Takes over the layer's weight, which can't be used any more."""
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.compute_dtype: torch.dtype = layer.compute_dtype
        codes, state = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
        self.weight = nn.Parameter(codes.as_subclass(Tensor), requires_grad=False)  # uint8 [out, in/2]
        self.register_buffer("scales", state.absmax)
        self.register_buffer("code", state.code.bfloat16().float())  # as bitsandbytes' kernel rounds it
        self._product = self._fastest_product()
        self.native_product = self._product if isinstance(self._product, NF4Product) and self.bias is None else None

    def forward(self, x: Tensor) -> Tensor:
        """x[…, in] to […, out], in the dtype of x."""
        dtype = x.dtype
        y: Tensor = self._product((x if dtype is torch.bfloat16 else x.bfloat16()).contiguous())
        if dtype is not torch.bfloat16:
            y = y.to(dtype)
        if self.bias is not None:
            y.add_(self.bias)
        return y

    def _fastest_product(self) -> Callable[[Tensor], Tensor]:
        """What gives the product of x[…, in] with the weight, both bfloat16.

        Milliseconds of a 5632x2048 layer on 2 cores for 1, 8, 32 and 512 tokens: on an Intel in tiles 0.5, 0.5, 0.6 and
        8.4, by bitsandbytes 0.6, 1.4, 5.4 and 86; on an AMD Zen 5 in vectors 0.1, 0.2, 0.75 and 12, by bitsandbytes
        0.13, 0.32, 1.1 and 17.
        """
        library = native()
        weight = self.weight.data, self.scales, self.code
        if library is not None and library.has_nf4_product:
            return library.nf4_product(*weight)
        return functools.partial(_bitsandbytes_product, *weight)


def _bitsandbytes_product(packed: Tensor, scales: Tensor, code: Tensor, x: Tensor) -> Tensor:
    n, k = packed.shape[0], packed.shape[1] * 2
    if not x.numel():  # bitsandbytes' kernel divides by the number of tokens: the process would end
        return x.new_empty(*x.shape[:-1], n)
    y: Tensor = torch.ops.bitsandbytes.gemv_4bit(x.view(-1, k), packed, (n, k), scales, code, BLOCK)
    return y.view(*x.shape[:-1], n)


BaseLinear = nn.Linear | PackedLinear
"""A layer of the base: an NF4 one in either layout, or a plain one where the base is not quantised."""


def pack(layer: BaseLinear) -> BaseLinear:
    """The layer in the fastest layout that there is for it here: on CPUs with AVX512_BF16, and shapes that fit."""
    if not isinstance(layer, Linear4bit) or layer.weight.is_cuda or not has_avx512bf16():
        return layer
    block = layer.weight.quant_state.blocksize
    fits = layer.out_features % PACKED_ROWS == 0 and layer.in_features % BLOCK == 0 and block == BLOCK
    return PackedLinear(layer) if fits else layer


def keep_canonical(layer: nn.Module) -> None:
    """Keeps bitsandbytes from repacking the layer on its own at the first call in eval mode."""
    if isinstance(layer, Linear4bit):
        layer.support_avx512bf16_for_cpu = False


def nf4_linear(x: Tensor, layer: BaseLinear, added: BatchLowRank | None = None) -> Tensor:
    """x[…, in] times the base's weight, plus its bias: […, out]. Then plus what low ranks give for x, made on the way
    where that can be done: the same values to the bit, without the time that a call of its own takes.
    """
    product = layer.native_product if isinstance(layer, PackedLinear) and x.dtype is torch.bfloat16 else None
    if product is not None and added is not None and added.native_sums is not None:
        return product(x.contiguous(), added.native_sums)
    # Nothing hooks into a layer: looking for that takes longer than a small product.
    y: Tensor = _dense_linear(x, layer) if type(layer) is nn.Linear else layer.forward(x)
    if added is not None:
        added(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]))
    return y


def _dense_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    weight, tokens = layer.weight, x.reshape(-1, layer.in_features)
    library = native() if x.device.type == "cpu" and x.dtype is weight.dtype is torch.bfloat16 else None
    if library is None or len(tokens) > FEW or tokens.stride(1) != 1:
        return nn.functional.linear(x, weight, layer.bias)
    y = library.dense_product(tokens, weight).view(*x.shape[:-1], layer.out_features)
    return y if layer.bias is None else y.add_(layer.bias)


def dequantized(layer: nn.Linear) -> Tensor:
    """The weight [out, in] of a layer that is not packed, in the dtype it was quantised from."""
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.detach()


def nf4_linear_reference(x: Tensor, layer: nn.Linear) -> Tensor:
    """The same as `nf4_linear` from the dequantised weight, in x's dtype."""
    return torch.nn.functional.linear(x, dequantized(layer).to(x.dtype), layer.bias)


def nf4_tensors(layer: nn.Module) -> list[Tensor]:
    """What holds a quantised layer's codes and scales; empty for one that is not quantised."""
    if isinstance(layer, PackedLinear):
        return [layer.weight, layer.scales]
    if not isinstance(layer, Linear4bit):
        return []
    state = layer.weight.quant_state
    return [layer.weight, state.absmax, *([state.state2.absmax] if state.nested else [])]
