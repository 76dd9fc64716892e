"""MiSS, matrix shard sharing (Kang and Yin 2024, arXiv:2409.15371), as PEFT 0.21 saves it.

Per module `y[o] += Σ_j block[j, o] Σ_{c ≡ j mod r} x[c]`, which is low rank: B = blockᵀ and A[j, c] = [c mod r = j].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import (
    TARGET_KEYS,
    Adapted,
    low_rank_size,
    modules_in,
    rank_of,
    refuse_trained_biases,
    refuse_unknown,
    spec_of,
)
from hatrack_server.adapters.peft_targets import config_field, matched_modules
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "MISS"
DEFAULT_RANK = 64
BLOCK = "miss_block"


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`."""
    refuse_unknown(config, TARGET_KEYS | {"r", "bias", "init_weights"}, {"mini_r", "miss_dropout"})
    refuse_trained_biases(config)
    if not isinstance(config.get("init_weights", True), bool):
        raise InvalidArtifact(config_field("init_weights"), "only MiSS itself is supported, not Bat or mini")
    r = rank_of("every module", config.get("r", DEFAULT_RANK))
    adapted = []
    for module in matched_modules(config, base.linears, Budget()):
        linear = base.linears[module]
        shapes = {BLOCK: (r, linear.out_features)}
        adapted.append(Adapted(module, shapes, r, low_rank_size(r, linear)))
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank)


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import LowRank

    for module, block in modules_in(tensors, BLOCK):
        r = block.shape[0]
        a = block.new_zeros(r, base.shapes.linears[module].in_features)
        for row in range(r):
            a[row, row::r] = 1
        yield module, LowRank(a, block)
