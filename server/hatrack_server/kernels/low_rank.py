"""y += (x Aᵀ) B for the tokens of each adapter, from stacked pools (LoRA, Hu et al. 2021; batched as in Punica)."""

from __future__ import annotations

from torch import Tensor

from hatrack_server.kernels.runs import Run, each_token


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: list[Run]) -> None:
    """Adds each run's low-rank product to y in place; tokens outside of every run are left alone.

    y[T, out], x[T, in], a[rows, r, in], b[rows, r, out] with the scale folded in. Rows never mix: each token meets its
    own adapter's values only, so a NaN stays with its owner.
    """
    for run in runs:
        shrunk = run.tokens(x).to(a.dtype).bmm(a[run.index].mT)
        out = run.tokens(y)
        if out.dtype is b.dtype:
            out.baddbmm_(shrunk, b[run.index])
        else:
            out.add_(shrunk.bmm(b[run.index]))


def add_low_rank_reference(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: list[Run]) -> None:
    """The same, token by token."""
    for token, row in each_token(runs):
        y[token] += b[row].mT @ (a[row] @ x[token].to(a.dtype))


def add_embedded(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, runs: list[Run]) -> None:
    """Adds what each run's own low-rank embedding gives for its token ids to y in place.

    y[T, width], ids[T], a[rows, vocabulary, r], b[rows, r, width] with the scale folded in.
    """
    for run in runs:
        for tokens, row in run.parts():
            y[tokens] += a[row, ids[tokens]] @ b[row]


def add_embedded_reference(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, runs: list[Run]) -> None:
    """The same, token by token."""
    for token, row in each_token(runs):
        y[token] += b[row].mT @ a[row, ids[token]]
