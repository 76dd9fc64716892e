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
from hatrack_trainer.wording import shortened

METHOD_KEY = ("adapter", "method")
SET = "--set"
SHOWN = 80
"""Characters of a key or a value that are shown."""

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
    except _WrongYaml as error:
        place = path if error.line is None else f"{path}:{error.line}"
        raise ConfigError(f"{place}: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold the sections {', '.join(TrainConfig.model_fields)}")
    # A section whose keys are all commented out is null to YAML.
    return {name: section for name, section in raw.items() if section is not None}


def _change(sections: Sections, change: str) -> Key:
    """Makes one change in `sections`, and returns its key."""
    name, equals, text = change.partition("=")
    section, _, key = name.partition(".")
    if not (equals and section.isidentifier() and key.isidentifier()):
        raise ConfigError(f"{SET} {shortened(change, SHOWN)}: must be SECTION.KEY=VALUE, as in train.epochs=3")
    try:
        value = _parse(text)
    except _WrongYaml as error:
        raise ConfigError(f"{SET} {name}: {error}") from None
    before = sections.get(section, {})
    if isinstance(before, dict):
        sections[section] = {**before, key: value}
    return section, key


class _WrongYaml(Exception):
    """What a text can't be read for, and on which of its lines, if that is known."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.line = line


class _Loader(yaml.SafeLoader):
    """PyYAML's, but that no key may be given twice, where it would take the last, and that all errors have a line."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Called by PyYAML."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    key_name = shortened(key.value, SHOWN)
                    raise _WrongYaml(f"{key_name}: is given twice, first on line {lines[key.value]}", line)
                lines[key.value] = line
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Called by PyYAML, which lets through what its parsers of dates, numbers and truth values raise."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            what = f"not YAML: {shortened(str(node.value), SHOWN)!r} is no {kind}"
            raise _WrongYaml(what, node.start_mark.line + 1) from None


def _parse(text: str) -> Any:
    """Raises _WrongYaml."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except yaml.MarkedYAMLError as error:
        what = ", ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark
        raise _WrongYaml(f"not YAML: {what}", None if mark is None else mark.line + 1) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _WrongYaml(f"not YAML: {chr(error.character)!r}: {error.reason}", line) from None
    except RecursionError:
        raise _WrongYaml("not YAML: nested too deeply") from None


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
    key = ".".join(shortened(part, SHOWN) for part in location)
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
