"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454), as PEFT 0.21 saves it.

Per module `y += λ_b ⊙ (B[:out] (λ_d ⊙ (A[:, :in] x)))`; A (r, widest in), B (widest out, r) are random and shared by
all modules, and lie in the file unless `save_projection` is off: then they come from the configuration's seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
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
    seed_of,
    spec_of,
    tensor_of,
)
from hatrack_server.adapters.peft_targets import matched_modules
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.types import BaseShapes, LinearShape, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "VERA"
DEFAULT_RANK = 256
SHARED_A, SHARED_B = "base_model.vera_A", "base_model.vera_B"
LAMBDA_B, LAMBDA_D = "vera_lambda_b", "vera_lambda_d"
SEED_KEY = "projection_prng_key"
READ_KEYS = TARGET_KEYS | frozenset({"r", "bias", "save_projection", SEED_KEY})
HARMLESS_KEYS = frozenset({"d_initial", "init_weights", "vera_dropout"})


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
    seed_of(config, SEED_KEY, 0)
    r = rank_of("every module", config.get("r", DEFAULT_RANK))
    adapted = []
    for module in matched_modules(config, base.linears, Budget()):
        linear = base.linears[module]
        shapes = {LAMBDA_B: (linear.out_features,), LAMBDA_D: (r,)}
        adapted.append(Adapted(module, shapes, r, low_rank_size(r, linear)))
    shared: dict[str, tuple[int, ...]] = {}
    if adapted and config.get("save_projection", True):
        widest_in, widest_out = _widest(base.linears[one.module] for one in adapted)
        shared = {SHARED_A: (r, widest_in), SHARED_B: (widest_out, r)}
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank, shared=shared)


def compile(config: dict[str, Any], tensors: Mapping[str, Tensor], base: BaseLayers) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import LowRank

    adapted = {module: base.shapes.linears[module] for module, _ in modules_in(tensors, LAMBDA_B)}
    if SHARED_A in tensors:
        shared_a, shared_b = precise(tensors[SHARED_A]), precise(tensors[SHARED_B])
    else:
        shared_a, shared_b = _drawn(config.get(SEED_KEY, 0), config.get("r", DEFAULT_RANK), *_widest(adapted.values()))
    for module, shape in adapted.items():
        a = tensor_of(tensors, module, LAMBDA_D)[:, None] * shared_a[:, : shape.in_features]
        yield module, LowRank(a, tensor_of(tensors, module, LAMBDA_B) * shared_b[: shape.out_features].mT)


def _widest(linears: Iterable[LinearShape]) -> tuple[int, int]:
    """(in_features, out_features)."""
    shapes = list(linears)
    return max(shape.in_features for shape in shapes), max(shape.out_features for shape in shapes)


def _drawn(seed: int, r: int, widest_in: int, widest_out: int) -> tuple[Tensor, Tensor]:
    """A and B as PEFT draws them (Kaiming uniform): the same wherever torch's generator is the same."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    a, b = torch.empty(r, widest_in), torch.empty(widest_out, r)
    for matrix in (a, b):
        bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(matrix.shape[1])
        matrix.uniform_(-bound, bound, generator=generator)
    return a, b
