"""Whether a run fits in memory; and if not, with which settings it would, tried out one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hatrack_trainer.config import TrainConfig
from hatrack_trainer.errors import UsageError

Settings = dict[str, Any]
"""New values by their keys, e.g. `train.batch_size`."""
Needs = Callable[[TrainConfig], int]
"""The bytes that a run takes."""


def check_fits(config: TrainConfig, available: int, needs: Needs) -> None:
    """Raises UsageError for a run that needs more than `available` bytes, with the settings that would make it fit."""
    needed = needs(config)
    if needed > available:
        found = [_as_text(settings) for settings in fitting(config, lambda changed: needs(changed) <= available)]
        advice = f"would fit with {', or with '.join(found)}" if found else "take a smaller base"
        raise UsageError(f"needs {gigabytes(needed)} of memory of {gigabytes(available)}: {advice}")


def fitting(config: TrainConfig, fits: Callable[[TrainConfig], bool]) -> list[Settings]:
    """The least changes that make a run fit, each enough by itself: of speed alone, or else of what it learns, too."""
    for choices in _remedies(config):
        found = [next((each for each in choice if fits(changed(config, each))), None) for choice in choices]
        if any(found):
            return [each for each in found if each]
    return []


def changed(config: TrainConfig, settings: Settings) -> TrainConfig:
    """The configuration with other values, which are not validated."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=new) for name, new in sections.items()}
    )


def gigabytes(size: int) -> str:
    """In decimal units, as devices are sold."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _remedies(config: TrainConfig) -> Iterator[list[list[Settings]]]:
    """From the mildest on: alternatives, each with its values from the mildest on."""
    batches, recompute = _smaller_batches(config), _checkpointing(config)
    yield [batches, [recompute]] if recompute else [batches]
    smallest = {**(batches[-1] if batches else {}), **recompute}
    yield [[{**each, **recompute} for each in batches]]
    yield [[{**smallest, "data.max_length": length} for length in _shorter(config)], _smaller_adapters(config)]
    if config.base.quantization == "none":
        yield [[{"base.quantization": "nf4"}, {"base.quantization": "nf4", **smallest}]]


def _smaller_batches(config: TrainConfig) -> list[Settings]:
    """With as many rows a step."""
    rows = config.train.batch_size * config.train.gradient_accumulation
    sizes = [size for size in range(config.train.batch_size - 1, 0, -1) if rows % size == 0]
    return [{"train.batch_size": size, "train.gradient_accumulation": rows // size} for size in sizes]


def _checkpointing(config: TrainConfig) -> Settings:
    if config.train.activation_checkpointing or not config.adapter.allows_checkpointing:
        return {}
    return {"train.activation_checkpointing": True}


def _shorter(config: TrainConfig) -> list[int]:
    """Every row that is longer loses its end."""
    lengths = [2**power for power in range(16, 4, -1)]
    return [length for length in lengths if length < config.data.max_length]


def _smaller_adapters(config: TrainConfig) -> list[Settings]:
    """What the adapter's size grows with, halved again and again; AdaLoRA's ranks must differ."""
    found = {key: getattr(config.adapter, key, 0) for key in ("rank", "initial_rank", "tokens")}
    sizes = {f"adapter.{key}": size for key, size in found.items() if size}
    halved = [{key: size >> power for key, size in sizes.items()} for power in range(1, 17)]
    return [each for each in halved if each and all(each.values()) and len({*each.values()}) == len(each)]


def _as_text(settings: Settings) -> str:
    """As `--set` takes them."""
    return " and ".join(f"{key}={str(value).lower()}" for key, value in settings.items())
