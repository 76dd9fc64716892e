"""DeLoRA, decoupled low-rank adaptation (Bini et al. 2025, arXiv:2503.18225), as PEFT 0.21 saves it.

ΔW = λ / r * Σ_i b_i a_iᵀ / (‖b_i‖ ‖a_i‖) diag(w_norm): the columns of `delora_B` (out_features, r) and the rows of
`delora_A` (r, in_features) give directions alone, `delora_lambda` (1) how far they reach, and `delora_w_norm`
(in_features) weighs the inputs. It holds the lengths of the columns of the weight that the adapter was made on, and is
read from the file, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import (
    DEFAULT_RANK,
    TARGET_KEYS,
    Adapted,
    low_rank_size,
    modules_in,
    precise,
    rank_of,
    refuse_trained_biases,
    refuse_unknown,
    spec_of,
    tensor_of,
)
from hatrack_server.adapters.peft_targets import ModulePatterns, matched_modules
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "DELORA"
A, B, LAMBDA, W_NORM = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
SHORTEST = 1e-4  # what a shorter vector is divided by
READ_KEYS = TARGET_KEYS | frozenset({"r", "bias", "rank_pattern"})
# λ is trained: the configuration only says where it began.
HARMLESS_KEYS = frozenset({"delora_lambda", "init_weights", "lambda_pattern", "module_dropout"})


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`."""
    refuse_unknown(config, READ_KEYS, HARMLESS_KEYS)
    refuse_trained_biases(config)
    budget = Budget()
    ranks = ModulePatterns(config, "rank_pattern", budget)
    adapted = []
    for module in matched_modules(config, base.linears, budget):
        linear = base.linears[module]
        r = rank_of(module, ranks.value(module, config.get("r", DEFAULT_RANK)))
        shapes: dict[str, tuple[int, ...]] = {A: (r, linear.in_features), B: (linear.out_features, r)}
        shapes |= {LAMBDA: (1,), W_NORM: (linear.in_features,)}
        adapted.append(Adapted(module, shapes, r, low_rank_size(r, linear)))
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank)


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import LowRank

    for module, rows in modules_in(tensors, A):
        a, b = precise(rows), tensor_of(tensors, module, B).mT
        lengths = a.norm(dim=1).clamp(min=SHORTEST) * b.norm(dim=1).clamp(min=SHORTEST)
        scales = tensor_of(tensors, module, LAMBDA) / len(a) / lengths
        yield module, LowRank(a * tensor_of(tensors, module, W_NORM), scales[:, None] * b)
