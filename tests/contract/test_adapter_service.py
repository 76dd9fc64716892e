from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from contract.artifacts import header, lora, upload
from contract.conftest import Harness, failure
from contract.fake_engine import BASE
from google.protobuf.field_mask_pb2 import FieldMask

from hatrack.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, BaseIdentity, Manifest, artifact_digest
from hatrack.v1 import adapters_pb2 as pb
from hatrack.v1 import inference_pb2
from hatrack_server.catalog import gate
from hatrack_server.errors import GenerationFailed, Unavailable

Code = grpc.StatusCode
LIVE = FieldMask(paths=["live_version"])


def update(name: str, version: int, etag: str = "", mask: FieldMask = LIVE) -> pb.UpdateAdapterRequest:
    adapter = pb.Adapter(name=name, live_version=version, etag=etag)
    return pb.UpdateAdapterRequest(adapter=adapter, update_mask=mask)


async def test_versions_come_live_and_back(harness: Harness) -> None:
    service = harness.adapters
    first = await service.UploadAdapter(upload("tone", lora(fill=1)))
    assert (first.version, first.live_version, first.versions[0].method) == (1, 1, "LORA")
    assert first.versions[0].state == pb.ADAPTER_STATE_READY
    assert (first.versions[0].rank, first.versions[0].parameters) == (2, 32)
    assert first.versions[0].create_time.seconds > 0
    second = await service.UploadAdapter(upload("tone", lora(fill=2), stage=True))
    assert (second.version, second.live_version) == (2, 1)
    again = await service.UploadAdapter(upload("tone", lora(fill=1)))
    assert again.version == 1
    promoted = await service.UpdateAdapter(update("tone", 2, again.etag))
    assert promoted.live_version == 2
    stale = await failure(service.UpdateAdapter(update("tone", 1, again.etag)))
    assert (stale.code, stale.reason) == (Code.ABORTED, "CONFLICT")
    live = await failure(service.DeleteAdapter(pb.DeleteAdapterRequest(name="tone@2")))
    assert (live.code, live.reason) == (Code.FAILED_PRECONDITION, "FAILED_PRECONDITION")
    await service.DeleteAdapter(pb.DeleteAdapterRequest(name="tone@1"))
    got = await service.GetAdapter(pb.GetAdapterRequest(name="tone@2"))
    assert ([version.version for version in got.versions], got.version) == ([2], 2)
    await service.DeleteAdapter(pb.DeleteAdapterRequest(name="tone"))
    assert (await failure(service.GetAdapter(pb.GetAdapterRequest(name="tone")))).code is Code.NOT_FOUND
    assert harness.artifacts() == []


