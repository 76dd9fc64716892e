"""LayerNorm tuning (Zhao et al. 2023, arXiv:2312.11420), as PEFT 0.21 saves it: norms of their own, whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import TARGET_KEYS, check_tensors, refuse_unknown
from hatrack_server.adapters.peft_targets import matched_modules
from hatrack_server.adapters.replacements import WholeModule
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "LN_TUNING"
SAVED_IN = "ln_tuning_layers"


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`; norms have no rank, so it is 0."""
    refuse_unknown(config, TARGET_KEYS)
    modules = _modules(config, base)
    shapes = {key: shape for module in modules for key, shape in module.shapes.items()}
    check_tensors(shapes, headers, base)
    return ProgramSpec(
        method=PEFT_TYPE,
        rank=0,
        parameters=sum(module.parameters for module in modules),
        resident_bytes=sum(module.resident for module in modules),
        tensors=shapes,
    )


def compile(config: dict[str, Any], tensors: Mapping[str, Tensor], base: BaseLayers) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    for module in _modules(config, base.shapes):
        yield from module.compile(tensors, base)


def _modules(config: Mapping[str, Any], base: BaseShapes) -> list[WholeModule]:
    norms = sorted(base.replaceable.keys() - base.ends)
    modules = matched_modules(config, norms, Budget())
    return [WholeModule(module, base.replaceable[module], f"{module}.{SAVED_IN}") for module in modules]
