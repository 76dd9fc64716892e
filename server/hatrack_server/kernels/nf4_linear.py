"""Every GEMM against the frozen base goes through `nf4_linear`."""

from __future__ import annotations

import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

PACKED_ROWS = 32  # bitsandbytes' packed CPU kernel crashes unless out_features is a multiple of this


def choose_layout(layer: nn.Linear, *, packed: bool) -> None:
    """Lets bitsandbytes repack `layer` for its fast CPU kernel at the first call, or keeps the canonical bytes.

    The packed layout rounds block scales to bfloat16 and computes in bfloat16 whatever the input; digests are
    therefore taken from the checkpoint's files. Layers that the packed kernel can't hold keep the canonical layout.
    """
    if isinstance(layer, Linear4bit):
        block = layer.weight.quant_state.blocksize
        fits = layer.out_features % PACKED_ROWS == 0 and layer.in_features % block == 0
        layer.support_avx512bf16_for_cpu = packed and fits and has_avx512bf16()


def nf4_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """x[…, in] times the base's weight, plus its bias: […, out].

    `layer` is a `Linear4bit`, or a plain linear where the base is not quantised (lm_head, or all with "none").
    """
    return layer(x)


def dequantized(layer: nn.Linear) -> Tensor:
    """The layer's weight [out, in], in the dtype it was quantised from; right only in the canonical layout."""
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.detach()


def nf4_linear_reference(x: Tensor, layer: Linear4bit) -> Tensor:
    """The same as `nf4_linear` from the dequantised weight, in x's dtype; right only in the canonical layout."""
    return torch.nn.functional.linear(x, dequantized(layer).to(x.dtype), layer.bias)
