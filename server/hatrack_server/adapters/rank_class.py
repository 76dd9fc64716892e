"""Ranks come in classes, so that a batch's programs lie in few stacks."""

from __future__ import annotations


def rank_class(rank: int) -> int:
    """The next power of two: what a low-rank piece of this rank is padded to in a pool."""
    return 1 << (rank - 1).bit_length()
