"""What a run did, step by step: one JSON object a line, for people and for the loss plot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One optimizer step, or one evaluation after it."""

    step: int  # from 1
    loss: float | None = None  # mean over the tokens that carry loss
    eval_loss: float | None = None
    grad_norm: float | None = None  # before clipping
    learning_rate: float | None = None


def log_entries(history: Iterable[dict[str, Any]]) -> list[LogEntry]:
    """Of the trainer's `state.log_history`, whose last lines sum up the run."""
    names = {field.name for field in fields(LogEntry)}
    return [
        LogEntry(**{name: value for name, value in logged.items() if name in names})
        for logged in history
        if "loss" in logged or "eval_loss" in logged
    ]


def losses(entries: Iterable[LogEntry], name: str) -> list[tuple[int, float]]:
    """(step, value) of the entries that have `loss` or `eval_loss`."""
    return [(entry.step, value) for entry in entries if (value := getattr(entry, name)) is not None]


def as_json_lines(entries: Iterable[LogEntry]) -> str:
    """A line for each, without what it lacks."""
    present = ({name: value for name, value in asdict(entry).items() if value is not None} for entry in entries)
    return "".join(json.dumps(each) + "\n" for each in present)
