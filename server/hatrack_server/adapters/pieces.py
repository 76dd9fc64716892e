"""The canonical pieces that every PEFT method compiles into; the engine knows nothing else of methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LowRank:
    """y += (x aᵀ) b at one linear layer, the method's scale folded into b."""

    a: Tensor  # [r, in]
    b: Tensor  # [r, out]

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


Pieces = Mapping[str, LowRank]
"""What a method compiles an artifact into: a piece by the name of the layer where it acts."""
