"""What the parts of a training configuration are made of. Importing this needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


def _path(value: Any) -> Any:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError("must be a path")
    return value


# Strict but for these two: YAML has no paths, and PyYAML reads `2e-4` (no dot) as text.
FilePath = Annotated[Path, Field(strict=False), BeforeValidator(_path)]
Real = Annotated[float, Field(strict=False, allow_inf_nan=False), BeforeValidator(_no_truth_value)]
PositiveReal = Annotated[float, Field(strict=False, allow_inf_nan=False, gt=0), BeforeValidator(_no_truth_value)]
"""For what may be absent, too: a bound beside `Real | None` would be none of the number's."""
Steps = Annotated[int, Field(ge=1, le=10**9)]
Rank = Annotated[int, Field(ge=1, le=4096)]
"""Above any that pays off: the width of a base of 7 B parameters."""
Alpha = Annotated[int, Field(ge=1, le=10**6)]
VirtualTokenCount = Annotated[int, Field(ge=1, le=100_000)]


class Section(BaseModel):
    """What all parts of the configuration share."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
