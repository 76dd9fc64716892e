from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hatrack_server.kernels.native import Native
from hatrack_server.kernels.paged_attention import causal_mask, paged_decode, paged_prefill

SLOTS, DIM, VALUE_DIM = 80, 8, 6
GROUPINGS = [(4, 4), (4, 2), (6, 1)]  # heads over key-value heads
OPTIONS = {"plain": (None, False), "softcap": (5.0, False), "sinks": (None, True), "both": (2.0, True)}
SCALE = 0.3


def pools(kv_heads: int) -> tuple[Tensor, Tensor]:
    """Random keys and values; slot 0, where padding points, is zero."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(SLOTS, kv_heads, DIM, generator=generator)
    v = torch.randn(SLOTS, kv_heads, VALUE_DIM, generator=generator)
    k[0], v[0] = 0, 0
    return k, v


def queries(count: int, heads: int) -> Tensor:
    return torch.randn(count, heads, DIM, generator=torch.Generator().manual_seed(1))


def scattered(lengths: list[int]) -> list[Tensor]:
    """Slots of each sequence's keys, in no order, never slot 0."""
    free = 1 + torch.randperm(SLOTS - 1, generator=torch.Generator().manual_seed(2))
    return list(free[: sum(lengths)].split(lengths))


def attend(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """One query q[H, D] over its own keys k[L, KV, D] and values, head by head: [H, value dim]."""
    out = []
    for head in range(q.shape[0]):
        kv = head // (q.shape[0] // k.shape[1])
        scores = k[:, kv] @ q[head] * SCALE
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        total = weights.sum() + (sinks[head].exp() if sinks is not None else 0.0)
        out.append(weights / total @ v[:, kv])
    return torch.stack(out)


def sinks_of(heads: int, wanted: bool) -> Tensor | None:
    return torch.linspace(-1, 2, heads) if wanted else None


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPINGS)
@pytest.mark.parametrize("window", [None, 1, 5])
def test_decode_equals_plain_attention(option: str, heads: int, kv_heads: int, window: int | None) -> None:
    softcap, with_sinks = OPTIONS[option]
    sinks = sinks_of(heads, with_sinks)
    (k, v), lengths = pools(kv_heads), [1, 17, 5, 9]
    q, slots = queries(len(lengths), heads), scattered(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(slots, batch_first=True)
    mask = causal_mask(torch.tensor(lengths) - 1, torch.arange(padded.shape[1])[None], window)
    found = paged_decode(q, k, v, padded, mask, scale=SCALE, softcap=softcap, sinks=sinks)
    for row, own in enumerate(slots):
        seen = own[-window:] if window else own
        torch.testing.assert_close(found[row], attend(q[row], k[seen], v[seen], softcap, sinks))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPINGS)
@pytest.mark.parametrize("window", [None, 1, 5])
def test_prefill_equals_plain_attention(option: str, heads: int, kv_heads: int, window: int | None) -> None:
    softcap, with_sinks = OPTIONS[option]
    sinks = sinks_of(heads, with_sinks)
    start, length = 6, 7
    (k, v), q = pools(kv_heads), queries(length, heads)
    [slots] = scattered([start + length])
    mask = causal_mask(torch.arange(start, start + length), torch.arange(start + length)[None], window)
    found = paged_prefill(q, k, v, slots, mask, scale=SCALE, softcap=softcap, sinks=sinks)
    for token in range(length):
        seen = slots[: start + token + 1]
        seen = seen[-window:] if window else seen
        torch.testing.assert_close(found[token], attend(q[token], k[seen], v[seen], softcap, sinks))


