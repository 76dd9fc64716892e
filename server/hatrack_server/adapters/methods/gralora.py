"""GraLoRA, granular low-rank adaptation (Jung et al. 2025, arXiv:2505.20355), as PEFT 0.21 saves it.

W is cut into k by k blocks, and block (j, n), from inputs n to outputs j, has a low-rank change of its own, of rank
s = r / k: ΔW_jn = alpha / (r + hybrid_r) * (A_n[:, j s : j s + s] B_j[n s : n s + s])ᵀ, with `gralora_A`
(k, in_features / k, r) and `gralora_B` (k, r, out_features / k). With zeros outside of the blocks that is low rank,
k² s = k r. `hybrid_r` adds a LoRA of that rank with the same scale: `gralora_A_general`, `gralora_B_general`.
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
    precise,
    rank_of,
    refuse_trained_biases,
    refuse_unknown,
    scale_of,
    spec_of,
    tensor_of,
)
from hatrack_server.adapters.peft_targets import config_field, matched_modules
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, LinearShape, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "GRALORA"
DEFAULT_RANK = 32
DEFAULT_ALPHA = 64
DEFAULT_K = 2
A, B, GENERAL_A, GENERAL_B = "gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"
READ_KEYS = TARGET_KEYS | frozenset({"r", "hybrid_r", "alpha", "gralora_k", "bias"})
HARMLESS_KEYS = frozenset({"gralora_dropout", "init_weights"})


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`; the rank is that of ΔW, k r + hybrid_r."""
    refuse_unknown(config, READ_KEYS, HARMLESS_KEYS)
    refuse_trained_biases(config)
    r, hybrid, k = _ranks_and_blocks(config)
    _scale(config, r + hybrid)
    rank = k * r + hybrid
    adapted = []
    for module in matched_modules(config, base.linears, Budget()):
        linear = base.linears[module]
        _check_divides(k, module, linear)
        shapes: dict[str, tuple[int, ...]] = {A: (k, linear.in_features // k, r), B: (k, r, linear.out_features // k)}
        if hybrid:
            shapes |= {GENERAL_A: (hybrid, linear.in_features), GENERAL_B: (linear.out_features, hybrid)}
        adapted.append(Adapted(module, shapes, rank, low_rank_size(rank, linear)))
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank)


def _ranks_and_blocks(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(r, hybrid_r, k)."""
    r = rank_of("every module", config.get("r", DEFAULT_RANK))
    hybrid, k = config.get("hybrid_r", 0), config.get("gralora_k", DEFAULT_K)
    if type(hybrid) is not int or hybrid < 0:
        raise InvalidArtifact(config_field("hybrid_r"), "must be an integer, 0 or more")
    if type(k) is not int or k < 1 or r % k:
        raise InvalidArtifact(config_field("gralora_k"), "must be a positive integer that divides r")
    return r, hybrid, k


def _check_divides(k: int, module: str, linear: LinearShape) -> None:
    if linear.in_features % k or linear.out_features % k:
        raise InvalidArtifact(config_field("gralora_k"), f"the features of {module} can't be cut into {k} equal blocks")


def _scale(config: Mapping[str, Any], rank: int) -> float:
    return scale_of("every module", config.get("alpha", DEFAULT_ALPHA), rank, "alpha")


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    import torch

    from hatrack_server.adapters.pieces import LowRank

    r, hybrid, k = _ranks_and_blocks(config)
    scale = _scale(config, r + hybrid)
    every = torch.arange(k)
    for module, saved in modules_in(tensors, A):
        a_blocks, b_blocks = precise(saved), tensor_of(tensors, module, B)
        a = a_blocks.new_zeros(k, r, k, a_blocks.shape[1])  # [n, j s, n, in / k]
        a[every, :, every] = a_blocks.mT
        b = b_blocks.new_zeros(k, k, r // k, k, b_blocks.shape[2])  # [n, j, s, j, out / k]
        b[:, every, :, every] = b_blocks.view(k, k, r // k, -1)
        a, b = a.view(k * r, -1), b.view(k * r, -1)
        if hybrid:
            a = torch.cat([a, tensor_of(tensors, module, GENERAL_A)])
            b = torch.cat([b, tensor_of(tensors, module, GENERAL_B).mT])
        yield module, LowRank(a, scale * b)
