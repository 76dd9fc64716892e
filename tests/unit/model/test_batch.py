from __future__ import annotations

import pytest
import torch

from hatrack_server.model.batch import Batch, Chunk, build_batch

CPU = torch.device("cpu")


def chunk(start: int, tokens: list[int], *, first_slot: int) -> Chunk:
    """A chunk whose keys lie backwards from `first_slot`, so that a slot is never a position by chance."""
    return Chunk(tokens, start, torch.arange(first_slot, first_slot - start - len(tokens), -1))


@pytest.fixture
def batch() -> Batch:
    """A fresh prompt, a decode, a prompt's second chunk, and another decode."""
    return build_batch(
        [
            chunk(0, [10, 11, 12], first_slot=20),
            chunk(5, [20], first_slot=40),
            chunk(4, [30, 31], first_slot=60),
            chunk(0, [40], first_slot=80),
        ],
        CPU,
    )


def test_chunks_lie_one_after_the_other(batch: Batch) -> None:
    assert batch.token_ids.tolist() == [10, 11, 12, 20, 30, 31, 40]
    assert batch.positions.tolist() == [0, 1, 2, 5, 4, 5, 0]
    assert batch.last_tokens.tolist() == [2, 3, 5, 6]
    assert {t.dtype for t in (batch.token_ids, batch.positions, batch.write_slots, batch.last_tokens)} == {torch.int64}


def test_each_token_is_written_at_its_own_position(batch: Batch) -> None:
    assert batch.write_slots.tolist() == [20, 19, 18, 35, 56, 55, 80]


def test_chunks_of_one_token_decode_together(batch: Batch) -> None:
    [decode] = batch.decodes
    assert decode.tokens.tolist() == [3, 6]
    assert decode.positions.tolist() == [5, 0]
    everything, window = decode.keys(None), decode.keys(2)
    assert everything.slots.tolist() == [[40, 39, 38, 37, 36, 35], [80, 0, 0, 0, 0, 0]]
    assert everything.mask.tolist() == [[True] * 6, [True] + [False] * 5]
    assert window.slots.tolist() == [[36, 35], [80, 80]]
    assert window.mask.tolist() == [[True, True], [False, True]]
    assert decode.keys(6).slots is decode.keys(None).slots


def test_longer_chunks_are_attended_alone(batch: Batch) -> None:
    first, second = batch.prefills
    assert (first.start, first.stop, second.start, second.stop) == (0, 3, 4, 6)
    assert second.positions.tolist() == [4, 5]
    assert first.keys(None).slots.tolist() == [20, 19, 18]
    assert first.keys(None).mask.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert second.keys(None).slots.tolist() == [60, 59, 58, 57, 56, 55]
    assert second.keys(3).slots.tolist() == [58, 57, 56, 55]
    assert second.keys(3).mask.tolist() == [[True, True, True, False], [False, True, True, True]]
    assert second.keys(9).slots.tolist() == second.keys(None).slots.tolist()


def test_keys_are_found_once(batch: Batch) -> None:
    for part in (*batch.decodes, *batch.prefills):
        assert part.keys(None) is part.keys(None)
        assert part.keys(2) is part.keys(2)
        assert part.keys(2) is not part.keys(3)


def test_decodes_alone_and_prefills_alone() -> None:
    decodes = build_batch([chunk(3, [1], first_slot=9), chunk(1, [2], first_slot=19)], CPU)
    assert decodes.prefills == []
    assert [decode.tokens for decode in decodes.decodes] == [slice(0, 2)]
    prefill = build_batch([chunk(0, [1, 2], first_slot=9)], CPU)
    assert prefill.decodes == []
    assert prefill.last_tokens.tolist() == [1]


def test_a_long_row_does_not_pad_the_others() -> None:
    lengths = [9, 5000, 200, 700, 90, 1200, 2400]
    batch = build_batch([chunk(length - 1, [1], first_slot=10_000) for length in lengths], CPU)
    places = torch.arange(len(lengths))
    assert [[lengths[token] for token in places[decode.tokens]] for decode in batch.decodes] == [
        [9, 200, 90],
        [700, 1200],
        [2400],
        [5000],
    ]
    assert [decode.slots.shape for decode in batch.decodes] == [(3, 200), (2, 1200), (1, 2400), (1, 5000)]
