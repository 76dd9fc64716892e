"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190), as PEFT 0.21 saves it.

(n, 2 layers, kv_heads, head_dim): keys and values of every attention layer at positions 0 … n - 1, with no rotation;
the text starts at position n. What a projection gave is baked into the saved tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.methods.prompt_tuning import (
    EMBEDDINGS,
    MADE_WITH_KEYS,
    check_embeddings,
    virtual_tokens,
)
from hatrack_server.adapters.peft_targets import config_field
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import AttentionShape, BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "PREFIX_TUNING"
PROJECTION_KEYS = frozenset({"encoder_hidden_size", "init_weights", "prefix_projection"})


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`; the base's attention layers must all be alike."""
    n = virtual_tokens(config, MADE_WITH_KEYS | PROJECTION_KEYS)
    layer = _alike(base.attention)
    columns = 2 * len(base.attention) * layer.kv_heads * layer.key_dim
    check_embeddings(headers, (n, columns))
    return ProgramSpec(
        method=PEFT_TYPE,
        rank=0,
        parameters=n * columns,
        resident_bytes=2 * n * columns,
        tensors={EMBEDDINGS: (n, columns)},
        prefix_tokens=n,
    )


def _alike(attention: tuple[AttentionShape, ...]) -> AttentionShape:
    sizes = {(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in attention}
    if len(sizes) != 1 or attention[0].key_dim != attention[0].value_dim:
        raise InvalidArtifact(config_field("peft_type"), "prefix tuning needs a base whose attention layers are alike")
    return attention[0]


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import KeyValuePrefix

    attention, embeddings = base.shapes.attention, tensors[EMBEDDINGS]
    parts = embeddings.view(len(embeddings), 2 * len(attention), attention[0].kv_heads, attention[0].key_dim)
    for number, layer in enumerate(attention):
        yield layer.name, KeyValuePrefix(parts[:, 2 * number], parts[:, 2 * number + 1])
