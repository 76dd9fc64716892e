"""What a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100
"""The label of a token that no loss is taken on."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence as the model sees it; both lists have the same length, and the first label is never learned.

    A label is its token's id, or IGNORED. One exception: where a template writes no stop between two turns, the label
    behind a learned turn is the stop that ends it when served, while the ids go on as the template writes them.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def learned(self) -> int:
        """How many labels carry loss."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def start(self) -> int:
        """Where the first label that carries loss is; there must be one."""
        return next(place for place, label in enumerate(self.labels) if label != IGNORED)

    def cut(self, max_length: int) -> Example:
        """Its first `max_length` tokens."""
        return Example(self.input_ids[:max_length], self.labels[:max_length])
