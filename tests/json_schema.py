"""As much of JSON Schema 2020-12 as the configuration's schema is made of; a package for all of it is no dependency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}
CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "const": lambda value, wanted: value == wanted,
    "enum": lambda value, choices: value in choices,
    "minimum": lambda value, limit: not _is_number(value) or value >= limit,
    "maximum": lambda value, limit: not _is_number(value) or value <= limit,
    "exclusiveMinimum": lambda value, limit: not _is_number(value) or value > limit,
    "exclusiveMaximum": lambda value, limit: not _is_number(value) or value < limit,
    "minLength": lambda value, length: not isinstance(value, str) or len(value) >= length,
    "minItems": lambda value, length: not isinstance(value, list) or len(value) >= length,
    "required": lambda value, keys: not isinstance(value, dict) or value.keys() >= set(keys),
    "type": lambda value, name: isinstance(value, TYPES[name]) and (name == "boolean") == isinstance(value, bool),
}
APART = {"$ref", "anyOf", "oneOf", "items", "properties", "additionalProperties"}
WORDS = {"$schema", "$defs", "title", "description", "default", "format", "discriminator"}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None) -> bool:
    """Whether the value is as the schema says; raises AssertionError for a keyword that is not known here."""
    root = root or schema
    unknown = schema.keys() - CHECKS.keys() - APART - WORDS
    assert not unknown, f"not checked: {unknown}"
    return (
        all(check(value, schema[word]) for word, check in CHECKS.items() if word in schema)
        and ("$ref" not in schema or fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root))
        and ("anyOf" not in schema or any(fits(value, each, root) for each in schema["anyOf"]))
        and ("oneOf" not in schema or sum(fits(value, each, root) for each in schema["oneOf"]) == 1)
        and _parts_fit(value, schema, root)
    )


def _parts_fit(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    if isinstance(value, list):
        return all(fits(each, schema.get("items", {}), root) for each in value)
    if not isinstance(value, dict):
        return True
    known = schema.get("properties", {})
    closed = schema.get("additionalProperties", True) is False
    return not (closed and value.keys() - known.keys()) and all(
        fits(value[name], each, root) for name, each in known.items() if name in value
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
