from __future__ import annotations

import pytest
import torch

from hatrack_server.adapters.host_tier import HostTier
from hatrack_server.adapters.pieces import LowRank, OutputShift, Pieces, ReplacedHead, ReplacedTokens

SIZE = 2 * 64  # two tensors, each in lines of its own


def program(value: float) -> Pieces:
    return (("up", LowRank(torch.full((2, 3), value), torch.full((2, 5), -value))),)


@pytest.fixture
def tier() -> HostTier:
    return HostTier(3 * SIZE, pinned=False)


def test_a_copy_is_alike_whatever_it_holds_and_shares_nothing(tier: HostTier) -> None:
    pieces: Pieces = (
        ("up", LowRank(torch.randn(2, 3).bfloat16(), torch.randn(5, 2).mT)),
        ("up", OutputShift(torch.randn(5))),
        ("embed", ReplacedTokens(torch.tensor([3, 2**24 + 1]), torch.randn(2, 3))),
        ("head", ReplacedHead(torch.randn(1, 3))),
    )
    tier = HostTier(10_000, pinned=False)
    tier.put("a", pieces)
    copied = tier.get("a")
    assert copied is not None
    for (module, piece), (copied_module, copy) in zip(pieces, copied, strict=True):
        assert (module, type(piece)) == (copied_module, type(copy))
        for one, other in zip(piece.tensors, copy.tensors, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            one.zero_()
            assert other.any()


def test_the_least_recently_used_goes_first_and_the_budget_holds(tier: HostTier) -> None:
    for value, digest in enumerate("abc", 1):
        tier.put(digest, program(float(value)))
    assert tier.bytes == 3 * SIZE
    assert tier.get("a")
    tier.put("d", program(4.0))
    assert [digest in tier for digest in "abcd"] == [True, False, True, True]
    assert tier.get("b") is None
    assert tier.bytes == 3 * SIZE


def test_what_is_there_is_not_copied_again(tier: HostTier) -> None:
    tier.put("a", program(1.0))
    before = tier.get("a")
    tier.put("a", program(2.0))
    assert tier.get("a") is before


def test_one_that_no_budget_would_hold_costs_the_others_nothing(tier: HostTier) -> None:
    tier.put("a", program(1.0))
    tier.put("huge", (("up", OutputShift(torch.ones(1000))),))
    assert ("a" in tier, "huge" in tier) == (True, False)


def test_dropping_gives_the_memory_back(tier: HostTier) -> None:
    tier.put("a", program(1.0))
    tier.put("empty", ())
    for digest in ("a", "empty", "never seen"):
        tier.drop(digest)
    assert ("a" in tier, tier.bytes) == (False, 0)
