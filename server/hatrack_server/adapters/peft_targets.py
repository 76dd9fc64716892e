"""Which modules a PEFT configuration selects, and what it sets for each: PEFT 0.21's own rules, without PEFT.

The rules are `check_target_module_exists`, `_maybe_include_all_linear_layers` and `get_pattern_key` of PEFT, restricted
to the linear layers that the base lets adapters target. Patterns are matched within a budget (see `patterns`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hatrack.manifest import CONFIG_FILE
from hatrack_server.adapters.patterns import Budget, Pattern
from hatrack_server.errors import InvalidArtifact

ALL_LINEAR = "all-linear"
OUTPUT_HEADS = frozenset({"lm_head", "embed_out"})  # what `all-linear` leaves out

Predicate = Callable[[str], bool]


def config_field(key: str) -> str:
    """How errors name a key of the configuration."""
    return f"{CONFIG_FILE}: {key}"


def matched_modules(config: Mapping[str, Any], modules: Iterable[str], budget: Budget) -> list[str]:
    """Those of `modules` (full names) that `config` selects, in their order.

    Reads target_modules, exclude_modules, layers_to_transform, layers_pattern and modules_to_save, whose modules no
    method adapts. Raises InvalidArtifact naming the key that is malformed.
    """
    selected = _targets(config, budget)
    excluded = _excluded(config, budget)
    whole = names_of(config, "modules_to_save")
    return [
        module
        for module in modules
        if not excluded(module) and selected(module) and not any(f".{name}." in f".{module}." for name in whole)
    ]


class ModulePatterns:
    """A mapping from patterns to values, e.g. rank_pattern: the first pattern that matches a module's end decides."""

    def __init__(self, config: Mapping[str, Any], key: str, budget: Budget) -> None:
        """Reads `config[key]`; raises InvalidArtifact when it is no mapping or a pattern is malformed."""
        field = config_field(key)
        table = config.get(key) or {}
        if not isinstance(table, dict):
            raise InvalidArtifact(field, "must be an object")
        template = r"(.*\.)?({})$"
        self._rules = [(Pattern(text, field, budget, template=template), value) for text, value in table.items()]

    def value(self, module: str, default: Any) -> Any:
        """What the mapping gives `module`, unchecked; `default` when no pattern matches."""
        return next((value for pattern, value in self._rules if pattern.fullmatch(module)), default)


def _targets(config: Mapping[str, Any], budget: Budget) -> Predicate:
    wanted = config.get("target_modules")
    layers = _layers(config, budget)
    if isinstance(wanted, str):
        if config.get("layers_to_transform") is not None or config.get("layers_pattern") is not None:
            raise InvalidArtifact(config_field("layers_to_transform"), "needs target_modules to be a list")
        if wanted.lower() == ALL_LINEAR:
            return lambda module: module.rpartition(".")[2] not in OUTPUT_HEADS
        return Pattern(wanted, config_field("target_modules"), budget).fullmatch
    names = names_of(config, "target_modules")
    if not names:
        raise InvalidArtifact(config_field("target_modules"), "must select at least one module")
    # A full name selects its module whatever layers_to_transform says.
    return lambda module: module in names or (_ends_with_any(module, names) and layers(module))


def _excluded(config: Mapping[str, Any], budget: Budget) -> Predicate:
    unwanted = config.get("exclude_modules")
    if isinstance(unwanted, str) and unwanted:
        return Pattern(unwanted, config_field("exclude_modules"), budget).fullmatch
    names = names_of(config, "exclude_modules")
    return lambda module: module in names or _ends_with_any(module, names)


def _layers(config: Mapping[str, Any], budget: Budget) -> Predicate:
    indices = config.get("layers_to_transform")
    if indices is None or indices == []:
        return lambda _: True
    field = config_field("layers_to_transform")
    wanted = {indices} if type(indices) is int else indices
    if not isinstance(wanted, list | set) or not all(type(index) is int for index in wanted):
        raise InvalidArtifact(field, "must be a layer's index or a list of them")
    index_of = _layer_index(config, budget)
    chosen = frozenset(wanted)
    return lambda module: index_of(module) in chosen


def _layer_index(config: Mapping[str, Any], budget: Budget) -> Callable[[str], int | None]:
    field = config_field("layers_pattern")
    given = config.get("layers_pattern") or []
    containers = [given] if isinstance(given, str) else given
    if not isinstance(containers, list) or not all(isinstance(item, str) for item in containers):
        raise InvalidArtifact(field, "must be a name or a list of names")
    if containers:
        template = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
        patterns = [Pattern(container, field, budget, template=template) for container in containers]
    else:
        patterns = [Pattern(r".*?\.[^.]*\.(?P<idx>\d+)\.", field, budget)]

    def index_of(module: str) -> int | None:
        found = (pattern.group_at_start(module, "idx") for pattern in patterns)
        return next((int(index) for index in found if index is not None), None)

    return index_of


def names_of(config: Mapping[str, Any], key: str) -> frozenset[str]:
    """A list of names, empty when it is absent; raises InvalidArtifact when it is something else."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InvalidArtifact(config_field(key), "must be text or a list of texts")
    return frozenset(value)


def _ends_with_any(module: str, names: frozenset[str]) -> bool:
    return any(ending in names for ending in _endings(module))


def _endings(module: str) -> Iterator[str]:
    rest = module
    while "." in rest:
        rest = rest.partition(".")[2]
        yield rest
