"""y += (x Aᵀ) B on a GPU, in two launches for all adapters of a batch (as in Punica, Chen et al. 2023, and S-LoRA).

*Shrink* makes x Aᵀ in float32, *expand* adds its product with B to y. A program of a launch works on one tile of
`kernels/runs.py`, whose tokens share their adapter, so rows never mix. Nothing here waits for the device.

A row's A is read by several programs, each taking a part of `in`: without them a batch of one row would leave most of
the GPU idle. Their sums are written apart and added up by expand, rather than by atomics: nothing must be cleared
before, and equal batches give equal bits.

A recorded CUDA graph has tiles of one token each, in a table that stays where it is (`FixedRuns`): as long as the
graph's rows are many, filled up with tiles of no tokens, which end at once.

Import this on a CUDA path only: Triton comes with PyTorch for CUDA, not with others.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hatrack_server.kernels.runs import Run, Runs, Tiles

COLUMNS = 128  # of y, in a program of expand
MOST_RANKS = 64  # in a program of shrink, and in a pass of expand's loop
FEW_PROGRAMS = 128  # about as many as a GPU has multiprocessors: with more, each may read all of `in`


def add_low_rank_cuda(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: list[Run]) -> None:
    """Adds each run's low-rank product to y in place; tokens outside of every run are left alone.

    y[T, out], x[T, in], a[rows, r, in], b[rows, r, out] with the scale folded in, for any r; a and b are contiguous,
    and x may be y. What `merge_runs` gives keeps its tiles for all layers.
    """
    tiles = Runs.of(runs).tiles(y.device)
    if len(tiles.table):
        _add_expanded(y, _shrunk(x, a, tiles), b, tiles)


def _shrunk(x: Tensor, a: Tensor, tiles: Tiles) -> Tensor:
    """x Aᵀ as float32 [splits, T, r], whose sum over the splits is wanted; undefined for tokens of no tile."""
    tokens, features, rank = *x.shape, a.shape[1]
    block = _block(tiles.height, rank)
    width = min(256, 8192 // block["ranks"]) if tiles.height == 1 else 64
    grid = len(tiles.table), triton.cdiv(rank, block["ranks"])
    splits = _splits(tiles.height, math.prod(grid))
    part = triton.cdiv(triton.cdiv(features, width), splits) * width
    v = torch.empty(splits, tokens, rank, dtype=torch.float32, device=x.device)
    _shrink[*grid, splits](v, x, a, tiles.table, features, part, tokens, rank, *x.stride(), **block, width=width)
    return v


def _add_expanded(y: Tensor, v: Tensor, b: Tensor, tiles: Tiles) -> None:
    (splits, tokens, rank), features = v.shape, y.shape[1]
    block = _block(tiles.height, rank)
    _expand[len(tiles.table), triton.cdiv(features, COLUMNS)](
        y, v, b, tiles.table, features, tokens, rank, *y.stride(), **block, splits=splits, columns=COLUMNS, num_stages=1
    )


def _block(height: int, rank: int) -> dict[str, int]:
    """What one program of either launch works on; a tensor core's product takes no fewer than 16 ranks."""
    ranks = max(triton.next_power_of_2(rank), 1 if height == 1 else 16)
    return {"height": height, "ranks": min(ranks, MOST_RANKS), "num_warps": 8 if height == 64 else 4}


def _splits(height: int, programs: int) -> int:
    """How many programs share a tile's `in`: always many for single tokens, whose sums are small and quickly added."""
    if height == 1:
        return 16
    return 8 if programs <= FEW_PROGRAMS else 1


