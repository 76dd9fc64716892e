"""The next token of each row, from its own logits, parameters and random number only."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

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


def sample(logits: Tensor, draws: Rows[Draw]) -> list[Drawn | None]:
    """Draws one token per row of logits[R, vocab]; None for a row whose logits are not all finite.

    Log-probabilities are of the logits as they came; then banned ids are masked, then temperature, top-k, top-p, min-p.
    """
    logits = logits.float()
    finite = logits.isfinite().all(-1).tolist()
    allowed = _ban(logits, draws)
    chosen = allowed.argmax(-1)
    random = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0 and finite[row]]
    if random:
        chosen[random] = _draw(allowed[random], [draws[row] for row in random])
    tokens: list[int] = chosen.tolist()
    logprobs = _top_logprobs(logits, tokens, draws)
    return [Drawn(token, logprobs.get(row)) if finite[row] else None for row, token in enumerate(tokens)]


def _ban(logits: Tensor, draws: Rows[Draw]) -> Tensor:
    rows = [row for row, draw in enumerate(draws) for _ in draw.banned]
    if not rows:
        return logits
    ids = [token for draw in draws for token in draw.banned]
    logits = logits.clone()
    logits[rows, ids] = float("-inf")
    return logits


def _draw(logits: Tensor, draws: Rows[Draw]) -> Tensor:
    """Inverse-CDF sampling over the filtered probabilities of logits[R, vocab]: int64 [R]."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

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
    point = torch.tensor(
        [uniform(d.sampling.seed, d.position) for d in draws], device=logits.device, dtype=torch.double
    )
    chosen = torch.searchsorted(cumulative, point[:, None] * cumulative[:, -1:], right=True)
    # Rounding may put the point on the very end: the last id that can be drawn is the nearest.
    drawable = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, chosen.minimum(drawable))[:, 0]


def _top_logprobs(logits: Tensor, tokens: list[int], draws: Rows[Draw]) -> dict[int, TokenLogprobs]:
    """By row, for the rows that asked for them."""
    rows = [row for row, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    if not rows:
        return {}
    logprobs = logits[rows].log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor([[tokens[row]] for row in rows], device=logits.device))[:, 0].tolist()
    wanted = [draws[row].sampling.logprobs or 0 for row in rows]
    values, ids = logprobs.topk(min(max(wanted), logits.shape[-1]), dim=-1)
    return {
        row: TokenLogprobs(own, tuple(zip(i[:count], v[:count], strict=True)))
        for row, own, count, i, v in zip(rows, chosen, wanted, ids.tolist(), values.tolist(), strict=True)
    }
