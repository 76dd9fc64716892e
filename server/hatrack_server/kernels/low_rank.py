"""y += (x Aᵀ) B for the tokens of each adapter, from stacked pools (LoRA, Hu et al. 2021; batched as in Punica)."""

from __future__ import annotations

from torch import Tensor

from hatrack_server.kernels.runs import Run, each_token

FEW = 8  # tokens: up to here, what a CPU's product in 16 bits takes to begin costs more than turning all into 32


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: list[Run]) -> None:
    """Adds each run's low-rank product to y in place; tokens outside of every run are left alone.

    y[T, out], x[T, in], a[rows, r, in], b[rows, r, out] with the scale folded in. Rows never mix: each token meets its
    own adapter's values only, so a NaN stays with its owner.
    """
    for run in runs:
        tokens, out, own_a, own_b = run.tokens(x), run.tokens(y), a[run.index], b[run.index]
        if a.itemsize < 4 and run.stop - run.start <= FEW:
            out.add_(tokens.float().bmm(own_a.float().mT).bmm(own_b.float()))
        elif out.dtype is b.dtype:
            out.baddbmm_(tokens.to(a.dtype).bmm(own_a.mT), own_b)
        else:
            out.add_(tokens.to(a.dtype).bmm(own_a.mT).bmm(own_b))


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
