"""What an adapter may be called. Server and trainer both import this, so that a name is refused before a run, too."""

from __future__ import annotations

import re

NAME_RULE = "must be 1 to 64 of a-z, 0-9, '-', '_' and '.', starting with a letter or a digit"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)


def is_adapter_name(text: str) -> bool:
    """Whether `text` keeps NAME_RULE."""
    return _NAME.fullmatch(text) is not None
