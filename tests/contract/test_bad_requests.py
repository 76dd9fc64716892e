from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import grpc
import pytest
from contract.conftest import Harness, failure
from contract.fake_engine import BASE

from hatrack.v1 import inference_pb2 as pb

VOCAB, LIMIT = BASE.vocab_size, BASE.kv_tokens


def user(content: str, role: str = "user") -> pb.ChatMessage:
    return pb.ChatMessage(role=role, content=content)


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 100.5}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": LIMIT}, "max_tokens"),
        ({"max_tokens": 2**31 - 1}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": LIMIT}, "min_tokens"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a" * 257]}, "stop"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"repetition_penalty": 1.0}, "repetition_penalty"),
        ({"presence_penalty": 0.0}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {1: 2.0}}, "logit_bias"),
    ],
    ids=str,
)
async def test_sampling(harness: Harness, sampling: dict[str, Any], field: str) -> None:
    request = pb.GenerateRequest(prompt="hi", sampling=pb.SamplingParams(**sampling))
    await refused(harness, request, f"sampling.{field}")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "input"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * (LIMIT - 1)}, "prompt"),
        ({"chat": pb.Chat()}, "chat.messages"),
        ({"chat": pb.Chat(messages=[user("hi", role="")])}, "chat.messages.role"),
        ({"chat": pb.Chat(messages=[user("a" * LIMIT)])}, "chat.messages"),
        ({"token_ids": pb.TokenIds()}, "token_ids.ids"),
        ({"token_ids": pb.TokenIds(ids=[VOCAB])}, "token_ids.ids"),
        ({"token_ids": pb.TokenIds(ids=[1, -1])}, "token_ids.ids"),
        ({"token_ids": pb.TokenIds(ids=[1] * LIMIT)}, "token_ids.ids"),
        ({"prompt": "hi", "json_schema": "{}"}, "json_schema"),
        ({"prompt": "hi", "regex": ""}, "regex"),
        ({"prompt": "hi", "grammar": "x"}, "grammar"),
        ({"prompt": "hi", "choice": pb.ChoiceList()}, "choice"),
        ({"prompt": "hi", "request_id": "a" * 129}, "request_id"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_request(harness: Harness, fields: dict[str, Any], field: str) -> None:
    await refused(harness, pb.GenerateRequest(**fields), field)


async def test_the_edges_are_allowed(harness: Harness) -> None:
    sampling = pb.SamplingParams(
        temperature=100, top_p=1e-9, top_k=2**31 - 1, min_p=1, max_tokens=LIMIT - 1, min_tokens=LIMIT - 1,
        stop=["a" * 256] * 16, stop_token_ids=[0, VOCAB - 1], n=1, logprobs=20, seed=0, ignore_eos=True,
    )  # fmt: skip
    await harness.inference.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling=sampling))
    got = harness.engine.calls[-1]["sampling"]
    assert (got.max_tokens, got.top_k, got.ignore_eos, got.stop_token_ids) == (
        LIMIT - 1,
        2**31 - 1,
        True,
        {0, VOCAB - 1},
    )


@pytest.mark.parametrize("adapter", ["unknown", "unknown@3", "../etc", "A", "a@0", "a@x", "\x00", "a" * 300])
async def test_an_unknown_adapter(harness: Harness, adapter: str) -> None:
    got = await failure(harness.inference.Generate(pb.GenerateRequest(adapter=adapter, prompt="hi")))
    assert (got.code, got.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


async def refused(harness: Harness, request: pb.GenerateRequest, field: str) -> None:
    for call in (harness.inference.Generate(request), harness.inference.StreamGenerate(request)):
        got = await failure(call)
        assert (got.code, got.reason, got.field) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", field)
    assert not harness.engine.calls


@pytest.mark.parametrize("inside", ["", "sampling", "chat"])
async def test_a_field_that_the_server_does_not_know_is_refused(harness: Harness, inside: str) -> None:
    newer = bytes.fromhex("f83f01")  # field 1023
    request = pb.GenerateRequest(chat=pb.Chat(messages=[user("hi")]), sampling=pb.SamplingParams(seed=1))
    if inside:
        getattr(request, inside).MergeFromString(newer)
    else:
        request.MergeFromString(newer)
    got = await failure(harness.inference.Generate(request))
    assert (got.code, got.field) == (grpc.StatusCode.INVALID_ARGUMENT, f"{inside}.1023".lstrip("."))


async def test_a_hopeless_text_is_refused_untokenised(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> list[int]:
        raise AssertionError("the text was tokenised")

    monkeypatch.setattr("hatrack_server.text.codec.TextCodec.encode", never)
    monkeypatch.setattr("hatrack_server.text.codec.TextCodec.encode_chat", never)
    text = "x" * (100 * LIMIT)
    for request, field in (
        (pb.GenerateRequest(prompt=text), "prompt"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[user(text)])), "chat.messages"),
    ):
        got = await failure(harness.inference.Generate(request))
        assert (got.code, got.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_token_that_only_the_tokenizer_knows(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuned tokenizers often have added tokens past the end of the base's embedding."""
    monkeypatch.setattr(harness.engine, "loaded", replace(harness.engine.base, vocab_size=100))
    got = await failure(harness.inference.Generate(pb.GenerateRequest(prompt="ü")))
    assert (got.code, got.field) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt")