@pytest.mark.parametrize("option", OPTIONS)
def test_a_poisoned_sequence_stays_alone(option: str) -> None:
    softcap, with_sinks = OPTIONS[option]
    sinks = sinks_of(4, with_sinks)
    (k, v), lengths = pools(2), [4, 11, 6]
    q, slots = queries(3, 4), scattered(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(slots, batch_first=True)
    mask = causal_mask(torch.tensor(lengths) - 1, torch.arange(padded.shape[1])[None], None)
    clean = paged_decode(q, k, v, padded, mask, scale=SCALE, softcap=softcap, sinks=sinks)
    k[slots[1]], v[slots[1]] = math.nan, math.inf
    found = paged_decode(q, k, v, padded, mask, scale=SCALE, softcap=softcap, sinks=sinks)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_half_precision_stays_half() -> None:
    (k, v), [slots] = pools(2), scattered([9])
    q = queries(1, 4)
    for softcap in (None, 5.0):
        mask = causal_mask(torch.tensor([8]), torch.arange(9)[None], None)
        halves = paged_decode(q.bfloat16(), k.bfloat16(), v.bfloat16(), slots[None], mask, scale=SCALE, softcap=softcap)
        assert halves.dtype is torch.bfloat16
        wanted = attend(q[0], k[slots], v[slots], softcap, None)
        torch.testing.assert_close(halves[0].float(), wanted, atol=3e-2, rtol=3e-2)


def long_rows(kv_heads: int, dim: int, value_dim: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Slots of five rows, some longer than what C takes at a time; the same padded; keys and values in bfloat16."""
    lengths, generator = [1, 700, 256, 257, 30], torch.Generator().manual_seed(0)
    slots = list((1 + torch.randperm(sum(lengths), generator=generator)).split(lengths))
    k, v = (torch.randn(sum(lengths) + 1, kv_heads, n, generator=generator).bfloat16() for n in (dim, value_dim))
    k[0], v[0] = 0, 0
    return slots, torch.nn.utils.rnn.pad_sequence(slots, batch_first=True), k, v


@pytest.mark.parametrize("sharpness", [0.1, 5.0])  # of the softmax: the latter leaves one key with nearly all weight
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (70, 48)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 1), (7, 1), (3, 3)])
@pytest.mark.parametrize("window", [None, 1, 300])
def test_decode_in_c_equals_plain_attention(
    library: Native, window: int | None, heads: int, kv_heads: int, dim: int, value_dim: int, sharpness: float
) -> None:
    slots, padded, k, v = long_rows(kv_heads, dim, value_dim)
    q = (sharpness * torch.randn(len(slots), heads, dim, generator=torch.Generator().manual_seed(1))).bfloat16()
    lengths = torch.tensor([len(own) for own in slots])
    mask = causal_mask(lengths - 1, torch.arange(padded.shape[1])[None], window)
    found = library.paged_decode(q, k, v, padded, mask, SCALE)
    for row, own in enumerate(slots):
        seen = own[-window:] if window else own
        wanted = attend(q[row].float(), k[seen].float(), v[seen].float(), None, None)
        torch.testing.assert_close(found[row].float(), wanted, rtol=2**-7, atol=2e-3)


def test_a_poisoned_sequence_stays_alone_in_c(library: Native) -> None:
    slots, padded, k, v = long_rows(2, 64, 64)
    q = torch.randn(len(slots), 8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    mask = causal_mask(torch.tensor([len(own) for own in slots]) - 1, torch.arange(padded.shape[1])[None], None)
    clean = library.paged_decode(q, k, v, padded, mask, SCALE)
    k[slots[1][5]], v[slots[2][5]], k[slots[3]] = math.nan, math.inf, math.inf
    found = library.paged_decode(q, k, v, padded, mask, SCALE)
    assert not found[1:4].isfinite().any()
    assert torch.equal(found[[0, 4]], clean[[0, 4]])


def test_the_mask_is_causal_and_the_window_counts_the_query() -> None:
    positions, places = torch.tensor([0, 3]), torch.arange(4)[None]
    assert causal_mask(positions, places, None).tolist() == [[True, False, False, False], [True] * 4]
    assert causal_mask(positions, places, 2).tolist() == [[True, False, False, False], [False, False, True, True]]


def test_the_mask_of_rows_that_have_keys_of_their_own() -> None:
    places = torch.tensor([[-1, 0], [2, 3]])
    assert causal_mask(torch.tensor([0, 3]), places, None).tolist() == [[False, True], [True, True]]
    assert causal_mask(torch.tensor([0, 3]), places, 1).tolist() == [[False, True], [False, True]]
