"""Refusing a base that our attention would serve wrongly: by what its config says, then by trying it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from hatrack_server.errors import StartupError
from hatrack_server.model.batch import Chunk, build_batch

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.model.paged import PagedModel

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
PROBE_TOKENS = 48
PROBE_WINDOW = 12  # tokens; the base's own would take too long to fill
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}  # of the largest logit


def refuse_unservable(config: PretrainedConfig) -> None:
    """Raises StartupError for what is known to be served wrongly, with the reason; needs no weights."""
    family = config.model_type
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if architecture is None:
        raise StartupError(f"{family} can't be served: transformers has no causal language model of it")
    if getattr(architecture, "_is_stateful", False):
        raise StartupError(f"{family} can't be served: it keeps a recurrent state beside keys and values")
    if not getattr(architecture, "_supports_attention_backend", False):
        raise StartupError(f"{family} can't be served: its attention can't be replaced in transformers")
    config = config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    if unknown:
        raise StartupError(f"{family} can't be served: it has layers of type {', '.join(sorted(unknown))}")
    if getattr(config, "kv_lora_rank", None):
        raise StartupError(f"{family} can't be served: latent attention is not supported")
    if {"longrope", "dynamic"} & _rope_types(config):
        raise StartupError(f"{family} can't be served: its positions are scaled by the longest row of a batch")


def _rope_types(config: PretrainedConfig) -> set[str]:
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return {str(value.get("rope_type", "default")) for value in nested}


@torch.inference_mode()
def probe(model: PagedModel) -> None:
    """Compares paged attention with transformers' own, in uneven chunks and with sliding windows that are left behind.

    Uses and then clears the KV pool. Raises StartupError when the logits differ by more than the dtype explains.
    """
    length = min(PROBE_TOKENS, model.kv_slots - model.block_size, model.max_position)
    ids = torch.arange(length).mul(7919).add(11).remainder(model.config.vocab_size)
    with model.narrow_windows(PROBE_WINDOW):
        expected = model.eager_logits(ids)
        got = _paged_logits(model, ids)
    model.clear_kv()
    scale = expected.abs().max()
    difference = ((expected - got).abs().max() / scale).item()
    if not difference <= TOLERANCE[model.dtype]:
        raise StartupError(
            f"{model.config.model_type} can't be served: paged attention differs from transformers' "
            f"by {difference:.1e} of the largest logit"
        )


def _paged_logits(model: PagedModel, ids: Tensor) -> Tensor:
    """The last token's logits [1, vocab], its predecessors prefilled in two chunks over permuted slots."""
    length, split = len(ids), len(ids) // 3
    order = torch.randperm(model.kv_slots - model.block_size, generator=torch.Generator().manual_seed(0))
    slots = order[:length] + model.block_size
    tokens = ids.tolist()
    for start, stop in ((0, split), (split, length - 1), (length - 1, length)):
        logits = model.forward(build_batch([Chunk(tokens[start:stop], start, slots[:stop])], model.device))
    return logits.float()
