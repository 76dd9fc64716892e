"""The kernels that act on runs: each against its reference, token by token, on all sorts of batches."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hatrack_server.kernels.bottleneck import add_bottleneck, add_bottleneck_reference
from hatrack_server.kernels.kronecker import add_kronecker, add_kronecker_reference
from hatrack_server.kernels.low_rank import (
    COPIED_RANK,
    BatchLowRank,
    add_embedded,
    add_embedded_reference,
    add_low_rank_reference,
)
from hatrack_server.kernels.replacement import (
    replace_embedding,
    replace_linear,
    replace_norm,
    replace_scores,
    replace_tokens,
)
from hatrack_server.kernels.rowwise import add_vector, multiply_vector, replace_first
from hatrack_server.kernels.runs import Run, Runs, each_token, merge_runs

ROWS, IN, OUT = 9, 15, 8

Stacks = tuple[Tensor, ...]
Kernel = Callable[[Tensor, Tensor, Stacks, list[Run]], None]


def multiply_reference(y: Tensor, _: Tensor, stacks: Stacks, runs: list[Run]) -> None:
    for token, row in each_token(runs):
        y[token] *= stacks[0][row]


def add_reference(y: Tensor, _: Tensor, stacks: Stacks, runs: list[Run]) -> None:
    for token, row in each_token(runs):
        y[token] += stacks[0][row]


CHOSEN = torch.tensor([[1, 5]]).expand(ROWS, -1)  # the tokens that every row replaces


def linear_reference(y: Tensor, x: Tensor, stacks: Stacks, runs: list[Run]) -> None:
    for token, row in each_token(runs):
        y[token] = stacks[0][row] @ x[token].to(stacks[0].dtype) + stacks[1][row]


def norm_reference(y: Tensor, x: Tensor, stacks: Stacks, runs: list[Run]) -> None:
    for token, row in each_token(runs):
        y[token] = x[token, :OUT] * stacks[0][row] + stacks[1][row]


def embedding_reference(y: Tensor, x: Tensor, stacks: Stacks, runs: list[Run]) -> None:
    for token, row in each_token(runs):
        y[token] = stacks[0][row, ids_of(x)[token]]


def scores_reference(y: Tensor, x: Tensor, stacks: Stacks, runs: list[Run]) -> None:
    for token, row in each_token(runs):
        for nth, chosen in enumerate(CHOSEN[row]):
            y[token, chosen] = stacks[0][row, nth] @ x[token].to(stacks[0].dtype)


def ids_of(x: Tensor) -> Tensor:
    """Token ids of which about a third are CHOSEN."""
    return (x[:, 0] * 100).long() % 6


def tokens_reference(y: Tensor, x: Tensor, stacks: Stacks, runs: list[Run]) -> None:
    for token, row in each_token(runs):
        for nth, chosen in enumerate(CHOSEN[row]):
            if ids_of(x)[token] == chosen:
                y[token] = stacks[0][row, nth]


# The shapes of the stacks' rows, the kernel, its reference.
KERNELS: dict[str, tuple[list[tuple[int, ...]], Kernel, Kernel]] = {
    "low rank": (
        [(3, IN), (3, OUT)],
        lambda y, x, stacks, runs: BatchLowRank(*stacks, runs=runs)(y, x),
        lambda y, x, stacks, runs: add_low_rank_reference(y, x, *stacks, runs=runs),
    ),
    "low rank, a high one": (
        [(COPIED_RANK + 1, IN), (COPIED_RANK + 1, OUT)],
        lambda y, x, stacks, runs: BatchLowRank(*stacks, runs=runs)(y, x),
        lambda y, x, stacks, runs: add_low_rank_reference(y, x, *stacks, runs=runs),
    ),
    "kronecker": (
        [(2, 5), (4, 3)],
        lambda y, x, stacks, runs: add_kronecker(y, x, *stacks, runs=runs),
        lambda y, x, stacks, runs: add_kronecker_reference(y, x, *stacks, runs=runs),
    ),
    "bottleneck": (
        [(3, OUT), (3,), (3, OUT), (OUT,)],
        lambda y, _, stacks, runs: add_bottleneck(y, *stacks, activation=torch.relu, runs=runs),
        lambda y, _, stacks, runs: add_bottleneck_reference(y, *stacks, activation=torch.relu, runs=runs),
    ),
    "replaced linear layer": (
        [(OUT, IN), (OUT,)],
        lambda y, x, stacks, runs: replace_linear(y, x, [list(stack) for stack in stacks], runs),
        linear_reference,
    ),
    "replaced norm": (
        [(OUT,), (OUT,)],
        lambda y, x, stacks, runs: replace_norm(y, x[:, :OUT].contiguous(), stacks, runs),
        norm_reference,
    ),
    "replaced embedding": (
        [(6, OUT)],
        lambda y, x, stacks, runs: replace_embedding(y, ids_of(x), list(stacks[0]), runs),
        embedding_reference,
    ),
    "replaced tokens": (
        [(2, OUT)],
        lambda y, x, stacks, runs: replace_tokens(y, ids_of(x), CHOSEN, stacks[0], runs),
        tokens_reference,
    ),
    "replaced scores": (
        [(2, IN)],
        lambda y, x, stacks, runs: replace_scores(y, x, CHOSEN, stacks[0], runs),
        scores_reference,
    ),
    "multiply": ([(OUT,)], lambda y, _, stacks, runs: multiply_vector(y, stacks[0], runs), multiply_reference),
    "add": ([(OUT,)], lambda y, _, stacks, runs: add_vector(y, stacks[0], runs), add_reference),
}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> tuple[Stacks, Kernel, Kernel]:
    shapes, function, reference = KERNELS[request.param]
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(ROWS, *shape, generator=generator) for shape in shapes), function, reference


def tokens(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, OUT, generator=generator), torch.randn(count, IN, generator=generator)


def runs_of(rows: list[int | None], lengths: list[int]) -> list[Run]:
    """One run for each sequence of an adapter; None is the base alone."""
    starts = [0, *itertools.accumulate(lengths)]
    return [Run(s, n, (row,)) for s, n, row in zip(starts, lengths, rows, strict=False) if row is not None]


SKEWS: dict[str, list[int | None]] = {
    "distinct": list(range(ROWS)),
    "uniform": [n % 3 for n in range(12)],
    "zipf": random.Random(0).choices(range(ROWS), [1 / (n + 1) for n in range(ROWS)], k=17),
    "all same": [4] * 11,
    "single": [8],
    "not side by side": [4, 1, 8, 0],
    "among the base": [None, 2, None, None, 3, 4, None],
    "base alone": [None, None],
}


@pytest.mark.parametrize("lengths", [[1], [5], [1, 7, 2, 2]], ids=str)
@pytest.mark.parametrize("skew", SKEWS)
def test_equals_the_reference(kernel: tuple[Stacks, Kernel, Kernel], skew: str, lengths: list[int]) -> None:
    stacks, function, reference = kernel
    rows = SKEWS[skew]
    sizes = [lengths[n % len(lengths)] for n in range(len(rows))]
    y, x = tokens(sum(sizes))
    runs = runs_of(rows, sizes)
    wanted = y.clone()
    reference(wanted, x, stacks, runs)
    for given_runs in (runs, merge_runs(runs)):
        found = y.clone()
        function(found, x, stacks, given_runs)
        torch.testing.assert_close(found, wanted)


def test_without_runs_nothing_changes(kernel: tuple[Stacks, Kernel, Kernel]) -> None:
    stacks, function, _ = kernel
    y, x = tokens(3)
    before = y.clone()
    function(y, x, stacks, [])
    assert torch.equal(y, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pools_of_another_dtype_than_the_layers(kernel: tuple[Stacks, Kernel, Kernel], dtype: torch.dtype) -> None:
    stacks, function, reference = kernel
    y, x = (values.to(dtype) for values in tokens(6))
    wanted, found = y.clone(), y.clone()
    runs = [Run(0, 2, (1, 2)), Run(4, 2, (0,))]
    reference(wanted, x, stacks, runs)
    function(found, x, stacks, runs)
    assert found.dtype is dtype
    torch.testing.assert_close(found, wanted)


def test_a_bad_adapter_touches_its_own_tokens_only(kernel: tuple[Stacks, Kernel, Kernel]) -> None:
    stacks, function, _ = kernel
    y, x = tokens(8)
    runs = merge_runs([Run(0, 2, (0,)), Run(2, 2, (1,)), Run(4, 2, (2,))])
    wanted = y.clone()
    function(wanted, x, stacks, runs)
    for stack in stacks:
        stack[1] = math.nan
    function(y, x, stacks, runs)
    assert not y[2:4].isfinite().all()
    assert torch.equal(y[:2], wanted[:2])
    assert torch.equal(y[4:], wanted[4:])


def test_a_bad_token_touches_no_other_of_its_adapter(kernel: tuple[Stacks, Kernel, Kernel]) -> None:
    stacks, function, _ = kernel
    y, x = tokens(4)
    wanted = y.clone()
    function(wanted, x, stacks, [Run(0, 4, (0,))])
    x[1] = y[1] = math.nan
    function(y, x, stacks, [Run(0, 4, (0,))])
    others = [0, 2, 3]
    torch.testing.assert_close(y[others], wanted[others])


def rows_by_token(runs: list[Run]) -> dict[int, int]:
    return dict(each_token(runs))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 5)), max_size=12))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_merging_keeps_every_tokens_row(parts: list[tuple[int, int, int]]) -> None:
    runs: list[Run] = []
    for gap, length, row in parts:
        runs.append(Run((runs[-1].stop if runs else 0) + gap, length, (row,)))
    merged = merge_runs(runs)
    assert rows_by_token(merged) == rows_by_token(runs)
    assert len(merged) <= len(runs)


def test_neighbours_of_one_length_become_one() -> None:
    [side_by_side] = merge_runs([Run(2, 1, (3,)), Run(3, 1, (4,)), Run(4, 1, (5,))])
    assert side_by_side == Run(2, 1, (3, 4, 5))
    assert side_by_side.index == slice(3, 6)
    [apart] = merge_runs([Run(2, 1, (3,)), Run(3, 1, (7,)), Run(4, 1, (3,))])
    assert apart == Run(2, 1, (3, 7, 3))
    assert isinstance(apart.index, Tensor)
    for other in (Run(4, 1, (4,)), Run(3, 2, (4,))):
        assert merge_runs([Run(2, 1, (3,)), other]) == [Run(2, 1, (3,)), other]


def test_stretches_are_what_lies_side_by_side() -> None:
    run = Run(3, 2, (4, 5, 9, 1, 2), position=1)
    stretches = run.stretches
    assert [stretch.rows for stretch in stretches] == [(4, 5), (9,), (1, 2)]
    assert all(isinstance(stretch.index, slice) and stretch.position == 1 for stretch in stretches)
    assert rows_by_token(stretches) == rows_by_token([run])
    assert Run(0, 1, (3, 4)).stretches == [Run(0, 1, (3, 4))]


@pytest.mark.parametrize(("longest", "height"), [(0, 1), (1, 1), (4, 1), (5, 16), (64, 16), (65, 64), (130, 64)])
def test_tiles_hold_every_token_once_beside_its_row(longest: int, height: int) -> None:
    runs = merge_runs([Run(2, 1, (3, 1)), Run(4, longest, (8,)), Run(4 + longest, 0, (5,))])
    tiles = runs.tiles(torch.device("cpu"))
    held = [(first + n, row) for first, count, row in tiles.table.tolist() for n in range(count)]
    assert held == list(each_token(runs))
    assert tiles.height == height
    assert all(0 < count <= height for _, count, _ in tiles.table.tolist())


def test_tiles_are_made_once() -> None:
    runs = merge_runs([Run(0, 1, (3,))])
    assert Runs.of(runs).tiles(torch.device("cpu")) is runs.tiles(torch.device("cpu"))
    assert len(Runs.of([]).tiles(torch.device("cpu")).table) == 0


def test_runs_at_other_positions_of_their_sequences_stay_apart() -> None:
    assert len(merge_runs([Run(0, 1, (0,), position=2), Run(1, 1, (1,), position=3)])) == 2
    assert merge_runs([Run(0, 1, (0,), position=2), Run(1, 1, (1,), position=2)]) == [Run(0, 1, (0, 1), position=2)]


def test_the_first_positions_are_replaced_and_no_others() -> None:
    first = torch.arange(12.0).view(2, 3, 2)  # three positions of two adapters
    values = torch.full((9, 2), -1.0)
    replace_first(values, first, [Run(0, 2, (0,), 0), Run(2, 4, (1,), 1), Run(6, 2, (0,), 3)])
    kept = [-1.0, -1.0]
    assert values.tolist() == [*first[0, :2].tolist(), *first[1, 1:].tolist(), kept, kept, kept, kept, kept]


def test_an_embedded_token_meets_its_own_adapter() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 11, 3, generator=generator), torch.randn(4, 3, 5, generator=generator)
    ids, y = torch.tensor([0, 10, 3, 3, 7, 1, 2]), torch.randn(7, 5, generator=generator)
    runs = [Run(0, 2, (1, 2)), Run(5, 1, (0,))]
    wanted = y.clone()
    add_embedded_reference(wanted, ids, a, b, runs)
    found = y.clone()
    add_embedded(found, ids, a, b, runs)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found[[4, 6]], y[[4, 6]])
