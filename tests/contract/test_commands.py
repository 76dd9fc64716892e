"""`hatrack serve` and `hatrack keys` as an operator meets them; the engine alone is a fake."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from contract.artifacts import header, lora
from contract.conftest import failure
from contract.fake_engine import BASE, FakeEngine
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from tiny import make_tokenizer
from typer.testing import CliRunner

from hatrack.v1 import inference_pb2 as pb
from hatrack.v1.adapters_pb2_grpc import AdapterServiceStub
from hatrack.v1.inference_pb2_grpc import InferenceServiceStub
from hatrack_server import app, commands
from hatrack_server.commands import keys, serve
from hatrack_server.config import EngineConfig, ServerConfig
from hatrack_server.errors import StartupError, Unavailable
from hatrack_server.tenancy.keys import KeyStore

COMMANDS = typer.Typer()
COMMANDS.command()(serve)
COMMANDS.add_typer(keys, name="keys")


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(COMMANDS, list(map(str, arguments)))


def test_keys(tmp_path: Path) -> None:
    made = run("keys", "create", "acme", "--data-dir", tmp_path)
    assert made.exit_code == 0
    assert KeyStore(tmp_path).authenticate(made.stdout.strip()) == "acme"
    listed = run("keys", "list", "--data-dir", tmp_path)
    key_id, tenant, _ = listed.stdout.split()
    assert tenant == "acme"
    assert made.stdout.strip() not in listed.stdout
    assert run("keys", "revoke", key_id, "--data-dir", tmp_path).exit_code == 0
    assert run("keys", "list", "--data-dir", tmp_path).stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["keys", "revoke", "nope"], "'nope' was not found"),
        (["keys", "create", "No Such"], "tenant: must be"),
        (["serve"], "--model is missing"),
        (["serve", "--model", "/nowhere"], "/nowhere does not exist"),
        (["serve", "--model", "x", "--max-rank", "0"], "--max-rank: "),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(*arguments, "--data-dir", tmp_path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("hatrack: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ("engine: {max_rows: 0}", [], "engine.max_rows: input"),
        ("max_upload_bytes: 0", [], "max_upload_bytes: input"),
        ("engine: {max_row: 1}", [], "engine.max_row: extra"),
        ("max_rows: 1", [], "max_rows: extra"),
        ("max_rank: 1", ["--max-rank", "8"], "max_rank: extra"),
        ("engine: 1", [], "engine must be"),
    ],
)
def test_a_mistake_in_the_file_is_named_as_the_file_spells_it(
    tmp_path: Path, settings: str, options: list[str], message: str
) -> None:
    file = tmp_path / "hatrack.yaml"
    file.write_text(settings)
    result = run("serve", "--model", "x", "--config", file, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"hatrack: --config {file}: {message}")
    file.write_text("engine: {max_rank: 0}")
    assert "hatrack: --max-rank: " in run("serve", "--model", "x", "--config", file, "--max-rank", "-1").stderr


class StartingEngine(FakeEngine):
    """The fake with a process's life."""

    def __init__(self, config: EngineConfig, **callbacks: Any) -> None:
        super().__init__()
        self.callbacks = callbacks
        self.loaded = None
        self.ready = False
        self.started = asyncio.Event()
        self.load = asyncio.Event()
        if config.max_rows > 1:
            self.load.set()
        self.stopped = False
        ENGINES.append(self)

    async def start(self) -> Any:
        self.callbacks["on_progress"]("weights", 0.5)
        self.started.set()
        await self.load.wait()
        if self.error:
            raise self.error
        self.loaded, self.ready = BASE, True
        return BASE

    async def stop(self) -> None:
        self.stopped = True


ENGINES: list[StartingEngine] = []


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[StartingEngine]:
    ENGINES.clear()
    monkeypatch.setattr(app, "EngineClient", StartingEngine)
    monkeypatch.setattr(app, "configure_logging", lambda: None)
    return ENGINES


@pytest.fixture
def config(tmp_path: Path) -> ServerConfig:
    make_tokenizer().save_pretrained(tmp_path)
    engine = EngineConfig(model=tmp_path)
    return ServerConfig(engine=engine, port=0, metrics_port=0, data_dir=tmp_path / "data", drain_seconds=1)


async def test_serves_until_sigterm(config: ServerConfig, engines: list[StartingEngine]) -> None:
    announced: asyncio.Future[app.Addresses] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(app.serve(config, announce=announced.set_result))
    addresses = await announced
    async with grpc.aio.insecure_channel(f"127.0.0.1:{addresses.port}") as channel:
        await InferenceServiceStub(channel).Generate(pb.GenerateRequest(prompt="hi"))
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(5):
        await serving
    assert engines[0].stopped


