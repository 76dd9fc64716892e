"""What the client takes and gives: plain immutable data, apart from the wire's messages."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"; the model's chat template has the last word
    content: str


class Sampling(TypedDict, total=False):
    """How the next token is drawn; what is left out has the server's default (`hatrack/v1/inference.proto`)."""

    temperature: float  # 0 is greedy
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    seed: int
    logprobs: int  # alternatives per token, 0 to 20
    ignore_eos: bool


class FinishReason(enum.StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # an end-of-sequence id, a stop string or a stop id
    LENGTH = "length"  # max_tokens were generated
    UNKNOWN = "unknown"  # this client is older than the server


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens; `cached_tokens` are those of the prompt that were in the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds on the server's clock since the request's arrival."""

    queue: float  # until admission
    first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its natural log-probability, before temperature and filters."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One generated token and the likeliest alternatives, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What came since the last delta: whole characters only, never part of a stop string."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished completion, wholly made by one adapter version, which it names."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    adapter: str  # "" for the base alone
    version: int  # 0 for the base alone
    digest: str  # the artifact's; "" for the base alone
    logprobs: tuple[TokenLogprobs, ...]  # one per token id, if they were asked for
    timing: Timing


class AdapterState(enum.StrEnum):
    """Where a version stands; only READY ones are served."""

    VALIDATING = "validating"
    READY = "ready"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"
    DELETING = "deleting"
    UNKNOWN = "unknown"  # this client is older than the server


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of an adapter."""

    version: int
    digest: str  # sha256 over config and weights, lower-case hexadecimal
    state: AdapterState
    method: str  # as PEFT spells it, e.g. "LORA"
    rank: int  # the highest of any module
    parameters: int
    size_bytes: int
    verified: bool  # a manifest names the very base that is served
    warnings: tuple[str, ...]
    create_time: datetime  # UTC


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's name with all of its versions, newest first."""

    name: str
    live_version: int  # 0 when none is live
    versions: tuple[AdapterVersion, ...]
    etag: str  # changes with every change of the adapter
    version: int  # the version that the call made, found or named; 0 otherwise
