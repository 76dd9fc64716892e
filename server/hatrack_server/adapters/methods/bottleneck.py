"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247), as Hatrack's own
trainer saves them: PEFT 0.21 has no such method.

Per module `y += up(activation(down(y)))` on its finished output, with `bottleneck_down.weight` (r, out_features),
`bottleneck_up.weight` (out_features, r) and the biases of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import (
    TARGET_KEYS,
    Adapted,
    modules_in,
    rank_of,
    refuse_unknown,
    spec_of,
    tensor_of,
)
from hatrack_server.adapters.peft_targets import config_field, matched_modules
from hatrack_server.adapters.rank_class import rank_class
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "BOTTLENECK"
DOWN, DOWN_BIAS = "bottleneck_down.weight", "bottleneck_down.bias"
UP, UP_BIAS = "bottleneck_up.weight", "bottleneck_up.bias"
ACTIVATIONS = ("relu", "gelu", "silu")


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`; the rank is the bottleneck's width."""
    refuse_unknown(config, TARGET_KEYS | {"r", "activation"}, {"placement", "init_weights"})
    if config.get("activation") not in ACTIVATIONS:
        raise InvalidArtifact(config_field("activation"), f"must be one of {', '.join(ACTIVATIONS)}")
    r = rank_of("every module", config.get("r"))
    adapted = []
    for module in matched_modules(config, base.linears, Budget()):
        width = base.linears[module].out_features
        shapes: dict[str, tuple[int, ...]] = {DOWN: (r, width), DOWN_BIAS: (r,), UP: (width, r), UP_BIAS: (width,)}
        adapted.append(Adapted(module, shapes, r, rank_class(r) * (2 * width + 1) + width))
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank)


def compile(config: dict[str, Any], tensors: Mapping[str, Tensor], base: BaseLayers) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import GeluBottleneck, ReluBottleneck, SiluBottleneck

    kind = dict(zip(ACTIVATIONS, (ReluBottleneck, GeluBottleneck, SiluBottleneck), strict=True))[config["activation"]]
    for module, down in modules_in(tensors, DOWN):
        down_bias, up, up_bias = (tensor_of(tensors, module, name) for name in (DOWN_BIAS, UP, UP_BIAS))
        yield module, kind(down, down_bias, up.mT, up_bias)
