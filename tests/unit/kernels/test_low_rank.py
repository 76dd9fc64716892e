from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hatrack_server.kernels.low_rank import Run, add_low_rank, add_low_rank_reference, merge_runs

ROWS, RANK, IN, OUT = 9, 3, 13, 7


def pools(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(ROWS, RANK, IN, generator=generator)
    b = torch.randn(ROWS, RANK, OUT, generator=generator)
    return a.to(dtype), b.to(dtype)


def tokens(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, OUT, generator=generator), torch.randn(count, IN, generator=generator)


def runs_of(rows: list[int | None], lengths: list[int]) -> list[Run]:
    """One run for each sequence of an adapter; None is the base alone."""
    starts = [0, *itertools.accumulate(lengths)]
    return [Run(s, n, row) for s, n, row in zip(starts, lengths, rows, strict=False) if row is not None]


SKEWS: dict[str, list[int | None]] = {
    "distinct": list(range(ROWS)),
    "uniform": [n % 3 for n in range(12)],
    "zipf": random.Random(0).choices(range(ROWS), [1 / (n + 1) for n in range(ROWS)], k=17),
    "all same": [4] * 11,
    "single": [8],
    "among the base": [None, 2, None, None, 3, 4, None],
    "base alone": [None, None],
}


@pytest.mark.parametrize("lengths", [[1], [5], [1, 7, 2, 2]], ids=str)
@pytest.mark.parametrize("skew", SKEWS)
def test_equals_the_reference(skew: str, lengths: list[int]) -> None:
    rows = SKEWS[skew]
    sizes = [lengths[n % len(lengths)] for n in range(len(rows))]
    (y, x), (a, b) = tokens(sum(sizes)), pools()
    runs = runs_of(rows, sizes)
    wanted = y.clone()
    add_low_rank_reference(wanted, x, a, b, runs)
    for given_runs in (runs, merge_runs(runs)):
        found = y.clone()
        add_low_rank(found, x, a, b, given_runs)
        torch.testing.assert_close(found, wanted)


def test_without_runs_nothing_changes() -> None:
    (y, x), (a, b) = tokens(3), pools()
    before = y.clone()
    add_low_rank(y, x, a, b, [])
    assert torch.equal(y, before)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pools_of_another_dtype_than_the_layers(x_dtype: torch.dtype) -> None:
    (y, x), (a, b) = tokens(6), pools()
    wanted, found = y.to(x_dtype), y.to(x_dtype)
    runs = [Run(0, 2, 1, 2), Run(4, 2, 0)]
    add_low_rank_reference(wanted, x.to(x_dtype), a, b, runs)
    add_low_rank(found, x.to(x_dtype), a, b, runs)
    assert found.dtype is x_dtype
    torch.testing.assert_close(found, wanted)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 5)), max_size=12))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_merging_keeps_every_tokens_row(parts: list[tuple[int, int, int]]) -> None:
    runs: list[Run] = []
    for gap, length, row in parts:
        runs.append(Run((runs[-1].stop if runs else 0) + gap, length, row))
    merged = merge_runs(runs)
    assert rows_by_token(merged) == rows_by_token(runs)
    assert len(merged) <= len(runs)


def test_neighbours_in_tokens_and_rows_become_one() -> None:
    assert merge_runs([Run(2, 1, 3), Run(3, 1, 4), Run(4, 1, 5)]) == [Run(2, 1, 3, 3)]
    for apart in (Run(4, 1, 4), Run(3, 2, 4), Run(3, 1, 5), Run(3, 1, 3)):
        assert merge_runs([Run(2, 1, 3), apart]) == [Run(2, 1, 3), apart]


def test_a_bad_adapter_touches_its_own_tokens_only() -> None:
    (y, x), (a, b) = tokens(8), pools()
    runs = merge_runs([Run(0, 2, 0), Run(2, 2, 1), Run(4, 2, 2)])
    wanted = y.clone()
    add_low_rank(wanted, x, a, b, runs)
    a[1] = math.nan
    b[1] = math.inf
    add_low_rank(y, x, a, b, runs)
    assert not y[2:4].isfinite().any()
    assert torch.equal(y[:2], wanted[:2])
    assert torch.equal(y[4:], wanted[4:])


def test_a_bad_token_touches_no_other_of_its_adapter() -> None:
    (y, x), (a, b) = tokens(4), pools()
    wanted = y.clone()
    add_low_rank(wanted, x, a, b, [Run(0, 4, 0)])
    x[1] = math.nan
    add_low_rank(y, x, a, b, [Run(0, 4, 0)])
    others = [0, 2, 3]
    torch.testing.assert_close(y[others], wanted[others])


def rows_by_token(runs: list[Run]) -> dict[int, int]:
    return {token: run.row + (token - run.start) // run.length for run in runs for token in range(run.start, run.stop)}
