from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hatrack_server.adapters.pieces import LowRank, OutputScale, Piece, Pieces, ReplacedHead, ReplacedTokens
from hatrack_server.adapters.pools import Pool, Pools
from hatrack_server.adapters.stacks import DenseRows, ReservedRows, Rows
from hatrack_server.types import LinearShape

SHAPE = LinearShape(out_features=5, in_features=3)
CPU = torch.device("cpu")
DOWN = LowRank(torch.ones(3, 5), torch.ones(3, 3))
BYTES_OF_RANK = SHAPE.out_features + SHAPE.in_features  # values; float32 below


def piece(rank: int, value: float) -> LowRank:
    return LowRank(torch.full((rank, 3), value), torch.full((rank, 5), -value))


def at(layer: str, *pieces: Piece) -> Pieces:
    return tuple((layer, one) for one in pieces)


@pytest.fixture(params=[True, False], ids=["lazy", "dense"])
def pool(request: pytest.FixtureRequest) -> Pool:
    return Pool(0, "up", piece(4, 0.0), torch.float32, CPU, lazy=request.param)


def pools(budget: int, *, lazy: bool = False) -> Pools:
    return Pools(torch.float32, CPU, budget, lazy=lazy)


def test_ranks_are_classed_by_powers_of_two() -> None:
    ranks = [1, 2, 3, 4, 5, 8, 9, 64, 65]
    assert [piece(rank, 1.0).shapes[0][0] for rank in ranks] == [1, 2, 4, 4, 8, 8, 16, 64, 128]


def test_the_lowest_free_row_is_taken_first(pool: Pool) -> None:
    assert pool.full
    pool.grow(4)
    assert [pool.take() for _ in range(4)] == [0, 1, 2, 3]
    assert pool.full
    for row in (2, 0, 3):
        pool.free(row)
    assert [pool.take() for _ in range(3)] == [0, 2, 3]


def test_growing_keeps_what_is_there_and_what_readers_hold(pool: Pool) -> None:
    pool.grow(2)
    row = pool.take()
    pool.write(row, piece(4, 7.0))
    held = pool.stacks[0]
    pool.grow(3)
    assert pool.capacity == 5
    assert pool.take() == 1
    assert (pool.stacks[0][row] == 7.0).all()
    assert (pool.stacks[1][row] == -7.0).all()
    assert (held[row] == 7.0).all()


def test_a_lower_rank_is_padded_with_zeros_over_whatever_was_there(pool: Pool) -> None:
    pool.grow(1)
    row = pool.take()
    pool.write(row, piece(4, float("nan")))
    pool.write(row, piece(3, 2.0))
    assert (pool.stacks[0][row, :3] == 2.0).all()
    assert (pool.stacks[1][row, :3] == -2.0).all()
    assert (pool.stacks[0][row, 3:] == 0).all()
    assert (pool.stacks[1][row, 3:] == 0).all()


def test_a_row_is_copied_to_the_lowest_free_one(pool: Pool) -> None:
    pool.grow(4)
    for row in range(3):
        pool.write(pool.take(), piece(4, float(row)))
    assert pool.copy_lower(1) == 1  # the one free row lies behind it
    pool.free(0)
    assert pool.copy_lower(2) == 0
    for row in (0, 2):  # a reader of the old row meets it as it was
        assert (pool.stacks[0][row] == 2.0).all()
        assert (pool.stacks[1][row] == -2.0).all()
    assert (pool.taken, pool.take()) == (3, 3)
    assert pool.copy_lower(1) == 1


