"""What sentences for the user share."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """The text on one line that any terminal can show: nothing in it may control colours, or where text is written."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def shortened(text: str, most: int) -> str:
    """The text, or its two ends where it has more than `most` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


def some(names: Sequence[str], most: int) -> str:
    """The first `most` of them, and how many more there are: "a, b and 3 more"."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
