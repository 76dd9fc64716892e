"""HRA, Householder reflection adaptation (Yuan et al. 2024, arXiv:2405.17484), as PEFT 0.21 saves it.

W = W0 H_1 … H_r with H_i = I - 2 u_i u_iᵀ / ‖u_i‖², where u_i are the columns of `hra_u` (in_features, r), made
orthogonal by Gram-Schmidt if `apply_GS` is on. What is orthogonal to all of them no reflection moves. So with u = Q R
and Q's columns orthonormal, ΔW = W0 Q (C - I) Qᵀ, where C is the same product for the columns of R: exactly low rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack.manifest import WEIGHTS_FILE
from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import (
    DEFAULT_RANK,
    PREFIX,
    TARGET_KEYS,
    Adapted,
    flag,
    low_rank_size,
    modules_in,
    precise,
    rank_of,
    refuse_trained_biases,
    refuse_unknown,
    spec_of,
)
from hatrack_server.adapters.peft_targets import matched_modules
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "HRA"
U = "hra_u"
DEPENDENT = 1e-4  # below this, what Gram-Schmidt leaves of a unit vector is mostly float32's rounding


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`."""
    refuse_unknown(config, TARGET_KEYS | {"r", "apply_GS", "bias"}, {"init_weights"})
    refuse_trained_biases(config)
    flag(config, "apply_GS")
    r = rank_of("every module", config.get("r", DEFAULT_RANK))
    adapted = []
    for module in matched_modules(config, base.linears, Budget()):
        linear = base.linears[module]
        adapted.append(Adapted(module, {U: (linear.in_features, r)}, r, low_rank_size(r, linear)))
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank)


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    import torch

    from hatrack_server.adapters.pieces import LowRank

    orthogonalised = flag(config, "apply_GS")
    for module, u in modules_in(tensors, U):
        basis, columns = torch.linalg.qr(precise(u))
        _check_directions(module, columns, independent=orthogonalised)
        # Gram-Schmidt makes a basis of the same span: every direction in it is turned round.
        change = -2 * torch.eye(len(columns), dtype=columns.dtype) if orthogonalised else _change(columns)
        yield module, LowRank(basis.mT, change.mT @ base.project(module, basis.mT))


def _check_directions(module: str, columns: Tensor, *, independent: bool) -> None:
    import torch

    lengths = columns.norm(dim=0)
    if not lengths.all():
        raise InvalidArtifact(f"{WEIGHTS_FILE}: {PREFIX}{module}.{U}", "a column is 0, which no reflection is along")
    if independent and torch.linalg.matrix_rank(columns / lengths, rtol=DEPENDENT) < len(lengths):
        message = "its columns depend on each other: what apply_GS makes of them is rounding"
        raise InvalidArtifact(f"{WEIGHTS_FILE}: {PREFIX}{module}.{U}", message)


def _change(columns: Tensor) -> Tensor:
    """Π (I - 2 u uᵀ / ‖u‖²) - I over the columns u, from left to right."""
    import torch

    identity = torch.eye(len(columns), dtype=columns.dtype)
    product = identity
    for u in (columns / columns.norm(dim=0)).mT:
        product = product - 2 * torch.outer(product @ u, u)
    return product - identity