def fails_at_the_second(change: Callable[..., Rows]) -> Callable[..., Rows]:
    calls = itertools.count(1)

    def changed(*args: Any) -> Rows:
        if next(calls) == 2:
            raise MemoryError
        return change(*args)

    return changed


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "dense"])
def test_a_tensor_that_finds_no_memory_leaves_the_whole_pool_as_it_was(
    lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(0, "up", piece(4, 0.0), torch.float32, CPU, lazy=lazy)
    kind = ReservedRows if lazy else DenseRows
    with monkeypatch.context() as patch:
        pool.grow(3)
        pool.write(pool.take(), piece(4, 1.0))
        for change in ("grown", "trimmed"):
            patch.setattr(kind, change, fails_at_the_second(getattr(kind, change)))
        before = pool.stacks
        with pytest.raises(MemoryError):
            pool.grow(100)
        with pytest.raises(MemoryError):
            pool.trim()
        assert pool.stacks is before
        assert pool.capacity == 3
        pool.write(pool.take(), piece(4, 2.0))
    pool.grow(100)
    assert [[row.unique().tolist() for row in stack[:2]] for stack in pool.stacks] == [
        [[1.0], [2.0]],
        [[-1.0], [-2.0]],
    ]


def test_a_pool_that_did_not_move_gives_readers_the_same_stacks() -> None:
    pool = Pool(0, "up", piece(4, 0.0), torch.float32, CPU, lazy=True)
    pool.grow(1, reserve=8)
    before = pool.stacks
    pool.grow(1, reserve=8)
    pool.trim()
    assert pool.stacks is before


def test_trimming_gives_back_the_rows_behind_the_last_taken(pool: Pool) -> None:
    assert not pool.trim()
    pool.grow(5)
    rows = [pool.take() for _ in range(3)]
    for row in rows:
        pool.write(row, piece(4, float(row)))
    pool.free(1)
    assert pool.trim()
    assert pool.capacity == 3
    assert (pool.stacks[0][2] == 2.0).all()
    assert not pool.trim()
    assert pool.take() == 1
    assert pool.full
    for row in rows:
        pool.free(row)
    assert pool.trim()
    assert (pool.capacity, pool.full) == (0, True)
    pool.grow(1)
    assert pool.take() == 0


def test_ranks_of_one_class_share_a_pool() -> None:
    all_pools = pools(budget=10_000)
    five, eight, four = (all_pools.place(at("up", piece(rank, 1.0)))[0].pool for rank in (5, 8, 4))
    assert five is eight
    assert five is not four
    assert all_pools.place(at("down", piece(4, 1.0)))[0].pool is not four


def test_bytes_are_those_of_the_stacks() -> None:
    all_pools = pools(budget=100_000)
    pieces = at("up", piece(8, 1.0)) + at("down", DOWN, OutputScale(torch.ones(3)))
    places = all_pools.place(pieces)
    assert all_pools.bytes == all_pools.size(pieces)
    assert all_pools.bytes == sum(stack.nbytes for place in places for stack in place.pool.stacks)


def test_growing_is_generous_within_the_budget_and_exact_at_its_end() -> None:
    row = 8 * BYTES_OF_RANK * 4
    all_pools = pools(budget=7 * row)
    sizes = []
    while all_pools.fits(at("up", piece(8, 1.0))):
        sizes.append(all_pools.place(at("up", piece(8, 1.0)))[0].pool.capacity)
        assert all_pools.bytes <= all_pools.budget
    assert sizes == [1, 2, 4, 4, 7, 7, 7]


def test_a_free_row_fits_whatever_the_budget() -> None:
    up, down = at("up", piece(8, 1.0)), at("down", LowRank(torch.zeros(8, 5), torch.zeros(8, 3)))
    all_pools = pools(budget=8 * BYTES_OF_RANK * 4)
    places = all_pools.place(up)
    assert not all_pools.fits(up)
    assert all_pools.size(down) > all_pools.spare
    assert not all_pools.trim()
    all_pools.free(places)
    assert all_pools.fits(up)
    assert not all_pools.fits(up + down)
    assert not all_pools.fits(down)
    assert all_pools.size(down) <= all_pools.spare
    assert all_pools.trim()
    assert all_pools.bytes == 0
    assert all_pools.fits(down)


def test_scales_are_kept_in_float32_whatever_the_base_computes_in() -> None:
    all_pools = Pools(torch.bfloat16, CPU, 10_000)
    low_rank, scale = all_pools.place(at("up", piece(4, 1.0), OutputScale(torch.full((5,), 1.001))))
    assert low_rank.pool.stacks[0].dtype is torch.bfloat16
    assert scale.pool.stacks[0][scale.row].tolist() == [pytest.approx(1.001)] * 5


def test_rows_that_are_not_stacked_are_never_copied_to_make_room() -> None:
    """A whole embedding or head is so large that a copy of all of them would not fit."""
    kept = pools(10**6)
    places = [kept.place(at("head", ReplacedHead(torch.full((5, 3), float(n))))) for n in range(3)]
    pool = places[0][0].pool
    assert pool.capacity == 3  # none to spare
    held = [row.data_ptr() for row in pool.stacks[0]]
    kept.place(at("head", ReplacedHead(torch.full((5, 3), 3.0))))
    assert [row.data_ptr() for row in pool.stacks[0][:3]] == held
    assert [row.unique().tolist() for row in pool.stacks[0]] == [[0.0], [1.0], [2.0], [3.0]]
    kept.free(places[0])
    [moved] = kept.copy_lower(places[2])
    assert (moved.row, pool.stacks[0][0].unique().tolist()) == (0, [2.0])
    assert pool.stacks[0][2].unique().tolist() == [2.0]  # steps that read it there go on
    kept.free(places[2])
    assert not kept.trim()  # the last one is taken
    pool.free(3)
    assert kept.trim()
    assert (pool.capacity, kept.bytes) == (2, 2 * 5 * 3 * 4)


def test_token_ids_keep_their_type() -> None:
    [place] = pools(10**6).place(at("e", ReplacedTokens(torch.tensor([3, 2**24 + 1]), torch.ones(2, 4))))
    tokens, rows = place.pool.stacks
    assert (tokens.dtype, tokens[0].tolist()) == (torch.int64, [3, 2**24 + 1])
    assert place.pool.row_bytes == 2 * 8 + 2 * 4 * 4
    assert rows.dtype is torch.float32


def test_a_write_that_fails_leaves_no_row_taken() -> None:
    all_pools = pools(10**6)
    wrong_type = LowRank(torch.ones(4, 3, device="meta"), torch.ones(4, 5, device="meta"))  # has nothing to copy
    for _ in range(3):
        with pytest.raises(NotImplementedError):
            all_pools.place(at("up", piece(4, 1.0)) + at("down", wrong_type))
    assert all_pools.spare == all_pools.budget
    assert all_pools.trim()
    assert all_pools.bytes == 0


def test_pools_that_grew_before_one_that_could_not_are_counted() -> None:
    all_pools = pools(10**6)
    endless = LowRank(torch.ones(1, 1).expand(1, 2**60), torch.ones(1, 5))
    with pytest.raises(RuntimeError):
        all_pools.place(at("up", piece(4, 1.0)) + at("down", endless))
    assert all_pools.bytes == 4 * BYTES_OF_RANK * 4
