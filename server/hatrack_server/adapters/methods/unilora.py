"""Uni-LoRA (Li et al. 2025, arXiv:2506.00799), as PEFT 0.21 saves it.

Per module `y += B (A x)`, where every number of every A (r, in_features) and B (out_features, r) is one of a vector θ,
over the square root of how often it stands in all of them. The file holds θ alone. Which number stands where is drawn
from the configuration's seed, for all modules at once: in the base's order, each with A before B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import (
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
)
from hatrack_server.adapters.peft_targets import config_field, matched_modules
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "UNILORA"
DEFAULT_RANK = 4
DEFAULT_LENGTH = 256
DEFAULT_SEED = 42
THETA = "base_model.unilora_theta_d"
SEED_KEY = "proj_seed"
MAX_DRAWN = 1 << 24  # numbers, which the smallest file could ask for without end; one core takes 1.5 s for these
# PEFT would pass over `exclude_modules` here, and one module more changes what all others have.
READ_KEYS = (TARGET_KEYS - {"exclude_modules"}) | frozenset({"r", "bias", "theta_d_length", "save_indices", SEED_KEY})
HARMLESS_KEYS = frozenset({"init_theta_d_bound", "init_weights", "unilora_dropout"})


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
    if flag(config, "save_indices"):
        message = "it saves integers, which are not supported; the vector and the seed tell all"
        raise InvalidArtifact(config_field("save_indices"), message)
    r = rank_of("every module", config.get("r", DEFAULT_RANK))
    linears = {module: base.linears[module] for module in matched_modules(config, base.linears, Budget())}
    drawn = r * sum(linear.in_features + linear.out_features for linear in linears.values())
    if drawn > MAX_DRAWN:
        message = f"{drawn} numbers would be drawn at each load; at most {MAX_DRAWN} may be"
        raise InvalidArtifact(config_field("r"), message)
    adapted = [Adapted(module, {}, r, low_rank_size(r, linear)) for module, linear in linears.items()]
    shared = {THETA: (count_of(config, "theta_d_length", DEFAULT_LENGTH),)} if adapted else {}
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank, shared=shared)


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`; the file names no module, so the patterns are matched again."""
    from hatrack_server.adapters.pieces import LowRank

    theta, r = precise(tensors[THETA]), config.get("r", DEFAULT_RANK)
    adapted = matched_modules(config, base.shapes.linears, Budget())
    shapes = [base.shapes.linears[module] for module in adapted]
    sizes = [r * features for shape in shapes for features in (shape.in_features, shape.out_features)]
    parts = _spread(theta, sum(sizes), seed_of(config, SEED_KEY, DEFAULT_SEED)).split_with_sizes(sizes)
    for module, a, b in zip(adapted, parts[::2], parts[1::2], strict=True):
        yield module, LowRank(a.view(r, -1), b.view(-1, r).mT)


def _spread(theta: Tensor, count: int, seed: int) -> Tensor:
    """`count` numbers of θ as PEFT draws them, each as often as the others or once more, over the root of how often."""
    import torch

    generator = np.random.default_rng(seed)
    rounds, rest = divmod(count, len(theta))
    once_more = generator.choice(len(theta), size=rest, replace=False)
    which = np.concatenate([np.arange(len(theta)).repeat(rounds), once_more])
    generator.shuffle(which)
    drawn = torch.from_numpy(which)
    often = drawn.bincount(minlength=len(theta)).clamp(min=1)
    return (theta * often.float().rsqrt())[drawn]
