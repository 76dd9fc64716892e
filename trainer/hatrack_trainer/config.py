"""The training configuration: one YAML file, validated once and then frozen."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from hatrack_trainer.errors import ConfigError
from hatrack_trainer.methods import Method, method_of, methods, read_method
from hatrack_trainer.methods.lora import Lora
from hatrack_trainer.section import FilePath, Real, Section

METHOD_KEY = ("adapter", "method")


class BaseSection(Section):
    """The frozen model under the adapter."""

    model: str = Field(min_length=1)
    """A local checkpoint or a hub id; the same one that the server serves."""
    quantization: Literal["nf4", "none"] = "nf4"
    """As the server has it: an adapter learns to correct the quantisation's errors too."""


class DataSection(Section):
    """JSON lines, one format per file."""

    train: FilePath
    eval: FilePath | None = None
    """Held-out rows; their loss is taken once, after the last step."""
    format: Literal["auto", "prompt-completion", "chat", "alpaca", "sharegpt", "text", "preference"] = "auto"
    """What the rows are; auto: told from their keys, for each file, and said."""
    loss: Literal["completion", "assistant"] = "completion"
    """What is learned of a chat: its last turn, or every one of the assistant's. Of other rows it is the completion, or
    all of a text."""
    max_length: int = Field(default=1024, ge=2)
    """A row's tokens, prompt and completion together; what is beyond is cut off."""


class TrainSection(Section):
    """The optimisation."""

    epochs: Real = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; overrides epochs."""
    batch_size: int = Field(default=8, ge=1)
    """Rows in memory at once."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Batches per optimizer step."""
    learning_rate: Real | None = Field(default=None, gt=0)
    """Absent: the adapter method's own, which suits bases of a billion parameters or less; larger ones want less."""
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
    adapter: SerializeAsAny[Annotated[Method, BeforeValidator(read_method)]] = Lora()
    data: DataSection
    train: TrainSection = TrainSection()
    output: OutputSection

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.train.activation_checkpointing and not self.adapter.allows_checkpointing:
            raise ValueError(f"train.activation_checkpointing: does not work with adapter.method {self.adapter.method}")
        return self

    @property
    def learning_rate(self) -> float:
        """What the optimizer begins with: `train.learning_rate`, or the method's own."""
        return self.train.learning_rate or self.adapter.default_learning_rate


def load_config(path: Path) -> TrainConfig:
    """Reads and validates a YAML file; relative paths in it are relative to the working directory.

    Raises ConfigError, one sentence that names the first wrong key, and for an unknown key the nearest known one.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML lets through what dates and integers raise
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold the sections {', '.join(TrainConfig.model_fields)}")
    # A section whose keys are all commented out is null to YAML.
    sections = {name: section for name, section in raw.items() if section is not None}
    try:
        return TrainConfig.model_validate(sections)
    except ValidationError as error:
        first = min(error.errors(), key=_urgency)
        raise ConfigError(f"{path}: {_sentence(first, sections)}") from None


def _urgency(error: Any) -> tuple[bool, bool]:
    """The wrong method comes first, whose keys are the default's; then unknown keys: a misspelt one is missing, too."""
    return error["loc"] != METHOD_KEY, error["type"] != "extra_forbidden"


def _sentence(error: Any, sections: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"][:2]]  # beyond section and key it names pydantic's union members
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _known_keys(location[:-1], sections), n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{key}: missing"
    if error["type"] == "model_type":
        return f"{key}: must be a section, with keys of its own"
    if error["type"] == "value_error":  # one of our own validators
        return f"{key}: {error['ctx']['error']}".removeprefix(": ")
    if error["loc"] == METHOD_KEY:
        return f"{key}: must be one of {', '.join(methods())}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _known_keys(section: list[str], sections: dict[str, Any]) -> list[str]:
    if section == ["adapter"]:
        return list(method_of(sections["adapter"]).model_fields)
    model: type[BaseModel] = TrainConfig
    for name in section:
        model = model.model_fields[name].annotation  # type: ignore[assignment]
    return list(model.model_fields)
