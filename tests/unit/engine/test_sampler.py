from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hatrack_server.engine.sampler import Draw, Drawn, sample, uniform
from hatrack_server.types import Sampling

VOCAB = 12
EOS = 11
SAMPLES = 4000
FIXED = torch.tensor([2.0, -1.0, 0.5, 1.0, 3.0, -4.0, 0.0, 2.5, -0.5, 1.5, -2.0, 0.25])


def draw(position: int = 0, *, generated: int = 0, eos: frozenset[int] = frozenset({EOS}), **sampling: Any) -> Draw:
    return Draw(Sampling(**sampling), position, generated, eos)


def logits(rows: int, *, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def sampled(rows: Tensor, draws: list[Draw]) -> list[Drawn | None]:
    return sample(rows, draws).read()


def drawn(row: Tensor, draws: list[Draw]) -> list[int]:
    """The token of each draw, all from the same logits."""
    return [d.token for d in sampled(row.expand(len(draws), -1), draws) if d is not None]


def frequencies(**sampling: Any) -> Tensor:
    tokens = drawn(FIXED, [draw(position, seed=5, **sampling) for position in range(SAMPLES)])
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB) / SAMPLES


def exact(**sampling: Any) -> Tensor:
    """The filtered probabilities, one token after the other, as the documentation of the parameters says."""
    s = Sampling(**sampling)
    p = (FIXED.double() / s.temperature).softmax(-1)
    order = sorted(range(VOCAB), key=lambda i: -p[i])
    order = order[: s.top_k or VOCAB]
    total = sum(p[i] for i in order)
    kept: list[int] = []
    for i in order:
        if (kept and sum(p[j] for j in kept) >= s.top_p * total) or p[i] < s.min_p * p[order[0]]:
            break
        kept.append(i)
    out = torch.zeros(VOCAB, dtype=torch.double)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.8},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 6, "top_p": 0.7, "temperature": 1.5},
        {"top_p": 0.9, "min_p": 0.1, "temperature": 1.5},
        {"top_k": 10_000},
    ],
    ids=str,
)
def test_tokens_come_as_often_as_the_filtered_probabilities_say(sampling: dict[str, Any]) -> None:
    wanted, found = exact(**sampling), frequencies(**sampling)
    assert found[wanted == 0].sum() == 0
    # Five standard deviations of each count; the seed is fixed.
    assert ((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / SAMPLES).sqrt() + 1e-9).all()


def test_temperature_zero_is_argmax() -> None:
    rows = logits(20)
    tokens = [d.token for d in sampled(rows, [draw(temperature=0.0, seed=row) for row in range(20)]) if d]
    assert tokens == rows.argmax(-1).tolist()


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"temperature": 1e-6}, {"temperature": 1e-300}], ids=str)
def test_narrowest_sampling_is_greedy(sampling: dict[str, Any]) -> None:
    rows = 1e4 * logits(20)
    tokens = [d.token for d in sampled(rows, [draw(row, seed=row, **sampling) for row in range(20)]) if d]
    assert tokens == rows.argmax(-1).tolist()


def test_top_p_keeps_no_more_than_it_needs() -> None:
    even = torch.zeros(4)  # a quarter each, exactly
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.51, 3), (1.0, 4)):
        assert len(set(drawn(even, [draw(p, top_p=top_p) for p in range(100)]))) == kept


def test_a_row_draws_alike_alone_and_in_any_batch() -> None:
    rows = logits(16)
    draws = [
        draw(row, seed=row % 3, temperature=(0.0, 0.7, 1.3)[row % 3], top_p=0.9, top_k=row % 5, logprobs=row % 4)
        for row in range(16)
    ]
    alone = [sampled(rows[row : row + 1], [draws[row]])[0] for row in range(16)]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    mixed = sampled(rows[order], [draws[row] for row in order])
    for row, other in zip(order, mixed, strict=True):
        own = alone[row]
        assert own is not None
        assert other is not None
        assert other.token == own.token


def test_seed_and_position_both_matter() -> None:
    flat = torch.zeros(1000)
    tokens = [drawn(flat, [draw(p, seed=s) for p in range(50)]) for s in (1, 2)]
    assert tokens[0] != tokens[1]
    assert len(set(tokens[0])) > 40
    assert tokens[0] == drawn(flat, [draw(p, seed=1) for p in range(50)])


