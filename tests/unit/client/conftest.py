"""A real gRPC server in this process that plays canned answers and keeps what it was asked."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from hatrack.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

WORDS = ("two ", "hats")


@dataclass
class CannedServer(inference_pb2_grpc.InferenceServiceServicer, adapters_pb2_grpc.AdapterServiceServicer):
    """Answers every call, or fails it with `failure` when that is set."""

    address: str = ""
    failure: status_pb2.Status | None = None
    endless: bool = False  # streams go on until they are cancelled
    requests: list[Any] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    deadline: float | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    adapters: dict[str, adapters_pb2.Adapter] = field(default_factory=dict)

    def fail(self, code: grpc.StatusCode, message: str, *details: Message) -> None:
        """Fails every call from now on with that status."""
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        self.failure = status_pb2.Status(code=code.value[0], message=message, details=packed)

    def hang(self, name: str, *, live: int, versions: int) -> adapters_pb2.Adapter:
        """Puts an adapter with ready versions 1 to `versions` on the rack."""
        numbers = range(versions, 0, -1)
        ready = adapters_pb2.ADAPTER_STATE_READY
        self.adapters[name] = adapters_pb2.Adapter(
            name=name,
            live_version=live,
            etag=f"{name}-{live}",
            versions=[
                adapters_pb2.AdapterVersion(version=n, digest=f"{n:064x}", state=ready, method="LORA", rank=8)
                for n in numbers
            ],
        )
        return self.adapters[name]

    def Generate(self, request: Any, context: Any) -> inference_pb2.GenerateResponse:
        self._meet(request, context)
        response = inference_pb2.GenerateResponse(
            completions=[
                inference_pb2.Completion(
                    text="".join(WORDS), token_ids=[1, 2], finish_reason=inference_pb2.FINISH_REASON_STOP
                )
            ],
            usage=_usage(),
            adapter="tone",
            adapter_version=2,
            adapter_digest="d" * 64,
        )
        response.timing.total.FromMilliseconds(1500)
        return response

    def StreamGenerate(self, request: Any, context: Any) -> Iterator[inference_pb2.StreamGenerateResponse]:
        self._meet(request, context)
        # Before the first message: a call that is cancelled never resumes this generator.
        context.add_callback(self.cancelled.set)
        for token, word in enumerate(WORDS, start=1):
            yield _delta(word, token)
        while self.endless and not self.cancelled.wait(0.01):
            yield _delta("more", 3)
        end = inference_pb2.GenerateEnd(
            finish_reasons=[inference_pb2.FINISH_REASON_LENGTH], usage=_usage(), adapter="tone", adapter_version=2
        )
        yield inference_pb2.StreamGenerateResponse(end=end)

    def UploadAdapter(self, parts: Any, context: Any) -> adapters_pb2.Adapter:
        header = next(parts).header
        self._meet(header, context)
        content = b"".join(part.chunk for part in parts)
        for file in header.files:
            assert hashlib.sha256(content[: file.size]).hexdigest() == file.sha256
            content = content[file.size :]
        assert content == b""
        adapter = self.hang(header.name, live=0 if header.stage else 1, versions=1)
        adapter.version = 1
        adapter.versions[0].warnings.append("another chat template")
        return adapter

    def GetAdapter(self, request: Any, context: Any) -> adapters_pb2.Adapter:
        self._meet(request, context)
        name, _, version = request.name.partition("@")
        if name not in self.adapters:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no adapter {name}")
        found = adapters_pb2.Adapter()
        found.CopyFrom(self.adapters[name])
        found.version = int(version or 0)
        return found

    def ListAdapters(self, request: Any, context: Any) -> adapters_pb2.ListAdaptersResponse:
        self._meet(request, context)
        names = sorted(name for name in self.adapters if name > request.page_token)
        page = names[: request.page_size]
        return adapters_pb2.ListAdaptersResponse(
            adapters=[self.adapters[name] for name in page],
            next_page_token=page[-1] if len(names) > len(page) else "",
        )

    def UpdateAdapter(self, request: Any, context: Any) -> adapters_pb2.Adapter:
        self._meet(request, context)
        assert request.update_mask.paths == ["live_version"]
        adapter = self.adapters[request.adapter.name]
        if request.adapter.etag not in ("", adapter.etag):
            context.abort(grpc.StatusCode.ABORTED, "the adapter has changed")
        adapter.live_version = request.adapter.live_version
        return adapter

    def DeleteAdapter(self, request: Any, context: Any) -> Empty:
        self._meet(request, context)
        del self.adapters[request.name]
        return Empty()

    def GetBase(self, request: Any, context: Any) -> adapters_pb2.Base:
        self._meet(request, context)
        return adapters_pb2.Base(weights="w", quantization="nf4-double-64", tokenizer="t", chat_template="c")

    def _meet(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        self.deadline = context.time_remaining()
        if self.failure is not None:
            context.abort_with_status(rpc_status.to_status(self.failure))


def _usage() -> inference_pb2.Usage:
    return inference_pb2.Usage(prompt_tokens=5, cached_tokens=4, completion_tokens=2)


def _delta(text: str, token: int) -> inference_pb2.StreamGenerateResponse:
    chosen = inference_pb2.TokenLogprob(token_id=token, logprob=-0.5)
    return inference_pb2.StreamGenerateResponse(
        delta=inference_pb2.CompletionDelta(
            text=text, token_ids=[token], logprobs=[inference_pb2.TokenLogprobs(chosen=chosen, top=[chosen])]
        )
    )


@pytest.fixture
def server() -> Iterator[CannedServer]:
    canned = CannedServer()
    host = grpc.server(ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(canned, host)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(canned, host)
    canned.address = f"127.0.0.1:{host.add_insecure_port('127.0.0.1:0')}"
    host.start()
    yield canned
    host.stop(grace=None).wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's folder whose weights take several chunks."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 5000)
    return tmp_path
