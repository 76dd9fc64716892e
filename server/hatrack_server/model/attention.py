"""Our attention under transformers' modelling code: registered once by name, and given everything by argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from hatrack_server.kernels.paged_attention import paged_decode, paged_prefill
from hatrack_server.model.batch import Batch
from hatrack_server.model.wrap import Effect

PAGED = "hatrack_paged"
NAME = "hatrack_name"  # an attribute of attention modules: their own names


class PagedKV:
    """Keys and values: for each layer two tensors [slots, kv_heads, head_dim]. The first block of slots stays zero."""

    def __init__(
        self, shapes: list[tuple[int, int, int]], slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`shapes` gives (kv_heads, key dim, value dim) of each layer."""
        self.keys = [torch.zeros(slots, heads, k, dtype=dtype, device=device) for heads, k, _ in shapes]
        self.values = [torch.zeros(slots, heads, v, dtype=dtype, device=device) for heads, _, v in shapes]


class StepCache:
    """What transformers takes for its cache during one step: writes into the pool, and returns what came in."""

    is_compileable = False

    def __init__(self, kv: PagedKV, write_slots: Tensor) -> None:
        self._kv = kv
        self._slots = write_slots

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Scatters key, value [1, kv_heads, T, dim] into the layer's pool."""
        self._kv.keys[layer_idx].index_copy_(0, self._slots, key[0].transpose(0, 1))
        self._kv.values[layer_idx].index_copy_(0, self._slots, value[0].transpose(0, 1))
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        """0: positions are always given explicitly."""
        return 0


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,  # noqa: ARG001 - already in the pool
    value: Tensor,  # noqa: ARG001
    attention_mask: Tensor | None,  # noqa: ARG001 - no mask is registered for our name
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    *,
    hatrack: Batch,
    hatrack_kv: PagedKV,
    hatrack_effects: Mapping[str, Effect],
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D] to ([1, T, H, D], None).

    The keywords that begin with `hatrack` are those that `PagedModel.forward` passes down through the modelling code.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    k_pool, v_pool = hatrack_kv.keys[layer], hatrack_kv.values[layer]
    q = query[0].transpose(0, 1)
    options: dict[str, Any] = {
        "scale": q.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "sinks": s_aux,
    }
    out = q.new_empty(q.shape[0], q.shape[1], v_pool.shape[-1])
    for d in hatrack.decodes:
        keys = d.keys(sliding_window)
        out[d.tokens] = paged_decode(q[d.tokens], k_pool, v_pool, keys.slots, keys.mask, **options)
    for p in hatrack.prefills:
        chunk, keys = slice(p.start, p.stop), p.keys(sliding_window)
        out[chunk] = paged_prefill(q[chunk], k_pool, v_pool, keys.slots, keys.mask, **options)
    effect = hatrack_effects.get(module.__dict__.get(NAME, ""))
    if effect is not None:
        effect.output(out, q)
    return out[None], None


AttentionInterface.register(PAGED, paged_attention)
