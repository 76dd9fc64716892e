from __future__ import annotations

import asyncio

import grpc
import pytest
from contract.artifacts import lora, upload
from contract.conftest import Harness, failure, outcome
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from hatrack.v1 import adapters_pb2, inference_pb2
from hatrack_server.api.server import SERVICES
from hatrack_server.errors import Unavailable

Code = grpc.StatusCode
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
HELLO = inference_pb2.GenerateRequest(prompt="hi")


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def status(harness: Harness, service: str = "") -> int:
    answer = await HealthStub(harness.channel).Check(health_pb2.HealthCheckRequest(service=service))
    return answer.status


async def test_keys_close_the_door(harness: Harness) -> None:
    await harness.inference.Generate(HELLO)
    key = harness.keys.create_key("acme")
    for metadata in ((), bearer("hk_wrong"), (("authorization", key),), (("authorization", "Bearer "),)):
        for call in (harness.inference.Generate, harness.inference.StreamGenerate):
            got = await failure(call(HELLO, metadata=metadata))
            assert (got.code, got.reason) == (Code.UNAUTHENTICATED, "UNAUTHENTICATED")
    await harness.inference.Generate(HELLO, metadata=bearer(key))
    assert [call["tenant"] for call in harness.engine.calls] == ["default", "acme"]
    assert harness.engine.calls[0]["salt"] != harness.engine.calls[1]["salt"]
    assert await status(harness) == SERVING
    [record] = harness.keys.list_keys()
    harness.keys.revoke_key(record.id)
    for metadata in ((), bearer(key)):
        assert (await failure(harness.inference.Generate(HELLO, metadata=metadata))).code is Code.UNAUTHENTICATED


async def test_a_foreign_adapter_is_an_unknown_one(harness: Harness) -> None:
    ours, theirs = bearer(harness.keys.create_key("ours")), bearer(harness.keys.create_key("theirs"))
    await harness.adapters.UploadAdapter(upload("tone", lora()), metadata=ours)
    answers = []
    for name in ("tone", "gone"):
        request = inference_pb2.GenerateRequest(adapter=name, prompt="hi")
        got = [
            await failure(harness.inference.Generate(request, metadata=theirs)),
            await failure(harness.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=name), metadata=theirs)),
            await failure(
                harness.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=name), metadata=theirs)
            ),
        ]
        answers.append([(one.code, one.reason, one.message.replace(name, "")) for one in got])
    assert answers[0] == answers[1]
    assert {code for code, *_ in answers[0]} == {Code.NOT_FOUND}
    listed = await harness.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest(), metadata=theirs)
    assert listed.adapters == []


@pytest.mark.parametrize("service", ["", *SERVICES])
async def test_health_follows_the_engine(harness: Harness, service: str) -> None:
    assert await status(harness, service) == SERVING
    ready = harness.metrics.registry.get_sample_value
    assert ready("hatrack_ready") == 1
    harness.engine.ready = False
    async with asyncio.timeout(3):
        while await status(harness, service) != NOT_SERVING:
            await asyncio.sleep(0.02)
    assert ready("hatrack_ready") == 0
    watch = HealthStub(harness.channel).Watch(health_pb2.HealthCheckRequest(service=service))
    assert (await watch.read()).status == NOT_SERVING
    harness.engine.ready = True
    async with asyncio.timeout(3):
        assert (await watch.read()).status == SERVING
    watch.cancel()


async def test_health_of_an_unknown_service(harness: Harness) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await status(harness, "hatrack.v1.Nothing")
    assert caught.value.code() is Code.NOT_FOUND


async def test_reflection_lists_every_service_without_a_key(harness: Harness) -> None:
    harness.keys.create_key("acme")
    call = ServerReflectionStub(harness.channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    assert names == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICES[0]))
    assert (await call.read()).file_descriptor_response.file_descriptor_proto
    await call.done_writing()


async def test_an_unknown_method(harness: Harness) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.channel.unary_unary("/hatrack.v1.InferenceService/Nothing")(b"")
    assert caught.value.code() is Code.UNIMPLEMENTED


async def test_an_internal_error_is_logged_under_the_id_that_the_client_gets(
    harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    harness.engine.error = RuntimeError("/secret/path")
    got = await failure(harness.inference.Generate(HELLO))
    error_id = got.message.removeprefix("internal error ")
    out = capsys.readouterr().out
    assert error_id in out
    assert "/secret/path" in out


async def test_draining_waits_for_calls_in_flight_and_refuses_new_ones(harness: Harness) -> None:
    harness.engine.stall = True
    watch = HealthStub(harness.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    call = harness.inference.StreamGenerate(HELLO)
    await call.read()
    stopping = asyncio.create_task(harness.api.stop(5))
    assert (await watch.read()).status == NOT_SERVING
    await asyncio.sleep(0.05)
    got = await failure(harness.inference.Generate(HELLO))
    assert (got.code, got.reason) == (Code.UNAVAILABLE, "UNAVAILABLE")
    assert not stopping.done()
    call.cancel()
    async with asyncio.timeout(3):
        assert await stopping == 0


async def test_what_outlives_the_drain_is_cut_off(harness: Harness) -> None:
    harness.engine.stall = True
    events = aiter(harness.inference.StreamGenerate(HELLO))
    await anext(events)
    async with asyncio.timeout(5):
        assert await harness.api.stop(0.05) == 1
    assert harness.engine.in_flight == 0
    with pytest.raises(grpc.aio.AioRpcError):
        await outcome(events)


async def test_a_dead_engine_leaves_the_server_answering(harness: Harness) -> None:
    harness.engine.error = Unavailable("the engine is starting")
    assert (await failure(harness.inference.Generate(HELLO))).code is Code.UNAVAILABLE
    harness.engine.error = None
    await harness.inference.Generate(HELLO)


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x12\x05ab"])
@pytest.mark.parametrize("method", ["InferenceService/Generate", "AdapterService/UploadAdapter"])
async def test_bytes_that_are_no_message(harness: Harness, raw: bytes, method: str) -> None:
    streaming = method.endswith("UploadAdapter")
    kind = harness.channel.stream_unary if streaming else harness.channel.unary_unary
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await kind(f"/hatrack.v1.{method}")(iter([raw]) if streaming else raw)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == "request: the bytes are not a message of this method's type"
