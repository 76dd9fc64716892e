"""JSON from a tenant: bounded, without duplicate keys, NaN or infinities."""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_DIGITS = 18  # within 64 bits


def parse_object(data: bytes) -> dict[str, Any]:
    """One JSON object; raises ValueError with a short reason for anything else.

    The caller bounds the size of `data`; nesting too deep for Python's parser is refused here.
    """
    try:
        parsed = json.loads(
            data.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_int=_int
        )
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        raise ValueError("a key appears twice")
    return parsed


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
