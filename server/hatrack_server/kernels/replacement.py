"""An adapter's own parameters in place of the base's, on its tokens, from stacked pools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.func import functional_call

from hatrack_server.kernels.runs import Run


def replace_output(y: Tensor, x: Tensor, module: nn.Module, parameters: Mapping[str, Tensor], runs: list[Run]) -> None:
    """y[T, …] of each run's tokens becomes what `module` gives for x[T, …] with the run's own parameters.

    parameters: stacks [rows, …] by the parameter's name.
    """
    for tokens, row in _each_row(runs):
        own = {name: stack[row] for name, stack in parameters.items()}
        y[tokens] = functional_call(module, own, (x[tokens],))


def replace_embeddings(y: Tensor, ids: Tensor, tokens: Tensor, embeddings: Tensor, runs: list[Run]) -> None:
    """y[T, width] becomes embeddings[rows, n, width] wherever ids[T] is one of the run's own tokens[rows, n]."""
    for part, row in _each_row(runs):
        found, which = (ids[part, None] == tokens[row]).nonzero(as_tuple=True)
        y[part][found] = embeddings[row, which].to(y.dtype)


def replace_scores(y: Tensor, x: Tensor, tokens: Tensor, heads: Tensor, runs: list[Run]) -> None:
    """y[T, vocabulary] at each run's own tokens[rows, n] becomes heads[rows, n, width] times x[T, width]."""
    for part, row in _each_row(runs):
        y[part, tokens[row]] = (x[part].to(heads.dtype) @ heads[row].mT).to(y.dtype)


def _each_row(runs: list[Run]) -> Iterator[tuple[slice, int]]:
    """(tokens, their row in the pools)."""
    for run in runs:
        for nth in range(run.count):
            start = run.start + nth * run.length
            yield slice(start, start + run.length), run.row + nth
