"""The training configuration: one YAML file, validated once and then frozen."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hatrack_trainer.errors import ConfigError

# Strict but for these two: YAML has no paths, and PyYAML reads `2e-4` (no dot) as text.
FilePath = Annotated[Path, Field(strict=False)]
Real = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class Section(BaseModel):
    """What all parts of the configuration share."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BaseSection(Section):
    """The frozen model under the adapter."""

    model: str = Field(min_length=1)
    """A local checkpoint or a hub id; the same one that the server serves."""
    quantization: Literal["nf4", "none"] = "nf4"
    """As the server has it: an adapter learns to correct the quantisation's errors too."""


class AdapterSection(Section):
    """LoRA (Hu et al. 2021): y += alpha/rank · B(Ax) beside each target."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    rslora: bool = False
    """Scale by alpha/√rank instead (Kalajdzievski 2023), so that high ranks learn as fast as low ones."""
    dropout: Real = Field(default=0.0, ge=0, lt=1)
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of linear layers, e.g. [q_proj, v_proj]; all-linear is every one but the output head."""


class DataSection(Section):
    """JSON lines: {"prompt", "completion"}, or {"messages": [{"role", "content"} …]} ending with the assistant's."""

    train: FilePath
    eval: FilePath | None = None
    """Held-out rows; their loss is taken once, after the last step."""
    max_length: int = Field(default=1024, ge=2)
    """Prompt and completion together, in tokens; what is beyond is cut off."""


class TrainSection(Section):
    """The optimisation."""

    epochs: Real = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; overrides epochs."""
    batch_size: int = Field(default=8, ge=1)
    """Rows in memory at once."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Batches per optimizer step."""
    learning_rate: Real = Field(default=2e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: Real = Field(default=0.0, ge=0)
    max_grad_norm: Real = Field(default=1.0, gt=0)
    optimizer: Literal["paged_adamw_32bit", "paged_adamw_8bit"] = "paged_adamw_32bit"
    """Paged: states move to host memory when the device is full (QLoRA, Dettmers et al. 2023). Needs CUDA."""
    activation_checkpointing: bool = False
    """Compute activations twice to keep fewer of them."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    threads: int | None = Field(default=None, ge=1, le=1024)
    """torch's CPU threads; absent: torch's own choice."""


class OutputSection(Section):
    """Where the artifact goes."""

    dir: FilePath
    """Must not exist yet, or be empty."""


class TrainConfig(Section):
    """Everything that `hatrack train run` can be told."""

    base: BaseSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    train: TrainSection = TrainSection()
    output: OutputSection


def load_config(path: Path) -> TrainConfig:
    """Reads and validates a YAML file; relative paths in it are relative to the working directory.

    Raises ConfigError, one sentence that names the first wrong key, and for an unknown key the nearest known one.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold the sections {', '.join(TrainConfig.model_fields)}")
    try:
        # A section whose keys are all commented out is null to YAML.
        return TrainConfig.model_validate({name: section for name, section in raw.items() if section is not None})
    except ValidationError as error:
        # An unknown key comes first: a misspelt one is also reported as missing under its right name.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise ConfigError(f"{path}: {_sentence(first)}") from None


def _sentence(error: Any) -> str:
    location = [str(part) for part in error["loc"][:2]]  # beyond section and key it names pydantic's union members
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _known_keys(location[:-1]), n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{key}: missing"
    if error["type"] == "model_type":
        return f"{key}: must be a section, with keys of its own"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _known_keys(section: list[str]) -> list[str]:
    model: type[BaseModel] = TrainConfig
    for name in section:
        model = model.model_fields[name].annotation  # type: ignore[assignment]
    return list(model.model_fields)
