"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes a text on up to the first stop string, of which nothing is ever emitted.

    First is the one that is complete first, so that the result doesn't depend on where the text was split; of those
    that end together, the one that began first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be emitted now, and whether a stop was met; push nothing after one was."""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = len(text) - self._possible_start(text)
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """What was held back for a stop that never came."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """The length of the longest suffix of `text` that begins a stop."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        suffixes = (text[len(text) - length :] for length in range(longest, 0, -1))
        return next((len(suffix) for suffix in suffixes if any(stop.startswith(suffix) for stop in self._stops)), 0)
