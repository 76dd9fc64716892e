"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199), PEFT 0.21's adaption prompts, for Llama and Mistral.

In each of the top `adapter_layers` layers, attention also looks at k_proj and v_proj of a learned prompt, with a
softmax of its own and no rotation: o_proj(attention + gate * softmax(q kᵀ / √d) v). These keys and values are
constants, and the output projection is linear, so what is added comes before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.peft_linear import (
    PREFIX,
    check_tensors,
    count_of,
    modules_in,
    precise,
    refuse_unknown,
    tensor_of,
)
from hatrack_server.adapters.peft_targets import config_field
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import AttentionShape, BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "ADAPTION_PROMPT"
PROMPT, GATE = "adaption_prompt", "adaption_gate"
READ_KEYS = frozenset({"adapter_len", "adapter_layers", "target_modules"})


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`."""
    refuse_unknown(config, READ_KEYS)
    length = count_of(config, "adapter_len")
    layers = count_of(config, "adapter_layers")
    if layers > len(base.attention):
        raise InvalidArtifact(config_field("adapter_layers"), f"this base has {len(base.attention)} layers")
    adapted = base.attention[len(base.attention) - layers :]
    _check_attention(config, adapted, base)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in adapted:
        shapes[f"{PREFIX}{layer.name}.{PROMPT}"] = (1, length, base.width)
        shapes[f"{PREFIX}{layer.name}.{GATE}"] = (1,)
    check_tensors(shapes, headers, base)
    resident = sum(length * layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in adapted)
    return ProgramSpec(
        method=PEFT_TYPE,
        rank=0,
        parameters=sum(header.elements for header in headers.values()),
        resident_bytes=2 * resident,
        tensors=shapes,
    )


def _check_attention(config: Mapping[str, Any], adapted: tuple[AttentionShape, ...], base: BaseShapes) -> None:
    for layer in adapted:
        if config.get("target_modules") != layer.name.rpartition(".")[2]:
            message = f"must be {layer.name.rpartition('.')[2]!r}, what this base calls its attention"
            raise InvalidArtifact(config_field("target_modules"), message)
        projections = {f"{layer.name}.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        if not projections <= base.linears.keys() or layer.key_dim != layer.value_dim:
            message = "adaption prompts need attention with k_proj, v_proj and o_proj of one head size"
            raise InvalidArtifact(config_field("peft_type"), message)


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import GatedPrefix

    heads = {layer.name: layer for layer in base.shapes.attention}
    for module, prompt in modules_in(tensors, PROMPT):
        layer, gate = heads[module], tensor_of(tensors, module, GATE)
        keys, values = (
            _projected(base, f"{module}.{name}", precise(prompt)[0]).view(-1, layer.kv_heads, layer.key_dim)
            for name in ("k_proj", "v_proj")
        )
        yield module, GatedPrefix(keys, gate * values)


def _projected(base: BaseLayers, layer: str, rows: Tensor) -> Tensor:
    bias = base.bias(layer)
    out = base.project(layer, rows)
    return out if bias is None else out + bias
