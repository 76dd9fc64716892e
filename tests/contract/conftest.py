"""A real gRPC server in process, over the real catalog and keys, with a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from contract.fake_engine import FakeEngine
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status
from tiny import make_tokenizer

from hatrack.v1.adapters_pb2_grpc import AdapterServiceStub
from hatrack.v1.inference_pb2_grpc import InferenceServiceStub
from hatrack_server.api.server import ApiServer
from hatrack_server.catalog import Catalog
from hatrack_server.config import EngineConfig, ServerConfig
from hatrack_server.metrics import Metrics
from hatrack_server.tenancy.keys import KeyStore
from hatrack_server.text.codec import TextCodec

DETAILS = (ErrorInfo, BadRequest, RetryInfo)


@dataclass
class Harness:
    """Everything that a test may look at behind the wire."""

    api: ApiServer
    engine: FakeEngine
    catalog: Catalog
    keys: KeyStore
    metrics: Metrics
    data_dir: Path
    channel: grpc.aio.Channel

    @property
    def inference(self) -> InferenceServiceStub:
        return InferenceServiceStub(self.channel)

    @property
    def adapters(self) -> AdapterServiceStub:
        return AdapterServiceStub(self.channel)

    def artifacts(self) -> list[str]:
        """What lies on disk, staged or stored."""
        return [str(file) for part in ("artifacts", "staging") for file in (self.data_dir / part).iterdir()]


@pytest.fixture(scope="session")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return TextCodec(path)


@pytest.fixture
async def harness(tmp_path: Path, codec: TextCodec) -> AsyncIterator[Harness]:
    config = ServerConfig(engine=EngineConfig(model=tmp_path), port=0, data_dir=tmp_path / "data")
    engine, metrics, keys = FakeEngine(), Metrics(), KeyStore(config.data_dir)
    catalog = Catalog(config.data_dir, max_upload_bytes=100_000, on_unused=engine.forget)
    api = ApiServer(config, engine=engine, catalog=catalog, keys=keys, codec=codec, metrics=metrics)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await api.start()}") as channel:
        yield Harness(api, engine, catalog, keys, metrics, config.data_dir, channel)
    await api.stop(1)
    catalog.close()
    keys.close()


@dataclass
class Failure:
    """A failed call as a client sees it."""

    code: grpc.StatusCode
    message: str
    reason: str
    field: str | None
    retry_seconds: float | None


async def failure(call: Any) -> Failure:
    """Awaits a call (unary, or a stream to its end) that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await outcome(call)
    status = rpc_status.from_call(_Trailers(caught.value))
    assert status is not None, caught.value
    found: dict[str, Any] = {}
    for detail in status.details:
        kind = next(kind for kind in DETAILS if detail.Is(kind.DESCRIPTOR))
        found[kind.__name__] = kind()
        detail.Unpack(found[kind.__name__])
    assert found["ErrorInfo"].domain == "hatrack"
    bad, retry = found.get("BadRequest"), found.get("RetryInfo")
    return Failure(
        code=caught.value.code(),
        message=status.message,
        reason=found["ErrorInfo"].reason,
        field=bad.field_violations[0].field if bad else None,
        retry_seconds=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
    )


async def outcome(call: Any) -> Any:
    """What a call answers: a message, or the list of a stream's."""
    return [event async for event in call] if hasattr(call, "__aiter__") else await call


class _Trailers:
    """An AioRpcError with the method names that grpc_status asks a sync call for."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code
        self.details = error.details
        self.trailing_metadata = error.trailing_metadata
