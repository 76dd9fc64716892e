"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512), as PEFT 0.21 saves it: pruned to the rank that each module kept.

Per module `y += alpha / (init_r + 1e-5) * B ((A ⊙ E) x)`, with A (rank, in_features), E (rank, 1) and
B (out_features, rank).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack.manifest import WEIGHTS_FILE
from hatrack_server.adapters.methods.lora import HARMLESS_KEYS, READ_KEYS, refuse_changed_base
from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import (
    PREFIX,
    Adapted,
    low_rank_size,
    modules_in,
    precise,
    rank_of,
    refuse_unknown,
    scale_of,
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

PEFT_TYPE = "ADALORA"
DEFAULT_RANK = 12
DEFAULT_ALPHA = 8
A, B, E = "lora_A", "lora_B", "lora_E"
# How training prunes; what it pruned, the tensors show.
SCHEDULE_KEYS = frozenset({
    "beta1", "beta2", "deltaT", "orth_reg_weight", "r", "target_r", "tfinal", "tinit", "total_step", "rank_pattern",
})  # fmt: skip
UNUSED = ("use_rslora", "use_dora", "lora_bias", "alpha_pattern")


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`; a module that was pruned to rank 0 is left as it is."""
    refuse_unknown(config, (READ_KEYS - set(UNUSED)) | {"init_r"}, HARMLESS_KEYS | SCHEDULE_KEYS | {"alpha_pattern"})
    if config.get("alpha_pattern"):
        raise InvalidArtifact(config_field("alpha_pattern"), "AdaLoRA has no alpha of each module")
    refuse_changed_base(config)
    _scale(config)
    adapted = []
    for module in matched_modules(config, base.linears, Budget()):
        linear, rank = base.linears[module], _kept_rank(module, headers)
        if rank > _initial_rank(config):
            raise InvalidArtifact(config_field("init_r"), f"{module} has rank {rank}, which is more")
        shapes = {A: (rank, linear.in_features), B: (linear.out_features, rank), E: (rank, 1)}
        adapted.append(Adapted(module, shapes, rank, low_rank_size(rank, linear)))
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank)


def _kept_rank(module: str, headers: Mapping[str, TensorHeader]) -> int:
    key = f"{PREFIX}{module}.{E}"
    if key not in headers:
        raise InvalidArtifact(f"{WEIGHTS_FILE}: {key}", "missing, though the configuration asks for it")
    shape = headers[key].shape
    if len(shape) != 2:
        raise InvalidArtifact(f"{WEIGHTS_FILE}: {key}", f"its shape is {shape}; (rank, 1) is needed")
    return shape[0]


def _initial_rank(config: Mapping[str, Any]) -> int:
    return rank_of("every module", config.get("init_r", DEFAULT_RANK), "init_r")


def _scale(config: Mapping[str, Any]) -> float:
    initial = _initial_rank(config)
    alpha = config.get("lora_alpha", DEFAULT_ALPHA)
    scale = scale_of("every module", alpha, initial + 1e-5, "lora_alpha")
    return scale if alpha > 0 else initial / (initial + 1e-5)  # PEFT's reading of alpha 0 and below


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import LowRank

    scale = _scale(config)
    for module, values in modules_in(tensors, E):
        if len(values):
            a = tensor_of(tensors, module, A) * precise(values)
            yield module, LowRank(a, scale * tensor_of(tensors, module, B).mT)
