"""What a client like grpcurl does: it learns services and messages from the server, and calls them."""

from __future__ import annotations

from typing import Any

import grpc
from contract.artifacts import lora, upload
from contract.conftest import Harness, outcome
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub


class Reflected:
    """The services of a server, from nothing but its reflection."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._pool = DescriptorPool()
        self._known: set[str] = set()
        self.methods: dict[str, MethodDescriptor] = {}

    async def learn(self) -> None:
        call = ServerReflectionStub(self._channel).ServerReflectionInfo()
        await call.write(ServerReflectionRequest(list_services=""))
        for listed in (await call.read()).list_services_response.service:
            await call.write(ServerReflectionRequest(file_containing_symbol=listed.name))
            for raw in reversed((await call.read()).file_descriptor_response.file_descriptor_proto):
                file = FileDescriptorProto.FromString(raw)
                if file.name not in self._known:
                    self._known.add(file.name)
                    self._pool.Add(file)
            service: ServiceDescriptor = self._pool.FindServiceByName(listed.name)
            self.methods |= {f"{listed.name}/{method.name}": method for method in service.methods}
        await call.done_writing()

    async def call(self, path: str, *requests: dict[str, Any]) -> Any:
        """Requests and answers as JSON has them."""
        method = self.methods[path]
        message = GetMessageClass(method.input_type)
        kinds = ("stream" if streaming else "unary" for streaming in (method.client_streaming, method.server_streaming))
        stub = getattr(self._channel, "_".join(kinds))(
            f"/{path}",
            request_serializer=lambda sent: sent.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        sent = [ParseDict(request, message()) for request in requests]
        answer = await outcome(stub(iter(sent) if method.client_streaming else sent[0]))
        return [MessageToDict(event) for event in answer] if isinstance(answer, list) else MessageToDict(answer)


async def test_a_client_that_knows_only_reflection_calls_every_method(harness: Harness) -> None:
    server = Reflected(harness.channel)
    await server.learn()
    inference, adapters = "hatrack.v1.InferenceService", "hatrack.v1.AdapterService"
    ours = {path for path in server.methods if path.startswith("hatrack.v1.")}
    called: dict[str, Any] = {}
    for path, requests in (
        (f"{adapters}/UploadAdapter", map(MessageToDict, upload("tone", lora()))),
        (f"{adapters}/GetAdapter", [{"name": "tone"}]),
        (f"{adapters}/ListAdapters", [{}]),
        (f"{adapters}/UpdateAdapter", [{"adapter": {"name": "tone", "liveVersion": 1}, "updateMask": "liveVersion"}]),
        (f"{inference}/Generate", [{"prompt": "hi", "adapter": "tone"}]),
        (f"{inference}/StreamGenerate", [{"prompt": "hi"}]),
        (f"{adapters}/DeleteAdapter", [{"name": "tone"}]),
        (f"{adapters}/GetBase", [{}]),
    ):
        called[path] = await server.call(path, *requests)
    assert called.keys() == ours
    assert called[f"{adapters}/ListAdapters"]["adapters"][0]["name"] == "tone"
    assert called[f"{inference}/Generate"]["adapterVersion"] == 1
    assert called[f"{inference}/StreamGenerate"]
