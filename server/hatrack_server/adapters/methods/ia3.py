"""(IA)³ (Liu et al. 2022, arXiv:2205.05638), as PEFT 0.21 saves it.

Per module one vector: `y *= l` over the output, the base's bias included, or `x *= l` over the input where the module
is among the feed-forward ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.patterns import Budget, Pattern
from hatrack_server.adapters.peft_linear import TARGET_KEYS, Adapted, modules_in, precise, refuse_unknown, spec_of
from hatrack_server.adapters.peft_targets import Predicate, config_field, matched_modules
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "IA3"
VECTOR = "ia3_l"


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`; vectors have no rank, so it is 0."""
    refuse_unknown(config, TARGET_KEYS | {"feedforward_modules"}, {"init_ia3_weights"})
    budget = Budget()
    is_feedforward = _feedforward(config, budget)
    adapted = []
    for module in matched_modules(config, base.linears, budget):
        linear = base.linears[module]
        shape = (1, linear.in_features) if is_feedforward(module) else (linear.out_features, 1)
        adapted.append(Adapted(module, {VECTOR: shape}, 0, 2 * math.prod(shape)))  # in float32, twice what others take
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank)


def _feedforward(config: Mapping[str, Any], budget: Budget) -> Predicate:
    """PEFT's rule, which is not that of target_modules: the end of a name counts, whatever stands before it."""
    modules = config.get("feedforward_modules")
    if isinstance(modules, str):
        return Pattern(modules, config_field("feedforward_modules"), budget).fullmatch
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise InvalidArtifact(config_field("feedforward_modules"), "must be text or a list of texts")
    return lambda module: module.endswith(tuple(modules))


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import InputScale, OutputScale

    for module, vector in modules_in(tensors, VECTOR):
        kind = InputScale if vector.shape[0] == 1 else OutputScale
        yield module, kind(precise(vector).flatten())
