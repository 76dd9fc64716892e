"""What the demo prints, and whether it may call itself a success."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from hatrack_trainer.demo.quiz import Answers, Score
from hatrack_trainer.demo.server import Counts
from hatrack_trainer.demo.skills import COMMAND, prompt
from hatrack_trainer.errors import TrainerError

SHOWN_WORDS = 6
ADAPTER_FLOOR = 0.9
BASE_CEILING = 0.2


def answers_table(answers: Answers, words: Sequence[str], scores: Sequence[Score]) -> Table:
    """The same prompts in each row, one column per adapter and one for the base; their scores in the last row."""
    table = Table(title="one batch, the same prompts", show_footer=True)
    table.add_column("prompt", footer=f"exact, {len(words)} words")
    for column in scores:
        table.add_column(column.adapter or "the base alone", footer=f"{column.exact:.0%}")
    for index, word in enumerate(words[:SHOWN_WORDS]):
        row = [answers[column.adapter][index] for column in scores]
        table.add_row(prompt(COMMAND, word), *row)
    return table


def verdict(scores: Sequence[Score], counts: Counts) -> str:
    """One sentence of what the server counted. Raises TrainerError for a score or a batch that is not as promised."""
    for result in scores:
        if result.adapter and result.exact < ADAPTER_FLOOR:
            raise TrainerError(f"{result.adapter} got {result.exact:.0%}, less than {ADAPTER_FLOOR:.0%}")
        if not result.adapter and result.exact > BASE_CEILING:
            raise TrainerError(f"the base alone got {result.exact:.0%}: the adapters had nothing to add")
    if not counts.mixed_steps:
        raise TrainerError(f"none of {counts.steps} steps held two adapters: they were not served together")
    return (
        f"the server took {counts.steps} steps, {counts.mixed_steps} of them with two adapters or more in one batch, "
        f"for {counts.completion_tokens} tokens"
    )
