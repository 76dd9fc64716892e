"""What one forward pass needs to know: built once per step, and handed down to every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hatrack_server.kernels.paged_attention import causal_mask


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence that a step computes: positions start … start + len(tokens) - 1."""

    tokens: Sequence[int]
    start: int
    slots: Tensor  # int64 [start + len(tokens)]: where the sequence's keys lie, in order, this chunk's included


@dataclass(slots=True)
class Decode:
    """The chunks of one token, attended together."""

    tokens: Tensor  # int64 [R]: their places among the step's tokens
    slots: Tensor  # int64 [R, L], padded with slot 0, which always holds zeros
    positions: Tensor  # int64 [R]
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """bool [R, L] for a layer with this sliding window; made once per step."""
        if window not in self.masks:
            self.masks[window] = causal_mask(self.positions, self.slots.shape[1], window)
        return self.masks[window]


@dataclass(slots=True)
class Prefill:
    """A chunk of several tokens, attended alone."""

    start: int  # its first place among the step's tokens
    stop: int
    slots: Tensor  # int64 [L]
    positions: Tensor  # int64 [T]
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """bool [T, L] for a layer with this sliding window; made once per step."""
        if window not in self.masks:
            self.masks[window] = causal_mask(self.positions, self.slots.shape[0], window)
        return self.masks[window]


@dataclass(slots=True)
class Batch:
    """A ragged batch of T tokens, chunk after chunk, without padding."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    write_slots: Tensor  # int64 [T]: where each token's key and value go
    last_tokens: Tensor  # int64 [chunks]: the place of each chunk's last token, whose logits are wanted
    decode: Decode | None
    prefills: list[Prefill]


def build_batch(chunks: Sequence[Chunk], device: torch.device) -> Batch:
    """Lays the chunks out one after the other; copies to `device` once per tensor."""
    lengths = [len(chunk.tokens) for chunk in chunks]
    ends = torch.tensor(lengths).cumsum(0)
    positions = torch.cat([torch.arange(c.start, c.start + len(c.tokens)) for c in chunks])
    decode_of = [i for i, length in enumerate(lengths) if length == 1]
    prefills = [
        Prefill(
            start=int(ends[i]) - length,
            stop=int(ends[i]),
            slots=chunks[i].slots.to(device),
            positions=positions[int(ends[i]) - length : int(ends[i])].to(device),
        )
        for i, length in enumerate(lengths)
        if length > 1
    ]
    return Batch(
        token_ids=torch.tensor([token for chunk in chunks for token in chunk.tokens]).to(device),
        positions=positions.to(device),
        write_slots=torch.cat([chunk.slots[chunk.start :] for chunk in chunks]).to(device),
        last_tokens=(ends - 1).to(device),
        decode=_decode([chunks[i] for i in decode_of], (ends[decode_of] - 1), device) if decode_of else None,
        prefills=prefills,
    )


def _decode(chunks: Sequence[Chunk], tokens: Tensor, device: torch.device) -> Decode:
    slots = torch.nn.utils.rnn.pad_sequence([chunk.slots for chunk in chunks], batch_first=True)
    positions = torch.tensor([chunk.start for chunk in chunks])
    return Decode(tokens.to(device), slots.to(device), positions.to(device))