def trained_on(base: BaseIdentity) -> dict[str, bytes]:
    files = lora()
    digest = artifact_digest({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
    return {**files, MANIFEST_FILE: Manifest(digest, base, "LORA").to_json().encode()}


async def test_a_version_is_held_against_the_base_that_is_served_now(harness: Harness) -> None:
    made = await harness.adapters.UploadAdapter(upload("tone", trained_on(BASE.identity)))
    assert (made.versions[0].verified, list(made.versions[0].warnings)) == (True, [])
    harness.engine.loaded = replace(BASE, identity=replace(BASE.identity, chat_template="d" * 64))
    [got] = (await harness.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters
    assert not got.versions[0].verified
    [warning] = got.versions[0].warnings
    assert "chat template" in warning


async def test_an_adapter_of_another_chat_template_is_refused(harness: Harness) -> None:
    other = replace(BASE.identity, chat_template="d" * 64)
    got = await failure(harness.adapters.UploadAdapter(upload("tone", trained_on(other))))
    assert (got.code, got.field) == (Code.INVALID_ARGUMENT, "manifest.json: base.chat_template")
    assert got.message == (
        "manifest.json: base.chat_template: it was trained with another chat template than this server's"
    )
    await nothing_is_left(harness)


@pytest.mark.parametrize("files", [trained_on(BASE.identity), lora()], ids=["with a manifest", "without"])
async def test_no_chat_reaches_an_adapter_that_learned_another_template(
    harness: Harness, files: dict[str, bytes]
) -> None:
    await harness.adapters.UploadAdapter(upload("tone", files))
    harness.engine.loaded = replace(BASE, identity=replace(BASE.identity, chat_template="d" * 64))
    chat = inference_pb2.GenerateRequest(adapter="tone", chat={"messages": [{"role": "user", "content": "hi"}]})
    if MANIFEST_FILE in files:
        got = await failure(harness.inference.Generate(chat))
        assert (got.code, got.message) == (
            Code.FAILED_PRECONDITION,
            "tone@1 was trained with another chat template than this server's: send a prompt, or train it again",
        )
    else:
        await harness.inference.Generate(chat)
    await harness.inference.Generate(inference_pb2.GenerateRequest(adapter="tone", prompt="hi"))


async def test_the_base_can_be_asked_for(harness: Harness) -> None:
    base = await harness.adapters.GetBase(pb.GetBaseRequest())
    assert BaseIdentity(base.weights, base.quantization, base.tokenizer, base.chat_template) == BASE.identity
    harness.engine.loaded = None
    assert (await failure(harness.adapters.GetBase(pb.GetBaseRequest()))).code is Code.UNAVAILABLE


async def test_the_canary_runs_the_staged_adapter(harness: Harness) -> None:
    made = await harness.adapters.UploadAdapter(upload("tone", lora()))
    [call] = harness.engine.calls
    assert call["artifact"].digest == made.versions[0].digest
    assert (call["sampling"].max_tokens, call["sampling"].temperature) == (1, 0)
    assert len(call["prompt"]) > 0


@pytest.mark.parametrize(
    ("error", "code", "field"),
    [
        (GenerationFailed("logits are not finite"), Code.INVALID_ARGUMENT, WEIGHTS_FILE),
        (Unavailable("the engine died"), Code.UNAVAILABLE, None),
    ],
)
async def test_a_failed_canary_leaves_nothing(harness: Harness, error: Exception, code: Code, field: str) -> None:
    harness.engine.error = error
    got = await failure(harness.adapters.UploadAdapter(upload("tone", lora())))
    assert (got.code, got.field) == (code, field)
    await nothing_is_left(harness)


def without(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {file: content for file, content in files.items() if file != name}


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ([], "header"),
        ([pb.UploadAdapterRequest(chunk=b"x")], "header"),
        ([header("tone", lora()), header("tone", lora())], "chunk"),
        ([header("tone", lora()), pb.UploadAdapterRequest()], "chunk"),
        ([header("tone", lora()), pb.UploadAdapterRequest(chunk=bytes(2**20 + 1))], "chunk"),
        ([header("../tone", lora())], "header.name"),
        ([header("tone", without(lora(), CONFIG_FILE))], "header.files"),
        ([header("tone", {**lora(), "../x": b"1"})], "header.files[2].name"),
        ([header("tone", {**lora(), WEIGHTS_FILE: bytes(100_001)})], "header.files[1].size"),
        ([*upload("tone", lora()), pb.UploadAdapterRequest(chunk=b"x")], "chunk"),
        ([header("tone", lora())], CONFIG_FILE),
        ([header("tone", lora(fill=1)), *list(upload("tone", lora(fill=2)))[1:]], WEIGHTS_FILE),
        (list(upload("tone", lora(peft_type="POLY"))), f"{CONFIG_FILE}: peft_type"),
        (list(upload("tone", lora(fill=float("nan")))), None),
        # What a refusal quotes must neither break the status nor outgrow a header.
        (list(upload("tone", lora(**{"\ud800": 1}))), None),
        (list(upload("tone", lora(**{"x" * 50_000: 1}))), None),
        (list(upload("tone", lora(peft_type="y" * 50_000))), f"{CONFIG_FILE}: peft_type"),
        (list(upload("tone", {**lora(), CONFIG_FILE: b'{"r": %s}' % (b"9" * 5000)})), CONFIG_FILE),
    ],
    ids=lambda value: value if isinstance(value, str) else "parts",
)
async def test_a_refused_upload_leaves_nothing(harness: Harness, parts: list[Any], field: str | None) -> None:
    got = await failure(harness.adapters.UploadAdapter(iter(parts)))
    assert got.code is Code.INVALID_ARGUMENT
    assert got.reason in {"INVALID_REQUEST", "INVALID_ARTIFACT"}
    assert field is None or got.field == field
    assert str(harness.data_dir) not in got.message
    await nothing_is_left(harness)


async def test_other_calls_find_a_thread_while_uploads_are_checked(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, check = threading.Event(), gate.check

    def slow_check(*args: Any, **options: Any) -> gate.Checked:
        assert go_on.wait(10)
        return check(*args, **options)

    monkeypatch.setattr(gate, "check", slow_check)
    key = harness.keys.create_key("acme")
    credential = (("authorization", f"Bearer {key}"),)
    files = lora()
    uploads = [
        asyncio.ensure_future(harness.adapters.UploadAdapter(upload(f"n{i}", files), metadata=credential))
        for i in range(40)
    ]
    try:
        async with asyncio.timeout(8):
            while len(harness.artifacts()) < len(uploads):
                await asyncio.sleep(0.01)
            await harness.adapters.ListAdapters(pb.ListAdaptersRequest(), metadata=credential)
    finally:
        go_on.set()
    await asyncio.gather(*uploads)


async def test_an_abandoned_upload_leaves_nothing(harness: Harness) -> None:
    going = asyncio.Event()

    async def half() -> AsyncIterator[pb.UploadAdapterRequest]:
        for part in list(upload("tone", lora()))[:3]:
            yield part
        going.set()
        await asyncio.Event().wait()

    call = harness.adapters.UploadAdapter(half())
    await going.wait()
    while not harness.artifacts():
        await asyncio.sleep(0.01)
    call.cancel()
    await nothing_is_left(harness)


async def test_pages(harness: Harness) -> None:
    for name in ("b", "a", "c"):
        await harness.adapters.UploadAdapter(upload(name, lora()))
    page = await harness.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=2))
    assert [adapter.name for adapter in page.adapters] == ["a", "b"]
    rest = await harness.adapters.ListAdapters(pb.ListAdaptersRequest(page_token=page.next_page_token))
    assert ([adapter.name for adapter in rest.adapters], rest.next_page_token) == (["c"], "")
    for request, field in (
        (pb.ListAdaptersRequest(page_size=-1), "page_size"),
        (pb.ListAdaptersRequest(page_token="?"), "page_token"),
    ):
        assert (await failure(harness.adapters.ListAdapters(request))).field == field


@pytest.mark.parametrize("paths", [[], ["labels"], ["live_version", "etag"], ["*"]])
async def test_only_the_live_version_can_be_updated(harness: Harness, paths: list[str]) -> None:
    got = await failure(harness.adapters.UpdateAdapter(update("tone", 1, mask=FieldMask(paths=paths))))
    assert (got.code, got.field) == (Code.INVALID_ARGUMENT, "update_mask")


async def nothing_is_left(harness: Harness) -> None:
    async with asyncio.timeout(3):
        while harness.artifacts():
            await asyncio.sleep(0.01)
    assert (await harness.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters == []
