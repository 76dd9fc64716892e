"""VB-LoRA, vector banks (Li et al. 2024, arXiv:2405.15179), as PEFT 0.21 saves them.

Per module `y += B (A x)`, where A (r, in_features) and B (out_features, r) consist of sub-vectors of length L, rows of
A and columns of B. Each of them mixes the vectors of one bank (h, L), shared by all modules, whose logits are the k
highest of its h: softmax(logits)ᵀ bank. Logits are (r, in_features / L, h) and (out_features / L, r, h).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import (
    TARGET_KEYS,
    Adapted,
    count_of,
    flag,
    low_rank_size,
    modules_in,
    precise,
    rank_of,
    refuse_trained_biases,
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

PEFT_TYPE = "VBLORA"
DEFAULT_RANK = 4
DEFAULT_VECTORS = DEFAULT_LENGTH = 256
DEFAULT_TOP_K = 2
BANK = "base_model.vblora_vector_bank"
LOGITS_A, LOGITS_B = "vblora_logits_A", "vblora_logits_B"
ONLY_TOP_K = "save_only_topk_weights"
READ_KEYS = TARGET_KEYS | frozenset({"r", "bias", "num_vectors", "vector_length", "topk", ONLY_TOP_K})
HARMLESS_KEYS = frozenset({"init_logits_std", "init_vector_bank_bound", "vblora_dropout"})


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
    if flag(config, ONLY_TOP_K):
        raise InvalidArtifact(config_field(ONLY_TOP_K), "it saves integers, which are not supported; save all logits")
    r = rank_of("every module", config.get("r", DEFAULT_RANK))
    vectors = count_of(config, "num_vectors", DEFAULT_VECTORS)
    length = count_of(config, "vector_length", DEFAULT_LENGTH)
    if _top_k(config) > vectors:
        raise InvalidArtifact(config_field("topk"), f"the bank has {vectors} vectors")
    adapted = []
    for module in matched_modules(config, base.linears, Budget()):
        linear = base.linears[module]
        if linear.in_features % length or linear.out_features % length:
            message = f"{module} is {linear.in_features} in, {linear.out_features} out: {length} does not divide both"
            raise InvalidArtifact(config_field("vector_length"), message)
        shapes = {
            LOGITS_A: (r, linear.in_features // length, vectors),
            LOGITS_B: (linear.out_features // length, r, vectors),
        }
        adapted.append(Adapted(module, shapes, r, low_rank_size(r, linear)))
    shared = {BANK: (vectors, length)} if adapted else {}
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank, shared=shared)


def _top_k(config: Mapping[str, Any]) -> int:
    return count_of(config, "topk", DEFAULT_TOP_K)


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import LowRank

    bank, k = precise(tensors[BANK]), _top_k(config)
    for module, logits in modules_in(tensors, LOGITS_A):
        a = _mixed(precise(logits), bank, k)  # [r, in / L, L]
        b = _mixed(tensor_of(tensors, module, LOGITS_B), bank, k)  # [out / L, r, L]
        yield module, LowRank(a.flatten(1), b.transpose(0, 1).flatten(1))


def _mixed(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """Of logits[…, h] and bank[h, L], the sub-vectors […, L]."""
    highest, which = logits.topk(k)
    weights = logits.new_zeros(logits.shape).scatter(-1, which, highest.softmax(-1))
    return weights.to(bank) @ bank
