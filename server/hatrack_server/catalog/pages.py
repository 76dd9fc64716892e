"""Pages of a listing that is ordered by name."""

from __future__ import annotations

import base64
import binascii

from hatrack.names import is_adapter_name
from hatrack_server.errors import InvalidRequest

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000


def page_limit(page_size: int) -> int:
    """How many entries a page gets: 0 is the default, and more than the most is the most.

    Raises InvalidRequest("page_size") when it is negative.
    """
    if page_size < 0:
        raise InvalidRequest("page_size", "must not be negative")
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def encode_token(last_name: str) -> str:
    """The token of the page after the one that ends with `last_name`."""
    return base64.urlsafe_b64encode(last_name.encode()).decode().rstrip("=")


def decode_token(token: str) -> str:
    """The name that the page starts after, "" for the first; raises InvalidRequest("page_token")."""
    if not token:
        return ""
    try:
        name = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        name = ""
    if not is_adapter_name(name):
        raise InvalidRequest("page_token", "is not a token of an earlier page")
    return name
