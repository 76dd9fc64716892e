"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691), as PEFT 0.21 saves it.

n learned embeddings, (n, width), stand before the text's: they go through the whole model at positions 0 … n - 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack.manifest import WEIGHTS_FILE
from hatrack_server.adapters.peft_linear import check_shapes, count_of, refuse_unknown
from hatrack_server.adapters.peft_targets import config_field
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "PROMPT_TUNING"
EMBEDDINGS = "prompt_embeddings"
READ_KEYS = frozenset({"num_virtual_tokens", "num_transformer_submodules"})
# How the embeddings came to be, and sizes that the tensor shows.
MADE_WITH_KEYS = frozenset({
    "num_attention_heads", "num_layers", "prompt_tuning_init", "prompt_tuning_init_text", "token_dim",
    "tokenizer_kwargs", "tokenizer_name_or_path",
})  # fmt: skip


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`."""
    n = virtual_tokens(config, MADE_WITH_KEYS)
    check_embeddings(headers, (n, base.width))
    return soft_prompt_spec(PEFT_TYPE, n, base)


def virtual_tokens(config: Mapping[str, Any], harmless: frozenset[str]) -> int:
    """How many there are; raises InvalidArtifact when that is malformed, or a key is on that is not known."""
    refuse_unknown(config, READ_KEYS, harmless)
    if config.get("num_transformer_submodules", 1) not in (None, 1):
        raise InvalidArtifact(config_field("num_transformer_submodules"), "only decoders are served: it must be 1")
    return count_of(config, "num_virtual_tokens")


def check_embeddings(headers: Mapping[str, TensorHeader], shape: tuple[int, ...]) -> None:
    """Raises InvalidArtifact unless the file holds the embeddings in this shape, and nothing else."""
    for key in headers:
        if key != EMBEDDINGS:
            raise InvalidArtifact(f"{WEIGHTS_FILE}: {key}", "unexpected: the method has no such tensor")
    check_shapes({EMBEDDINGS: shape}, headers)


def soft_prompt_spec(method: str, n: int, base: BaseShapes) -> ProgramSpec:
    """What n embeddings amount to."""
    return ProgramSpec(
        method=method,
        rank=0,
        parameters=n * base.width,
        resident_bytes=2 * n * base.width,
        tensors={EMBEDDINGS: (n, base.width)},
        soft_tokens=n,
    )


def compile(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base: BaseLayers,
) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import SoftPrompt

    yield base.shapes.embedding, SoftPrompt(tensors[EMBEDDINGS])
