"""An adapter's own parameters in place of the base's, on its tokens, from pools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from hatrack_server.kernels.runs import Run

Rows = Tensor | Sequence[Tensor]  # of a pool


def replace_norm(y: Tensor, x: Tensor, vectors: Sequence[Tensor], runs: list[Run]) -> None:
    """y[T, n] becomes scale * x + bias, where x[T, n] is normalised.

    vectors: scale[rows, n], and bias[rows, n] of a norm that has one.
    """
    for run in runs:
        scale, *bias = (vector[run.index, None] for vector in vectors)
        own = run.tokens(x) * scale
        run.tokens(y).copy_(own + bias[0] if bias else own)


def replace_linear(y: Tensor, x: Tensor, parameters: Sequence[Rows], runs: list[Run]) -> None:
    """y[T, out] becomes weight x + bias, given weight[rows, out, in], and bias[rows, out] of a layer that has one."""
    for part, row in _parts(runs):
        weight, *bias = (rows[row] for rows in parameters)
        y[part] = linear(x[part].to(weight.dtype), weight, *bias)


def replace_embedding(y: Tensor, ids: Tensor, embeddings: Rows, runs: list[Run]) -> None:
    """y[T, width] becomes embeddings[rows, vocabulary, width] at ids[T]."""
    for part, row in _parts(runs):
        y[part] = embedding(ids[part], embeddings[row])


def replace_tokens(y: Tensor, ids: Tensor, tokens: Tensor, embeddings: Tensor, runs: list[Run]) -> None:
    """y[T, width] becomes embeddings[rows, n, width] wherever ids[T] is one of the run's own tokens[rows, n].

    Tokens are in ascending order.
    """
    for part, row in _parts(runs):
        nearest = torch.searchsorted(tokens[row], ids[part]).clamp(max=tokens.shape[1] - 1)
        (found,) = (tokens[row, nearest] == ids[part]).nonzero(as_tuple=True)
        y[part][found] = embeddings[row, nearest[found]].to(y.dtype)


def replace_scores(y: Tensor, x: Tensor, tokens: Tensor, heads: Tensor, runs: list[Run]) -> None:
    """y[T, vocabulary] at each run's own tokens[rows, n] becomes heads[rows, n, width] times x[T, width]."""
    for part, row in _parts(runs):
        y[part, tokens[row]] = (x[part].to(heads.dtype) @ heads[row].mT).to(y.dtype)


def _parts(runs: list[Run]) -> Iterator[tuple[slice, int]]:
    return (part for run in runs for part in run.parts())
