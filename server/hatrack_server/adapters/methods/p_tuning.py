"""P-tuning (Liu et al. 2021, arXiv:2103.10385), as PEFT 0.21 saves it.

What its encoder gave is baked into the saved embeddings, so it is served as prompt tuning is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hatrack_server.adapters.methods import prompt_tuning
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.types import BaseShapes, ProgramSpec

PEFT_TYPE = "P_TUNING"
ENCODER_KEYS = frozenset({
    "encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type",
})  # fmt: skip

compile = prompt_tuning.compile


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`."""
    n = prompt_tuning.virtual_tokens(config, prompt_tuning.MADE_WITH_KEYS | ENCODER_KEYS)
    prompt_tuning.check_embeddings(headers, (n, base.width))
    return prompt_tuning.soft_prompt_spec(PEFT_TYPE, n, base)
