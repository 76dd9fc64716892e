"""Lets each row's adapter act on what modules of the base give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from hatrack_server.kernels.nf4_linear import choose_layout, nf4_linear


class Effect(Protocol):
    """What the adapters of one batch do at one module."""

    def input(self, x: Tensor) -> Tensor:
        """What a linear layer's product takes in place of x[T, in]."""

    def output(self, y: Tensor, x: Tensor) -> None:
        """Changes the module's output y[T, …] in place, given what it got: x[T, …]."""


class Effects:
    """The effects of the step that runs now, by module; shared by all of one model."""

    def __init__(self) -> None:
        self.by_module: Mapping[str, Effect] = {}


class AdaptedLinear(nn.Module):
    """A linear layer of the base with the current step's effect on it."""

    def __init__(self, base: nn.Linear, name: str, effects: Effects) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._effects = effects

    def forward(self, x: Tensor) -> Tensor:
        """x[1, T, in] to [1, T, out]."""
        effect = self._effects.by_module.get(self.name)
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


def wrap_linears(model: PreTrainedModel, effects: Effects, *, packed: bool) -> dict[str, nn.Linear]:
    """Replaces every linear layer in place; returns them as they were, by name: adapters may target each."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in linears.items():
        choose_layout(layer, packed=packed)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, AdaptedLinear(layer, name, effects))
    return linears


def hook_embedding(model: PreTrainedModel, name: str, effects: Effects) -> None:
    """Lets effects act on the output of the embedding of this name."""

    def act(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        effect = effects.by_module.get(name)
        if effect is not None:
            effect.output(y.view(-1, y.shape[-1]), args[0].view(-1))

    model.get_submodule(name).register_forward_hook(act)
