from __future__ import annotations

from collections.abc import Callable

import pytest

from hatrack_server.engine.blocks import KVBlocks
from hatrack_server.engine.sequence import Sequence

NewSequence = Callable[..., Sequence]
SIZE = 4
PROMPT = tuple(range(10))  # two full blocks, and half of a third


def run(blocks: KVBlocks, sequence: Sequence) -> int:
    """Admits `sequence` and computes all its tokens; how many of them the cache had."""
    assert blocks.can_admit(sequence)
    blocks.admit(sequence)
    cached = sequence.computed
    blocks.grow(sequence, len(sequence.tokens))
    sequence.computed = len(sequence.tokens)
    blocks.publish(sequence, sequence.computed - cached)
    return cached


@pytest.fixture
def blocks() -> KVBlocks:
    return KVBlocks(12, SIZE, "base")


def test_blocks_go_out_and_come_back(blocks: KVBlocks, new_sequence: NewSequence) -> None:
    sequence = new_sequence(9)
    assert blocks.needed(8) == 2
    assert run(blocks, sequence) == 0
    assert len(sequence.blocks) == blocks.used == 3
    assert 0 not in sequence.blocks
    blocks.check([sequence])
    blocks.release(sequence)
    assert (blocks.used, sequence.blocks, sequence.computed) == (0, [], 0)
    blocks.check([])


def test_equal_prefixes_share_full_blocks(blocks: KVBlocks, new_sequence: NewSequence) -> None:
    one, two = new_sequence(PROMPT, digest="d"), new_sequence((*PROMPT, 99), digest="d")
    assert run(blocks, one) == 0
    assert run(blocks, two) == 8
    assert one.blocks[:2] == two.blocks[:2]
    assert one.blocks[2] != two.blocks[2]
    assert blocks.used == 4
    blocks.check([one, two])


@pytest.mark.parametrize(
    "other",
    [
        {"salt": b"another tenant's"},
        {"digest": "e"},
        {"digest": None},
        {"prompt": (99, *PROMPT[1:])},
        {"salt": b"sal", "digest": "td"},  # parts that only together spell the same
    ],
)
def test_anything_different_shares_nothing(
    blocks: KVBlocks, new_sequence: NewSequence, other: dict[str, object]
) -> None:
    run(blocks, new_sequence(PROMPT, digest="d"))
    assert run(blocks, new_sequence(**{"prompt": PROMPT, "digest": "d", **other})) == 0


def test_the_base_is_part_of_every_key(new_sequence: NewSequence) -> None:
    keys = []
    for base in ("one", "two"):
        sequence = new_sequence(PROMPT)
        run(KVBlocks(12, SIZE, base), sequence)
        keys.append(sequence.keys)
    assert not set(keys[0]) & set(keys[1])


def test_equal_tokens_after_a_difference_are_not_shared(blocks: KVBlocks, new_sequence: NewSequence) -> None:
    run(blocks, new_sequence((1, 2, 3, 4, 5, 6, 7, 8, 9)))
    assert run(blocks, new_sequence((1, 2, 3, 4, 0, 6, 7, 8, 9))) == 4
    assert run(blocks, new_sequence((0, 2, 3, 4, 5, 6, 7, 8, 9))) == 0


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9])
def test_one_token_at_least_is_left_to_compute(blocks: KVBlocks, new_sequence: NewSequence, length: int) -> None:
    run(blocks, new_sequence(range(length)))
    again = new_sequence(range(length))
    assert run(blocks, again) == (length - 1) // SIZE * SIZE
    blocks.release(again)
    blocks.admit(again)
    assert again.remaining >= 1


def test_only_computed_tokens_are_shared(blocks: KVBlocks, new_sequence: NewSequence) -> None:
    half = new_sequence(PROMPT)
    blocks.admit(half)
    blocks.grow(half, len(PROMPT))
    half.computed = 5
    blocks.publish(half, 5)
    assert run(blocks, new_sequence(PROMPT)) == 4
    half.computed = 9
    blocks.publish(half, 4)
    assert run(blocks, new_sequence(PROMPT)) == 8


def test_generated_tokens_are_shared_too(blocks: KVBlocks, new_sequence: NewSequence) -> None:
    first = new_sequence(PROMPT)
    run(blocks, first)
    for token in (50, 51, 52):
        first.tokens.append(token)
        blocks.grow(first, len(first.tokens))
        first.computed += 1
        blocks.publish(first, 1)
    assert run(blocks, new_sequence((*PROMPT, 50, 51, 52, 53))) == 12


