"""Lets each row's adapter act on what modules of the base give."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hatrack_server.kernels.nf4_linear import BaseLinear, keep_canonical, nf4_linear, pack
from hatrack_server.kernels.rms_norm import fastest_norm


class Effect(Protocol):
    """What the adapters of one batch do at one module."""

    def linear(self, x: Tensor, layer: BaseLinear) -> Tensor:
        """What a linear layer gives for x[…, in] with them: […, out]. x is left as it is."""

    def output(self, y: Tensor, x: Tensor) -> None:
        """Changes y[T, …], what another module gives, in place; x[T, …] is what it got, a norm's as normalised."""


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

    def __call__(self, x: Tensor) -> Tensor:
        """Nothing hooks into it: looking for that takes longer than a small product."""
        y: Tensor = self.forward(x)
        return y

    @property
    def weight(self) -> Tensor | nn.Module:
        """The base's weight: some modelling code looks at its dtype."""
        return self.base.weight


class AdaptedEmbedding(Adapted):
    """The embedding with the current step's effect on its output."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids[1, T] to [1, T, width]."""
        y: Tensor = self.base(ids)
        effect = self._effects.by_module.get(self.name)
        if effect is not None:
            effect.output(y.view(-1, y.shape[-1]), ids.view(-1))
        return y


class AdaptedNorm(Adapted):
    """A norm with the current step's effect on its output.

    offset: what the norm adds to its weight before it multiplies with it: 1 in Gemma's, else 0.
    """

    def __init__(self, base: nn.Module, name: str, effects: Effects) -> None:
        super().__init__(base, name, effects)
        self.offset, self._normalise = _without_parameters(base)
        self._norm = fastest_norm(base)

    def forward(self, x: Tensor) -> Tensor:
        """x[…, width] to the same shape: [1, T, width], or [T, width] where modelling code flattens it."""
        y = self._norm(x)
        effect = self._effects.by_module.get(self.name)
        if effect is not None:
            normalised = self._normalise(x.float())  # so that what an adapter gives is rounded once
            effect.output(y.view(-1, y.shape[-1]), normalised.view(-1, x.shape[-1]))
        return y


@torch.no_grad()
def _without_parameters(norm: nn.Module) -> tuple[float, nn.Module]:
    """The offset of a norm's weight, and a copy of the norm that neither scales nor shifts."""
    plain = copy.deepcopy(norm).float()
    for parameter in plain.parameters():
        parameter.zero_()
    weight = plain.get_parameter("weight")
    ramp = torch.arange(1.0, len(weight) + 1).to(weight)
    if plain(ramp[None]).any():
        return 1.0, plain
    weight.fill_(1)
    return 0.0, plain


class AdaptedLinear(Adapted):
    """A linear layer of the base with the current step's effect on its input and output."""

    base: BaseLinear

    def forward(self, x: Tensor) -> Tensor:
        """x[1, T, in] to [1, T, out]."""
        effect = self._effects.by_module.get(self.name)
        return nf4_linear(x, self.base) if effect is None else effect.linear(x, self.base)


def wrap_linears(model: PreTrainedModel, effects: Effects) -> dict[str, nn.Linear]:
    """Replaces every linear layer in place; returns them as they were, by name: adapters may target each."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in linears.items():
        keep_canonical(layer)
        _put(model, AdaptedLinear(layer, name, effects))
    return linears


def pack_linears(model: PreTrainedModel) -> dict[str, BaseLinear]:
    """Gives every wrapped linear layer the fastest layout that there is for it; returns them by name."""
    wrapped = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for module in wrapped:
        module.base = pack(module.base)
    return {module.name: module.base for module in wrapped}


def wrap_embedding(model: PreTrainedModel, name: str, effects: Effects) -> nn.Module:
    """Replaces the embedding in place; returns it as it was."""
    embedding = model.get_submodule(name)
    _put(model, AdaptedEmbedding(embedding, name, effects))
    return embedding


def wrap_norms(model: PreTrainedModel, names: Iterable[str], effects: Effects) -> dict[str, float]:
    """Replaces norms in place; returns their weights' offsets by name."""
    norms = [AdaptedNorm(model.get_submodule(name), name, effects) for name in names]
    for norm in norms:
        _put(model, norm)
    return {norm.name: norm.offset for norm in norms}


def _put(model: PreTrainedModel, adapted: Adapted) -> None:
    parent, _, child = adapted.name.rpartition(".")
    setattr(model.get_submodule(parent), child, adapted)
