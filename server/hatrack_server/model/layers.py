"""The frozen base as adapters' methods see it while they compile an artifact (see adapters.BaseLayers)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hatrack_server.kernels.nf4_linear import BaseLinear, dequantized, nf4_linear
from hatrack_server.types import BaseShapes


class FrozenLayers:
    """Where adapters may act, and what the base's linear layers do."""

    def __init__(
        self,
        shapes: BaseShapes,
        linears: Mapping[str, BaseLinear],
        row_norms: Mapping[str, Tensor],
        ends: Mapping[str, nn.Module],
        norm_offsets: Mapping[str, float],
    ) -> None:
        """`row_norms` are the linears' `squared_norms`; `ends` are the embedding and the head, by name."""
        self.shapes = shapes
        self._ends = ends
        self._norm_offsets = norm_offsets
        self._linears = linears
        self._row_norms = row_norms

    @torch.inference_mode()
    def project(self, layer: str, rows: Tensor) -> Tensor:
        """rows[R, in] through the layer's weight alone, without its bias: float32 [R, out]."""
        linear, bias = self._linears[layer], self.bias(layer)
        # bitsandbytes turns a layer's bias into the dtype of what comes in: it must be the one that steps bring.
        dtype = getattr(linear, "compute_dtype", linear.weight.dtype)
        out = nf4_linear(rows.to(linear.weight.device, dtype), linear).float().cpu()
        return out if bias is None else out - bias

    def squared_norms(self, layer: str) -> Tensor:
        """The squared length of each row of the layer's weight: float32 [out]."""
        return self._row_norms[layer].cpu()

    def end(self, module: str, parameter: str) -> Tensor:
        """A parameter of the embedding or the head, as the base holds it."""
        return self._ends[module].get_parameter(parameter).detach().cpu()

    def norm_offset(self, norm: str) -> float:
        """What the norm adds to its weight before it multiplies with it."""
        return self._norm_offsets[norm]

    def bias(self, layer: str) -> Tensor | None:
        """The layer's bias, float32 [out], if it has one."""
        bias = self._linears[layer].bias
        return None if bias is None else bias.detach().float().cpu()


def squared_norms(linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """Of every row of every weight: float32 [out]. To be read before the weights are packed."""
    return {
        name: torch.linalg.vector_norm(dequantized(layer), dim=1, dtype=torch.float32).square()
        for name, layer in linears.items()
    }
