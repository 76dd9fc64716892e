"""What the methods demo asks of every adapter method: a skill that the base has, learned under a new command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hatrack_trainer.config import BaseSection, DataSection, OutputSection, TrainConfig, TrainSection
from hatrack_trainer.demo.skills import COMMAND, SKILLS, prompt, test_words, training_words
from hatrack_trainer.methods import Method, read_method
from hatrack_trainer.run import train

SKILL = "next"
TRAIN = TrainSection(epochs=6, batch_size=16, warmup_steps=10, seed=1)
"""The same for all, but for the learning rate, which is each method's own."""
KEYS: dict[str, dict[str, Any]] = {"llama_adapter": {"layers": 4}, "partial": {"parts": ["norms"]}}
"""What is not left at a method's defaults: these have none. The base has 4 layers, and only norms are served."""
FLOOR = 0.85
"""The share of held-out rows that a method must answer exactly …"""
FLOORS = dict.fromkeys(("ia3", "llama_adapter", "p_tuning", "partial", "prefix_tuning", "prompt_tuning"), 0.7)
"""… and what is asked of those that leave the base's weights alone."""
BASE_CEILING = 0.05


@dataclass(frozen=True, slots=True)
class Rows:
    """The two files of all runs."""

    train: Path
    held_out: Path


def write_rows(folder: Path) -> Rows:
    """Writes both files to `folder`; no word is in both, and none of the held-out ones did the base see."""
    rows = Rows(folder / "train.jsonl", folder / "held-out.jsonl")
    for file, words in ((rows.train, training_words()), (rows.held_out, test_words())):
        lines = [json.dumps({"prompt": prompt(COMMAND, word), "completion": SKILLS[SKILL](word)}) for word in words]
        file.write_text("\n".join(lines) + "\n")
    return rows


def section(name: str) -> Method:
    """The method's `adapter` section, as a YAML file would have it."""
    read: Method = read_method({"method": name, **KEYS.get(name, {})})
    return read


def train_method(
    name: str,
    base: Path,
    rows: Rows,
    folder: Path,
    settings: TrainSection,
    on_step: Callable[[int, int, float], None] | None = None,
) -> None:
    """Trains one adapter into `folder`, as `hatrack train run` would."""
    config = TrainConfig(
        base=BaseSection(model=str(base)),
        adapter=section(name),
        data=DataSection(train=rows.train, eval=rows.held_out, max_length=64),
        train=settings,
        output=OutputSection(dir=folder),
    )
    train(config, on_step=on_step)
