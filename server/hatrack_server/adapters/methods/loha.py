"""LoHa, low-rank Hadamard products (Hyeon-Woo et al. 2021, arXiv:2108.06098), as PEFT 0.21 saves them.

ΔW = alpha / r * (w1_a w1_b) ⊙ (w2_a w2_b), which is exactly of rank r²: with B[:, p r + q] = w1_a[:, p] ⊙ w2_a[:, q]
and A[p r + q, :] = w1_b[p, :] ⊙ w2_b[q, :].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import (
    TARGET_KEYS,
    Adapted,
    RanksAndScales,
    low_rank_size,
    modules_in,
    refuse_unknown,
    spec_of,
    tensor_of,
)
from hatrack_server.adapters.peft_targets import matched_modules
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "LOHA"
READ_KEYS = TARGET_KEYS | frozenset({"r", "alpha", "rank_pattern", "alpha_pattern"})
# `use_effective_conv2d` concerns convolutions, which no base here has.
HARMLESS_KEYS = frozenset({"init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d"})


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`; the rank is that of ΔW, r²."""
    refuse_unknown(config, READ_KEYS, HARMLESS_KEYS)
    budget = Budget()
    settings = RanksAndScales(config, budget, alpha_key="alpha")
    adapted = []
    for module in matched_modules(config, base.linears, budget):
        linear, r = base.linears[module], settings.rank(module)
        settings.scale(module, r)
        shapes = {f"hada_{w}_a": (linear.out_features, r) for w in ("w1", "w2")}
        shapes |= {f"hada_{w}_b": (r, linear.in_features) for w in ("w1", "w2")}
        adapted.append(Adapted(module, shapes, r * r, low_rank_size(r * r, linear)))
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank)


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import LowRank

    settings = RanksAndScales(config, Budget(), alpha_key="alpha")
    for module, _ in modules_in(tensors, "hada_w1_a"):
        a1, b1, a2, b2 = (tensor_of(tensors, module, f"hada_{w}") for w in ("w1_a", "w1_b", "w2_a", "w2_b"))
        scale = settings.scale(module, a1.shape[1])
        a = (b1[:, None] * b2[None]).flatten(0, 1)  # [r, r, in] to [r², in]
        yield module, LowRank(a, scale * (a1.mT[:, None] * a2.mT[None]).flatten(0, 1))
