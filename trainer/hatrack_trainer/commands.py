"""`hatrack train` and `hatrack demo`. Importing this costs nothing: what needs torch is imported inside."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hatrack_server.errors import HatrackError
from hatrack_trainer.data.problems import InvalidData
from hatrack_trainer.distributed import is_first, one_voice
from hatrack_trainer.errors import TrainerError, UsageError
from hatrack_trainer.progress import progress_bar
from hatrack_trainer.wording import printable

if TYPE_CHECKING:
    from hatrack_trainer.config import TrainConfig
    from hatrack_trainer.register import Registration
    from hatrack_trainer.run import TrainingResult

train = typer.Typer(no_args_is_help=True, help="Make adapters.")

Config = Annotated[Path, typer.Argument(help="A YAML file; examples/train.yaml explains every key.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="In place of CONFIG's value, in YAML. Repeatable."),
]
Register = Annotated[
    bool,
    typer.Option("--register", help="Push the adapter as CONFIG's section registration says; wait until it answers."),
]


@train.command()
def run(config: Config, changes: Changes = None, register: Register = False) -> None:
    """Train one adapter as CONFIG says, and write its artifact."""
    with reporting_errors(), one_voice():
        from hatrack_trainer.config_file import load_config

        settings = load_config(config, changes or ())
        registration = _registration(settings) if register else None
        console = Console(stderr=True, quiet=not is_first())
        with console.status("importing torch"):
            from hatrack_trainer.run import train as train_adapter
        _follow(partial(train_adapter, settings), console, registration)


@train.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The output.dir of a run that was cut short.")],
    learning_rate: Annotated[float | None, typer.Option(help="In place of the run's own from now on.")] = None,
    register: Register = False,
) -> None:
    """Go on from the last checkpoint in DIR, and write the artifact that the run would have written."""
    with reporting_errors(), one_voice():
        from hatrack_trainer.unfinished import read_beginning

        beginning = read_beginning(folder)
        registration = _registration(beginning.config) if register else None
        console = Console(stderr=True, quiet=not is_first())
        with console.status("importing torch"):
            from hatrack_trainer.run import resume as resume_run
        _follow(partial(resume_run, folder, learning_rate=learning_rate), console, registration)


@train.command()
def validate(
    source: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="The YAML file of `train run`; with --base, a JSONL file.")
    ],
    base: Annotated[str | None, typer.Option(help="The checkpoint that is to learn the JSONL file.")] = None,
    changes: Changes = None,
) -> None:
    """Check the data that CONFIG names: list all that is wrong, or show what would be learned. Needs no weights."""
    with reporting_errors():
        from hatrack_trainer.config import DataSection
        from hatrack_trainer.config_file import load_config
        from hatrack_trainer.data.validate import validate as validate_data

        if base is not None:
            if changes:
                raise UsageError("--set: changes a YAML file; with --base there is none")
            check_base_option(base)
            validate_data(DataSection(train=source), base, Console(), key="--base")
        elif source.suffix == ".jsonl":
            raise UsageError(f"{source}: is data; name the base that is to learn it by --base, or take a YAML file")
        else:
            settings = load_config(source, changes or ())
            validate_data(settings.data, settings.base.model, Console(), adapter=settings.adapter)


def demo(
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where the base and the adapters are kept.", show_default="~/.cache/hatrack/demo"),
    ] = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="Train by every adapter method instead, and compare them.")
    ] = False,
) -> None:
    """Make a small base and three adapters, serve them all at once, and show that each answers as itself."""
    with reporting_errors():
        if methods:
            from hatrack_trainer.demo.methods_run import run_methods_demo as run
        else:
            from hatrack_trainer.demo.run import run_demo as run

        run(cache_dir, Console())


@train.command()
def estimate(config: Config, changes: Changes = None) -> None:
    """Tell what CONFIG would take: of memory, by parts and from shapes alone, and of time, by a few real steps."""
    with reporting_errors():
        from hatrack_trainer.config_file import load_config

        settings = load_config(config, changes or ())
        console = Console(stderr=True)
        with console.status("importing torch") as status:
            from hatrack_trainer.estimate.report import estimate as estimate_run

            estimate_run(settings, Console(), say=status.update)


@train.command()
def schema() -> None:
    """Print the JSON schema of CONFIG, by which editors complete keys, explain them and mark mistakes."""
    from hatrack_trainer.config_schema import config_schema

    typer.echo(json.dumps(config_schema(), indent=2))


def _follow(train_adapter: Callable[..., TrainingResult], console: Console, registration: Registration | None) -> None:
    """Shows how the run goes, and tells its result."""
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=None, visible=False)
        result = train_adapter(
            on_step=lambda step, total, loss: bar.update(
                task, completed=step, total=total, visible=True, description=f"training, loss {loss:.3f}"
            ),
            say=lambda sentence: console.print(printable(sentence), markup=False, highlight=False, soft_wrap=True),
            check_base=registration and registration.check_base,
        )
    if not is_first():
        return
    held_out = "" if result.eval_loss is None else f", held-out loss {result.eval_loss:.4f}"
    figures = f"{result.steps} steps, loss {result.loss:.4f}{held_out}, digest {result.digest}"
    typer.echo(f"{printable(str(result.folder))}: {figures}")
    if registration is not None:
        _push(registration, result.folder)


def _registration(settings: TrainConfig) -> Registration:
    from hatrack_trainer.register import Registration

    if not settings.adapter.served:
        raise UsageError(
            f"--register: what adapter.method {settings.adapter.method} trains can't be served beside others, but for "
            "norms alone; run without --register, and merge what comes out by `hatrack adapters merge`"
        )
    return Registration(settings.registration)


def _push(registration: Registration, folder: Path) -> None:
    registered = registration.push(folder)
    for warning in registered.warnings:
        typer.echo(f"hatrack: warning: {warning}", err=True)
    typer.echo(str(registered))


def check_base_option(base: str) -> None:
    """Raises UsageError for a `--base` that names nothing: to pathlib, that is the working directory."""
    if not base.strip():
        raise UsageError("--base: is empty; name a checkpoint's folder, or a hub id")


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Prints an expected error on stderr, wrong data line by line, and exits: 2 for the user's mistake, 1 for ours."""
    # bitsandbytes recommends a package that would download a kernel at import.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # TRL tells the hub of every trainer that is made.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        yield
    except InvalidData as error:
        typer.echo(str(error), err=True)  # a line each, as compilers have it
        raise typer.Exit(2) from None
    except UsageError as error:
        raise _exit(str(error), 2) from None
    except HatrackError as error:
        raise _exit(error.message, 2) from None
    except TrainerError as error:
        raise _exit(str(error), 1) from None


def _exit(sentence: str, code: int) -> typer.Exit:
    typer.echo(f"hatrack: {printable(' '.join(sentence.split()))}", err=True)
    return typer.Exit(code)
