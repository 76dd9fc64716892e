"""The configuration's JSON schema, by which editors complete keys, explain them and mark mistakes."""

from __future__ import annotations

from typing import Any

from hatrack_trainer.config import TrainConfig
from hatrack_trainer.methods import DEFAULT, methods

DRAFT = "https://json-schema.org/draft/2020-12/schema"
BY_METHOD = {"propertyName": "method"}  # OpenAPI's hint to editors; the schemas tell themselves apart without

Schema = dict[str, Any]


def config_schema() -> Schema:
    """What `load_config` takes, in JSON Schema 2020-12, with each key's docstring as its description.

    Numbers are as YAML 1.2 has them: `1e-3` is one. PyYAML reads it as text, which `load_config` takes, too.
    """
    schema = TrainConfig.model_json_schema()
    definitions, sections = schema["$defs"], schema["properties"]
    del definitions["Method"], sections["adapter"]["$ref"]
    sections["adapter"] |= {"oneOf": [_of_method(name) for name in methods()], "discriminator": BY_METHOD}
    for name in sections.keys() - set(schema["required"]):
        sections[name] = _or_nothing(sections[name])
    return {"$schema": DRAFT, **schema}


def _of_method(name: str) -> Schema:
    """Without a `method`, exactly one of all may fit."""
    schema = methods()[name].model_json_schema()
    if name != DEFAULT:
        schema["required"] = ["method", *schema.get("required", [])]
    return schema


def _or_nothing(section: Schema) -> Schema:
    """A section whose keys are all commented out is null to YAML."""
    return {"anyOf": [section, {"type": "null"}]}
