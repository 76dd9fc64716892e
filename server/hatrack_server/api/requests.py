"""What a client asked for, checked: every refusal names the field as the proto spells it."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import replace

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from hatrack.v1 import inference_pb2 as pb
from hatrack_server.errors import InvalidRequest
from hatrack_server.text.codec import ChatMessage, TextCodec
from hatrack_server.types import BaseInfo, Sampling

DEFAULT_MAX_TOKENS = 256
MAX_TEMPERATURE = 100.0
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64
MAX_REQUEST_ID_CHARACTERS = 128
INT32_MAX = 2**31 - 1
UNSUPPORTED = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def check_supported(request: pb.GenerateRequest) -> None:
    """Raises InvalidRequest for a field that this server does not support yet, or does not know at all."""
    _refuse_unknown_fields(request, "")
    constraint = request.WhichOneof("constraint")
    if constraint is not None:
        raise InvalidRequest(constraint, f"{constraint} is not supported yet")
    for name in UNSUPPORTED:
        if request.sampling.HasField(name):
            raise InvalidRequest(f"sampling.{name}", f"{name} is not supported yet")
    if request.sampling.logit_bias:
        raise InvalidRequest("sampling.logit_bias", "logit_bias is not supported yet")
    if request.sampling.HasField("n") and request.sampling.n != 1:
        raise InvalidRequest("sampling.n", f"n must be 1: more is not supported yet (got {request.sampling.n})")
    if len(request.request_id) > MAX_REQUEST_ID_CHARACTERS:
        raise InvalidRequest("request_id", f"request_id has more than {MAX_REQUEST_ID_CHARACTERS} characters")


def _refuse_unknown_fields(message: Message, path: str) -> None:
    """A newer client's field may change what is asked for: ignored, it would be answered wrongly."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        raise InvalidRequest(f"{path}{number}", f"field number {number} is not known to this server")
    for field, value in message.ListFields():
        for part in value if field.is_repeated else (value,):
            if isinstance(part, Message):
                _refuse_unknown_fields(part, f"{path}{field.name}.")


def read_sampling(params: pb.SamplingParams, base: BaseInfo) -> Sampling:
    """The sampling with every default but the room that the prompt leaves (`fit` does that); raises InvalidRequest."""
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest("sampling.stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids")
    given = {name.name: value for name, value in params.ListFields()}
    return Sampling(
        temperature=_in_range("temperature", given.get("temperature", 1.0), 0, MAX_TEMPERATURE),
        top_p=_positive("top_p", _in_range("top_p", given.get("top_p", 1.0), 0, 1)),
        top_k=int(_in_range("top_k", given.get("top_k", 0), 0, INT32_MAX)),
        min_p=_in_range("min_p", given.get("min_p", 0.0), 0, 1),
        max_tokens=int(_in_range("max_tokens", given.get("max_tokens", DEFAULT_MAX_TOKENS), 1, INT32_MAX)),
        min_tokens=int(_in_range("min_tokens", given.get("min_tokens", 0), 0, INT32_MAX)),
        seed=params.seed if params.HasField("seed") else secrets.randbits(64),
        logprobs=_logprobs(params),
        ignore_eos=params.ignore_eos,
        stop_token_ids=frozenset(_in_vocabulary("sampling.stop_token_ids", params.stop_token_ids, base)),
    )


