"""Whether a run's rows fit the base's context: told before the base is loaded. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hatrack_server.model.checkpoint import read_text_config
from hatrack_trainer.config import DataSection, TrainConfig
from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods import Method

SHORTEST = 2
"""Tokens of a row: one to go on from, one to learn."""


def within_context(config: TrainConfig, checkpoint: Path, say: Callable[[str], None]) -> TrainConfig:
    """The configuration with rows that the base has positions for; as `rows_within_context`."""
    return config.model_copy(update={"data": rows_within_context(config.data, config.adapter, checkpoint, say)})


def rows_within_context(
    section: DataSection, adapter: Method | None, checkpoint: Path, say: Callable[[str], None]
) -> DataSection:
    """Lowers a `max_length` that nobody has set to what the base has positions for, and says so.

    Raises UsageError, naming the key, for one that is set beyond them, and for virtual tokens that leave none.
    """
    positions, virtual = _positions(checkpoint), adapter.virtual_tokens if adapter else 0
    if positions is None or section.max_length + virtual <= positions:
        return section
    room = positions - virtual
    left = f"the base's {positions} positions" + (f", of which adapter.tokens takes {virtual}" if virtual else "")
    if room < SHORTEST:
        raise UsageError(f"adapter.tokens: {virtual} leave no room for text in the base's {positions} positions")
    if "max_length" in section.model_fields_set:
        raise UsageError(f"data.max_length: {section.max_length} is more than {left}; {room} is the most")
    say(f"data.max_length: {room}, for {left}")
    return section.model_copy(update={"max_length": room})


def _positions(checkpoint: Path) -> int | None:
    """The longest context that the checkpoint claims, in tokens; None where it claims none."""
    config = read_text_config(checkpoint)
    found = config.get("max_position_embeddings", config.get("n_positions"))  # GPT-2's name
    return found if isinstance(found, int) else None
