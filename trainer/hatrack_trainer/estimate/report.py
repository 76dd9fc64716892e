"""`hatrack train estimate`: what a run would take of memory and of time, before it is begun."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from hatrack_trainer.base import find_base
from hatrack_trainer.config import TrainConfig
from hatrack_trainer.context import within_context
from hatrack_trainer.data import Example
from hatrack_trainer.data.read import Data, ExampleSet, read_data
from hatrack_trainer.distributed import own_device
from hatrack_trainer.dpo import make_pair_trainer
from hatrack_trainer.estimate.memory import Memory, available_memory, check_memory, estimate_memory, largest_batch
from hatrack_trainer.estimate.remedies import changed, gigabytes
from hatrack_trainer.objective import check_objective
from hatrack_trainer.run import load_trainer
from hatrack_trainer.sft import make_trainer
from hatrack_trainer.targets import check_adapter

STEPS = 3
"""Measured, of which the first, that makes what later ones have, does not count."""


@dataclass(frozen=True, slots=True)
class Duration:
    """How long a run takes."""

    seconds_per_batch: float  # of its longest rows
    steps: int
    evaluations: int  # at most: with patience, a run may stop early
    seconds: float  # all of them, by their rows' tokens; without checkpoints


def estimate(config: TrainConfig, console: Console, say: Callable[[str], None] = lambda _: None) -> Duration:
    """Prints the memory by part against what is free, then loads the base and prints the time by a few real steps.

    Writes no files. `say` gets sentences on what is being done. Raises UsageError, after the table, for a run that does
    not fit; NoEstimate for a base whose memory can't be told; and what `train` raises.
    """
    checkpoint = find_base(config.base.model)
    check_adapter(config.adapter, checkpoint)
    config = within_context(config, checkpoint, lambda sentence: console.print(Text(sentence), soft_wrap=True))
    data = read_data(config.data, checkpoint)
    train_set = data.train
    check_objective(config, train_set)
    cuda = own_device() != "cpu"
    memory = estimate_memory(config, checkpoint, largest_batch(config, train_set), cuda=cuda)
    available = available_memory(cuda=cuda)
    console.print(_table(memory, available, "CUDA" if cuda else "the CPU"))
    if memory.total > available:
        check_memory(config, checkpoint, train_set, cuda=cuda)
    say(f"measuring {STEPS} steps")
    duration = _measure(config, checkpoint, data)
    console.print(Text(_sentence(duration)), soft_wrap=True)
    return duration


def batches_of(lengths: list[int], config: TrainConfig) -> list[int]:
    """The tokens of an epoch's batches, padding included, of rows of these lengths in the file's order."""
    if config.train.packing:
        lengths = [config.data.max_length] * math.ceil(sum(lengths) / config.data.max_length)
    size = config.train.batch_size
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return [len(batch) * max(batch) for batch in batches]


def steps_of(batches: int, config: TrainConfig) -> int:
    """The optimizer's steps of a run that has so many batches in an epoch."""
    train = config.train
    return train.max_steps or math.ceil(train.epochs * math.ceil(batches / train.gradient_accumulation))


def evaluations_of(steps: int, config: TrainConfig) -> int:
    """How often a run of so many steps takes the held-out loss, if none is its best for long."""
    if config.data.eval is None:
        return 0
    return 1 if config.eval.every is None else math.ceil(steps / config.eval.every)


def _measure(config: TrainConfig, checkpoint: Path, data: Data) -> Duration:
    ended: list[float] = []
    make = make_pair_trainer if data.train.pairs else make_trainer
    measured = _longest(config, data.train)
    unpacked = changed(config, {"train.packing": False})  # as held-out rows always are
    held_out = _longest(unpacked, data.held_out) if data.held_out else None
    trainer = load_trainer(
        make,
        _few_steps(config),
        checkpoint,
        _examples(measured),
        _examples(held_out) if held_out else None,
        lambda *_: ended.append(time.perf_counter()),
    )
    trainer.train()
    per_batch = (ended[-1] - ended[0]) / (len(ended) - 1)
    batches = _batches(config, _rows(data.train))
    steps = steps_of(len(batches), config)
    share = sum(batches) / len(batches) / max(_batches(config, measured))
    seconds = per_batch * share * steps * config.train.gradient_accumulation
    evaluations = evaluations_of(steps, config)
    if data.held_out and held_out:
        began = time.perf_counter()
        trainer.evaluate()
        share = sum(_batches(unpacked, _rows(data.held_out))) / sum(_batches(unpacked, held_out))
        seconds += (time.perf_counter() - began) * share * evaluations
    return Duration(per_batch, steps, evaluations, seconds)


def _few_steps(config: TrainConfig) -> TrainConfig:
    return changed(
        config,
        {
            "train.max_steps": STEPS,
            "train.gradient_accumulation": 1,
            "train.trackers": [],
            "output.checkpoint_every": None,
            "eval.every": None,
        },
    )


def _rows(part: ExampleSet) -> list[list[Example]]:
    """The examples of each row: of a preference, two."""
    size = 2 if part.pairs else 1
    examples = part.examples
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def _examples(rows: list[list[Example]]) -> list[Example]:
    return [each for row in rows for each in row]


def _batches(config: TrainConfig, rows: list[list[Example]]) -> list[int]:
    return batches_of([_length(row) for row in rows], config)


def _length(row: list[Example]) -> int:
    return max(len(each.input_ids) for each in row)


def _longest(config: TrainConfig, part: ExampleSet) -> list[list[Example]]:
    """Rows enough for the measured batches; to be packed, all, as each packed row is as full as the others."""
    rows = sorted(_rows(part), key=_length, reverse=True)
    return rows if config.train.packing else rows[: STEPS * config.train.batch_size]


def _table(memory: Memory, available: int, device: str) -> Table:
    table = Table("memory", Column("needed", justify="right"), box=None)
    for part, size in asdict(memory).items():
        table.add_row(part, gigabytes(size))
    table.add_row("in all", gigabytes(memory.total), style="bold")
    table.add_row(f"free on {device}", gigabytes(available))
    return table


def _sentence(duration: Duration) -> str:
    many = "1 evaluation" if duration.evaluations == 1 else f"{duration.evaluations} evaluations"
    evaluations = f" and {many}" if duration.evaluations else ""
    return (
        f"time: {_clock(duration.seconds)} for {duration.steps} steps{evaluations}, by "
        f"{duration.seconds_per_batch:.2f} s for a batch of the longest rows; checkpoints come on top"
    )


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
