"""y += (x Aᵀ) B for the tokens of each adapter, from stacked pools (LoRA, Hu et al. 2021; batched as in Punica)."""

from __future__ import annotations

import torch
from torch import Tensor

from hatrack_server.kernels.native import native
from hatrack_server.kernels.runs import Run, each_token

COPIED_RANK = 16  # up to here, rows that don't lie side by side are copied into one product

# Tokens of each adapter times ranks up to which the C kernel takes less time than batched products, which do more
# arithmetic in a second, and want rows that lie side by side or a copy of them.
IN_PLACE, COPIED = 256, 1024


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: list[Run]) -> None:
    """Adds each run's low-rank product to y in place; tokens outside of every run are left alone.

    y[T, out], x[T, in], a[rows, r, in], b[rows, r, out] with the scale folded in. Rows never mix: each token meets its
    own adapter's values only, so a NaN stays with its owner.
    """
    if y.is_cuda:
        from hatrack_server.kernels.triton_low_rank import add_low_rank_cuda  # Triton comes with torch for CUDA only

        add_low_rank_cuda(y, x, a, b, runs)
        return
    library = native() if y.dtype is x.dtype is a.dtype is b.dtype is torch.bfloat16 else None
    for run in runs:
        few = IN_PLACE if isinstance(run.index, slice) else COPIED
        if library is not None and run.length * a.shape[1] <= few:
            library.add_low_rank(y, x, a, b, run.row_numbers, start=run.start, length=run.length)
        else:
            _add_products(y, x, a, b, run)


def _add_products(y: Tensor, x: Tensor, a: Tensor, b: Tensor, run: Run) -> None:
    """One batched product for the run, or for each stretch of it."""
    for part in run.stretches if a.shape[1] > COPIED_RANK else (run,):
        tokens, out, own_a, own_b = part.tokens(x), part.tokens(y), a[part.index], b[part.index]
        if out.dtype is b.dtype:
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
