"""`hatrack serve` and `hatrack keys`: options in, one sentence out when they are wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hatrack_server.config import ServerConfig
    from hatrack_server.tenancy.keys import KeyStore

# What runs the server is imported when it runs: `hatrack --help` loads this module too.

DEFAULT_DATA_DIR = Path("hatrack-data")

DataDir = Annotated[Path, typer.Option(help="Where adapters and keys are kept.")]


def serve(
    model: Annotated[str | None, typer.Option(help="A checkpoint's folder, or a hub id.")] = None,
    host: Annotated[str | None, typer.Option(show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one.", show_default="50051")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="0 takes a free one.", show_default="9464")] = None,
    metrics_host: Annotated[
        str | None, typer.Option(help="Without TLS or key: loopback unless you know better.", show_default="127.0.0.1")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where adapters and keys are kept.", show_default="hatrack-data")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4 or none.", show_default="nf4")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.", show_default="auto")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Prompt and completion together, in tokens.", show_default="the model's")
    ] = None,
    kv_cache_gb: Annotated[float | None, typer.Option(help="Memory of the KV cache.", show_default="1")] = None,
    adapter_gb: Annotated[float | None, typer.Option(help="Memory of resident adapters.", show_default="1")] = None,
    host_adapter_gb: Annotated[
        float | None, typer.Option(help="Memory for copies of evicted adapters.", show_default="1")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Sequences in one step.", show_default="64")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="Tokens in one step.", show_default="512")] = None,
    max_rank: Annotated[int | None, typer.Option(help="The highest rank accepted.", show_default="256")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads on a CPU.", show_default="torch's choice")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file; renewed ones are taken up.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Beyond loopback without TLS.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with the same settings; the command line wins.")] = None,
) -> None:
    """Serve one base model and its adapters over gRPC."""
    given = {key: value for key, value in locals().items() if key != "config" and value is not None}
    from hatrack_server.app import Addresses
    from hatrack_server.app import serve as run

    def announce(at: Addresses) -> None:
        calls, metrics = _authority(at.host, at.port), _authority(at.metrics_host, at.metrics_port)
        typer.echo(f"hatrack: serving on {calls}, metrics on http://{metrics}/metrics")

    with _one_sentence():
        asyncio.run(run(configure(given, config), announce=announce))


keys = typer.Typer(help="Make, list and revoke the keys of a server, beside its data.", no_args_is_help=True)


@keys.command("create")
def create_key(tenant: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Make a key for TENANT and print it: it can't be shown again."""
    with _one_sentence():
        typer.echo(_key_store(data_dir).create_key(tenant))


@keys.command("list")
def list_keys(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """List the keys' ids with their tenants; the keys themselves are not stored."""
    with _one_sentence():
        for key in _key_store(data_dir).list_keys():
            typer.echo(f"{key.id}\t{key.tenant}\t{key.create_time:%Y-%m-%dT%H:%M:%SZ}")


@keys.command("revoke")
def revoke_key(key_id: str, data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Revoke the key with this id; calls with it are refused from now on."""
    with _one_sentence():
        _key_store(data_dir).revoke_key(key_id)


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder in PEFT's format.", show_default=False)],
    model: Annotated[str, typer.Option(help="The base: a checkpoint's folder, or a hub id.")],
    max_rank: Annotated[int, typer.Option(help="The highest rank that the server accepts.")] = 256,
) -> None:
    """Say what an adapter is, and whether a server of this base would accept it; needs neither server nor weights."""
    import logging

    from rich.console import Console
    from rich.table import Table

    logging.disable(logging.WARNING)  # libraries' advice about a base that is made but not loaded
    with _one_sentence():
        from hatrack_server.catalog import gate
        from hatrack_server.model.checkpoint import resolve_checkpoint
        from hatrack_server.model.shapes import shapes_of_checkpoint

        shapes = shapes_of_checkpoint(resolve_checkpoint(model, weights=False))
        spec = gate.describe(folder, shapes, max_rank=max_rank)
    modules = shapes.linears.keys() | shapes.replaceable.keys()
    targets = {module.rpartition(".")[2] for module in modules if any(f".{module}." in key for key in spec.tensors)}
    table = Table(show_header=False, box=None)
    for name, value in (
        ("method", spec.method),
        ("targets", ", ".join(sorted(targets)) or "none by name"),
        ("rank", str(spec.rank or "none")),
        ("virtual tokens", str(spec.virtual_tokens)),
        ("parameters", f"{spec.parameters:,}"),
        ("when resident", f"{spec.resident_bytes:,} bytes"),
        ("accepted", "yes, by a server of this base"),
    ):
        table.add_row(name, value)
    Console().print(table)


def _key_store(data_dir: Path) -> KeyStore:
    from hatrack_server.tenancy.keys import KeyStore

    return KeyStore(data_dir)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turns an error into one sentence, and exit status 2 when the user can mend it, else 1."""
    from hatrack_server.errors import HatrackError, InvalidRequest, Unavailable

    try:
        yield
    except HatrackError as error:
        field = f"{error.field}: " if isinstance(error, InvalidRequest) else ""
        typer.echo(f"hatrack: {field}{error.message}", err=True)
        raise typer.Exit(1 if isinstance(error, Unavailable) else 2) from None


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def configure(given: dict[str, Any], file: Path | None) -> ServerConfig:
    """The ServerConfig of a file and the options over it; raises StartupError naming what is wrong."""
    from pydantic import ValidationError

    from hatrack_server.config import EngineConfig, ServerConfig
    from hatrack_server.errors import StartupError
    from hatrack_server.model.checkpoint import resolve_checkpoint

    settings = _read(file) if file else {}
    engine = settings.setdefault("engine", {})
    if not isinstance(engine, dict):
        raise StartupError(f"--config {file}: engine must be a mapping of settings")
    options: dict[tuple[int | str, ...], str] = {}  # where each given one lies in the settings
    for key, value in given.items():
        of_engine = key in EngineConfig.model_fields
        (engine if of_engine else settings)[key] = value
        options[("engine", key) if of_engine else (key,)] = f"--{key.replace('_', '-')}"
    if not isinstance(engine.get("model"), str):
        raise StartupError("--model is missing: a checkpoint's folder, or a hub id")
    try:
        # Everything cheap is checked before a checkpoint may be downloaded.
        ServerConfig.model_validate(settings)
        engine["model"] = resolve_checkpoint(engine["model"])
        return ServerConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = first["loc"]
        name = options.get(place) or f"--config {file}: {'.'.join(map(str, place))}"
        raise StartupError(_sentence(name, first)) from None


def _read(file: Path) -> dict[str, Any]:
    import yaml

    from hatrack_server.errors import StartupError

    try:
        settings = yaml.safe_load(file.read_text())
    except OSError as error:
        raise StartupError(f"--config {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise StartupError(f"--config {file} is not YAML") from None
    if not isinstance(settings, dict):
        raise StartupError(f"--config {file} must be a mapping of settings")
    return settings


def _sentence(name: str, error: Any) -> str:
    """One pydantic error as a sentence that names the setting; a check over several of them names them itself."""
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["loc"] in ((), ("engine",)):
        return message
    return f"{name}: {message[:1].lower()}{message[1:]} (got {error['input']!r})"
