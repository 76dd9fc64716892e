"""The next token of each row, from its own logits, parameters and random number only."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from hatrack_server.kernels.transfer import to_device, to_host
from hatrack_server.types import Sampling, TokenLogprobs

_MASK = (1 << 64) - 1
_COLDEST = torch.finfo(torch.float32).tiny  # what a positive temperature is at least: it must not round to 0


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row's draw depends on beside its logits."""

    sampling: Sampling
    position: int  # of the token to be drawn, in the sequence
    generated: int  # tokens before it in the completion
    eos_token_ids: frozenset[int]

    @property
    def banned(self) -> frozenset[int]:
        """Ids that can't be drawn yet: whatever would end the completion before min_tokens."""
        if self.generated >= self.sampling.min_tokens:
            return frozenset()
        eos = frozenset() if self.sampling.ignore_eos else self.eos_token_ids
        return eos | self.sampling.stop_token_ids


@dataclass(frozen=True, slots=True)
class Drawn:
    """One row's token."""

    token: int
    logprobs: TokenLogprobs | None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: SplitMix64 (Steele et al. 2014) over both."""
    state = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((state ^ (state >> 31)) >> 11) / (1 << 53)


class Sample:
    """What was drawn for each row of a batch, on its way to the host.

    tokens: int64 [R] where the logits are; in place of one that can't be drawn, any id.
    """

    def __init__(self, tokens: Tensor, finite: Tensor, logprobs: Logprobs | None) -> None:
        self.tokens = tokens
        self._logprobs = logprobs
        self._found = [to_host(tensor) for tensor in (tokens, finite, *(logprobs.tensors if logprobs else ()))]
        self._arrived = torch.cuda.Event() if tokens.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[Drawn | None]:
        """Each row's token; None for a row whose logits are not all finite. Waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens, finite, *top = (tensor.tolist() for tensor in self._found)
        logprobs = self._logprobs.by_row(*top) if self._logprobs else {}
        return [Drawn(token, logprobs.get(row)) if finite[row] else None for row, token in enumerate(tokens)]


def sample(logits: Tensor, draws: Rows[Draw]) -> Sample:
    """Draws one token per row of logits[R, vocab], without waiting for the device.

    Log-probabilities are of the logits as they came; then banned ids are masked, then temperature, top-k, top-p, min-p.
    """
    logits = logits.float()
    allowed = _ban(logits, draws)
    tokens = allowed.argmax(-1)
    random = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if random:
        rows = to_device(random, logits.device)
        tokens[rows] = _draw(allowed[rows], [draws[row] for row in random])
    return Sample(tokens, logits.isfinite().all(-1), _top_logprobs(logits, tokens, draws))


def _ban(logits: Tensor, draws: Rows[Draw]) -> Tensor:
    banned = [(row, token) for row, draw in enumerate(draws) for token in draw.banned]
    if not banned:
        return logits
    rows, ids = to_device(banned, logits.device).T
    return logits.index_put((rows, ids), logits.new_full((), float("-inf")))


def _draw(logits: Tensor, draws: Rows[Draw]) -> Tensor:
    """Inverse-CDF sampling over the filtered probabilities of logits[R, vocab]: int64 [R]."""

    def column(values: list[float]) -> Tensor:
        return to_device(values, logits.device)[:, None]

    params = [draw.sampling for draw in draws]
    # Shifted first: dividing by a tiny temperature then overflows only downwards, to probability 0.
    temperatures = column([max(p.temperature, _COLDEST) for p in params])
    shifted = (logits - logits.amax(-1, keepdim=True)) / temperatures
    probabilities, ids = shifted.softmax(-1).sort(dim=-1, descending=True)
    rank = torch.arange(probabilities.shape[-1], device=logits.device)
    top_k = column([p.top_k or probabilities.shape[-1] for p in params])
    probabilities = probabilities.masked_fill(rank >= top_k, 0)
    before = probabilities.cumsum(-1) - probabilities  # the likeliest has 0 before it, so it always stays
    total = probabilities.sum(-1, keepdim=True)
    outside = before >= column([p.top_p for p in params]) * total
    outside |= probabilities < column([p.min_p for p in params]) * probabilities[:, :1]
    outside[:, 0] = False
    cumulative = probabilities.masked_fill(outside, 0).double().cumsum(-1)
    point = to_device([uniform(d.sampling.seed, d.position) for d in draws], logits.device, torch.double)
    chosen = torch.searchsorted(cumulative, point[:, None] * cumulative[:, -1:], right=True)
    # Rounding may put the point on the very end: the last id that can be drawn is the nearest.
    drawable = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, chosen.minimum(drawable))[:, 0]


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities for the rows that asked for them."""

    rows: list[int]
    wanted: list[int]  # of each: how many of the likeliest
    tensors: tuple[Tensor, Tensor, Tensor]  # of the rows: the drawn token's [n], the likeliest ones' [n, k], their ids

    def by_row(self, chosen: list[float], values: list[list[float]], ids: list[list[int]]) -> dict[int, TokenLogprobs]:
        """As they are told, given what `tensors` hold."""
        return {
            row: TokenLogprobs(own, tuple(zip(i[:count], v[:count], strict=True)))
            for row, own, count, i, v in zip(self.rows, chosen, self.wanted, ids, values, strict=True)
        }


def _top_logprobs(logits: Tensor, tokens: Tensor, draws: Rows[Draw]) -> Logprobs | None:
    asked = [(row, draw.sampling.logprobs) for row, draw in enumerate(draws)]
    wanted = {row: count for row, count in asked if count is not None}
    if not wanted:
        return None
    rows = to_device(list(wanted), logits.device)
    logprobs = logits[rows].log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[rows][:, None])[:, 0]
    values, ids = logprobs.topk(min(max(wanted.values()), logits.shape[-1]), dim=-1)
    return Logprobs(list(wanted), list(wanted.values()), (chosen, values, ids))
