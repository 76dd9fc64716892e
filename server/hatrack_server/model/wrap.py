"""Wraps the base's linear layers so that each row's adapter can act on what they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from hatrack_server.kernels.nf4_linear import choose_layout, nf4_linear
from hatrack_server.types import LinearShape


class Effect(Protocol):
    """What the adapters of one batch do at one layer."""

    def __call__(self, y: Tensor, x: Tensor) -> None:
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
        y = nf4_linear(x, self.base)
        effect = self._effects.by_layer.get(self.name)
        if effect is not None:
            effect(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]))  # y is ours and contiguous, x is the model's
        return y

    @property
    def weight(self) -> Tensor:
        """The base's weight: some modelling code looks at its dtype."""
        return self.base.weight


def wrap_linears(model: PreTrainedModel, effects: Effects, *, packed: bool) -> dict[str, LinearShape]:
    """Replaces every linear layer in place; returns them all, by name: adapters may target each."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in linears.items():
        choose_layout(layer, packed=packed)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, AdaptedLinear(layer, name, effects))
    return {name: LinearShape(layer.out_features, layer.in_features) for name, layer in linears.items()}
