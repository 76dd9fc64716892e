"""LoHa and LoKr on an NF4 base, for PEFT.

PEFT 0.21 makes ΔW and gives it the shape of the base's weight (tuners/loha/layer.py, tuners/lokr/layer.py): on NF4 that
is the shape of packed bytes. Importing this module registers layers that bypass the weight, `y = base(x) + s ΔW x`, and
compute with the factors of ΔW: as large as the weight dequantised, it is never made, nor kept for the backward pass.
Tensors, initial values and files are PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoHaModel, LoKrModel
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.lokr.layer import Linear as LoKrLinear
from torch import Tensor
from torch.nn.functional import linear


class NF4LoHa(LoHaLinear):
    """s ((W1a W1b) ⊙ (W2a W2b)) x as a low-rank product of rank r²: of every row with every row, of both factors."""

    def create_adapter_parameters(self, adapter_name: str, r: int, _packed: tuple[int, ...]) -> None:
        """Makes them for the shape that the weight has unpacked."""
        super().create_adapter_parameters(adapter_name, r, (self.out_features, self.in_features))

    def _get_delta_activations(self, adapter_name: str, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """x[…, in] to s ΔW x[…, out]."""
        a1, a2 = self.hada_w1_a[adapter_name], self.hada_w2_a[adapter_name]
        b1, b2 = self.hada_w1_b[adapter_name], self.hada_w2_b[adapter_name]
        down = (b1[:, None] * b2).flatten(0, 1)  # [r, r, in] to [r², in]
        up = (a1[:, :, None] * a2[:, None]).flatten(1)  # [out, r, r] to [out, r²]
        y = linear(linear(self._cast_input_dtype(x, down.dtype), down), up)
        return _without_dropped_rows(self, adapter_name, self.scaling[adapter_name] * y)


class NF4LoKr(LoKrLinear):
    """s (W1 ⊗ W2) x as y[l, k] = s Σ W1[l, p] W2[k, q] x[p, q]."""

    def _get_delta_activations(self, adapter_name: str, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """x[…, in] to s ΔW x[…, out]."""
        w1, w2 = self._factor("lokr_w1", adapter_name), self._factor("lokr_w2", adapter_name)
        x = self._cast_input_dtype(x, w1.dtype).unflatten(-1, (w1.shape[1], w2.shape[1]))
        y = linear(linear(x, w2).mT, w1).mT.flatten(-2)  # [p, q] to [p, k] to [l, k]
        return _without_dropped_rows(self, adapter_name, self.scaling[adapter_name] * y)

    def _factor(self, name: str, adapter_name: str) -> Tensor:
        whole: Any = getattr(self, name)
        if adapter_name in whole:
            return whole[adapter_name]
        return getattr(self, f"{name}_a")[adapter_name] @ getattr(self, f"{name}_b")[adapter_name]


def _without_dropped_rows(layer: Any, adapter_name: str, y: Tensor) -> Tensor:
    """y[…, out] without the rows of ΔW that rank dropout leaves out, which are drawn as PEFT draws them."""
    share = layer.rank_dropout[adapter_name]
    if not layer.training or not share:
        return y
    kept = (torch.rand(y.shape[-1]) > share).to(y)
    return y * (kept / kept.mean() if layer.rank_dropout_scale.get(adapter_name, True) else kept)


# PEFT takes the first kind that fits, and a layer on NF4 is a linear layer, too.
LoHaModel.layers_mapping = {Linear4bit: NF4LoHa, **LoHaModel.layers_mapping}
LoKrModel.layers_mapping = {Linear4bit: NF4LoKr, **LoKrModel.layers_mapping}
