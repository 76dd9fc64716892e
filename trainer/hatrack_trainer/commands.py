"""`hatrack train` and `hatrack demo`. Importing this costs nothing: what needs torch is imported inside."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hatrack_server.errors import HatrackError
from hatrack_trainer.data.problems import InvalidData
from hatrack_trainer.errors import TrainerError, UsageError
from hatrack_trainer.progress import progress_bar

train = typer.Typer(no_args_is_help=True, help="Make adapters.")


@train.command()
def run(config: Annotated[Path, typer.Argument(help="A YAML file; examples/train.yaml explains every key.")]) -> None:
    """Train one adapter as CONFIG says, and write its artifact."""
    with reporting_errors():
        from hatrack_trainer.config import load_config

        settings = load_config(config)
        console = Console(stderr=True)
        with console.status("importing torch"):
            from hatrack_trainer.run import train as train_adapter
        with progress_bar(console) as bar:
            task = bar.add_task("training", total=None, visible=False)
            result = train_adapter(
                settings,
                on_step=lambda step, total, loss: bar.update(
                    task, completed=step, total=total, visible=True, description=f"training, loss {loss:.3f}"
                ),
                say=lambda sentence: console.print(sentence, markup=False, highlight=False, soft_wrap=True),
            )
        held_out = "" if result.eval_loss is None else f", held-out loss {result.eval_loss:.4f}"
        typer.echo(f"{result.folder}: {result.steps} steps, loss {result.loss:.4f}{held_out}, digest {result.digest}")


@train.command()
def validate(
    source: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="The YAML file of `train run`; with --base, a JSONL file.")
    ],
    base: Annotated[str | None, typer.Option(help="The checkpoint that is to learn the JSONL file.")] = None,
) -> None:
    """Check the data that CONFIG names: list all that is wrong, or show what would be learned. Needs no weights."""
    with reporting_errors():
        from hatrack_trainer.config import DataSection, load_config
        from hatrack_trainer.data.validate import validate as validate_data

        if base is not None:
            validate_data(DataSection(train=source), base, Console())
        elif source.suffix == ".jsonl":
            raise UsageError(f"{source}: is data; name the base that is to learn it by --base, or take a YAML file")
        else:
            settings = load_config(source)
            validate_data(settings.data, settings.base.model, Console())


def demo(
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where the base and the adapters are kept.", show_default="~/.cache/hatrack/demo"),
    ] = None,
) -> None:
    """Make a small base and three adapters, serve them all at once, and show that each answers as itself."""
    with reporting_errors():
        from hatrack_trainer.demo.run import run_demo

        run_demo(cache_dir, Console())


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Prints an expected error on stderr, wrong data line by line, and exits: 2 for the user's mistake, 1 for ours."""
    # bitsandbytes recommends a package that would download a kernel at import.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
    typer.echo(f"hatrack: {' '.join(sentence.split())}", err=True)
    return typer.Exit(code)
