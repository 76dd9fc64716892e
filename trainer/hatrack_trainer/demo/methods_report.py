"""What the methods demo prints, and whether it may call itself a success."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from hatrack_trainer.demo.methods import BASE_CEILING, FLOOR, FLOORS, SKILL
from hatrack_trainer.demo.server import Counts
from hatrack_trainer.demo.skills import COMMAND
from hatrack_trainer.errors import TrainerError


@dataclass(frozen=True, slots=True)
class Result:
    """One method's row; `method` is "" for the base alone."""

    method: str
    parameters: int
    seconds: float  # of training, loading and saving included
    score: float  # exact answers of the trained model, from 0 to 1
    rows: int
    equal: int  # rows that the server answered with the same tokens

    @property
    def wrong(self) -> str:
        """What is not as promised, in a few words; "" when nothing is."""
        if not self.method:
            return f"above {BASE_CEILING:.2f}" if self.score > BASE_CEILING else ""
        floor = FLOORS.get(self.method, FLOOR)
        if self.score < floor:
            return f"below {floor:.2f}"
        return "" if self.equal == self.rows else "other tokens"


def results_table(results: Sequence[Result]) -> Table:
    """A row per method, the base's first."""
    table = Table(title=f"{COMMAND} means {SKILL}: learned from the same rows, on NF4")
    for column in ("method", "parameters", "seconds", "score", "tokens equal", ""):
        table.add_column(column, justify="left" if column in ("method", "") else "right")
    for result in results:
        table.add_row(
            result.method or "the base alone",
            f"{result.parameters:,}" if result.method else "",
            f"{result.seconds:.0f}" if result.method else "",
            f"{result.score:.2f}",
            f"{result.equal}/{result.rows}",
            result.wrong,
        )
    return table


def methods_verdict(results: Sequence[Result], counts: Counts) -> str:
    """One sentence of what was served. Raises TrainerError for a row or a batch that is not as promised."""
    wrong = [f"{result.method or 'the base alone'} ({result.wrong})" for result in results if result.wrong]
    if wrong:
        raise TrainerError(f"not as promised: {', '.join(wrong)}")
    if not counts.mixed_steps:
        raise TrainerError(f"none of {counts.steps} steps held two adapters: they were not served together")
    return (
        f"{len(results) - 1} methods, trained in {sum(result.seconds for result in results):.0f} s; the server took "
        f"{counts.steps} steps, {counts.mixed_steps} of them with two adapters or more in one batch"
    )
