"""The canonical pieces that every PEFT method compiles into; the engine knows nothing else of methods.

A piece acts at one module of the base, on the tokens of those rows of a batch whose program holds it: at a linear
layer, at the embedding, or at an attention layer.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from hatrack_server.adapters.peft_linear import precise
from hatrack_server.adapters.rank_class import rank_class
from hatrack_server.kernels.bottleneck import add_bottleneck
from hatrack_server.kernels.kronecker import add_kronecker
from hatrack_server.kernels.low_rank import BatchLowRank, add_embedded
from hatrack_server.kernels.prefix_attention import add_prefix_attention
from hatrack_server.kernels.replacement import (
    replace_embedding,
    replace_linear,
    replace_norm,
    replace_scores,
    replace_tokens,
)
from hatrack_server.kernels.rowwise import add_vector, multiply_vector, replace_first
from hatrack_server.kernels.runs import Run


class Stage(enum.IntEnum):
    """When a piece acts, where a program has several at one module."""

    CACHE = 0  # before any pass: the engine puts it into the KV cache, and a pass has nothing to do for it
    INPUT = 1  # on x, before the base's product
    REPLACE = 2  # what stands in place of the base's output y
    SUM = 3  # what is added to y
    SCALE = 4  # what y is then multiplied with
    SHIFT = 5  # what no scale touches
    OUTPUT = 6  # what is made from the finished y


Stack = Tensor | list[Tensor]

Action = Callable[[Tensor, Tensor], None]
"""Changes values[T, …] in place, given x[T, …]: values are a module's output, or at Stage.INPUT a copy of its input.

x is what the module got: a linear layer its input, the embedding token ids, attention its queries; a norm its input as
it is normalised, before any weight.
"""


@dataclass(frozen=True)
class Piece:
    """Tensors, the fields of each kind, and what they do. Pieces of one kind and equal `shapes` share a pool."""

    stage: ClassVar[Stage] = Stage.SUM
    # What a pool holds of its floating-point tensors; None is the dtype that the base computes in.
    dtype: ClassVar[torch.dtype | None] = None
    # Whether its pools are one tensor for all rows, as a batched product needs it; else each row has its own, and a
    # pool of large ones grows without a copy.
    stacked: ClassVar[bool] = True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order in which `bind` takes their stacks."""
        return tuple(self._named_tensors.values())

    def with_tensors(self, make: Callable[[Tensor], Tensor]) -> Self:
        """The same piece with what `make` gives for each of its tensors, in their order."""
        return replace(self, **{name: make(tensor) for name, tensor in self._named_tensors.items()})

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """What a pool pads each tensor to, with zeros: its own, unless a kind knows better."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors)

    @property
    def _named_tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def write(self, rows: tuple[Tensor, ...]) -> None:
        """Copies the tensors into a pool's rows, which have the `shapes`, padding them with zeros."""
        for row, values in zip(rows, self.tensors, strict=True):
            _copy(row, values)

    @classmethod
    def bind(cls, stacks: tuple[Any, ...], runs: list[Run]) -> Action:
        """What the pieces in `stacks` do in one batch, in which the tokens of `runs` meet them."""
        return partial(cls.act, stacks=stacks, runs=runs)

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """Acts as an Action does, on these stacks and runs: for kinds that have nothing to do once for a batch."""
        raise NotImplementedError


@dataclass(frozen=True)
class LowRank(Piece):
    """y += (x aᵀ) scale b; a pool has the scale folded into its b."""

    a: Tensor  # [r, in]
    b: Tensor  # [r, out]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The rank is padded to its class."""
        rank = rank_class(self.rank)
        return (rank, self.a.shape[1]), (rank, self.b.shape[1])

    def write(self, rows: tuple[Tensor, ...]) -> None:
        """See Piece. The scale is folded in before b is rounded, unless folding it in rounds nothing."""
        a, b = rows
        # A power of two changes bfloat16's exponent alone, for which it has as much room as float32.
        exact = self.b.dtype is b.dtype is torch.bfloat16 and abs(math.frexp(self.scale)[0]) == 0.5
        _copy(a, self.a)
        _copy(b, self.b if exact else self.scale * precise(self.b))
        if exact:
            b.mul_(self.scale)  # where it lies: a product of its own would take fresh memory first

    @classmethod
    def bind(cls, stacks: tuple[Any, ...], runs: list[Run]) -> Action:
        """See Piece."""
        a, b = stacks
        return BatchLowRank(a, b, runs)


