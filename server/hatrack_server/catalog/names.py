"""Names of adapters, and references to their versions: `name` is the live version, `name@2` exactly version 2."""

from __future__ import annotations

import re
from typing import NamedTuple

from hatrack.names import NAME_RULE, is_adapter_name
from hatrack_server.errors import InvalidRequest, NotFound

_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)


class Reference(NamedTuple):
    """A parsed reference; `version` 0 stands for the live one."""

    name: str
    version: int


def check_name(text: str, field: str) -> None:
    """Raises InvalidRequest naming `field` unless `text` may name an adapter."""
    if not is_adapter_name(text):
        raise InvalidRequest(field, NAME_RULE)


def parse_reference(text: str) -> Reference:
    """Parses `name` or `name@2`; raises NotFound for any other text, because it can name nothing."""
    name, at, version = text.partition("@")
    if not is_adapter_name(name) or (at and not _VERSION.fullmatch(version)):
        raise not_found(text)
    return Reference(name, int(version) if at else 0)


def not_found(reference: str) -> NotFound:
    """The one answer for what is absent and for what is another tenant's."""
    return NotFound(f"adapter {reference[:80]!r} was not found")
