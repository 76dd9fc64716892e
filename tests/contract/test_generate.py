from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
from contract.artifacts import lora, upload
from contract.conftest import Harness, failure
from contract.fake_engine import BASE, BOS, EOS

from hatrack.v1 import inference_pb2 as pb
from hatrack_server.errors import DeadlinePassed, GenerationFailed, Overloaded, Unavailable
from hatrack_server.types import FinishReason

Code = grpc.StatusCode


def request(text: str = "hi", adapter: str = "", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(adapter=adapter, prompt=text, sampling=pb.SamplingParams(**sampling))


async def stream(harness: Harness, message: pb.GenerateRequest) -> tuple[list[pb.CompletionDelta], pb.GenerateEnd]:
    events = [event async for event in harness.inference.StreamGenerate(message)]
    assert [event.WhichOneof("event") for event in events] == ["delta"] * (len(events) - 1) + ["end"]
    return [event.delta for event in events[:-1]], events[-1].end


def failures(harness: Harness, reason: str) -> float | None:
    return harness.metrics.registry.get_sample_value("hatrack_errors_total", {"reason": reason})


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(3):
        while not condition():
            await asyncio.sleep(0.01)


async def test_the_base_alone(harness: Harness) -> None:
    harness.engine.spell("Hel", "lo")
    answer = await harness.inference.Generate(request("hi"))
    [completion] = answer.completions
    assert completion.text == "Hello"
    assert len(completion.token_ids) == 5
    assert completion.finish_reason == pb.FINISH_REASON_LENGTH
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens, answer.usage.completion_tokens) == (3, 2, 5)
    assert (answer.adapter, answer.adapter_version, answer.adapter_digest) == ("", 0, "")
    assert answer.timing.queue.ToTimedelta().total_seconds() == 0.25
    assert answer.timing.total.ToNanoseconds() >= answer.timing.first_token.ToNanoseconds() > 0
    [call] = harness.engine.calls
    assert (call["tenant"], call["artifact"], call["prompt"][0]) == ("default", None, BOS)
    assert call["sampling"].max_tokens == 256


async def test_defaults_fill_and_seeds_differ(harness: Harness) -> None:
    long = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 390))
    for _ in range(2):
        await harness.inference.Generate(long)
    first, second = (call["sampling"] for call in harness.engine.calls)
    assert first.max_tokens == BASE.kv_tokens - 390
    assert first.seed != second.seed
    await harness.inference.Generate(request(seed=2**64 - 1, temperature=0))
    assert harness.engine.calls[-1]["sampling"].seed == 2**64 - 1
    assert harness.engine.calls[-1]["sampling"].temperature == 0


async def test_an_adapter_is_named_and_leased(harness: Harness) -> None:
    made = await harness.adapters.UploadAdapter(upload("tone", lora()))
    for reference in ("tone", "tone@1"):
        answer = await harness.inference.Generate(request(adapter=reference))
        assert (answer.adapter, answer.adapter_version) == ("tone", 1)
        assert answer.adapter_digest == made.versions[0].digest == harness.engine.calls[-1]["artifact"].digest
    value = harness.metrics.registry.get_sample_value
    assert value("hatrack_adapter_completion_tokens_total", {"tenant": "default", "adapter": "tone"}) == 6


async def test_chat_goes_through_the_template(harness: Harness, codec: Any) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    await harness.inference.Generate(pb.GenerateRequest(chat=chat))
    assert codec.decode(harness.engine.calls[-1]["prompt"]) == "[user]hi\n[assistant]"


async def test_a_stream_never_sends_half_a_character(harness: Harness) -> None:
    harness.engine.spell("né😀!")
    [ids] = harness.engine.script
    harness.engine.script = [[token] for token in ids]
    deltas, end = await stream(harness, request())
    assert [delta.text for delta in deltas] == ["n", "", "é", "", "", "", "😀", "!"]
    assert [token for delta in deltas for token in delta.token_ids] == ids
    assert end.usage.completion_tokens == len(ids)


@pytest.mark.parametrize("deltas", [("one END two",), tuple("one END two"), ("one E", "ND two")])
async def test_a_stop_string_never_leaks(harness: Harness, deltas: tuple[str, ...]) -> None:
    harness.engine.spell(*deltas)
    harness.engine.stall = True
    sent, end = await stream(harness, request(stop=["END", "two"]))
    assert "".join(delta.text for delta in sent) == "one "
    assert list(end.finish_reasons) == [pb.FINISH_REASON_STOP]
    assert end.usage.completion_tokens == len("one END")
    assert sum(len(delta.token_ids) for delta in sent) == len("one END")
    assert harness.engine.in_flight == 0


