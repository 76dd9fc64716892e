"""The canonical pieces that every PEFT method compiles into; the engine knows nothing else of methods.

A piece acts at one module of the base, on the tokens of those rows of a batch whose program holds it: at a linear
layer, at the embedding, or at an attention layer.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from hatrack_server.adapters.rank_class import rank_class
from hatrack_server.kernels.kronecker import add_kronecker
from hatrack_server.kernels.low_rank import add_embedded, add_low_rank
from hatrack_server.kernels.prefix_attention import add_prefix_attention
from hatrack_server.kernels.rowwise import add_vector, multiply_vector, replace_first
from hatrack_server.kernels.runs import Run


class Stage(enum.IntEnum):
    """When a piece acts, where a program has several at one module."""

    CACHE = 0  # before any pass: the engine puts it into the KV cache, and a pass has nothing to do for it
    INPUT = 1  # on x, before the base's product
    SUM = 2  # what is added to the base's output y
    SCALE = 3  # what y is then multiplied with
    SHIFT = 4  # what no scale touches


@dataclass(frozen=True)
class Piece:
    """Tensors, the fields of each kind, and what they do. Pieces of one kind and equal `shapes` share a pool."""

    stage: ClassVar[Stage] = Stage.SUM
    dtype: ClassVar[torch.dtype | None] = None  # what a pool holds; None is the dtype that the base computes in

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order in which `act` takes their stacks."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """What a pool pads each tensor to, with zeros: its own, unless a kind knows better."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors)

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """Changes values[T, …] in place: the module's output, or at Stage.INPUT a copy of its input.

        x[T, …] is what the module got: a linear layer its input, the embedding token ids, attention its queries.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LowRank(Piece):
    """y += (x aᵀ) b, the method's scale folded into b."""

    a: Tensor  # [r, in]
    b: Tensor  # [r, out]

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The rank is padded to its class."""
        rank = rank_class(self.rank)
        return (rank, self.a.shape[1]), (rank, self.b.shape[1])

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        a, b = stacks
        add_low_rank(values, x, a, b, runs)


@dataclass(frozen=True)
class EmbeddingLowRank(Piece):
    """y += a[id] b at the embedding, the method's scale folded into b."""

    a: Tensor  # [vocabulary, r]
    b: Tensor  # [r, width]

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        a, b = stacks
        add_embedded(values, x, a, b, runs)


@dataclass(frozen=True)
class Kronecker(Piece):
    """y += (w1 ⊗ w2) x, never made, the method's scale folded into w1."""

    w1: Tensor  # [l, p]
    w2: Tensor  # [k, q], where in = p·q and out = l·k

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        w1, w2 = stacks
        add_kronecker(values, x, w1, w2, runs)


@dataclass(frozen=True)
class _Scale(Piece):
    """In float32, like all vectors: it meets each feature once, so its rounding would show."""

    dtype: ClassVar[torch.dtype | None] = torch.float32

    vector: Tensor

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        multiply_vector(values, stacks[0], runs)


@dataclass(frozen=True)
class InputScale(_Scale):
    """x *= vector[in]."""

    stage: ClassVar[Stage] = Stage.INPUT


@dataclass(frozen=True)
class OutputScale(_Scale):
    """y *= vector[out], the base's bias included."""

    stage: ClassVar[Stage] = Stage.SCALE


@dataclass(frozen=True)
class OutputShift(Piece):
    """y += vector[out]."""

    stage: ClassVar[Stage] = Stage.SHIFT
    dtype: ClassVar[torch.dtype | None] = torch.float32

    vector: Tensor

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        add_vector(values, stacks[0], runs)


@dataclass(frozen=True)
class SoftPrompt(Piece):
    """Embeddings in place of those of a sequence's first tokens."""

    rows: Tensor  # [n, width]

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        replace_first(values, stacks[0], runs)


@dataclass(frozen=True)
class KeyValuePrefix(Piece):
    """Keys and values at the first positions of one attention layer's cache."""

    stage: ClassVar[Stage] = Stage.CACHE

    keys: Tensor  # [n, kv_heads, key dim]
    values: Tensor  # [n, kv_heads, value dim]


@dataclass(frozen=True)
class GatedPrefix(Piece):
    """What one attention layer gives, plus gate * softmax(q kᵀ / √d) v over keys that no position has."""

    keys: Tensor  # [n, kv_heads, head_dim]
    values: Tensor  # [n, kv_heads, head_dim], the gate folded in

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        keys, gated_values = stacks
        add_prefix_attention(values, x, keys, gated_values, runs)


Pieces = tuple[tuple[str, Piece], ...]
"""What a method compiles an artifact into: pieces and the modules where they act, at most one of a kind at each."""
