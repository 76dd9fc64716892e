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

    def parameter(self, module: str, name: str) -> Tensor:
        """One of a module that `shapes.replaceable` names, as the base holds it."""

    def bias(self, layer: str) -> Tensor | None:
        """The layer's bias, float32 [out], if it has one."""