async def test_text_held_for_a_stop_comes_at_the_end(harness: Harness) -> None:
    harness.engine.spell("a E", "N")
    answer = await harness.inference.Generate(request(stop=["END"]))
    assert answer.completions[0].text == "a EN"
    assert answer.completions[0].finish_reason == pb.FINISH_REASON_LENGTH


async def test_min_tokens_lets_a_stop_pass(harness: Harness) -> None:
    harness.engine.spell("a.b.c")
    answer = await harness.inference.Generate(request(stop=["."], min_tokens=2))
    assert answer.completions[0].text == "a.b"


async def test_the_token_that_ends_is_counted_but_not_text(harness: Harness) -> None:
    harness.engine.spell("ab!", finish=FinishReason.STOP)
    answer = await harness.inference.Generate(request(stop_token_ids=[0]))
    assert answer.completions[0].text == "ab"
    assert answer.usage.completion_tokens == 3
    harness.engine.script = [[1], [EOS]]
    answer = await harness.inference.Generate(request())
    assert answer.completions[0].finish_reason == pb.FINISH_REASON_STOP
    assert list(answer.completions[0].token_ids) == [1, EOS]


async def test_logprobs_one_per_token(harness: Harness) -> None:
    answer = await harness.inference.Generate(request(logprobs=2))
    entries = answer.completions[0].logprobs
    assert [entry.chosen.token_id for entry in entries] == [1, 2, 3]
    assert [(top.token_id, top.logprob) for top in entries[0].top] == [(0, -0.5), (1, -1.5)]
    deltas, _ = await stream(harness, request(logprobs=0))
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (Overloaded("the queue is full", 1.5), Code.RESOURCE_EXHAUSTED, "OVERLOADED"),
        (Unavailable("the engine died"), Code.UNAVAILABLE, "UNAVAILABLE"),
        (GenerationFailed("not finite"), Code.FAILED_PRECONDITION, "GENERATION_FAILED"),
        (DeadlinePassed("too late"), Code.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
        (RuntimeError("/secret/path"), Code.INTERNAL, "INTERNAL"),
        (asyncio.CancelledError(), Code.ABORTED, "ABORTED"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("late", [False, True])
async def test_errors_of_the_engine(
    harness: Harness, method: str, error: Any, code: Code, reason: str, late: bool
) -> None:
    setattr(harness.engine, "late_error" if late else "error", error)
    got = await failure(getattr(harness.inference, method)(request()))
    assert (got.code, got.reason) == (code, reason)
    assert "secret" not in got.message
    assert got.retry_seconds == (1.5 if reason == "OVERLOADED" else None)
    assert failures(harness, reason) == 1


async def test_a_cancel_ends_the_generation_and_the_lease(harness: Harness) -> None:
    await harness.adapters.UploadAdapter(upload("tone", lora()))
    harness.engine.stall = True
    call = harness.inference.StreamGenerate(request(adapter="tone"))
    await call.read()
    assert harness.engine.in_flight == 1
    await harness.adapters.DeleteAdapter(pb_delete("tone"))
    assert len(harness.artifacts()) == 1  # the request in flight still holds it
    call.cancel()
    await eventually(lambda: harness.engine.in_flight == 0 and not harness.artifacts())
    await eventually(lambda: len(harness.engine.forgotten) == 1)


async def test_a_passed_deadline_ends_the_generation(harness: Harness) -> None:
    harness.engine.stall = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.inference.Generate(request(), timeout=0.2)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    await eventually(lambda: harness.engine.in_flight == 0)
    await eventually(lambda: failures(harness, "DEADLINE_PASSED") == 1)


async def test_a_cancel_is_counted(harness: Harness) -> None:
    harness.engine.stall = True
    call = harness.inference.StreamGenerate(request(), timeout=60)
    await call.read()
    call.cancel()
    await eventually(lambda: failures(harness, "CANCELLED") == 1)
    assert failures(harness, "DEADLINE_PASSED") is None


async def test_token_ids_do_not_wait_for_prompts_that_are_tokenised(
    harness: Harness, codec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(codec, "encode", lambda _: [0] if go_on.wait(10) else [])
    waiting = [asyncio.ensure_future(harness.inference.Generate(request())) for _ in range(10)]
    try:
        async with asyncio.timeout(5):
            await harness.inference.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2])))
        assert [call["prompt"] for call in harness.engine.calls] == [(1, 2)]
    finally:
        go_on.set()
    await asyncio.gather(*waiting)


async def test_a_slow_reader_waits_for_itself_alone(harness: Harness) -> None:
    harness.engine.script = [[1]] * 200
    slow = aiter(harness.inference.StreamGenerate(request()))
    await anext(slow)
    await harness.inference.Generate(request())
    assert len([event async for event in slow]) == 200


def pb_delete(name: str) -> Any:
    from hatrack.v1.adapters_pb2 import DeleteAdapterRequest

    return DeleteAdapterRequest(name=name)
