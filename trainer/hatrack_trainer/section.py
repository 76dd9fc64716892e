"""What the parts of a training configuration are made of. Importing this needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Strict but for these two: YAML has no paths, and PyYAML reads `2e-4` (no dot) as text.
FilePath = Annotated[Path, Field(strict=False)]
Real = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class Section(BaseModel):
    """What all parts of the configuration share."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
