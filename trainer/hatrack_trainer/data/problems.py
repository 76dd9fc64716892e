"""What is wrong with a file, as a list for its author: nobody wants to meet the mistakes of a file one by one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hatrack_trainer.errors import DataError
from hatrack_trainer.wording import printable, shortened

SHOWN = 20
QUOTED = 80
"""Characters of a text that is quoted."""


@dataclass(frozen=True, slots=True)
class Flaw:
    """One thing that is wrong with a row; `field` is its place, e.g. `messages[2].role`, or empty."""

    field: str
    what: str


class WrongRow(Exception):
    """A row can't be learned from, for every reason in `flaws`."""

    def __init__(self, *flaws: Flaw) -> None:
        super().__init__(*flaws)
        self.flaws = flaws


@dataclass(frozen=True, slots=True)
class Problem:
    """A flaw of a file: on one of its lines, counted from 1, or of the file as a whole."""

    file: Path
    what: str
    line: int | None = None
    field: str = ""

    def __str__(self) -> str:
        place = str(self.file) if self.line is None else f"{self.file}:{self.line}"
        return printable(": ".join(filter(None, (place, self.field, self.what))))


class InvalidData(DataError):
    """Everything that is wrong with the data; its text has a line for each of the first SHOWN problems."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        more = len(problems) - SHOWN
        super().__init__("\n".join([*map(str, problems[:SHOWN]), *([f"… and {more} more"] if more > 0 else [])]))


def nearest(word: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known word that `word` most likely is a misspelling of; 1 is the likeness of equal words."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)), None)


def quoted(text: str) -> str:
    """The text as JSON would write it, on one line that any terminal can show; of a long one its ends."""
    return printable(json.dumps(shortened(text, QUOTED), ensure_ascii=False))
