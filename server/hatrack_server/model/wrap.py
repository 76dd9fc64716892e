"""Lets each row's adapter act on what modules of the base give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from hatrack_server.kernels.nf4_linear import choose_layout, nf4_linear


class Effect(Protocol):
    """What the adapters of one batch do at one module."""

    def input(self, x: Tensor, module: nn.Module) -> Tensor:
        """What a linear layer's product takes in place of x[T, in]."""

    def output(self, y: Tensor, x: Tensor, module: nn.Module) -> None:
        """Changes the module's output y[T, …] in place, given what it got: x[T, …]."""


class Effects:
    """The effects of the step that runs now, by module; shared by all of one model."""

    def __init__(self) -> None:
        self.by_module: Mapping[str, Effect] = {}


class Adapted(nn.Module):
    """A module of the base with the current step's effect on its output."""

    def __init__(self, base: nn.Module, name: str, effects: Effects) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._effects = effects

    def forward(self, x: Tensor) -> Tensor:
        """x[1, T, …] to [1, T, …]."""
        y: Tensor = self.base(x)
        effect = self._effects.by_module.get(self.name)
        if effect is not None:
            effect.output(y[0], x[0], self.base)
        return y

    @property
    def weight(self) -> Tensor | nn.Module:
        """The base's weight: some modelling code looks at its dtype."""
        return self.base.weight


class AdaptedLinear(Adapted):
    """A linear layer of the base with the current step's effect on its input and output."""

    base: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """x[1, T, in] to [1, T, out]."""
        effect = self._effects.by_module.get(self.name)
        if effect is None:
            return nf4_linear(x, self.base)
        tokens = x.reshape(-1, x.shape[-1])
        y = nf4_linear(effect.input(tokens, self.base), self.base)
        effect.output(y, tokens, self.base)
        return y.view(*x.shape[:-1], -1)


def wrap_linears(model: PreTrainedModel, effects: Effects, *, packed: bool) -> dict[str, nn.Linear]:
    """Replaces every linear layer in place; returns them as they were, by name: adapters may target each."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in linears.items():
        choose_layout(layer, packed=packed)
        _put(model, AdaptedLinear(layer, name, effects))
    return linears


def wrap_others(model: PreTrainedModel, names: Iterable[str], effects: Effects) -> dict[str, nn.Module]:
    """Replaces modules of one tensor to one, [1, T, …] to [1, T, …], in place; returns them as they were, by name."""
    modules = {name: model.get_submodule(name) for name in names}
    for name, module in modules.items():
        _put(model, Adapted(module, name, effects))
    return modules


def _put(model: PreTrainedModel, adapted: Adapted) -> None:
    parent, _, child = adapted.name.rpartition(".")
    setattr(model.get_submodule(parent), child, adapted)
