"""What one forward pass needs to know: built once per step, and handed down to every layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hatrack_server.kernels.paged_attention import causal_mask
from hatrack_server.kernels.transfer import to_device

SHORT = 256  # keys; up to here, one product over padded rows costs less than several


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence that a step computes: positions start … start + len(tokens) - 1."""

    tokens: Sequence[int]
    start: int
    slots: Tensor  # int64 [start + len(tokens)]: where the sequence's keys lie, in order, this chunk's included


@dataclass(frozen=True, slots=True)
class Keys:
    """What the queries of one part of a batch may see at one layer."""

    slots: Tensor  # int64 [R, L] for a Decode, [L] for a Prefill
    mask: Tensor  # bool [R, L] or [T, L]


@dataclass(slots=True)
class Decode:
    """Chunks of one token and of similar lengths, attended together."""

    tokens: slice | Tensor  # their places among the step's tokens: int64 [R], or a slice where they are neighbours
    slots: Tensor  # int64 [R, L], padded with slot 0, which always holds zeros
    positions: Tensor  # int64 [R]
    _keys: dict[int | None, Keys] = field(default_factory=dict)

    def keys(self, window: int | None) -> Keys:
        """For a layer with this sliding window, no more than the window; made once per step."""
        if window not in self._keys:
            slots, places = self.slots, torch.arange(self.slots.shape[1], device=self.slots.device)[None]
            if window is not None and window < slots.shape[1]:
                places = self.positions[:, None] + torch.arange(1 - window, 1, device=slots.device)
                slots = slots.gather(1, places.clamp(min=0))  # what lies before a row's first key is masked
            self._keys[window] = Keys(slots, causal_mask(self.positions, places, window))
        return self._keys[window]


@dataclass(slots=True)
class Prefill:
    """A chunk of several tokens, attended alone."""

    start: int  # its first place among the step's tokens
    stop: int
    slots: Tensor  # int64 [L]
    positions: Tensor  # int64 [T]
    _keys: dict[int | None, Keys] = field(default_factory=dict)

    def keys(self, window: int | None) -> Keys:
        """For a layer with this sliding window, no more than its queries see; made once per step."""
        if window not in self._keys:
            length, queries = len(self.slots), self.stop - self.start
            first = 0 if window is None else max(0, length - queries + 1 - window)
            places = torch.arange(first, length, device=self.slots.device)[None]
            self._keys[window] = Keys(self.slots[first:], causal_mask(self.positions, places, window))
        return self._keys[window]


@dataclass(slots=True)
class Batch:
    """A ragged batch of T tokens, chunk after chunk, without padding."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    write_slots: Tensor  # int64 [T]: where each token's key and value go
    last_tokens: Tensor  # int64 [chunks]: the place of each chunk's last token, whose logits are wanted
    decodes: list[Decode]
    prefills: list[Prefill]


def build_batch(chunks: Sequence[Chunk], device: torch.device) -> Batch:
    """Lays the chunks out one after the other; copies to `device` once per tensor, and doesn't wait for it."""
    put = functools.partial(to_device, device=device)
    lengths = [len(chunk.tokens) for chunk in chunks]
    ends = torch.tensor(lengths).cumsum(0)
    positions = torch.cat([torch.arange(c.start, c.start + len(c.tokens)) for c in chunks])
    single = [(chunk, int(end) - 1) for chunk, end in zip(chunks, ends, strict=True) if len(chunk.tokens) == 1]
    prefills = [
        Prefill(
            start=int(ends[i]) - length,
            stop=int(ends[i]),
            slots=put(chunks[i].slots),
            positions=put(positions[int(ends[i]) - length : int(ends[i])]),
        )
        for i, length in enumerate(lengths)
        if length > 1
    ]
    return Batch(
        token_ids=put([token for chunk in chunks for token in chunk.tokens], dtype=torch.int64),
        positions=put(positions),
        write_slots=put(torch.cat([chunk.slots[chunk.start :] for chunk in chunks])),
        last_tokens=put(ends - 1),
        decodes=[_decode(group, put) for group in _similar(single)],
        prefills=prefills,
    )


def _similar(single: Iterable[tuple[Chunk, int]]) -> Iterator[list[tuple[Chunk, int]]]:
    """Groups whose padding never doubles what is read, short ones apart: one long row must not slow down the others."""
    group: list[tuple[Chunk, int]] = []
    for chunk, token in sorted(single, key=lambda found: len(found[0].slots)):
        if group and len(chunk.slots) > max(SHORT, 2 * len(group[0][0].slots)):
            yield group
            group = []
        group.append((chunk, token))
    if group:
        yield group


def _decode(group: Sequence[tuple[Chunk, int]], put: Callable[..., Tensor]) -> Decode:
    group = sorted(group, key=lambda found: found[1])
    slots = torch.nn.utils.rnn.pad_sequence([chunk.slots for chunk, _ in group], batch_first=True)
    positions = torch.tensor([chunk.start for chunk, _ in group])
    places = [token for _, token in group]
    adjacent = places[-1] - places[0] == len(places) - 1
    tokens = slice(places[0], places[-1] + 1) if adjacent else put(places)
    return Decode(tokens, put(slots), put(positions))
