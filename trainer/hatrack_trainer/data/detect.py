"""Which format a file has, told from the keys of its rows, and its rows parsed as that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from hatrack_trainer.data.formats import (
    Alpaca,
    Chat,
    ChatPreference,
    Preference,
    PromptCompletion,
    RawText,
    Row,
    ShareGpt,
    Target,
)
from hatrack_trainer.data.lines import Line, kind
from hatrack_trainer.data.problems import Flaw, WrongRow, nearest, quoted

FORMATS: dict[str, type[Row]] = {
    "prompt-completion": PromptCompletion,
    "chat": Chat,
    "alpaca": Alpaca,
    "sharegpt": ShareGpt,
    "text": RawText,
    "preference": Preference,
}
REQUIRED = {
    name: {key for key, field in row_type.model_fields.items() if field.is_required()}
    for name, row_type in FORMATS.items()
}
SHAPES = {
    "prompt-completion": '{"prompt", "completion"}',
    "chat": '{"messages": [{"role", "content"}, …]}',
    "alpaca": '{"instruction", "input", "output"}, learned as a chat of two turns',
    "sharegpt": '{"conversations": [{"from", "value"}, …]}',
    "text": '{"text"}',
    "preference": '{"prompt", "chosen", "rejected"}',
}
KEY_LIKENESS = 0.75
"""Any word may be a key, so that less than this is no misspelling."""


@dataclass(frozen=True, slots=True)
class FileFormat:
    """The format of a file's rows; `line` is where it was told from, or None where the user named it."""

    name: str
    line: int | None = None

    def parse(self, row: dict[str, Any]) -> list[Target]:
        """What the row wants learned. Raises WrongRow, with all of its flaws."""
        if self.line is not None:
            self._check_unmixed(row)
        try:
            return self._row_type(row).model_validate(row).targets()
        except ValidationError as error:
            raise WrongRow(*map(_flaw, error.errors())) from None

    def unread(self, lines: Iterable[Line]) -> dict[str, list[Line]]:
        """The keys that the format doesn't know, each with the lines that have it."""
        known = FORMATS[self.name].model_fields
        found: dict[str, list[Line]] = {}
        for line in lines:
            for key in filter(lambda key: key not in known, line.row):
                found.setdefault(key, []).append(line)
        return found

    def misspelt(self, lines: Iterable[Line]) -> dict[tuple[str, str], list[Line]]:
        """Unread keys that may be misspellings of an absent key, as (key, key meant), with the lines that have them."""
        known = FORMATS[self.name].model_fields.keys()
        found: dict[tuple[str, str], list[Line]] = {}
        for key, having in self.unread(lines).items():
            for line in having:
                if near := nearest(key, known - line.row.keys(), KEY_LIKENESS):
                    found.setdefault((key, near), []).append(line)
        return found

    def _row_type(self, row: dict[str, Any]) -> type[Row]:
        as_chat = self.name == "preference" and isinstance(row.get("chosen"), list)
        return ChatPreference if as_chat else FORMATS[self.name]

    def _check_unmixed(self, row: dict[str, Any]) -> None:
        fitting = _fitting(row)
        if len(fitting) > 1:
            raise WrongRow(Flaw("", f"can be read as {' and as '.join(fitting)}: name one in data.format"))
        if fitting and self.name not in fitting:
            raise WrongRow(Flaw("", f"is {fitting[0]}, but line {self.line} is {self.name}: a file holds one format"))


def detect(lines: Sequence[Line]) -> FileFormat | None:
    """The format of the first row that has all keys of one, else the one that the first row has most keys of."""
    for line in lines:
        if fitting := _fitting(line.row):
            return FileFormat(fitting[0], line.number)
    first = lines[0]
    likeliest = max(FORMATS, key=lambda name: _likeness(first.row, name))
    return FileFormat(likeliest, first.number) if _likeness(first.row, likeliest) else None


def _fitting(row: dict[str, Any]) -> list[str]:
    return [name for name in FORMATS if REQUIRED[name] <= row.keys()]


def _likeness(row: dict[str, Any], name: str) -> int:
    return sum(nearest(key, row, KEY_LIKENESS) is not None for key in REQUIRED[name])


def _flaw(error: Any) -> Flaw:
    """One of pydantic's errors in words for the user."""
    *path, last = error["loc"]
    value = error["input"]
    match error["type"]:
        case "missing":
            near = nearest(last, value, KEY_LIKENESS)
            if near is None:
                return Flaw(_field(error["loc"]), "missing")
            return Flaw(_field([*path, near]), f"unknown key (did you mean {quoted(last)}?)")
        case "value_error":
            return Flaw(_field(error["loc"]), str(error["ctx"]["error"]))
        case "string_type":
            return Flaw(_field(error["loc"]), f"must be text, not {kind(value)}")
        case "list_type":
            return Flaw(_field(error["loc"]), f"must be an array, not {kind(value)}")
        case _:
            return Flaw(_field(error["loc"]), f"must be an object, not {kind(value)}")


def _field(path: Sequence[str | int]) -> str:
    """("messages", 2, "role") as messages[2].role."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")
