"""Plain data that crosses layers and processes. No torch, no grpc: everything here pickles and compares by value."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

from hatrack.manifest import BaseIdentity


class FinishReason(enum.Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; every value is already checked and every default filled in."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    seed: int = 0  # 64 bits; random numbers are keyed by (seed, position)
    logprobs: int | None = None  # alternatives per token; None: no log-probabilities
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Artifact:
    """The files of one adapter version, and where they lie now."""

    digest: str  # sha256 over config and safetensors, lower-case hexadecimal
    path: Path
    # Positions before the text that it takes: of embeddings, which go through the model, or of ready keys and values.
    soft_tokens: int = 0
    prefix_tokens: int = 0

    @property
    def virtual_tokens(self) -> int:
        """Both; they count in the context."""
        return self.soft_tokens + self.prefix_tokens


@dataclass(frozen=True, slots=True)
class Generation:
    """One completion to generate; what the front process hands to the worker."""

    id: int
    tenant: str
    salt: bytes  # the tenant's, part of every prefix-cache key
    artifact: Artifact | None  # None: the base alone
    prompt: tuple[int, ...]
    sampling: Sampling
    deadline: float | None = None  # time.monotonic() seconds, one clock for all processes of a machine


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities before temperature and filters."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), best first


@dataclass(frozen=True, slots=True)
class Delta:
    """What one or several steps brought for one completion; the last one carries `finish`."""

    id: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    error: str | None = None  # a sentence for the user, with FinishReason.ERROR
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    queue_seconds: float = 0.0  # from arrival in the worker to admission


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear layer of the base that an adapter may target."""

    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One attention layer of the base."""

    name: str  # the module's, e.g. "model.layers.0.self_attn"
    kv_heads: int
    key_dim: int  # of one head
    value_dim: int


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """Where adapters may act in the base."""

    linears: dict[str, LinearShape]  # by full module name, e.g. "model.layers.0.self_attn.q_proj"
    embedding: str  # the module's name
    width: int  # of the embedding and the residual stream
    attention: tuple[AttentionShape, ...]  # layer by layer
    embedding_rows: int = 0  # 0: adapters can't act on it
    embedding_scale: float = 1.0  # what the embedding multiplies its rows with
    # The modules whose parameters an adapter may replace, and the shapes of these by name: the embedding, the output
    # head, and norms of the residual stream.
    replaceable: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    head: str | None = None  # the linear layer that gives the logits
    tied: bool = False  # whether the embedding and the head share one weight

    @property
    def ends(self) -> frozenset[str]:
        """The embedding and the head, as far as they may be replaced."""
        return frozenset({self.embedding, self.head or self.embedding} & self.replaceable.keys())


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """What the front process needs to know of the loaded base."""

    identity: BaseIdentity
    architecture: str  # e.g. "LlamaForCausalLM"
    shapes: BaseShapes
    vocab_size: int
    max_model_len: int  # prompt and completion together, in tokens
    kv_tokens: int  # what the whole KV cache holds, in tokens
    eos_token_ids: frozenset[int]
    memory: dict[str, int]  # bytes by what they are for, in the order of the start-up table
    adapter_bytes: int  # what all resident adapters may take
    device: str


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """What `describe` finds in an artifact without reading its tensors."""

    method: str  # as PEFT spells it, e.g. "LORA"
    rank: int  # the highest of any module
    parameters: int
    resident_bytes: int  # when it is served by a base that computes in 16 bits
    tensors: dict[str, tuple[int, ...]] = field(repr=False)  # every expected key with its exact shape
    soft_tokens: int = 0  # see Artifact
    prefix_tokens: int = 0

    @property
    def virtual_tokens(self) -> int:
        """Both."""
        return self.soft_tokens + self.prefix_tokens


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the worker, sent after steps; totals count from the worker's start."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    resident_programs: int = 0
    resident_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0
    evictions: int = 0
    host_bytes: int = 0  # of evicted programs that are kept
    disk_loads: int = 0  # programs read and compiled
    host_loads: int = 0  # programs that came back from the host
    reloads: int = 0  # of both, those of programs that had been evicted
    working_set_bytes: int = 0  # of the programs asked for within the last minute
    adapter_budget_bytes: int = 0  # what resident programs may take
    adapter_loads: tuple[float, ...] = ()  # seconds of each load since the last snapshot
    adapters_per_step: tuple[int, ...] = ()  # distinct adapters of each step since the last snapshot
