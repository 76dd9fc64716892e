"""LoKr, low-rank Kronecker products (Yeh et al. 2023, arXiv:2309.14859), as PEFT 0.21 saves them.

ΔW = alpha / r * (W1 ⊗ W2) with W1 (l, p) and W2 (k, q), out_features = l k and in_features = p q, each of them whole or
a product of two factors. It is never made: y[l, k] += Σ W1[l, p] W2[k, q] x[p, q].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import (
    PREFIX,
    TARGET_KEYS,
    Adapted,
    RanksAndScales,
    flag,
    refuse_unknown,
    spec_of,
    tensor_of,
)
from hatrack_server.adapters.peft_targets import config_field, matched_modules
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "LOKR"
READ_KEYS = TARGET_KEYS | frozenset(
    {"r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor"}
)
# `use_effective_conv2d` concerns convolutions, which no base here has.
HARMLESS_KEYS = frozenset({
    "init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d",
})  # fmt: skip


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`; the rank is r, that of ΔW is higher."""
    refuse_unknown(config, READ_KEYS, HARMLESS_KEYS)
    budget = Budget()
    settings = RanksAndScales(config, budget, alpha_key="alpha")
    both, divisor = flag(config, "decompose_both"), config.get("decompose_factor", -1)
    if type(divisor) is not int or (divisor < 1 and divisor != -1):
        raise InvalidArtifact(config_field("decompose_factor"), "must be a positive integer, or -1")
    adapted = []
    for module in matched_modules(config, base.linears, budget):
        linear, r = base.linears[module], settings.rank(module)
        settings.scale(module, r)
        rows1, rows2 = factorized(linear.out_features, divisor)
        columns1, columns2 = factorized(linear.in_features, divisor)
        shapes = _factor("lokr_w1", rows1, columns1, r, whole=not both or r >= max(rows1, columns1) / 2)
        shapes |= _factor("lokr_w2", rows2, columns2, r, whole=r >= max(rows2, columns2) / 2)
        adapted.append(Adapted(module, shapes, r, rows1 * columns1 + rows2 * columns2))
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank)


def factorized(dimension: int, divisor: int) -> tuple[int, int]:
    """The two factors, in order, that PEFT's `factorization` splits a dimension into.

    `divisor` itself where it divides; else the most balanced ones whose lesser is at most `divisor` (-1: any).
    """
    if divisor > 0 and dimension % divisor == 0:
        return divisor, dimension // divisor
    most = dimension if divisor == -1 else divisor
    lesser = max(m for m in range(1, int(dimension**0.5) + 1) if dimension % m == 0 and m <= most)
    return lesser, dimension // lesser


def _factor(name: str, rows: int, columns: int, r: int, *, whole: bool) -> dict[str, tuple[int, ...]]:
    return {name: (rows, columns)} if whole else {f"{name}_a": (rows, r), f"{name}_b": (r, columns)}


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import Kronecker

    settings = RanksAndScales(config, Budget(), alpha_key="alpha")
    for module in dict.fromkeys(key.removeprefix(PREFIX).rpartition(".lokr_")[0] for key in tensors):
        scale = settings.scale(module, settings.rank(module))
        yield module, Kronecker(scale * _matrix(tensors, module, "lokr_w1"), _matrix(tensors, module, "lokr_w2"))


def _matrix(tensors: Mapping[str, Tensor], module: str, name: str) -> Tensor:
    if f"{PREFIX}{module}.{name}" in tensors:
        return tensor_of(tensors, module, name)
    return tensor_of(tensors, module, f"{name}_a") @ tensor_of(tensors, module, f"{name}_b")
