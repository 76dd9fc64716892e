"""The work that every system is measured on: cases, prompts, and the folders that hold base and adapters."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

PROMPT_TOKENS = 32
DECODE_STEPS = 24
PREFILL_NEW_TOKENS = 2  # a run this short is nearly all prefill
WARM_UP_NEW_TOKENS = 3
RANK = 16


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
        draw = random.Random(f"{self} {run} {phase}")
        return [[draw.randrange(5, 256) for _ in range(PROMPT_TOKENS)] for _ in range(self.rows)]


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


@dataclass(frozen=True, slots=True)
class Measurement:
    """One system on one case, once."""

    step_ms: float
    """The mean decode step of the full batch."""
    prefill_s: float
    """All rows from prompt to second token."""
