"""Wraps the base's linear layers so that each row's adapter can act on what they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hatrack_server.kernels.nf4_linear import choose_layout, dequantized, nf4_linear
from hatrack_server.types import LinearShape


class Effect(Protocol):
    """What the adapters of one batch do at one layer."""

    def input(self, x: Tensor) -> Tensor:
        """What the base's product takes in place of x[T, in]."""

    def output(self, y: Tensor, x: Tensor) -> None:
        """Changes the layer's output y[T, out], given its input x[T, in], in place."""


class Effects:
    """The effects of the step that runs now, by layer name; shared by all wrapped layers of one model."""

    def __init__(self) -> None:
        self.by_layer: Mapping[str, Effect] = {}


class AdaptedLinear(nn.Module):
    """A linear layer of the base with the current step's effect on it."""

    def __init__(self, base: nn.Linear, name: str, effects: Effects) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._effects = effects

    def forward(self, x: Tensor) -> Tensor:
        """x[1, T, in] to [1, T, out]."""
        effect = self._effects.by_layer.get(self.name)
        if effect is None:
            return nf4_linear(x, self.base)
        tokens = x.reshape(-1, x.shape[-1])
        y = nf4_linear(effect.input(tokens), self.base)
        effect.output(y, tokens)
        return y.view(*x.shape[:-1], -1)

    @property
    def weight(self) -> Tensor:
        """The base's weight: some modelling code looks at its dtype."""
        return self.base.weight


class LinearLayers:
    """The base's linear layers as methods see them when they compile an artifact (see adapters.BaseLayers)."""

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        """Reads every weight once, before it may be packed."""
        self._layers = layers
        self.shapes = {name: LinearShape(layer.out_features, layer.in_features) for name, layer in layers.items()}
        self._squared_norms = {name: dequantized(layer).square().sum(1) for name, layer in layers.items()}

    @torch.inference_mode()
    def project(self, layer: str, rows: Tensor) -> Tensor:
        """rows[R, in] through the layer's weight alone, without its bias: float32 [R, out]."""
        linear, bias = self._layers[layer], self.bias(layer)
        # bitsandbytes turns a layer's bias into the dtype of what comes in: it must be the one that steps bring.
        dtype = getattr(linear, "compute_dtype", linear.weight.dtype)
        out = nf4_linear(rows.to(linear.weight.device, dtype), linear).float().cpu()
        return out if bias is None else out - bias

    def squared_norms(self, layer: str) -> Tensor:
        """The squared length of each row of the layer's weight: float32 [out]."""
        return self._squared_norms[layer].cpu()

    def bias(self, layer: str) -> Tensor | None:
        """The layer's bias, float32 [out], if it has one."""
        bias = self._layers[layer].bias
        return None if bias is None else bias.detach().float().cpu()


def wrap_linears(model: PreTrainedModel, effects: Effects, *, packed: bool) -> LinearLayers:
    """Replaces every linear layer in place; returns them all: adapters may target each."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    layers = LinearLayers(linears)
    for name, layer in linears.items():
        choose_layout(layer, packed=packed)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, AdaptedLinear(layer, name, effects))
    return layers
