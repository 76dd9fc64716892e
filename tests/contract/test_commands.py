"""`hatrack serve` and `hatrack keys` as an operator meets them; the engine alone is a fake."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from contract.fake_engine import BASE, FakeEngine
from tiny import make_tokenizer
from typer.testing import CliRunner

from hatrack.v1 import inference_pb2 as pb
from hatrack.v1.inference_pb2_grpc import InferenceServiceStub
from hatrack_server import app
from hatrack_server.commands import keys, serve
from hatrack_server.config import EngineConfig, ServerConfig
from hatrack_server.errors import StartupError
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


class StartingEngine(FakeEngine):
    """The fake with a process's life."""

    def __init__(self, config: EngineConfig, **callbacks: Any) -> None:
        super().__init__()
        self.callbacks = callbacks
        self.started = asyncio.Event()
        self.blocked = config.max_rows == 1
        self.stopped = False
        ENGINES.append(self)

    async def start(self) -> Any:
        self.callbacks["on_progress"]("weights", 0.5)
        self.started.set()
        if self.blocked:
            await asyncio.Event().wait()
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


async def test_sigterm_ends_the_loading(config: ServerConfig, engines: list[StartingEngine]) -> None:
    slow = config.model_copy(update={"engine": config.engine.model_copy(update={"max_rows": 1})})
    serving = asyncio.create_task(app.serve(slow, announce=lambda _: pytest.fail("must not serve")))
    while not engines:
        await asyncio.sleep(0.01)
    await engines[0].started.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(5):
        await serving
    assert engines[0].stopped


@pytest.mark.parametrize("port", ["port", "metrics_port"])
async def test_a_port_in_use(config: ServerConfig, engines: list[StartingEngine], port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        clash = config.model_copy(update={port: taken.getsockname()[1]})
        with pytest.raises(StartupError, match=f"127.0.0.1:{taken.getsockname()[1]}"):
            await app.serve(clash, announce=print)
    assert all(engine.stopped for engine in engines)


async def test_beyond_loopback_needs_a_key(config: ServerConfig, engines: list[StartingEngine]) -> None:
    open_to_all = config.model_copy(update={"host": "0.0.0.0", "insecure": True})
    with pytest.raises(StartupError, match="there is no key"):
        await app.serve(open_to_all, announce=print)
    assert not engines
