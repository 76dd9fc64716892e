"""`--register` against a real gRPC server with canned answers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from contract.test_tls import write_certificate

from hatrack.manifest import CONFIG_FILE, WEIGHTS_FILE, BaseIdentity
from hatrack.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from hatrack_client.cli import run as hatrack
from hatrack_trainer import register
from hatrack_trainer.config import RegistrationSection
from hatrack_trainer.errors import TrainerError, UsageError
from hatrack_trainer.register import Registration

BASE = BaseIdentity("w", "nf4-double-64", "t", "c")
DIGEST = "d" * 64


@dataclass
class Canned(inference_pb2_grpc.InferenceServiceServicer, adapters_pb2_grpc.AdapterServiceServicer):
    """Has tone@1 and makes tone@2 of what is pushed; its first calls of a method fail as `failures` says."""

    address: str = ""
    failures: dict[str, list[grpc.StatusCode]] = field(default_factory=dict)
    asked: list[inference_pb2.GenerateRequest] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    def GetBase(self, request: Any, context: Any) -> adapters_pb2.Base:
        self._meet("GetBase", context)
        return adapters_pb2.Base(**asdict(BASE))

    def UploadAdapter(self, parts: Any, context: Any) -> adapters_pb2.Adapter:
        header = next(parts).header
        assert sum(len(part.chunk) for part in parts) == sum(file.size for file in header.files)
        self._meet("UploadAdapter", context)
        versions = [
            adapters_pb2.AdapterVersion(version=2, digest=DIGEST, warnings=["another tokenizer"]),
            adapters_pb2.AdapterVersion(version=1),
        ]
        live = 1 if header.stage else 2
        return adapters_pb2.Adapter(name=header.name, version=2, live_version=live, versions=versions)

    def Generate(self, request: Any, context: Any) -> inference_pb2.GenerateResponse:
        self._meet("Generate", context)
        self.asked.append(request)
        name, _, version = request.adapter.partition("@")
        return inference_pb2.GenerateResponse(
            completions=[inference_pb2.Completion(token_ids=[1])],
            adapter=name, adapter_version=int(version), adapter_digest=DIGEST,
        )  # fmt: skip

    def _meet(self, method: str, context: Any) -> None:
        self.metadata = dict(context.invocation_metadata())
        if self.failures.get(method):
            context.abort(self.failures[method].pop(0), "not now")


@contextmanager
def serving(credentials: grpc.ServerCredentials | None = None) -> Iterator[Canned]:
    canned, host = Canned(), grpc.server(ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(canned, host)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(canned, host)
    anywhere = "127.0.0.1:0"
    port = host.add_secure_port(anywhere, credentials) if credentials else host.add_insecure_port(anywhere)
    canned.address = f"127.0.0.1:{port}"
    host.start()
    yield canned
    host.stop(grace=None).wait()


@pytest.fixture
def server() -> Iterator[Canned]:
    with serving() as canned:
        yield canned


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    (tmp_path / CONFIG_FILE).write_text("{}")
    (tmp_path / WEIGHTS_FILE).write_bytes(b"weights")
    return tmp_path


def section(server: Canned, **options: Any) -> RegistrationSection:
    return RegistrationSection(name="tone", server=server.address, **options)


def test_an_artifact_becomes_a_live_version_that_has_answered(server: Canned, artifact: Path) -> None:
    registered = Registration(section(server)).push(artifact)
    assert str(registered) == f"tone@2 is live and answers, digest {DIGEST}"
    assert registered.warnings == ("another tokenizer",)
    [asked] = server.asked
    assert (asked.adapter, asked.sampling.max_tokens, len(asked.token_ids.ids)) == ("tone@2", 1, 1)


def test_a_staged_version_answers_and_says_how_it_becomes_live(server: Canned, artifact: Path) -> None:
    registered = Registration(section(server, stage=True)).push(artifact)
    assert str(registered) == (
        f"tone@2 is staged (live by `hatrack adapters promote tone 2`) and answers, digest {DIGEST}"
    )


def test_key_and_server_are_those_of_the_command(
    server: Canned, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HATRACK_API_KEY", "hat-1")
    monkeypatch.setenv("HATRACK_SERVER", server.address)
    registration = Registration(RegistrationSection(name="tone"))
    assert server.metadata["authorization"] == "Bearer hat-1"
    registration.push(artifact)
    assert server.metadata["authorization"] == "Bearer hat-1"


def test_tls_is_that_of_the_command(artifact: Path, tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path / "ca.pem", tmp_path / "key.pem")
    with serving(grpc.ssl_server_credentials([((tmp_path / "key.pem").read_bytes(), certificate)])) as server:
        registration = Registration(section(server, tls_ca=tmp_path / "ca.pem"))
        assert registration.push(artifact).version == 2
        server.failures["UploadAdapter"] = [grpc.StatusCode.UNAVAILABLE]
        with pytest.raises(TrainerError, match=rf"`hatrack adapters push .* --tls-ca {tmp_path}/ca\.pem`$"):
            registration.push(artifact)


class TestBeforeTheRun:
    def test_a_name_is_needed(self) -> None:
        with pytest.raises(UsageError, match=r"^registration\.name: missing, and needed by --register$"):
            Registration(RegistrationSection())

    def test_nobody_is_there(self) -> None:
        with pytest.raises(UsageError, match=r"^registration\.server: 127\.0\.0\.1:1: the server can't be reached: "):
            Registration(RegistrationSection(name="tone", server="127.0.0.1:1"))

    @pytest.mark.parametrize(
        ("options", "key", "sentence"),
        [
            ({"server": "hats"}, None, "registration.server: must be HOST:PORT (got 'hats')"),
            ({"tls_ca": Path("/nowhere")}, None, "registration.tls_ca: /nowhere: No such file or directory"),
            ({}, "hat 1", "HATRACK_API_KEY: must be ASCII without spaces and line breaks"),
        ],
    )
    def test_what_no_server_takes(
        self, options: dict[str, Any], key: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if key:
            monkeypatch.setenv("HATRACK_API_KEY", key)
        with pytest.raises(UsageError) as caught:
            Registration(RegistrationSection(name="tone", **options))
        assert str(caught.value) == sentence

    def test_a_key_that_the_server_refuses(self, server: Canned) -> None:
        server.failures["GetBase"] = [grpc.StatusCode.UNAUTHENTICATED]
        with pytest.raises(UsageError) as caught:
            Registration(section(server))
        assert str(caught.value) == f"registration.server: {server.address}: not now"

    def test_the_base_must_be_the_served_one(self, server: Canned) -> None:
        registration = Registration(section(server))
        registration.check_base(BASE)
        with pytest.raises(UsageError) as caught:
            registration.check_base(replace(BASE, quantization="none", chat_template=""))
        assert str(caught.value) == (
            f"base.model: the server at {server.address} serves another base; "
            "they differ in: quantization, chat template"
        )

    def test_a_server_that_is_not_there_costs_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "train.yaml"
        file.write_text(
            "base: {model: /nowhere}\ndata: {train: /nowhere}\noutput: {dir: out}\n"
            "registration: {name: tone, server: '127.0.0.1:1'}\n"
        )
        assert hatrack(["train", "run", str(file), "--register"]) == 2
        assert capsys.readouterr().err.startswith("hatrack: registration.server: 127.0.0.1:1: the server can't be ")


class TestAfterTheRun:
    def test_a_refused_push_leaves_the_artifact_and_names_the_command(self, server: Canned, artifact: Path) -> None:
        server.failures["UploadAdapter"] = [grpc.StatusCode.INVALID_ARGUMENT]
        with pytest.raises(TrainerError) as caught:
            Registration(section(server, stage=True)).push(artifact)
        command = f"hatrack adapters push tone {artifact} --stage --server {server.address}"
        assert str(caught.value) == f"{artifact} is whole, but was not pushed: not now; push it by `{command}`"
        assert hatrack(command.split()[1:]) == 0

    def test_a_version_that_does_not_answer_is_named(self, server: Canned, artifact: Path) -> None:
        server.failures["Generate"] = [grpc.StatusCode.INTERNAL]
        with pytest.raises(TrainerError) as caught:
            Registration(section(server)).push(artifact)
        command = f"hatrack generate Hello --adapter tone@2 --server {server.address}"
        assert str(caught.value) == f"tone@2 is pushed, but does not answer: not now; ask it by `{command}`"
        assert hatrack(command.split()[1:]) == 0

    def test_a_server_that_is_busy_gets_time(
        self, server: Canned, artifact: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(register, "RETRY_SECONDS", 0.01)
        server.failures["Generate"] = [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE]
        assert Registration(section(server)).push(artifact).version == 2