def test_uniform_is_uniform_over_seeds_and_positions() -> None:
    for numbers in (
        [uniform(7, position) for position in range(4000)],
        [uniform(seed, 3) for seed in range(4000)],
        [uniform((1 << 64) - 1 - seed, 3) for seed in range(4000)],
    ):
        assert all(0 <= number < 1 for number in numbers)
        counts = torch.histc(torch.tensor(numbers, dtype=torch.double), bins=20, min=0, max=1)
        chi_square = ((counts - 200) ** 2 / 200).sum()
        assert chi_square < 55  # 19 degrees of freedom: 1 in 40,000, and the numbers are fixed


def test_neighbouring_positions_are_uncorrelated() -> None:
    numbers = torch.tensor([uniform(7, position) for position in range(4000)], dtype=torch.double)
    pairs = torch.stack([numbers[:-1], numbers[1:]])
    assert abs(torch.corrcoef(pairs)[0, 1]) < 0.06


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_that_ends_a_completion_is_drawn_before_min_tokens(temperature: float) -> None:
    row = torch.zeros(VOCAB)
    row[[EOS, 3]] = 50.0
    options: dict[str, Any] = {"temperature": temperature, "min_tokens": 2, "stop_token_ids": frozenset({3})}
    early = drawn(row, [draw(p, generated=1, **options) for p in range(50)])
    assert not {EOS, 3} & set(early)
    assert set(drawn(row, [draw(p, generated=2, **options) for p in range(50)])) <= {EOS, 3}
    ignoring = drawn(row, [draw(p, generated=1, ignore_eos=True, **options) for p in range(50)])
    assert set(ignoring) == {EOS}


def test_a_ban_is_one_rows_alone() -> None:
    row = torch.zeros(2, VOCAB)
    row[:, EOS] = 50.0
    first, second = sampled(row, [draw(min_tokens=1), draw()])
    assert first is not None
    assert second is not None
    assert (first.token == EOS, second.token == EOS) == (False, True)
    assert (row[:, EOS] == 50.0).all()  # the model's logits stay as they came


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_ends_alone(poison: float) -> None:
    rows = logits(5)
    draws = [draw(row, seed=row, temperature=float(row % 2), logprobs=2) for row in range(5)]
    clean = sampled(rows, draws)
    rows[2, 4] = poison
    rows[3, 0] = poison
    assert sampled(rows, draws) == [clean[0], clean[1], None, None, clean[4]]


def test_all_rows_may_be_lost() -> None:
    assert sampled(torch.full((2, VOCAB), math.nan), [draw(), draw(temperature=0.0)]) == [None, None]


def test_logprobs_are_the_models_own() -> None:
    rows = logits(4)
    draws = [
        draw(temperature=0.3, top_k=2, logprobs=3),  # filters and temperature don't show
        draw(temperature=0.0, min_tokens=5, logprobs=VOCAB),  # nor does a ban
        draw(logprobs=0),
        draw(),
    ]
    wanted = rows.double().log_softmax(-1)
    found = sampled(rows, draws)
    for row, count in enumerate((3, VOCAB, 0)):
        d = found[row]
        assert d is not None
        assert d.logprobs is not None
        assert d.logprobs.chosen == pytest.approx(wanted[row, d.token].item(), abs=1e-5)
        ids = [token for token, _ in d.logprobs.top]
        values = [value for _, value in d.logprobs.top]
        assert ids == wanted[row].argsort(descending=True)[:count].tolist()
        assert values == pytest.approx(wanted[row, ids].tolist(), abs=1e-5)
    assert found[3] is not None
    assert found[3].logprobs is None


def test_more_alternatives_than_tokens_gives_all_tokens() -> None:
    [found] = sampled(logits(1), [draw(logprobs=1000)])
    assert found is not None
    assert found.logprobs is not None
    assert len(found.logprobs.top) == VOCAB


def test_half_precision_and_great_logits_are_fine() -> None:
    rows = torch.tensor([[3e38, -3e38, 0.0], [-3e38, 1.0, 3e38]]).bfloat16()
    assert [d.token for d in sampled(rows, [draw(temperature=1e-3), draw(temperature=2.0)]) if d] == [0, 2]