@dataclass(frozen=True)
class OutputLowRank(LowRank):
    """y += (y aᵀ) b on the base's own output, its bias included: a low-rank product with the weight from the left."""

    stage: ClassVar[Stage] = Stage.REPLACE

    @classmethod
    def bind(cls, stacks: tuple[Any, ...], runs: list[Run]) -> Action:
        """See Piece."""
        add = super().bind(stacks, runs)
        return lambda values, _: add(values, values)


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


@dataclass(frozen=True)
class Bottleneck(Piece):
    """y += up(activation(down(y))), with the biases of both; a padded unit gives 0, since activation(0) is 0."""

    stage: ClassVar[Stage] = Stage.OUTPUT

    down: Tensor  # [r, width]
    down_bias: Tensor  # [r]
    up: Tensor  # [r, width]
    up_bias: Tensor  # [width]

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The width of the bottleneck is padded as a rank is."""
        r, width = self.down.shape
        padded = rank_class(r)
        return (padded, width), (padded,), (padded, width), (width,)

    @staticmethod
    def activation(units: Tensor) -> Tensor:
        """Of each kind its own."""
        raise NotImplementedError

    @classmethod
    def act(cls, values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:  # noqa: ARG003
        """See Piece."""
        down, down_bias, up, up_bias = stacks
        add_bottleneck(values, down, down_bias, up, up_bias, cls.activation, runs)


@dataclass(frozen=True)
class ReluBottleneck(Bottleneck):
    """With max(x, 0)."""

    @staticmethod
    def activation(units: Tensor) -> Tensor:
        """See Bottleneck."""
        return relu(units)


@dataclass(frozen=True)
class GeluBottleneck(Bottleneck):
    """With x Φ(x)."""

    @staticmethod
    def activation(units: Tensor) -> Tensor:
        """See Bottleneck."""
        return gelu(units)


@dataclass(frozen=True)
class SiluBottleneck(Bottleneck):
    """With x sigmoid(x)."""

    @staticmethod
    def activation(units: Tensor) -> Tensor:
        """See Bottleneck."""
        return silu(units)


@dataclass(frozen=True)
class ReplacedNorm(Piece):
    """y = scale * x + bias, for x as it is normalised."""

    stage: ClassVar[Stage] = Stage.REPLACE
    dtype: ClassVar[torch.dtype | None] = torch.float32

    scale: Tensor  # [width]
    bias: Tensor | None = None  # [width]

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        replace_norm(values, x, stacks, runs)


@dataclass(frozen=True)
class ReplacedHead(Piece):
    """y = weight x + bias."""

    stage: ClassVar[Stage] = Stage.REPLACE
    stacked: ClassVar[bool] = False

    weight: Tensor  # [vocabulary, width]
    bias: Tensor | None = None  # [vocabulary]

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Stack, ...], runs: list[Run]) -> None:
        """See Piece."""
        replace_linear(values, x, stacks, runs)


@dataclass(frozen=True)
class ReplacedEmbedding(Piece):
    """y = rows[id]."""

    stage: ClassVar[Stage] = Stage.REPLACE
    stacked: ClassVar[bool] = False

    rows: Tensor  # [vocabulary, width]

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Stack, ...], runs: list[Run]) -> None:
        """See Piece."""
        replace_embedding(values, x, stacks[0], runs)


@dataclass(frozen=True)
class ReplacedTokens(Piece):
    """Embeddings of some tokens in place of the base's."""

    stage: ClassVar[Stage] = Stage.REPLACE

    tokens: Tensor  # [n], ids
    rows: Tensor  # [n, width]

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        tokens, rows = stacks
        replace_tokens(values, x, tokens, rows, runs)


@dataclass(frozen=True)
class ReplacedScores(Piece):
    """The output head's rows for some tokens in place of the base's: y[tokens] = rows x."""

    stage: ClassVar[Stage] = Stage.REPLACE

    tokens: Tensor  # [n], ids
    rows: Tensor  # [n, width]

    @staticmethod
    def act(values: Tensor, x: Tensor, stacks: tuple[Tensor, ...], runs: list[Run]) -> None:
        """See Piece."""
        tokens, rows = stacks
        replace_scores(values, x, tokens, rows, runs)


def _copy(row: Tensor, values: Tensor) -> None:
    if row.shape != values.shape:
        row = row.zero_()[tuple(map(slice, values.shape))]
    row.copy_(values, non_blocking=True)


Pieces = tuple[tuple[str, Piece], ...]
"""What a method compiles an artifact into: pieces and the modules where they act, at most one of a kind at each."""