@triton.jit(do_not_specialize=["tokens"])  # another number of tokens must not compile another kernel
def _shrink(
    v: tl.tensor,
    x: tl.tensor,
    a: tl.tensor,
    table: tl.tensor,
    features: int,
    part: int,
    tokens: int,
    rank: int,
    x_token: int,
    x_feature: int,
    height: tl.constexpr,
    ranks: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """v[split, token, r] = Σ x[token, k] a[row, r, k] over the split's `part` of k, in steps of `width`."""
    tile, split = tl.program_id(0), tl.program_id(2)
    first, count, row = tl.load(table + 3 * tile), tl.load(table + 3 * tile + 1), tl.load(table + 3 * tile + 2)
    if count == 0:
        return
    token = (first + tl.arange(0, height)).to(tl.int64)[:, None]
    own = (tl.arange(0, height) < count)[:, None]
    r = tl.program_id(1) * ranks + tl.arange(0, ranks)
    a += row.to(tl.int64) * rank * features + r[:, None] * features
    total = tl.zeros((height, ranks), tl.float32)
    for start in range(split * part, min(split * part + part, features), width):
        k = (start + tl.arange(0, width))[None, :]
        own_x = tl.load(x + token * x_token + k * x_feature, mask=own & (k < features), other=0)
        own_a = tl.load(a + k, mask=(r < rank)[:, None] & (k < features), other=0)
        if height == 1:
            total += tl.sum(own_x.to(tl.float32) * own_a.to(tl.float32), axis=1)[None, :]
        else:
            total = tl.dot(own_x.to(own_a.dtype), tl.trans(own_a), total, input_precision="ieee")
    tl.store(v + (split * tokens + token) * rank + r[None, :], total, mask=own & (r < rank)[None, :])


@triton.jit(do_not_specialize=["tokens"])  # another number of tokens must not compile another kernel
def _expand(
    y: tl.tensor,
    v: tl.tensor,
    b: tl.tensor,
    table: tl.tensor,
    features: int,
    tokens: int,
    rank: int,
    y_token: int,
    y_feature: int,
    height: tl.constexpr,
    ranks: tl.constexpr,
    splits: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    """y[token, n] += Σ v[split, token, r] b[row, r, n] over all splits and r."""
    tile = tl.program_id(0)
    first, count, row = tl.load(table + 3 * tile), tl.load(table + 3 * tile + 1), tl.load(table + 3 * tile + 2)
    if count == 0:
        return
    token = (first + tl.arange(0, height)).to(tl.int64)
    own = tl.arange(0, height) < count
    n = (tl.program_id(1) * columns + tl.arange(0, columns))[None, :]
    b += row.to(tl.int64) * rank * features + n
    total = tl.zeros((height, columns), tl.float32)
    for start in range(0, rank, ranks):
        r = start + tl.arange(0, ranks)
        own_v = _sum_of_splits(v, token, own, r, tokens, rank, height, splits)
        own_b = tl.load(b + r[:, None] * features, mask=(r < rank)[:, None] & (n < features), other=0)
        if height == 1:
            total += tl.sum(own_v * own_b.to(tl.float32), axis=0)[None, :]
        else:
            total = tl.dot(tl.trans(own_v).to(own_b.dtype), own_b, total, input_precision="ieee")
    place = y + token[:, None] * y_token + n * y_feature
    mask = own[:, None] & (n < features)
    tl.store(place, (tl.load(place, mask=mask, other=0).to(tl.float32) + total).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _sum_of_splits(
    v: tl.tensor,
    token: tl.tensor,
    own: tl.tensor,
    r: tl.tensor,
    tokens: int,
    rank: int,
    height: tl.constexpr,
    splits: tl.constexpr,
) -> tl.tensor:
    """[ranks, height] of v[split, token, r]."""
    if height == 1:  # at once: in a loop, every thread would load what it needs of each, one after the other
        split = tl.arange(0, splits)[:, None]
        parts = tl.load(v + (split * tokens + token) * rank + r[None, :], mask=(r < rank)[None, :], other=0)
        return tl.sum(parts, axis=0)[:, None]
    place = v + token[None, :] * rank + r[:, None]
    mask = own[None, :] & (r < rank)[:, None]
    total = tl.zeros(mask.shape, tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(place + split * tokens * rank, mask=mask, other=0)
    return total
