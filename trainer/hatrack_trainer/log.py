"""What a run did, step by step: one JSON object a line, for people and for the loss plot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any

REWARDS = {"rewards/margins": "reward_margin", "rewards/accuracies": "reward_accuracy"}
"""TRL's names of what preference pairs have besides a loss, and ours."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One optimizer step, or one evaluation after it."""

    step: int  # from 1
    loss: float | None = None  # mean over the tokens that carry loss, or over preference pairs
    eval_loss: float | None = None
    grad_norm: float | None = None  # before clipping
    learning_rate: float | None = None
    reward_margin: float | None = None  # of preference pairs: how far the chosen's reward is above the rejected's
    reward_accuracy: float | None = None  # and for what share of them it is above


def log_entries(history: Iterable[dict[str, Any]]) -> list[LogEntry]:
    """Of the trainer's `state.log_history`, whose last lines sum up the run."""
    return [_entry(logged) for logged in history if "loss" in logged or "eval_loss" in logged]


def _entry(logged: dict[str, Any]) -> LogEntry:
    names = {field.name for field in fields(LogEntry)}
    ours = {REWARDS.get(name.removeprefix("eval_"), name): value for name, value in logged.items()}
    return LogEntry(**{name: value for name, value in ours.items() if name in names})


def losses(entries: Iterable[LogEntry], name: str) -> list[tuple[int, float]]:
    """(step, value) of the entries that have `loss` or `eval_loss`."""
    return [(entry.step, value) for entry in entries if (value := getattr(entry, name)) is not None]


def mean_loss(entries: Iterable[LogEntry]) -> float:
    """Over all steps."""
    return fmean(loss for _, loss in losses(entries, "loss"))


def best_step(entries: Iterable[LogEntry]) -> int | None:
    """The first step with the lowest loss on held-out rows; None when that was never taken."""
    return min(losses(entries, "eval_loss"), key=lambda found: found[1], default=(None, 0.0))[0]


def as_json_lines(entries: Iterable[LogEntry]) -> str:
    """A line for each, without what it lacks."""
    present = ({name: value for name, value in asdict(entry).items() if value is not None} for entry in entries)
    return "".join(json.dumps(each) + "\n" for each in present)
