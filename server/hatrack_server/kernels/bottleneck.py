"""y += up(activation(down(y))) for the tokens of each adapter, from stacked pools (Houlsby et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hatrack_server.kernels.runs import Run, each_token

Activation = Callable[[Tensor], Tensor]


def add_bottleneck(
    y: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, activation: Activation, runs: list[Run]
) -> None:
    """Adds each run's bottleneck of y to y in place; tokens outside of every run are left alone.

    y[T, n], down[rows, r, n], down_bias[rows, r], up[rows, r, n], up_bias[rows, n].
    """
    for run in runs:
        tokens = run.tokens(y)
        units = activation(down_bias[run.index, None].baddbmm(tokens.to(down.dtype), down[run.index].mT))
        tokens.add_(up_bias[run.index, None].baddbmm(units, up[run.index]))


def add_bottleneck_reference(
    y: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, activation: Activation, runs: list[Run]
) -> None:
    """The same, token by token."""
    for token, row in each_token(runs):
        units = activation(down[row] @ y[token].to(down.dtype) + down_bias[row])
        y[token] += up[row].mT @ units + up_bias[row]
