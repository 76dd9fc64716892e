"""`hatrack demo`: from nothing to three adapters and their base answering in the same batch."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from hatrack.manifest import file_sha256
from hatrack_client import Client, HatrackClientError
from hatrack_server.model.checkpoint import identify
from hatrack_trainer.demo.adapters import PLANS, TRAIN, AdapterPlan, make_adapter
from hatrack_trainer.demo.base import Pretraining, make_base
from hatrack_trainer.demo.cache import Cache, default_folder
from hatrack_trainer.demo.quiz import Answers, ask_all, score
from hatrack_trainer.demo.report import answers_table, verdict
from hatrack_trainer.demo.server import Counts, read_counts, serving
from hatrack_trainer.demo.skills import test_words
from hatrack_trainer.errors import TrainerError
from hatrack_trainer.progress import progress_bar


def run_demo(cache_dir: Path | None, console: Console) -> None:
    """Makes what the cache lacks, serves it, asks, and prints a table. Call it from the main thread.

    Raises TrainerError when something fails, a score is not as promised, or no batch held two adapters.
    """
    cache = Cache(cache_dir or default_folder())
    with unwinding():
        base = demo_base(cache, console)
        adapters = {plan: _adapter(cache, plan, base, console) for plan in PLANS}
        answers, counts = _serve_and_ask(base, adapters, console)
    scores = score(answers, test_words(), {plan.name: plan.skill for plan in PLANS})
    console.print(answers_table(answers, test_words(), scores))
    console.print(verdict(scores, counts))


@contextmanager
def unwinding() -> Iterator[None]:
    """Treats SIGTERM like Ctrl-C, so that no server is left running and nothing half made is left lying.

    Raises TrainerError when the server refuses something, or the system does.
    """
    transformers_logging.disable_progress_bar()
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except HatrackClientError as error:
        raise TrainerError(f"the demo's server refused: {error.message}") from error
    except OSError as error:
        raise TrainerError(f"the demo can't go on: {error}") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def demo_base(cache: Cache, console: Console) -> Path:
    """The demo's base, from the cache or made on the spot."""
    settings = Pretraining()
    path = cache.path("base", {"pretraining": asdict(settings), "sources": _sources()})
    if path.is_dir():
        console.print(f"base: from the cache, {path}")
        return path
    with progress_bar(console) as bar:
        task = bar.add_task("pre-training the base", total=settings.steps)
        cache.make(path, lambda folder: make_base(settings, folder, lambda step, _: bar.update(task, completed=step)))
    return path


def _sources() -> list[str]:
    """Digests of the code that draws the data and shapes the base: a change of either is another base."""
    return [file_sha256(Path(__file__).with_name(name)) for name in ("skills.py", "base.py")]


def _adapter(cache: Cache, plan: AdapterPlan, base: Path, console: Console) -> Path:
    made_from = {
        "plan": asdict(plan),
        "train": TRAIN.model_dump(),
        "base": asdict(identify(base, "nf4")),
        "sources": _sources(),
    }
    path = cache.path(plan.name, made_from)
    if path.is_dir():
        console.print(f"{plan.name}: from the cache, {path}")
        return path
    with progress_bar(console) as bar:
        task = bar.add_task(f"training {plan.name}, rank {plan.rank}", total=None)
        cache.make(
            path,
            lambda folder: make_adapter(
                plan, base, folder, lambda step, total, _: bar.update(task, completed=step, total=total)
            ),
        )
    return path


def _serve_and_ask(base: Path, adapters: dict[AdapterPlan, Path], console: Console) -> tuple[Answers, Counts]:
    with (
        tempfile.TemporaryDirectory(prefix="hatrack-demo-") as data,
        console.status("starting the server") as status,
        serving(base, Path(data)) as server,
    ):
        status.update("pushing the adapters")
        with Client(server.address, timeout=60) as client:
            for plan, folder in adapters.items():
                client.push_adapter(plan.name, folder)
        status.update("asking all of them at once")
        answers = asyncio.run(ask_all(server.address, ["", *(plan.name for plan in adapters)], test_words()))
        return answers, read_counts(server.metrics_url)
