"""The work that every system is measured on: cases, prompts, and the folders that hold base and adapters.

Nothing but the standard library: peers import it in environments of their own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SHAPES = ("tiny", "tinyllama-1.1b", "llama-3-8b")
PROMPT_TOKENS = 32
DECODE_STEPS = 24
PREFILL_NEW_TOKENS = 2  # a run this short is nearly all prefill
WARM_UP_NEW_TOKENS = 3
# Early rows decode while late ones are still prefilled: so that all are there for DECODE_STEPS, they go on longer.
LEAD = 16
DECODE_NEW_TOKENS = 1 + DECODE_STEPS + LEAD
RANK = 16
SMALL = "small"  # the adapter that many others are copies of


@dataclass(frozen=True, slots=True)
class Case:
    """A batch: `rows` completions at once, spread over `distinct` LoRA adapters; 0 is the base alone.

    With `mixed`, over as many of the adapters of all methods.
    """

    rows: int
    distinct: int
    mixed: bool = False

    @classmethod
    def parse(cls, text: str) -> Case:
        """From "ROWSxDISTINCT"; raises ValueError."""
        rows, distinct = map(int, text.split("x"))
        if rows < 1 or not 0 <= distinct <= rows:
            raise ValueError(f"{text}: needs at least one row, and no more adapters than rows")
        return cls(rows, distinct)

    def __str__(self) -> str:
        return f"{self.rows}x{self.distinct}" + (" mixed" if self.mixed else "")

    def adapters(self) -> list[str]:
        """The adapter's name of each row; "" for the base alone."""
        kind = "m" if self.mixed else "a"
        return [f"{kind}{row % self.distinct}" if self.distinct else "" for row in range(self.rows)]

    def prompts(self, run: int, phase: str) -> list[list[int]]:
        """Token ids per row: the same for every system, and never twice, lest a prefix cache remember them."""
        return [prompt(f"{self} {run} {phase} {row}") for row in range(self.rows)]


def prompt(seed: str) -> list[int]:
    """PROMPT_TOKENS random ids of bytes: another seed, other ids."""
    draw = random.Random(seed)
    return [draw.randrange(5, 256) for _ in range(PROMPT_TOKENS)]


def with_bases(cases: Sequence[Case]) -> list[Case]:
    """First the base alone with as many rows as each case has, then the cases; none twice."""
    return list(dict.fromkeys([*(Case(case.rows, 0) for case in cases), *cases]))


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where the base and the adapters of one shape lie."""

    folder: Path

    @property
    def base(self) -> Path:
        """A checkpoint in Hugging Face's format."""
        return self.folder / "base"

    def adapter(self, name: str) -> Path:
        """An adapter in PEFT's format."""
        return self.folder / "adapters" / name

    def adapter_bytes(self, name: str) -> int:
        """Of its weights, in the file and when it is served: both have 16 bits per value."""
        return (self.adapter(name) / "adapter_model.safetensors").stat().st_size


@dataclass(frozen=True, slots=True)
class Measurement:
    """One system on one case, once."""

    step_ms: float
    """The mean decode step of the full batch."""
    prefill_s: float
    """All rows from prompt to second token."""


def decode_ms(rows: Sequence[Sequence[float]]) -> float:
    """The mean step of DECODE_STEPS, given when each row got each of its tokens, in seconds.

    From when every row has its first token until every row has DECODE_STEPS more than it had then. Raises ValueError
    when a row ends earlier: the batch was not full all the time.
    """
    start = max(row[0] for row in rows)
    ends = []
    for row in rows:
        before = sum(arrival <= start for arrival in row)
        if before + DECODE_STEPS > len(row):
            raise ValueError(f"a row had {before} of its {len(row)} tokens when the last one began")
        ends.append(row[before + DECODE_STEPS - 1])
    return (max(ends) - start) / DECODE_STEPS * 1e3
