"""The trackers that transformers' Trainer can report to. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from hatrack_trainer.config import Tracker
from hatrack_trainer.errors import UsageError

DISTRIBUTIONS: dict[Tracker, str] = {"comet_ml": "comet-ml"}
"""What pip calls a tracker, where that is not its own name."""


def check_trackers(trackers: Iterable[Tracker]) -> None:
    """Raises UsageError, with the `pip install`, for the first one that is not installed."""
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise UsageError(
                f"train.trackers: {tracker} is not installed: pip install {DISTRIBUTIONS.get(tracker, tracker)}"
            )
