"""The demo's three tenants' adapters: the same new command, learned as three different skills."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hatrack_trainer.config import BaseSection, DataSection, OutputSection, TrainConfig, TrainSection
from hatrack_trainer.demo.skills import COMMAND, SKILLS, prompt, training_words
from hatrack_trainer.methods.lora import Lora
from hatrack_trainer.run import train


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """One adapter: what it makes of a word, and how big it is."""

    skill: str
    rank: int

    @property
    def name(self) -> str:
        """The adapter's name on the server."""
        return f"run-as-{self.skill}"


PLANS = (AdapterPlan("up", 4), AdapterPlan("next", 8), AdapterPlan("rev", 16))
TRAIN = TrainSection(epochs=6, batch_size=16, learning_rate=5e-3, warmup_steps=10, seed=1)


def make_adapter(
    plan: AdapterPlan, base: Path, folder: Path, on_step: Callable[[int, int, float], None] | None = None
) -> None:
    """Writes the data beside `folder`, and trains the adapter into `folder`, as `hatrack train run` would."""
    data = folder.with_suffix(".jsonl")
    rows = [{"prompt": prompt(COMMAND, word), "completion": SKILLS[plan.skill](word)} for word in training_words()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        base=BaseSection(model=str(base)),
        adapter=Lora(rank=plan.rank, alpha=2 * plan.rank),
        data=DataSection(train=data, max_length=64),
        train=TRAIN,
        output=OutputSection(dir=folder),
    )
    train(config, on_step=on_step)
