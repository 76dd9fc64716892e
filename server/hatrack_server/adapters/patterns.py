"""Regular expressions of tenants, as PEFT's configuration allows them, matched within a budget of time and memory.

PEFT matches with `re`, which a hostile pattern can hang for ever. The `regex` package takes a timeout and releases the
interpreter's lock while it matches. Two things it does not bound are screened beforehand: it unrolls counted repeats
when it compiles, and it reads some texts differently than `re`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import regex

from hatrack_server.errors import InvalidArtifact

MAX_PATTERN_LENGTH = 1000
MAX_UNROLLING = 1000  # the product of all counts of one pattern
DEFAULT_SECONDS = 2.0  # a pattern for each of 560 modules, all honest, takes 0.7

_COUNTED = re.compile(r"\{(\d*),?(\d*)\}")
# Fuzzy matching `{e<=1}` and named classes `[[:alpha:]]` exist in `regex` alone; `re` takes both literally.
_REGEX_ONLY = re.compile(r"\{(?!\d*,?\d*\})|\[:")


class Budget:
    """Seconds that all patterns of one artifact may take together; what happens between them doesn't count."""

    def __init__(self, seconds: float = DEFAULT_SECONDS) -> None:
        self._left = seconds

    @contextmanager
    def spending(self, field: str) -> Iterator[float]:
        """Gives the seconds left, and takes off what passes; raises InvalidArtifact naming `field` without any left."""
        if self._left <= 0:
            raise _too_slow(field)
        start = time.monotonic()
        try:
            yield self._left
        except (TimeoutError, MemoryError):
            raise _too_slow(field) from None
        finally:
            self._left -= time.monotonic() - start


class Pattern:
    """One pattern of a tenant; `field` is the configuration's key that holds it, for messages."""

    def __init__(self, text: str, field: str, budget: Budget, *, template: str = "{}") -> None:
        """Compiles `text` inside `template`; raises InvalidArtifact when it is malformed or could take too much."""
        self._field = field
        self._budget = budget
        _screen(text, field)
        whole = template.format(text)
        try:
            with budget.spending(field):
                re.compile(whole)
                self._compiled = regex.compile(whole)
        except (re.error, regex.error, RecursionError, OverflowError):
            raise InvalidArtifact(field, f"{text!r} is not a regular expression") from None

    def fullmatch(self, name: str) -> bool:
        """Whether the pattern matches all of `name`; raises InvalidArtifact when the budget is spent."""
        with self._budget.spending(self._field) as seconds:
            return bool(self._compiled.fullmatch(name, timeout=seconds))

    def group_at_start(self, name: str, group: str) -> str | None:
        """What `group` holds when the pattern matches at the start of `name`; raises InvalidArtifact as above."""
        with self._budget.spending(self._field) as seconds:
            match = self._compiled.match(name, timeout=seconds)
        return match[group] if match else None


def _screen(text: str, field: str) -> None:
    if len(text) > MAX_PATTERN_LENGTH:
        raise InvalidArtifact(field, f"a pattern may have at most {MAX_PATTERN_LENGTH} characters")
    if _REGEX_ONLY.search(text):
        raise InvalidArtifact(field, f"{text!r}: braces may only hold counts, and classes like [:alpha:] don't exist")
    counts = (int(count or 1) for pair in _COUNTED.findall(text) for count in pair)
    if math.prod(max(count, 1) for count in counts) > MAX_UNROLLING:
        raise InvalidArtifact(field, f"{text!r} repeats too much")


def _too_slow(field: str) -> InvalidArtifact:
    return InvalidArtifact(field, "its patterns take too long to match; list the modules' names instead")
