"""A vector of one adapter on each of its tokens, from stacked pools ((IA)³, Liu et al. 2022; DoRA's magnitudes)."""

from __future__ import annotations

from torch import Tensor

from hatrack_server.kernels.runs import Run


def multiply_vector(values: Tensor, vectors: Tensor, runs: list[Run]) -> None:
    """values[T, n] *= vectors[rows, n] in place, each run's tokens with its rows; other tokens are left alone."""
    for run in runs:
        run.tokens(values).mul_(vectors[run.rows, None])


def add_vector(values: Tensor, vectors: Tensor, runs: list[Run]) -> None:
    """values[T, n] += vectors[rows, n] in place, each run's tokens with its rows; other tokens are left alone."""
    for run in runs:
        run.tokens(values).add_(vectors[run.rows, None])
