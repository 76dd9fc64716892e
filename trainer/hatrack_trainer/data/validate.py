"""`hatrack train validate`: what training would make of the data, told without the base's weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hatrack_trainer.base import KEY, find_base
from hatrack_trainer.config import DataSection
from hatrack_trainer.context import rows_within_context
from hatrack_trainer.data.preview import preview
from hatrack_trainer.data.read import ExampleSet, read_data
from hatrack_trainer.data.remarks import format_remark, warnings
from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods import Method
from hatrack_trainer.wording import printable


def validate(
    section: DataSection, model: str, console: Console, *, adapter: Method | None = None, key: str = KEY
) -> None:
    """Prints how the data is read, what of it is lost, and what of a row is learned.

    `adapter` may take some of the base's context; `key` is where the base is named. Raises what `read_data` does, and
    UsageError for an absent base, part of one, or one whose context is too short.
    """
    checkpoint = checkpoint_without_weights(model, key)
    section = rows_within_context(section, adapter, checkpoint, lambda sentence: _print(console, sentence))
    data = read_data(section, checkpoint)
    for part in data.files:
        _print(console, format_remark(part))
        _print(console, f"  {_statistics(part)}")
    for warning in warnings(data, section.max_length):
        _print(console, f"warning: {warning}")
    shown = next((entry for entry in data.train.entries if not entry.truncated), data.train.entries[0])
    learned = "the first ⟦this⟧ is learned against the second" if data.train.pairs else "only ⟦this⟧ is learned"
    _print(console, f"line {shown.line.number} as the model sees it, where {learned}:")
    for entry in data.train.entries:
        if entry.line == shown.line:
            console.print(preview(entry.example, checkpoint), soft_wrap=True)


def checkpoint_without_weights(model: str, key: str = KEY) -> Path:
    """The folder of a base's configuration, tokenizer and template; of a hub id, only these are downloaded."""
    checkpoint = find_base(model, key=key, weights=False)
    if not (checkpoint / "tokenizer.json").is_file():
        raise UsageError(f"{key}: {model} has no tokenizer.json")
    return checkpoint


def _statistics(part: ExampleSet) -> str:
    lengths = sorted(entry.length for entry in part.entries)
    learned = sum(example.learned for example in part.examples)
    return (
        f"{sum(lengths)} tokens, of which {learned} carry loss; longest {lengths[-1]}, p50 {_quantile(lengths, 0.5)}, "
        f"p95 {_quantile(lengths, 0.95)}; {len(part.truncated)} of {len(part.lines)} rows lose their end"
    )


def _quantile(ordered: Sequence[int], share: float) -> int:
    """By nearest rank, so that it is the length of a row."""
    return ordered[math.ceil(share * len(ordered)) - 1]


def _print(console: Console, sentence: str) -> None:
    console.print(Text(printable(sentence)), soft_wrap=True)
