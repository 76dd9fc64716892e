"""What a method may ask of the frozen base while it compiles an artifact."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hatrack_server.types import BaseShapes


class BaseLayers(Protocol):
    """The loaded base: where adapters may act, and its linear layers by name."""

    @property
    def shapes(self) -> BaseShapes:
        """What `describe` was given."""

    def project(self, layer: str, rows: Tensor) -> Tensor:
        """rows[R, in] through the layer's weight alone, without its bias: float32 [R, out]."""

    def squared_norms(self, layer: str) -> Tensor:
        """The squared length of each row of the layer's weight: float32 [out]."""

    def end(self, module: str, parameter: str) -> Tensor:
        """A parameter of the embedding or the head, as the base holds it."""

    def norm_offset(self, norm: str) -> float:
        """What a norm that may be replaced adds to its weight before it multiplies with it."""

    def bias(self, layer: str) -> Tensor | None:
        """The layer's bias, float32 [out], if it has one."""
