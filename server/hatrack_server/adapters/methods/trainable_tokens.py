"""Trainable tokens, as PEFT 0.21 saves them: the embeddings of some tokens, and nothing else.

`trainable_tokens_delta` (n, width) holds the embeddings themselves, in the order of `token_indices`. Where the output
head shares the embedding's weight, its rows for these tokens change with them, and are saved under its name, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import PREFIX, TARGET_KEYS, check_tensors, refuse_unknown
from hatrack_server.adapters.peft_targets import config_field, matched_modules
from hatrack_server.adapters.replacements import TokenEmbeddings, token_embeddings
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "TRAINABLE_TOKENS"
DELTA = "trainable_tokens_delta"


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`; embeddings have no rank, so it is 0."""
    refuse_unknown(config, TARGET_KEYS | {"token_indices"}, {"init_weights"})
    replaced = _replaced(config, base)
    check_tensors(replaced.shapes, headers, base)
    return ProgramSpec(
        method=PEFT_TYPE,
        rank=0,
        parameters=replaced.parameters,
        resident_bytes=replaced.resident,
        tensors=replaced.shapes,
    )


def compile(config: dict[str, Any], tensors: Mapping[str, Tensor], base: BaseLayers) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    return _replaced(config, base.shapes).compile(tensors, base)


def _replaced(config: Mapping[str, Any], base: BaseShapes) -> TokenEmbeddings:
    modules = set(matched_modules(config, base.replaceable, Budget()))
    if modules != {base.embedding} and not (base.tied and modules == base.ends):
        message = f"must select {base.embedding}, the embedding, and nothing else that can be replaced"
        raise InvalidArtifact(config_field("target_modules"), message)
    ends = base.ends if base.tied else {base.embedding}
    keys = {module: f"{PREFIX}{module}.{DELTA}" for module in ends}
    return token_embeddings(keys, config.get("token_indices"), base, "token_indices")
