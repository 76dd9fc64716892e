"""One completion being generated: plain state that the scheduler reads and the step advances."""

from __future__ import annotations

from dataclasses import dataclass, field

from hatrack_server.types import Generation

PENDING = -1  # in place of a token that a pass in flight draws


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` grow, the last one maybe PENDING; the keys and values of the first `computed` of them lie in `blocks`.

    An adapter's virtual tokens come first, as zeros: the digest is in every block's key, so they can't be taken for
    others.
    """

    generation: Generation
    arrival: float  # time.monotonic() seconds
    tokens: list[int] = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of the full blocks among `tokens`
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first admission
    admitted: float | None = None

    def __post_init__(self) -> None:
        self.tokens = [0] * self.virtual_tokens + list(self.generation.prompt)

    @property
    def id(self) -> int:
        """The generation's."""
        return self.generation.id

    @property
    def digest(self) -> str | None:
        """The artifact's digest; None for the base alone."""
        return self.generation.artifact.digest if self.generation.artifact else None

    @property
    def virtual_tokens(self) -> int:
        """See Artifact."""
        return self.generation.artifact.virtual_tokens if self.generation.artifact else 0

    @property
    def prefix_tokens(self) -> int:
        """See Artifact."""
        return self.generation.artifact.prefix_tokens if self.generation.artifact else 0

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 in decode, more in prefill; 0 when none is wanted."""
        complete = self.generated >= self.generation.sampling.max_tokens
        return 0 if complete else len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.virtual_tokens - len(self.generation.prompt)
