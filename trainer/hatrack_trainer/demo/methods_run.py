"""`hatrack demo --methods`: every adapter method learns the same rows, and is served as it was trained."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import AutoTokenizer

from hatrack_client import Client, Generation
from hatrack_trainer.config import TrainSection
from hatrack_trainer.demo.cache import Cache, default_folder
from hatrack_trainer.demo.methods import SKILL, TRAIN, train_method, write_rows
from hatrack_trainer.demo.methods_report import Result, methods_verdict, results_table
from hatrack_trainer.demo.quiz import MAX_TOKENS, exact, generate_all
from hatrack_trainer.demo.run import demo_base, unwinding
from hatrack_trainer.demo.server import Counts, read_counts, serving
from hatrack_trainer.demo.skills import COMMAND, prompt, test_words
from hatrack_trainer.demo.trained import greedy, learned_parameters, load_trained
from hatrack_trainer.methods import methods
from hatrack_trainer.progress import progress_bar

# As exact as the trained model computes: in 16 bits two tokens are too often equally likely.
EXACT = {"dtype": "float32", "packed": False}


def run_methods_demo(cache_dir: Path | None, console: Console) -> None:
    """Makes the base if the cache lacks it, trains, serves, asks and prints a table. Call it from the main thread.

    Raises TrainerError when something fails, a score is not as promised, or the server answers otherwise.
    """
    with unwinding(), tempfile.TemporaryDirectory(prefix="hatrack-methods-") as folder:
        base = demo_base(Cache(cache_dir or default_folder()), console)
        results, counts = compare(list(methods()), base, Path(folder), TRAIN, console)
    console.print(results_table(results))
    console.print(methods_verdict(results, counts))


def compare(
    names: Sequence[str], base: Path, folder: Path, settings: TrainSection, console: Console
) -> tuple[list[Result], Counts]:
    """Trains each method into `folder`; the results of the base alone and of each, and what their one server counted.

    Raises TrainerError, or what the server's client raises.
    """
    seconds = _train_all(names, base, folder, settings, console)
    served, counts = _serve_and_ask(names, base, folder, console)
    with console.status("asking the trained models"):
        return [_result(base, folder, name, seconds.get(name, 0.0), served[name]) for name in served], counts


def _train_all(
    names: Sequence[str], base: Path, folder: Path, settings: TrainSection, console: Console
) -> dict[str, float]:
    """Seconds by method."""
    rows = write_rows(folder)
    seconds = {}
    with progress_bar(console) as bar:
        for number, name in enumerate(names, start=1):
            task = bar.add_task(f"training {name}, {number} of {len(names)}", total=None)
            begun = time.monotonic()
            train_method(name, base, rows, folder / name, settings, partial(_show_step, bar, task))
            seconds[name] = time.monotonic() - begun
    return seconds


def _show_step(bar: Progress, task: TaskID, step: int, total: int, _loss: float) -> None:
    bar.update(task, completed=step, total=total)


def _serve_and_ask(
    names: Sequence[str], base: Path, folder: Path, console: Console
) -> tuple[dict[str, list[Generation]], Counts]:
    with console.status("starting the server") as status, serving(base, folder, EXACT) as server:
        status.update("pushing the adapters")
        with Client(server.address, timeout=60) as client:
            for name in names:
                client.push_adapter(name, folder / name)
        status.update("asking all of them at once")
        served = asyncio.run(generate_all(server.address, ["", *names], test_words()))
        return served, read_counts(server.metrics_url)


def _result(base: Path, folder: Path, name: str, seconds: float, served: Sequence[Generation]) -> Result:
    words = test_words()
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    model = load_trained(base, folder / name if name else None)
    own = greedy(model, tokenizer, [prompt(COMMAND, word) for word in words], MAX_TOKENS)
    return Result(
        method=name,
        parameters=learned_parameters(folder / name) if name else 0,
        seconds=seconds,
        score=exact([tokenizer.decode(tokens, skip_special_tokens=True) for tokens in own], words, SKILL),
        rows=len(words),
        equal=sum(a == b.token_ids for a, b in zip(own, served, strict=True)),
    )
