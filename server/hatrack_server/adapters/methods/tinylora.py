"""TinyLoRA (Morris et al. 2026, arXiv:2602.04118), as PEFT 0.21 saves it.

Per module `y += B (R (A x))`, R = Σ_i v[i] P[i]. A (r, in_features) and B (out_features, r) are the r largest singular
triplets of the weight that it was trained on, and lie in the file, as P (u, r, r), which is random, does unless
`save_projection` is off: then it comes from the configuration's seed plus the module's number. The modules share
vectors v (u,) in groups of neighbours, fewer of them the nearer `weight_tying` is to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import (
    PREFIX,
    TARGET_KEYS,
    Adapted,
    count_of,
    flag,
    low_rank_size,
    precise,
    rank_of,
    refuse_trained_biases,
    refuse_unknown,
    seed_of,
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

PEFT_TYPE = "TINYLORA"
DEFAULT_RANK = 2
DEFAULT_LENGTH = 64
DEFAULT_SEED = 42
A, B, P = "tinylora_A", "tinylora_B", "tinylora_P"
SHARED_V = "base_model.tinylora_v"
SAVED_KEY, SEED_KEY, TYING_KEY = "save_projection", "projection_seed", "weight_tying"
MAX_DRAWN = 1 << 24  # numbers, which a small file could ask for without end; one core takes 0.1 s for these
# PEFT would pass over `exclude_modules` here, and one module more changes what the others share and draw.
READ_KEYS = (TARGET_KEYS - {"exclude_modules"}) | frozenset({"r", "u", "bias", SAVED_KEY, SEED_KEY, TYING_KEY})
HARMLESS_KEYS = frozenset({"init_v_bound", "init_weights", "tinylora_dropout"})


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
    seed_of(config, SEED_KEY, DEFAULT_SEED)
    wanted, u = rank_of("every module", config.get("r", DEFAULT_RANK)), count_of(config, "u", DEFAULT_LENGTH)
    saved = flag(config, SAVED_KEY, default=True)
    adapted = []
    for module in matched_modules(config, base.linears, Budget()):
        linear = base.linears[module]
        r = min(wanted, linear.in_features, linear.out_features)
        shapes: dict[str, tuple[int, ...]] = {A: (r, linear.in_features), B: (linear.out_features, r)}
        shapes |= {P: (u, r, r)} if saved else {}
        adapted.append(Adapted(module, shapes, r, low_rank_size(r, linear)))
    drawn = 0 if saved else sum(u * one.rank**2 for one in adapted)
    if drawn > MAX_DRAWN:
        message = f"{drawn} numbers would be drawn at each load; at most {MAX_DRAWN} may be: save them"
        raise InvalidArtifact(config_field(SAVED_KEY), message)
    shared = {f"{SHARED_V}.{group}": (u,) for group in _groups(config, len(adapted))}
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank, shared=shared)


def _groups(config: Mapping[str, Any], count: int) -> list[int]:
    """Which vector each of `count` modules has; raises InvalidArtifact."""
    tying = config.get(TYING_KEY, 0.0)
    if type(tying) not in (int, float) or not 0 <= tying <= 1:
        raise InvalidArtifact(config_field(TYING_KEY), "must be a number from 0 to 1")
    groups = max(1, round(count * (1.0 - tying)))
    return [min(index // (count // groups), groups - 1) for index in range(count)]


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    import torch

    from hatrack_server.adapters.pieces import LowRank

    seed = seed_of(config, SEED_KEY, DEFAULT_SEED)
    adapted = [module for module in base.shapes.linears if f"{PREFIX}{module}.{A}" in tensors]
    for index, (module, group) in enumerate(zip(adapted, _groups(config, len(adapted)), strict=True)):
        a, b = tensor_of(tensors, module, A), tensor_of(tensors, module, B)
        v = precise(tensors[f"{SHARED_V}.{group}"])
        saved = tensors.get(f"{PREFIX}{module}.{P}")
        p = _drawn(seed + index, len(v), len(a)) if saved is None else saved
        mixed = torch.tensordot(v.to(b), p.to(b), 1)
        yield module, LowRank(a, (b @ mixed).mT)


def _drawn(seed: int, u: int, r: int) -> Tensor:
    """P as PEFT draws it: the same wherever torch's generator is the same."""
    import torch

    return torch.empty(u, r, r).normal_(std=1 / r**0.5, generator=torch.Generator().manual_seed(seed))
