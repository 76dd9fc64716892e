from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hatrack.manifest import BaseIdentity
from hatrack.v1 import inference_pb2
from hatrack_client import (
    Aborted,
    AdapterState,
    Client,
    DeadlineExceeded,
    Delta,
    FailedPrecondition,
    FinishReason,
    Generation,
    InvalidArgument,
    NotFound,
)


@pytest.fixture
def client(server: Any) -> Any:
    with Client(server.address, api_key="hat-1") as client:
        yield client


def test_generation_carries_text_version_usage_and_timing(client: Client) -> None:
    generation = client.generate("tone@2", prompt="hi")
    assert (generation.text, generation.token_ids, generation.finish_reason) == ("two hats", (1, 2), FinishReason.STOP)
    assert (generation.adapter, generation.version, generation.digest) == ("tone", 2, "d" * 64)
    assert (generation.usage.prompt_tokens, generation.usage.cached_tokens) == (5, 4)
    assert generation.timing.total == 1.5


def test_request_carries_adapter_key_deadline_and_only_the_given_sampling(server: Any, client: Client) -> None:
    client.generate("tone", prompt="hi", request_id="r1", timeout=7, temperature=0.0, top_k=3, stop="\n")
    expected = inference_pb2.SamplingParams(temperature=0.0, top_k=3, stop=["\n"])
    assert server.requests == [
        inference_pb2.GenerateRequest(adapter="tone", prompt="hi", request_id="r1", sampling=expected)
    ]
    assert server.metadata["authorization"] == "Bearer hat-1"
    assert server.deadline == pytest.approx(7, abs=1)


def test_messages_and_token_ids_are_sent_as_they_are(server: Any, client: Client) -> None:
    client.generate(messages=[{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}])
    client.generate(token_ids=[7, 8])
    client.generate(messages=[])
    chat, tokens, empty = server.requests
    assert [(message.role, message.content) for message in chat.chat.messages] == [("system", "short"), ("user", "hi")]
    assert tokens.token_ids.ids == [7, 8]
    assert empty.WhichOneof("input") == "chat"


@pytest.mark.parametrize("inputs", [{}, {"prompt": "a", "token_ids": [1]}])
def test_exactly_one_input_is_needed(server: Any, client: Client, inputs: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="exactly one") as caught:
        client.generate(**inputs)
    assert caught.value.field == "input"
    assert server.requests == []


@pytest.mark.parametrize(
    "server", ["", "localhost", ":1", "a:b", "a:0", "a:65536", "a:1 ", "my hat:1", "http://a:1", "::1", "hüte:1"]
)
def test_an_address_that_no_server_has_is_refused(server: str) -> None:
    with pytest.raises(InvalidArgument, match="HOST:PORT") as caught:
        Client(server)
    assert caught.value.field == "server"


@pytest.mark.parametrize("server", ["localhost:1", "127.0.0.1:65535", "[::1]:1", "hat-rack.example_1.org:443"])
def test_an_address_that_a_server_may_have(server: str) -> None:
    Client(server).close()


