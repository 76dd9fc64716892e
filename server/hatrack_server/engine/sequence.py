"""One completion being generated: plain state that the scheduler reads and the step advances."""

from __future__ import annotations

from dataclasses import dataclass, field

from hatrack_server.types import Generation


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` grow; the keys and values of the first `computed` of them lie in `blocks`."""

    generation: Generation
    arrival: float  # time.monotonic() seconds
    tokens: list[int] = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of the full blocks among `tokens`
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first admission
    admitted: float | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.generation.prompt)

    @property
    def id(self) -> int:
        """The generation's."""
        return self.generation.id

    @property
    def digest(self) -> str | None:
        """The artifact's digest; None for the base alone."""
        return self.generation.artifact.digest if self.generation.artifact else None

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 in decode, more in prefill."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - len(self.generation.prompt)
