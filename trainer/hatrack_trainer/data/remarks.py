"""What a user should know of sound data before a run: how it is read, and what of it is lost."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence

from hatrack_trainer.data.detect import SHAPES
from hatrack_trainer.data.example import Example
from hatrack_trainer.data.lines import Line
from hatrack_trainer.data.problems import quoted
from hatrack_trainer.data.read import Data, ExampleSet
from hatrack_trainer.wording import some

NAMED = 5
"""How many keys or lines are named before the rest is counted."""


def format_remark(part: ExampleSet) -> str:
    """Says how a file's rows are read."""
    unread = some([quoted(key) for key in sorted(part.format.unread(part.lines))], NAMED)
    return f"{part.file}: {_count(part.lines)} read as {part.format.name}, {SHAPES[part.format.name]}" + (
        f"; not read: {unread}" if unread else ""
    )


def warnings(data: Data, max_length: int) -> list[str]:
    """Says what of the data is lost, and which held-out rows are not."""
    return [warning for part in data.files for warning in _losses(part, max_length)] + _overlap(data)


def _losses(part: ExampleSet, max_length: int) -> Iterator[str]:
    for (key, near), having in part.format.misspelt(part.lines).items():
        yield f"{part.file}: {quoted(key)} is not read (did you mean {quoted(near)}?) in {_places(having)}"
    if cut := part.truncated:
        yield f"{part.file}: {max_length=} cuts off the end of {_places(cut)}, of which no stop token is learned"


def _overlap(data: Data) -> list[str]:
    if data.held_out is None:
        return []
    seen = {_digest(example) for example in data.train.examples}
    both = {entry.line.number: entry.line for entry in data.held_out.entries if _digest(entry.example) in seen}
    if not both:
        return []
    places = _places([*both.values()])
    return [f"{data.held_out.file}: its loss says little of new text, for {data.train.file} also has {places}"]


def _digest(example: Example) -> bytes:
    """Stands for the example, of which a big file's would not fit into a set."""
    return hashlib.sha256(array("q", example.input_ids + example.labels).tobytes()).digest()


def _places(lines: Sequence[Line]) -> str:
    """E.g. "3 rows (lines 2, 5, 8)"."""
    numbers = some([str(line.number) for line in lines], NAMED)
    return f"{_count(lines)} ({'line' if len(lines) == 1 else 'lines'} {numbers})"


def _count(lines: Sequence[Line]) -> str:
    return "1 row" if len(lines) == 1 else f"{len(lines)} rows"
