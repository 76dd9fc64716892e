"""Reading the configuration: a YAML file and the changes of it that a command line asks for, wrong keys by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hatrack_trainer.config import TrainConfig
from hatrack_trainer.errors import ConfigError
from hatrack_trainer.methods import method_of, methods

METHOD_KEY = ("adapter", "method")
SET = "--set"

Sections = dict[str, Any]
Key = tuple[int | str, ...]


def load_config(path: Path, changes: Iterable[str] = ()) -> TrainConfig:
    """Reads and validates a YAML file; relative paths in it are relative to the working directory.

    Each of `changes`, e.g. `train.epochs=3`, is a key with its value in YAML, in place of the file's. Raises
    ConfigError, one sentence that names the first wrong key, and for an unknown key the nearest known one.
    """
    sections = _read(path)
    changed = {_change(sections, change) for change in changes}
    try:
        return TrainConfig.model_validate(sections)
    except ValidationError as error:
        first = min(error.errors(), key=_urgency)
        sentence = _sentence(first, sections)
        place = SET if _is_of(first["loc"][:2], changed, sentence) else path
        raise ConfigError(f"{place}: {sentence}") from None


def _read(path: Path) -> Sections:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    try:
        raw = _parse(text)
    except _GivenTwice as error:
        raise ConfigError(f"{path}:{error.line}: {error.key}: is given twice, first on line {error.first}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold the sections {', '.join(TrainConfig.model_fields)}")
    # A section whose keys are all commented out is null to YAML.
    return {name: section for name, section in raw.items() if section is not None}


def _change(sections: Sections, change: str) -> Key:
    """Makes one change in `sections`, and returns its key."""
    name, equals, text = change.partition("=")
    section, _, key = name.partition(".")
    if not (equals and section.isidentifier() and key.isidentifier()):
        raise ConfigError(f"{SET} {change}: must be SECTION.KEY=VALUE, as in train.epochs=3")
    try:
        value = _parse(text)
    except ValueError as error:
        raise ConfigError(f"{SET} {name}: not YAML: {error}") from None
    before = sections.get(section, {})
    if isinstance(before, dict):
        sections[section] = {**before, key: value}
    return section, key


class _GivenTwice(ValueError):
    """A key of a mapping: PyYAML would take the last of its values."""

    def __init__(self, key: str, line: int, first: int) -> None:
        super().__init__(f"{key} is given twice")
        self.key, self.line, self.first = key, line, first


class _Loader(yaml.SafeLoader):
    """PyYAML's, but that no key may be given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Called by PyYAML."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    raise _GivenTwice(key.value, line, lines[key.value])
                lines[key.value] = line
        return node


def _parse(text: str) -> Any:
    """Raises ValueError, in one line; PyYAML lets through what dates, integers and deep nesting raise."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except _GivenTwice:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _is_of(location: Key, changed: set[Key], sentence: str) -> bool:
    """Whether one of the changes is wrong; what two keys have against each other has no place but its sentence."""
    if location == ():
        return any(".".join(map(str, key)) in sentence for key in changed)
    return any(key[: len(location)] == location for key in changed)


def _urgency(error: Any) -> tuple[bool, bool]:
    """The wrong method comes first, whose keys are the default's; then unknown keys: a misspelt one is missing, too."""
    return error["loc"] != METHOD_KEY, error["type"] != "extra_forbidden"


def _sentence(error: Any, sections: Sections) -> str:
    location = [str(part) for part in error["loc"][:2]]  # beyond section and key it names pydantic's union members
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _known_keys(location[:-1], sections), n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{key}: missing"
    if error["type"] == "model_type":
        return f"{key}: must be a section, with keys of its own"
    if error["type"] == "value_error":  # one of our own validators
        return f"{key}: {error['ctx']['error']}".removeprefix(": ")
    if error["loc"] == METHOD_KEY:
        return f"{key}: must be one of {', '.join(methods())}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _known_keys(section: list[str], sections: Sections) -> list[str]:
    if section == ["adapter"]:
        return list(method_of(sections["adapter"]).model_fields)
    model: type[BaseModel] = TrainConfig
    for name in section:
        model = model.model_fields[name].annotation  # type: ignore[assignment]
    return list(model.model_fields)
