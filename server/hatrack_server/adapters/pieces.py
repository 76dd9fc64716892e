"""The canonical pieces that every PEFT method compiles into; the engine knows nothing else of methods.

A piece acts at one module of the base, on the tokens of those rows of a batch whose program holds it: at a linear
layer, at the embedding, or at an attention layer.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar, Protocol

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

    INPUT = 0  # on x, before the base's product
    SUM = 1  # what is added to the base's output y
    SCALE = 2  # what y is then multiplied with
    SHIFT = 3  # what no scale touches


class Piece(Protocol):
    """Tensors, and what they do. Pieces of one class and equal `shapes` are stacked in one pool."""

    stage: ClassVar[Stage]
    dtype: ClassVar[torch.dtype | None]  # what a pool holds; None is the dtype that the base computes in

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order in which `act` takes their stacks."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """What a pool pads each tensor to, with zeros, which change nothing."""

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """Changes values[T, …] in place: the module's output, or at Stage.INPUT a copy of its input.

        x[T, …] is what the module got: a linear layer its input, the embedding token ids, attention its queries.
        """


@dataclass(frozen=True, slots=True)
class LowRank:
    """y += (x aᵀ) b, the method's scale folded into b."""

    stage: ClassVar[Stage] = Stage.SUM
    dtype: ClassVar[torch.dtype | None] = None

    a: Tensor  # [r, in]
    b: Tensor  # [r, out]

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """a, b."""
        return self.a, self.b

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


@dataclass(frozen=True, slots=True)
class EmbeddingLowRank:
    """y += a[id] b at the embedding, the method's scale folded into b."""

    stage: ClassVar[Stage] = Stage.SUM
    dtype: ClassVar[torch.dtype | None] = None

    a: Tensor  # [vocabulary, r]
    b: Tensor  # [r, width]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """a, b."""
        return self.a, self.b

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Their own: a row of `a` is looked up, not multiplied with."""
        return tuple(self.a.shape), tuple(self.b.shape)

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        a, b = stacks
        add_embedded(values, x, a, b, runs)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """y += (w1 ⊗ w2) x, never made, the method's scale folded into w1."""

    stage: ClassVar[Stage] = Stage.SUM
    dtype: ClassVar[torch.dtype | None] = None

    w1: Tensor  # [l, p]
    w2: Tensor  # [k, q], where in = p·q and out = l·k

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """w1, w2."""
        return self.w1, self.w2

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Their own: padding would change how x is cut."""
        return tuple(self.w1.shape), tuple(self.w2.shape)

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        w1, w2 = stacks
        add_kronecker(values, x, w1, w2, runs)


@dataclass(frozen=True, slots=True)
class _Vector:
    """One number per feature, in float32: it meets each of them once, so its rounding would show."""

    dtype: ClassVar[torch.dtype | None] = torch.float32

    vector: Tensor  # [in] or [out]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The vector."""
        return (self.vector,)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Its own."""
        return (tuple(self.vector.shape),)


class InputScale(_Vector):
    """x *= vector[in]."""

    stage: ClassVar[Stage] = Stage.INPUT

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:  # noqa: ARG004
        """See Piece."""
        multiply_vector(values, stacks[0], runs)


class OutputScale(_Vector):
    """y *= vector[out], the base's bias included."""

    stage: ClassVar[Stage] = Stage.SCALE

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:  # noqa: ARG004
        """See Piece."""
        multiply_vector(values, stacks[0], runs)


class OutputShift(_Vector):
    """y += vector[out]."""

    stage: ClassVar[Stage] = Stage.SHIFT

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:  # noqa: ARG004
        """See Piece."""
        add_vector(values, stacks[0], runs)


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """Embeddings in place of those of a sequence's first tokens."""

    stage: ClassVar[Stage] = Stage.SUM
    dtype: ClassVar[torch.dtype | None] = None

    rows: Tensor  # [n, width]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The rows."""
        return (self.rows,)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Its own."""
        return (tuple(self.rows.shape),)

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:  # noqa: ARG004
        """See Piece."""
        replace_first(values, stacks[0], runs)


@dataclass(frozen=True, slots=True)
class KeyValuePrefix:
    """Keys and values at the first positions of one attention layer's cache: the engine puts them there.

    They act through the cache alone, so a forward pass has nothing to do for them.
    """

    stage: ClassVar[Stage] = Stage.SUM
    dtype: ClassVar[torch.dtype | None] = None

    keys: Tensor  # [n, kv_heads, key dim]
    values: Tensor  # [n, kv_heads, value dim]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys, values."""
        return self.keys, self.values

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Their own."""
        return tuple(self.keys.shape), tuple(self.values.shape)

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """Does nothing."""


@dataclass(frozen=True, slots=True)
class GatedPrefix:
    """What one attention layer gives, plus gate * softmax(q kᵀ / √d) v over keys that no position has."""

    stage: ClassVar[Stage] = Stage.SUM
    dtype: ClassVar[torch.dtype | None] = None

    keys: Tensor  # [n, kv_heads, head_dim]
    values: Tensor  # [n, kv_heads, head_dim], the gate folded in

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys, values."""
        return self.keys, self.values

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Their own: a padded key would take weight from the others."""
        return tuple(self.keys.shape), tuple(self.values.shape)

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        keys, gated_values = stacks
        add_prefix_attention(values, x, keys, gated_values, runs)


Pieces = tuple[tuple[str, Piece], ...]
"""What a method compiles an artifact into: pieces and the modules where they act, at most one of a kind at each."""