@pytest.mark.parametrize("key", ["Schlüssel", "hat-1\n", "hat 1", "hat\x7f"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(server: Any, key: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Client(server.address, api_key=key)
    assert caught.value.field == "api_key"
    assert key.strip() not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "hi", "adapter": "\ud800"}, "adapter"),
        ({"token_ids": ["a"]}, "token_ids"),
        ({"messages": [{"role": "user", "contents": "hi"}]}, "chat"),
    ],
)
def test_a_wrong_input_is_named(server: Any, client: Client, inputs: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.generate(**inputs)
    assert caught.value.field == field
    assert server.requests == []


@pytest.mark.parametrize(("name", "value"), [("top_k", "many"), ("tempature", 1.0)])
def test_a_wrong_sampling_value_or_name_is_named(client: Client, name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.generate(prompt="hi", **{name: value})
    assert caught.value.field == f"sampling.{name}"


def test_stream_gives_deltas_then_the_whole(client: Client) -> None:
    with client.stream("tone", prompt="hi", logprobs=1) as stream:
        *deltas, last = stream
    assert [delta.text for delta in deltas if isinstance(delta, Delta)] == ["two ", "hats"]
    assert isinstance(last, Generation)
    assert (last.text, last.token_ids, last.finish_reason) == ("two hats", (1, 2), FinishReason.LENGTH)
    assert [entry.chosen.token_id for entry in last.logprobs] == [1, 2]
    assert (last.version, last.usage.completion_tokens) == (2, 2)


def test_closing_a_stream_cancels_the_call(server: Any, client: Client) -> None:
    server.endless = True
    stream = client.stream(prompt="hi")
    next(stream)
    stream.close()
    assert server.cancelled.wait(5)
    assert list(stream) == []


def test_a_passed_deadline_is_typed_in_the_middle_of_a_stream(server: Any, client: Client) -> None:
    server.endless = True
    with pytest.raises(DeadlineExceeded):
        list(client.stream(prompt="hi", timeout=0.2))


@pytest.mark.parametrize("stage", [False, True])
def test_push_sends_every_byte_and_tells_its_progress(server: Any, client: Client, folder: Path, stage: bool) -> None:
    (folder / "manifest.json").write_text("{}")
    steps: list[tuple[int, int]] = []
    adapter = client.push_adapter("tone", folder, stage=stage, progress=lambda *step: steps.append(step))
    assert [file.name for file in server.requests[0].files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    assert server.requests[0].stage is stage
    assert adapter.version == 1
    total = 21 + 256 * 5000 + 2
    assert len(steps) > 4
    assert steps[-1] == (total, total)
    assert steps == sorted(steps)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_push_names_the_missing_file_and_sends_nothing(server: Any, client: Client, folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(InvalidArgument, match=missing) as caught:
        client.push_adapter("tone", folder)
    assert caught.value.field == missing
    assert server.requests == []


def test_push_names_a_file_that_cant_be_read(server: Any, client: Client, folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to("/proc/self/mem")
    with pytest.raises(InvalidArgument, match=r"adapter_config\.json can't be read") as caught:
        client.push_adapter("tone", folder)
    assert caught.value.field == "adapter_config.json"
    assert server.requests == []


def test_push_says_why_a_pickle_is_refused(client: Client, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InvalidArgument, match="pickle"):
        client.push_adapter("tone", folder)


def test_list_goes_through_all_pages(server: Any, client: Client) -> None:
    for name in ("c", "a", "b"):
        server.hang(name, live=1, versions=1)
    assert [adapter.name for adapter in client.list_adapters(page_size=2)] == ["a", "b", "c"]
    assert len(server.requests) == 2


def test_get_reads_versions_newest_first(server: Any, client: Client) -> None:
    server.hang("tone", live=1, versions=2)
    adapter = client.get_adapter("tone@2")
    assert (adapter.name, adapter.live_version, adapter.version) == ("tone", 1, 2)
    assert [(v.version, v.state, v.method) for v in adapter.versions] == [
        (2, AdapterState.READY, "LORA"),
        (1, AdapterState.READY, "LORA"),
    ]
    with pytest.raises(NotFound):
        client.get_adapter("other")


def test_the_base_is_told_by_its_four_digests(client: Client) -> None:
    assert client.get_base() == BaseIdentity("w", "nf4-double-64", "t", "c")


def test_promote_and_delete(server: Any, client: Client) -> None:
    server.hang("tone", live=1, versions=2)
    assert client.promote("tone", 2).live_version == 2
    client.delete_adapter("tone")
    assert server.adapters == {}


def test_rollback_takes_the_newest_ready_version_below_the_live_one(server: Any, client: Client) -> None:
    adapter = server.hang("tone", live=3, versions=4)
    adapter.versions[2].state = 4  # version 2 is quarantined
    assert client.rollback("tone").live_version == 1
    with pytest.raises(FailedPrecondition, match="below 1"):
        client.rollback("tone")


def test_rollback_minds_a_change_meanwhile(server: Any, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    server.hang("tone", live=2, versions=2)
    get = client.get_adapter

    def get_then_change(name: str) -> Any:
        read = get(name)
        server.adapters[name].etag = "changed"
        return read

    monkeypatch.setattr(client, "get_adapter", get_then_change)
    with pytest.raises(Aborted):
        client.rollback("tone")
    assert server.adapters["tone"].live_version == 2
