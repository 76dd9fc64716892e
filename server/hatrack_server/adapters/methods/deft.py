"""DEFT, decompositional efficient fine-tuning (Kumar et al. 2025, arXiv:2509.22793), and PaRa (Chen et al. 2024,
arXiv:2406.05641), as PEFT 0.21 saves them.

W = (I - Q Sᵀ) W0 + s Q R, with `deft_R` (r, in_features), s = alpha / r, or 1 without alpha,
and from `deft_P` (out_features, r) either Q = P and S = relu(P), or Q = S = the Q of P's QR decomposition, with the
signs that LAPACK gives it. PaRa (`para`) has no R. A rank above out_features counts as out_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import (
    DEFAULT_RANK,
    TARGET_KEYS,
    Adapted,
    flag,
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
from hatrack_server.adapters.rank_class import rank_class
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "DEFT"
P, R = "deft_P", "deft_R"
READ_KEYS = TARGET_KEYS | frozenset({"r", "alpha", "bias", "decomposition_method", "para"})
HARMLESS_KEYS = frozenset({"deft_dropout", "init_scale", "init_weights"})


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
    _decomposition(config)
    removes_only = flag(config, "para")
    r = rank_of("every module", config.get("r", DEFAULT_RANK))
    adapted = []
    for module in matched_modules(config, base.linears, Budget()):
        linear = base.linears[module]
        rank = min(r, linear.out_features)
        _scale(config, module, rank)
        shapes = {P: (linear.out_features, rank)} | ({} if removes_only else {R: (rank, linear.in_features)})
        numbers = rank_class(rank) * 2 * linear.out_features + 2 * linear.out_features  # and the shift, in float32
        adapted.append(Adapted(module, shapes, rank, numbers + (0 if removes_only else low_rank_size(rank, linear))))
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank)


def _decomposition(config: Mapping[str, Any]) -> str:
    method = config.get("decomposition_method", "relu")
    if method not in ("relu", "qr"):
        raise InvalidArtifact(config_field("decomposition_method"), 'must be "relu" or "qr"')
    return str(method)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("alpha")
    return scale_of(module, alpha, rank, "alpha") if alpha not in (None, 0) else 1.0  # PEFT takes 0 for no alpha


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    import torch

    from hatrack_server.adapters.pieces import LowRank, OutputLowRank, OutputShift

    decomposition = _decomposition(config)
    for module, saved in modules_in(tensors, P):
        p = precise(saved)
        q, removed = (p, p.relu()) if decomposition == "relu" else (torch.linalg.qr(p).Q,) * 2
        # Sᵀ W0 x is Sᵀ y without the bias: the base's own output spares reading its whole weight.
        yield module, OutputLowRank(removed.mT, -q.mT)
        bias = base.bias(module)
        if bias is not None:
            yield module, OutputShift(q @ (removed.mT @ bias))
        if not flag(config, "para"):
            yield module, LowRank(_scale(config, module, p.shape[1]) * tensor_of(tensors, module, R), q.mT)