def read_stops(params: pb.SamplingParams) -> tuple[str, ...]:
    """The stop strings; raises InvalidRequest."""
    if len(params.stop) > MAX_STOPS:
        raise InvalidRequest("sampling.stop", f"at most {MAX_STOPS} stop strings (got {len(params.stop)})")
    if not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in params.stop):
        raise InvalidRequest("sampling.stop", f"a stop string has 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(params.stop)


def read_prompt(request: pb.GenerateRequest, codec: TextCodec, base: BaseInfo) -> tuple[int, ...]:
    """The prompt's token ids; raises InvalidRequest for an absent or empty input and for ids out of the vocabulary.

    A tokenizer may know tokens that the base's embedding doesn't have, so the ids of text are checked, too. Takes as
    long as the text is, so it doesn't belong on the event loop.
    """
    _refuse_hopeless(request, codec.longest_token * base.max_model_len)
    match request.WhichOneof("input"):
        case "prompt" if request.prompt:
            return tuple(_in_vocabulary("prompt", codec.encode(request.prompt), base))
        case "chat" if request.chat.messages:
            return tuple(_in_vocabulary("chat.messages", codec.encode_chat(_messages(request.chat)), base))
        case "token_ids" if request.token_ids.ids:
            return tuple(_in_vocabulary("token_ids.ids", request.token_ids.ids, base))
        case None:
            raise InvalidRequest("input", "one of prompt, chat and token_ids is needed")
        case _:
            raise InvalidRequest(input_field(request), "the input is empty")


def _refuse_hopeless(request: pb.GenerateRequest, most_characters: int) -> None:
    """Refuses what no tokens of the vocabulary could make fit, before the time is spent to find out."""
    characters = len(request.prompt) + sum(len(message.content) for message in request.chat.messages)
    if characters > most_characters:
        message = f"{characters} characters are more than the context can hold, however they are tokenised"
        raise InvalidRequest(input_field(request), message)


def input_field(request: pb.GenerateRequest) -> str:
    """The path of the field that brought the prompt."""
    which = request.WhichOneof("input")
    return {"chat": "chat.messages", "token_ids": "token_ids.ids"}.get(which or "", which or "input")


def fit(
    sampling: Sampling, request: pb.GenerateRequest, prompt_tokens: int, virtual_tokens: int, base: BaseInfo
) -> Sampling:
    """The sampling with a max_tokens that the context has room for, behind what the adapter's virtual tokens take.

    Raises InvalidRequest for a prompt without room behind it, for a max_tokens that was given and doesn't fit, and
    for a min_tokens above max_tokens.
    """
    limit = min(base.max_model_len, base.kv_tokens) - virtual_tokens
    left = limit - prompt_tokens
    if prompt_tokens < 1:
        raise InvalidRequest(input_field(request), "the input is empty")
    if left < 1:
        message = f"the prompt has {prompt_tokens} tokens; with at least one more the limit is {limit}"
        raise InvalidRequest(input_field(request), message)
    if request.sampling.HasField("max_tokens") and sampling.max_tokens > left:
        message = f"max_tokens {sampling.max_tokens} after a prompt of {prompt_tokens} tokens exceeds the limit {limit}"
        raise InvalidRequest("sampling.max_tokens", message)
    max_tokens = min(sampling.max_tokens, left)
    if sampling.min_tokens > max_tokens:
        message = f"min_tokens {sampling.min_tokens} must not exceed max_tokens, here {max_tokens}"
        raise InvalidRequest("sampling.min_tokens", message)
    return replace(sampling, max_tokens=max_tokens)


def _messages(chat: pb.Chat) -> list[ChatMessage]:
    if not all(message.role for message in chat.messages):
        raise InvalidRequest("chat.messages.role", "every message needs a role")
    return [ChatMessage(role=message.role, content=message.content) for message in chat.messages]


def _in_range(name: str, value: float, low: float, high: float) -> float:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"sampling.{name}", f"{name} must be from {low:g} to {high:.10g} (got {value:g})")
    return value


def _positive(name: str, value: float) -> float:
    if value <= 0:
        raise InvalidRequest(f"sampling.{name}", f"{name} must be above 0 (got {value:g})")
    return value


def _logprobs(params: pb.SamplingParams) -> int | None:
    if not params.HasField("logprobs"):
        return None
    return int(_in_range("logprobs", params.logprobs, 0, MAX_LOGPROBS))


def _in_vocabulary(field: str, ids: Iterable[int], base: BaseInfo) -> Iterable[int]:
    ids = tuple(ids)
    wrong = next((token for token in ids if not 0 <= token < base.vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(field, f"token id {wrong} is not within the vocabulary of {base.vocab_size}")
    return ids