def test_without_a_prefix_cache_nothing_is_shared(new_sequence: NewSequence) -> None:
    blocks = KVBlocks(12, SIZE, "base", prefix_cache=False)
    one, two = new_sequence(PROMPT), new_sequence(PROMPT)
    assert run(blocks, one) == run(blocks, two) == 0
    blocks.check([one, two])


def test_shared_blocks_outlive_one_holder(blocks: KVBlocks, new_sequence: NewSequence) -> None:
    one, two = new_sequence(PROMPT), new_sequence(PROMPT)
    run(blocks, one)
    run(blocks, two)
    shared = two.blocks[:2]
    blocks.release(one)
    blocks.check([two])
    crowd = new_sequence(9 * SIZE)
    run(blocks, crowd)
    assert not set(crowd.blocks) & set(two.blocks)
    assert two.blocks[:2] == shared
    assert not blocks.can_grow((two, 13))


def test_what_several_can_grow_by_together(blocks: KVBlocks, new_sequence: NewSequence) -> None:
    one, two = new_sequence(SIZE), new_sequence(SIZE)
    run(blocks, one)
    run(blocks, two)
    free = blocks.total - blocks.used
    assert blocks.can_grow((one, SIZE), (two, (1 + free) * SIZE))
    assert not blocks.can_grow((one, SIZE + 1), (two, (1 + free) * SIZE))
    assert blocks.can_grow((one, 1), (two, (1 + free) * SIZE))  # what one has too much of doesn't help the other
    assert not blocks.can_grow((one, 1), (two, (1 + free) * SIZE + 1))
    assert blocks.can_grow()


def test_released_blocks_are_found_again(blocks: KVBlocks, new_sequence: NewSequence) -> None:
    one = new_sequence(PROMPT)
    run(blocks, one)
    held = one.blocks[:2]
    blocks.release(one)
    two = new_sequence(PROMPT)
    assert run(blocks, two) == 8
    assert two.blocks[:2] == held


def test_what_holds_nothing_goes_first_then_ends_of_prefixes_oldest_first(new_sequence: NewSequence) -> None:
    blocks = KVBlocks(6, SIZE, "base")
    older, newer = new_sequence(range(9)), new_sequence(range(100, 109))
    run(blocks, older)
    run(blocks, newer)
    (a1, a2, a3), (b1, b2, b3) = older.blocks, newer.blocks
    blocks.release(older)
    blocks.release(newer)
    taker = new_sequence(6 * SIZE)
    run(blocks, taker)
    assert set(taker.blocks[:2]) == {a3, b3}  # half full, so never findable
    assert taker.blocks[2:] == [a2, a1, b2, b1]


def test_a_block_given_out_again_is_no_longer_found(new_sequence: NewSequence) -> None:
    blocks = KVBlocks(3, SIZE, "base")
    first = new_sequence(PROMPT)
    run(blocks, first)
    blocks.release(first)
    taker = new_sequence(2 * SIZE)
    run(blocks, taker)  # takes the half-full block and the end of the prefix
    blocks.release(taker)
    assert run(blocks, new_sequence(PROMPT)) == 4


def test_admission_counts_cached_blocks_that_nobody_holds_as_taken(new_sequence: NewSequence) -> None:
    blocks = KVBlocks(4, SIZE, "base")
    first = new_sequence(PROMPT)
    run(blocks, first)
    assert not blocks.can_admit(
        new_sequence(PROMPT[:4] + tuple(range(50, 59)))
    )  # needs 3 beside the shared one: 1 free
    assert blocks.can_admit(new_sequence(PROMPT))  # needs 1 beside the two shared ones
    blocks.release(first)
    assert blocks.can_admit(new_sequence((*PROMPT[:8], *range(50, 58))))  # two cached, two others: all four
    assert not blocks.can_admit(new_sequence((*PROMPT[:8], *range(50, 59))))


def test_a_released_sequence_finds_its_own_tokens(blocks: KVBlocks, new_sequence: NewSequence) -> None:
    sequence = new_sequence(PROMPT)
    run(blocks, sequence)
    sequence.tokens += [50, 51, 52, 53]
    blocks.grow(sequence, 14)
    sequence.computed = 13
    blocks.publish(sequence, 3)
    blocks.release(sequence)
    assert run(blocks, sequence) == 12
    assert sequence.generated == 4
