"""A JSONL file to JSON objects, each with its line number; strict where JSON or UTF-8 are, for silence costs a run."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hatrack_trainer.data.problems import InvalidData, Problem, quoted


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a file."""

    number: int  # from 1
    row: dict[str, Any]


def check_data_file(file: Path) -> None:
    """Raises InvalidData when the file can't be opened, or is none: a pipe can't be read twice."""
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise InvalidData([Problem(file, "is no file: save what it gives as one")])
        file.open("rb").close()
    except (OSError, ValueError) as error:  # a path with a NUL in it is a ValueError
        raise InvalidData([Problem(file, f"can't be read: {getattr(error, 'strerror', error)}")]) from None


def read_lines(file: Path) -> tuple[list[Line], list[Problem]]:
    """The file's objects, and what is wrong with its other lines; empty lines don't count, and a BOM is fine.

    Raises InvalidData for what is wrong with the file as a whole.
    """
    check_data_file(file)
    data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InvalidData([Problem(file, "is UTF-16: save it as UTF-8")])
    if _is_array(data):
        raise InvalidData([Problem(file, "is one JSON array: write one object per line, as `jq -c '.[]'` does")])
    lines, problems = [], []
    # Bytes, because `str.splitlines` would cut at U+2028, too.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            try:
                lines.append(Line(number, _parse(line)))
            except ValueError as error:
                problems.append(Problem(file, str(error), number))
    if not lines and not problems:
        raise InvalidData([Problem(file, "holds no rows")])
    return lines, problems


def kind(value: object) -> str:
    """What JSON calls a value, e.g. "a number"."""
    names = {type(None): "null", bool: "a boolean", float: "a number", str: "text", list: "an array"}
    return names.get(type(value), "an object")


def _is_array(data: bytes) -> bool:
    # Many datasets are given out like that; else each of their lines would be a problem.
    try:
        return data.lstrip().startswith(b"[") and isinstance(json.loads(data), list)
    except (ValueError, RecursionError):
        return False


def _parse(line: bytes) -> dict[str, Any]:
    """Raises ValueError, in words for the user."""
    try:
        row = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg[0].lower()}{error.msg[1:]} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, not {kind(row)}")
    return row


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quoted(key)} comes twice in one object")
    return row


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"not JSON: {constant} is not a number in JSON")


# Numbers are not read: as floats they may be of any length.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_int=float)
