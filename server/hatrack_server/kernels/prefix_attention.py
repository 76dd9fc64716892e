"""Attention to a few extra keys of one adapter, from stacked pools (LLaMA-Adapter, Zhang et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from hatrack_server.kernels.runs import Run, each_token


def add_prefix_attention(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, runs: list[Run]) -> None:
    """Adds softmax(q kᵀ / √D) v over each run's own keys to out in place, in float32.

    out[T, H, D], q[T, H, D], keys[rows, n, KV, D], values[rows, n, KV, D] with the gate folded in; H heads share KV.
    """
    for run in runs:
        shape = (len(run.rows), run.length, keys.shape[2], -1, q.shape[2])  # rows, tokens, KV, heads of each, D
        grouped, k, v = q[run.start : run.stop].view(shape).float(), keys[run.index].float(), values[run.index].float()
        weights = (torch.einsum("rtkhd,rnkd->rtkhn", grouped, k) * q.shape[2] ** -0.5).softmax(-1)
        out[run.start : run.stop].view(shape).add_(torch.einsum("rtkhn,rnkd->rtkhd", weights, v))


def add_prefix_attention_reference(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, runs: list[Run]) -> None:
    """The same, token by token and head by head."""
    heads, dim = q.shape[1:]
    for token, row in each_token(runs):
        for head in range(heads):
            kv = head // (heads // keys.shape[2])
            weights = (keys[row, :, kv].float() @ q[token, head].float() * dim**-0.5).softmax(-1)
            out[token, head] += weights @ values[row, :, kv].float()
