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


class BatchLowRank:
    """y += (x Aᵀ) B for the tokens of each of a batch's adapters, as often as the batch takes a step.

    native_sums: those of the C kernel, where that is all there is to do: a product of the same x can take them along.
    """

    def __init__(self, a: Tensor, b: Tensor, runs: list[Run]) -> None:
        """a[rows, r, in], b[rows, r, out] with the scale folded in."""
        self._operands = a, b
        self._runs = runs
        halves = a.dtype is b.dtype is torch.bfloat16 and not a.is_cuda
        library = native() if halves else None
        few: list[Run] = []
        self._many: list[Run] = []
        for run in runs:
            (few if library is not None and _has_few(run, a.shape[1]) else self._many).append(run)
        self._sums = library.low_rank_sums(a, b, few) if library is not None and few else None
        self.native_sums = None if self._many else self._sums

    def __call__(self, y: Tensor, x: Tensor) -> None:
        """Adds to y[T, out] in place, given x[T, in]; tokens outside of every run are left alone.

        Rows never mix: each token meets its own adapter's values only, so a NaN stays with its owner.
        """
        if y.is_cuda:
            from hatrack_server.kernels.triton_low_rank import add_low_rank_cuda  # Triton comes with torch for CUDA

            add_low_rank_cuda(y, x, *self._operands, self._runs)
            return
        runs = self._runs
        if self._sums is not None and y.dtype is x.dtype is torch.bfloat16:
            self._sums(y, x)
            runs = self._many
        for run in runs:
            _add_products(y, x, *self._operands, run)


def _has_few(run: Run, rank: int) -> bool:
    return run.length * rank <= (IN_PLACE if isinstance(run.index, slice) else COPIED)


def _add_products(y: Tensor, x: Tensor, a: Tensor, b: Tensor, run: Run) -> None:
    """One batched product for the run, or for each stretch of it."""
    for part in run.stretches if a.shape[1] > COPIED_RANK else (run,):
        tokens, out, own_a, own_b = part.tokens(x), part.tokens(y), a[part.index], b[part.index]
        if out.dtype is b.dtype:
            out.baddbmm_(tokens.to(a.dtype).bmm(own_a.mT), own_b)
        else:
            out.add_(tokens.to(a.dtype).bmm(own_a.mT).bmm(own_b))


def add_low_rank_reference(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: list[Run]) -> None:
    """What a `BatchLowRank` does, token by token."""
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
