"""The canonical pieces that every PEFT method compiles into; the engine knows nothing else of methods.

A piece acts at one linear layer of the base, on the tokens of those rows of a batch whose program holds it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from hatrack_server.kernels.kronecker import add_kronecker
from hatrack_server.kernels.low_rank import add_low_rank
from hatrack_server.kernels.rowwise import add_vector, multiply_vector
from hatrack_server.kernels.runs import Run


class Stage(enum.IntEnum):
    """When a piece acts, where a program has several at one layer."""

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
        """Changes values[T, …] in place, given the layer's input x[T, in]: `values` is a copy of x at Stage.INPUT,
        else the layer's output.
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
        """Ranks are padded to the next power of two."""
        rank = 1 << (self.rank - 1).bit_length()
        return (rank, self.a.shape[1]), (rank, self.b.shape[1])

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        a, b = stacks
        add_low_rank(values, x, a, b, runs)


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


Pieces = tuple[tuple[str, Piece], ...]
"""What a method compiles an artifact into: pieces and the layers where they act, at most one of a kind at each."""
