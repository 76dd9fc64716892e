"""From JSON lines to token ids and labels: rows, their formats, their tokens, and what is wrong with them."""

from hatrack_trainer.data.example import IGNORED, Example

__all__ = ["IGNORED", "Example"]
