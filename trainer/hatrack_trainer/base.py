"""Finding the base that a configuration, or a command's option, names. Importing this needs no torch."""

from __future__ import annotations

from pathlib import Path

from hatrack_server.errors import StartupError
from hatrack_server.model.checkpoint import resolve_checkpoint
from hatrack_trainer.errors import UsageError

KEY = "base.model"


def find_base(name: str, *, key: str = KEY, weights: bool = True) -> Path:
    """The folder of the base's checkpoint; see `resolve_checkpoint`. Raises UsageError, naming the key."""
    try:
        return resolve_checkpoint(name, weights=weights)
    except StartupError as error:
        raise UsageError(f"{key}: {error.message}") from None
