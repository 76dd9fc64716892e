"""Sequences as short as a test needs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from hatrack_server.engine.sequence import Sequence
from hatrack_server.types import Artifact, Generation, Sampling

NewSequence = Callable[..., Sequence]


@pytest.fixture(scope="session")
def new_sequence() -> NewSequence:
    """Makes a sequence with the next id: `prompt` is its tokens, or how many of them (then never two alike)."""
    ids = itertools.count(1)

    def make(
        prompt: int | Iterable[int],
        *,
        tenant: str = "a",
        digest: str | None = None,
        salt: bytes = b"salt",
        soft_tokens: int = 0,
        prefix_tokens: int = 0,
        deadline: float | None = None,
    ) -> Sequence:
        number = next(ids)
        tokens = range(1000 * number, 1000 * number + prompt) if isinstance(prompt, int) else prompt
        artifact = Artifact(digest, Path(digest), soft_tokens, prefix_tokens) if digest else None
        return Sequence(Generation(number, tenant, salt, artifact, tuple(tokens), Sampling(), deadline), arrival=0.0)

    return make
