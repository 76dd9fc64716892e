"""y += (W1 ⊗ W2) x for the tokens of each adapter, from stacked pools, without making the product (LoKr)."""

from __future__ import annotations

import torch
from torch import Tensor

from hatrack_server.kernels.runs import Run, each_token


def add_kronecker(y: Tensor, x: Tensor, w1: Tensor, w2: Tensor, runs: list[Run]) -> None:
    """Adds each run's product to y in place; tokens outside of every run are left alone.

    y[T, l·k], x[T, p·q], w1[rows, l, p] with the scale folded in, w2[rows, k, q]:
    y[l, k] += Σ W1[l, p] W2[k, q] x[p, q].
    """
    for run in runs:
        tokens = run.tokens(x).to(w1.dtype).unflatten(-1, (w1.shape[2], w2.shape[2]))
        product = w1[run.index, None] @ (tokens @ w2[run.index, None].mT)
        run.tokens(y).add_(product.flatten(-2))


def add_kronecker_reference(y: Tensor, x: Tensor, w1: Tensor, w2: Tensor, runs: list[Run]) -> None:
    """The same, token by token."""
    for token, row in each_token(runs):
        y[token] += torch.kron(w1[row], w2[row]) @ x[token].to(w1.dtype)
