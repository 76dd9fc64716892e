"""Vectors of an adapter on its tokens, from stacked pools ((IA)³, Liu et al. 2022; DoRA; prompt tuning)."""

from __future__ import annotations

from torch import Tensor

from hatrack_server.kernels.runs import Run


def multiply_vector(values: Tensor, vectors: Tensor, runs: list[Run]) -> None:
    """values[T, n] *= vectors[rows, n] in place, each run's tokens with its rows; other tokens are left alone."""
    for run in runs:
        run.tokens(values).mul_(vectors[run.index, None])


def add_vector(values: Tensor, vectors: Tensor, runs: list[Run]) -> None:
    """values[T, n] += vectors[rows, n] in place, each run's tokens with its rows; other tokens are left alone."""
    for run in runs:
        run.tokens(values).add_(vectors[run.index, None])


def replace_first(values: Tensor, first: Tensor, runs: list[Run]) -> None:
    """values[T, n] of those tokens that stand at positions below k in their sequence become first[rows, k, n]."""
    for run in runs:
        count = min(first.shape[1] - run.position, run.length)
        if count > 0:
            run.tokens(values)[:, :count] = first[run.index, run.position : run.position + count]