@asynccontextmanager
async def loading(config: ServerConfig, engines: list[StartingEngine]) -> AsyncIterator[tuple[Any, str]]:
    """A server whose engine still loads: the task, and its address; neither may be there afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    slow = config.engine.model_copy(update={"max_rows": 1})
    config = config.model_copy(update={"engine": slow, "port": port})
    announced = asyncio.Event()
    serving = asyncio.create_task(app.serve(config, announce=lambda _: announced.set()))
    async with asyncio.timeout(10):
        while not engines:
            await asyncio.sleep(0.01)
        await engines[0].started.wait()
        yield serving, f"127.0.0.1:{port}"
    assert serving.done()
    assert engines[0].stopped
    assert announced.is_set() == engines[0].load.is_set()
    socket.create_server(("127.0.0.1", port)).close()


async def test_calls_are_unavailable_until_the_base_is_loaded(
    config: ServerConfig, engines: list[StartingEngine]
) -> None:
    async with loading(config, engines) as (serving, address), grpc.aio.insecure_channel(address) as channel:
        inference, adapters, health = InferenceServiceStub(channel), AdapterServiceStub(channel), HealthStub(channel)
        hello = pb.GenerateRequest(prompt="hi")
        for call in (
            inference.Generate(hello),
            inference.StreamGenerate(hello),
            adapters.UploadAdapter(never_ending()),
        ):
            got = await failure(call)
            assert (got.code, got.message) == (grpc.StatusCode.UNAVAILABLE, "the engine is starting")
        check = health_pb2.HealthCheckRequest()
        assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        engines[0].load.set()
        while (await health.Check(check)).status != health_pb2.HealthCheckResponse.SERVING:
            await asyncio.sleep(0.01)
        await inference.Generate(hello)
        os.kill(os.getpid(), signal.SIGTERM)
        await serving


async def never_ending() -> AsyncIterator[Any]:
    yield header("tone", lora())
    await asyncio.Event().wait()


async def test_sigterm_ends_the_loading(config: ServerConfig, engines: list[StartingEngine]) -> None:
    async with loading(config, engines) as (serving, _):
        os.kill(os.getpid(), signal.SIGTERM)
        await serving


async def test_an_engine_that_does_not_start_ends_the_server(
    config: ServerConfig, engines: list[StartingEngine]
) -> None:
    async with loading(config, engines) as (serving, _):
        engines[0].error = StartupError("no such architecture")
        engines[0].load.set()
        with pytest.raises(StartupError, match="architecture"):
            await serving
        engines[0].load.clear()


@pytest.mark.parametrize("port", ["port", "metrics_port"])
async def test_a_port_in_use_shows_before_the_base_is_loaded(
    config: ServerConfig, engines: list[StartingEngine], port: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        clash = config.model_copy(update={port: taken.getsockname()[1]})
        with pytest.raises(StartupError, match=f"127.0.0.1:{taken.getsockname()[1]}"):
            await app.serve(clash, announce=print)
    assert not any(engine.started.is_set() for engine in engines)


async def test_a_bad_certificate_shows_before_the_base_is_loaded(
    config: ServerConfig, engines: list[StartingEngine], tmp_path: Path
) -> None:
    (tmp_path / "c.pem").write_text("no certificate")
    paths = {"tls_cert": tmp_path / "c.pem", "tls_key": tmp_path / "c.pem"}
    with pytest.raises(StartupError, match="no certificate with its key"):
        await app.serve(config.model_copy(update=paths), announce=print)
    assert not engines[0].started.is_set()


@pytest.mark.parametrize(
    ("error", "status"), [(StartupError("no such architecture"), 2), (Unavailable("the engine's process died"), 1)]
)
def test_the_exit_status_says_whose_mistake_it_was(
    config: ServerConfig, engines: list[StartingEngine], monkeypatch: pytest.MonkeyPatch, error: Any, status: int
) -> None:
    async def start(_: StartingEngine) -> Any:
        raise error

    monkeypatch.setattr(StartingEngine, "start", start)
    monkeypatch.setattr(commands, "configure", lambda *_: config)
    result = run("serve")
    assert (result.exit_code, result.stderr) == (status, f"hatrack: {error.message}\n")


async def test_beyond_loopback_needs_a_key(config: ServerConfig, engines: list[StartingEngine]) -> None:
    open_to_all = config.model_copy(update={"host": "0.0.0.0", "insecure": True})
    with pytest.raises(StartupError, match="there is no key"):
        await app.serve(open_to_all, announce=print)
    assert not engines
