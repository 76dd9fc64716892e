"""What a method may ask of the frozen base while it compiles an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from hatrack_server.types import LinearShape


class BaseLayers(Protocol):
    """The linear layers of the loaded base, by name."""

    @property
    def shapes(self) -> Mapping[str, LinearShape]:
        """Of every layer that adapters may target."""

    def project(self, layer: str, rows: Tensor) -> Tensor:
        """rows[R, in] through the layer's weight alone, without its bias: float32 [R, out]."""

    def squared_norms(self, layer: str) -> Tensor:
        """The squared length of each row of the layer's weight: float32 [out]."""

    def bias(self, layer: str) -> Tensor | None:
        """The layer's bias, float32 [out], if it has one."""
