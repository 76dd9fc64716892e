"""`hatrack adapters`."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hatrack_client._connection import DEFAULT_SERVER
from hatrack_client.client import Client
from hatrack_client.commands._options import ApiKey, Server, Tls, TlsCa
from hatrack_client.commands._progress import upload_progress
from hatrack_client.types import Adapter, AdapterVersion

adapters = typer.Typer(
    help="Push, list, promote, roll back and delete adapters.", no_args_is_help=True, add_completion=False
)

# E.g. `inspect`, which needs the server's package and no server.
for _command in entry_points(group="hatrack.adapters"):
    adapters.command(_command.name)(_command.load())

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter.", show_default=False)]
NameOrVersion = Annotated[
    str, typer.Argument(metavar="NAME[@VERSION]", help="The adapter, or one of its versions.", show_default=False)
]


@adapters.command()
def push(
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder in PEFT's format.", show_default=False)],
    stage: Annotated[bool, typer.Option("--stage", help="Leave the live version as it is.")] = False,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """Upload an adapter as the next version of its name, and make it live."""
    with Client(server, api_key=api_key, tls=tls, tls_ca=tls_ca) as client, upload_progress(name) as progress:
        adapter = client.push_adapter(name, folder, stage=stage, progress=progress)
    pushed = _named_version(adapter)
    for warning in pushed.warnings:
        typer.echo(f"hatrack: warning: {warning}", err=True)
    typer.echo(f"{adapter.name}@{pushed.version} {pushed.state} {pushed.digest}")


@adapters.command("list")
def list_(server: Server = DEFAULT_SERVER, api_key: ApiKey = None, tls: Tls = False, tls_ca: TlsCa = None) -> None:
    """List the tenant's adapters with their live versions."""
    table = _table("name", "live", "versions", "method", "rank")
    with Client(server, api_key=api_key, tls=tls, tls_ca=tls_ca) as client:
        for adapter in client.list_adapters():
            live = next((version for version in adapter.versions if version.version == adapter.live_version), None)
            kind = (live.method, str(live.rank)) if live else ("", "")
            table.add_row(adapter.name, str(adapter.live_version or "none"), str(len(adapter.versions)), *kind)
    _print(table)


@adapters.command()
def get(
    name: NameOrVersion,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """Show an adapter's versions, or one of them."""
    with Client(server, api_key=api_key, tls=tls, tls_ca=tls_ca) as client:
        adapter = client.get_adapter(name)
    table = _table("version", "state", "method", "rank", "parameters", "bytes", "verified", "created", "digest")
    for version in [_named_version(adapter)] if adapter.version else adapter.versions:
        table.add_row(*_cells(version, live=version.version == adapter.live_version))
        for warning in version.warnings:
            typer.echo(f"hatrack: warning: version {version.version}: {warning}", err=True)
    _print(table)


@adapters.command()
def promote(
    name: Name,
    version: Annotated[int, typer.Argument(min=1, help="The version to make live.", show_default=False)],
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """Make a version the live one."""
    with Client(server, api_key=api_key, tls=tls, tls_ca=tls_ca) as client:
        _print_live(client.promote(name, version))


@adapters.command()
def rollback(
    name: Name, server: Server = DEFAULT_SERVER, api_key: ApiKey = None, tls: Tls = False, tls_ca: TlsCa = None
) -> None:
    """Make the newest ready version below the live one live again."""
    with Client(server, api_key=api_key, tls=tls, tls_ca=tls_ca) as client:
        _print_live(client.rollback(name))


@adapters.command()
def rm(
    name: NameOrVersion,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """Delete an adapter with all of its versions, or one version that is not live."""
    with Client(server, api_key=api_key, tls=tls, tls_ca=tls_ca) as client:
        client.delete_adapter(name)
    typer.echo(f"{name} is deleted")


def _named_version(adapter: Adapter) -> AdapterVersion:
    return next(version for version in adapter.versions if version.version == adapter.version)


def _cells(version: AdapterVersion, *, live: bool) -> tuple[str, ...]:
    return (
        f"{version.version} (live)" if live else str(version.version),
        version.state,
        version.method,
        str(version.rank),
        f"{version.parameters:,}",
        f"{version.size_bytes:,}",
        "yes" if version.verified else "no",
        f"{version.create_time:%Y-%m-%d}",
        version.digest[:12],
    )


def _print_live(adapter: Adapter) -> None:
    typer.echo(f"{adapter.name}@{adapter.live_version} is live")


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False, show_edge=False, header_style="bold")


def _print(table: Table) -> None:
    # A pipe has no width: a line that wraps there would be two to whoever reads it.
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 1000).print(table)
