"""The `hatrack` command: the client's own commands, and those that other packages bring by entry point."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from hatrack_client.errors import (
    Aborted,
    FailedPrecondition,
    HatrackClientError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)

GROUP = "hatrack.commands"
"""The entry-point group of commands: a `typer.Typer` becomes a group, a function a command."""

OWN_COMMANDS = (
    EntryPoint("generate", "hatrack_client.commands.generate:generate", GROUP),
    EntryPoint("adapters", "hatrack_client.commands.adapters:adapters", GROUP),
)
# Beside the names, so that `hatrack --help` imports none of the commands.
HELP = {
    "generate": "Generate text with an adapter, or with the base alone.",
    "adapters": "Push, list, promote, roll back and delete adapters.",
    "serve": "Serve a base model and its adapters.",
    "keys": "Make, list and revoke API keys, offline.",
    "train": "Check a dataset and train an adapter.",
    "demo": "See training, pushing and serving at work on a tiny model.",
}
EXTRAS = {"hatrack_server": "server", "hatrack_trainer": "trainer"}

OPTIONS = {"server": "--server", "api_key": "--api-key", "tls_ca": "--tls-ca"}
"""The client's arguments that are spelt otherwise on the command line."""

USERS_MISTAKES = (InvalidArgument, Unauthenticated, PermissionDenied, NotFound, FailedPrecondition, Aborted)


class MissingExtra(typer.TyperException):
    """A command's package is there, but not what it needs."""

    exit_code = 2


class LazyGroup(TyperGroup):
    """Imports a command only when it is run; to list it, its name and HELP are enough.

    `Any` stands for click's types: typer carries its own copy of click and exports none of them.
    """

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 -- click's signature
        """Every command's name: the client's own, then the others by name."""
        return list(_commands())

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:  # noqa: ARG002 -- click's signature
        """A stand-in that shows the command in a listing."""
        command = _commands().get(cmd_name)
        return TyperCommand(cmd_name, help=HELP.get(cmd_name, f"From {command.module}.")) if command else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The real command, imported now; raises MissingExtra."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        if name is None or stand_in is None:
            return name, stand_in, rest
        # Set before click does, for `invoke` to know which command could not be imported.
        ctx.invoked_subcommand = name
        return name, _load(_commands()[name]), rest

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; raises MissingExtra for what it fails to import, at once or while it runs."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            extra = _extra_that_lacks(error)
            if extra is None or (error.name or "").startswith("hatrack"):
                raise
            message = (
                f"`hatrack {ctx.invoked_subcommand}` needs the package {error.name}: pip install 'hatrack[{extra}]'"
            )
            raise MissingExtra(message) from error


def _extra_that_lacks(error: ModuleNotFoundError) -> str | None:
    """The extra of the first package with one whose code was running."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((EXTRAS[package] for module in modules if (package := module.partition(".")[0]) in EXTRAS), None)


def _commands() -> dict[str, EntryPoint]:
    own = {command.name: command for command in OWN_COMMANDS}
    others = sorted(entry_points(group=GROUP), key=lambda command: command.name)
    return own | {command.name: command for command in others if command.name not in own}


def _load(command: EntryPoint) -> Any:
    loaded = command.load()
    if isinstance(loaded, typer.Typer):
        return typer.main.get_command(loaded)
    single = typer.Typer(add_completion=False)
    single.command(command.name)(loaded)
    return typer.main.get_command(single)


app = typer.Typer(
    name="hatrack", cls=LazyGroup, help="One model, many hats: serve many adapters on one base.", no_args_is_help=True
)


@app.callback()
def _hatrack() -> None:
    """Makes `app` a group even though it has no command of its own."""


def run(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 2 for the user's mistake, 1 for ours or the server's."""
    try:
        status = typer.main.get_command(app).main(args, prog_name="hatrack", standalone_mode=False)
    except typer.Abort:
        return _fail("aborted", 1)
    except typer.TyperException as error:
        return _fail(error.format_message(), error.exit_code)
    except HatrackClientError as error:
        sentence = f"{OPTIONS[error.field]}: {error.message}" if error.field in OPTIONS else str(error)
        return _fail(sentence, 2 if isinstance(error, USERS_MISTAKES) else 1)
    except UnicodeError as error:
        return _fail(f"text must be UTF-8: {error}", 2)
    return status if isinstance(status, int) else 0


def _fail(sentence: str, status: int) -> int:
    # A bare group's "error" is its help, which is on the screen already.
    if sentence:
        typer.echo(f"hatrack: {sentence}", err=True)
    return status


def main() -> None:
    """The entry point of the console script."""
    sys.exit(run())
