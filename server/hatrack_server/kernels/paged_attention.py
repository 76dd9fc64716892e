"""Attention over keys and values that lie scattered in a paged pool (vLLM's PagedAttention, Kwon et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hatrack_server.kernels.native import native


def paged_decode(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query per row: q[R, H, D] over pools [slots, KV, D] at slots[R, L], where mask[R, L] is true: [R, H, D].

    Padding of `slots` must point at zeros: a NaN behind a mask would still poison its row.
    """
    rows, heads, dim = q.shape
    plain = softcap is None and sinks is None and q.dtype is k_pool.dtype is torch.bfloat16
    library = native() if plain and q.device.type == "cpu" else None
    if library is not None and v_pool.shape[-1] in library.value_widths:
        return library.paged_decode(q.contiguous(), k_pool, v_pool, slots, mask, scale)
    k, v = _gather(k_pool, slots), _gather(v_pool, slots)
    # The head group becomes the query length: a dense product instead of `enable_gqa`, several times faster on the CPU.
    folded = q.reshape(rows, k.shape[1], -1, dim)
    bias = _sinks_by_group(sinks, k.shape[1], 1)
    out = _attend(folded, k, v, mask[:, None, None, :], scale, softcap, bias)
    return out.reshape(rows, heads, -1)


def paged_prefill(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """A chunk of one sequence: q[T, H, D] over its L keys at slots[L], where mask[T, L] is true: [T, H, D]."""
    length, heads, dim = q.shape
    k, v = _gather(k_pool, slots[None]), _gather(v_pool, slots[None])
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    folded = q.transpose(0, 1).reshape(1, kv_heads, groups * length, dim)
    bias = _sinks_by_group(sinks, kv_heads, length)
    out = _attend(folded, k, v, mask.repeat(groups, 1)[None, None], scale, softcap, bias)
    return out.reshape(heads, length, -1).transpose(0, 1)


def causal_mask(positions: Tensor, places: Tensor, window: int | None) -> Tensor:
    """Which keys the queries at positions[T] may see: bool [T, L]; `window` counts the query itself.

    places[T or 1, L] are the positions of the keys; negative ones don't exist.
    """
    distance = positions[:, None] - places
    seen = (distance >= 0) & (places >= 0)
    return seen if window is None else seen & (distance < window)


def _gather(pool: Tensor, slots: Tensor) -> Tensor:
    """pool[slots, KV, D] at slots[B, L]: [B, KV, L, D]."""
    found = pool.index_select(0, slots.reshape(-1))
    return found.view(*slots.shape, *pool.shape[1:]).transpose(1, 2)


def _sinks_by_group(sinks: Tensor | None, kv_heads: int, length: int) -> Tensor | None:
    """sinks[H] as [1, KV, group·length, 1], in the order of the folded queries."""
    if sinks is None:
        return None
    return sinks.view(kv_heads, -1, 1).expand(-1, -1, length).reshape(1, kv_heads, -1, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """q[B, KV, Q, D] over k, v[B, KV, L, D]; softcap as in Gemma 2, attention sinks as in gpt-oss."""
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q @ k.mT).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return weights.to(v.dtype) @ v
