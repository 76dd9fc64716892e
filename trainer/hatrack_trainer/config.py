"""The training configuration: what one YAML file may hold, validated once and then frozen."""

from __future__ import annotations

from os.path import realpath
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, model_validator

from hatrack.names import NAME_RULE, is_adapter_name
from hatrack_trainer.methods import Method, read_method
from hatrack_trainer.methods.lora import Lora
from hatrack_trainer.section import FilePath, PositiveReal, Real, Section, Steps


def _adapter_name(text: str) -> str:
    if not is_adapter_name(text):
        raise ValueError(NAME_RULE)
    return text


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
    """Held-out rows, whose loss is taken as the section eval says."""
    format: Literal["auto", "prompt-completion", "chat", "alpaca", "sharegpt", "text", "preference"] = "auto"
    """What the rows are; auto: told from their keys, for each file, and said."""
    loss: Literal["completion", "assistant"] = "completion"
    """What is learned of a chat: its last turn, or every one of the assistant's. Of other rows it is the completion, or
    all of a text."""
    max_length: int = Field(default=1024, ge=2, le=10**7)
    """A row's tokens, prompt and completion together; what is beyond is cut off. Absent: 1024, or fewer where the
    base's positions end."""


Optimizer = Literal[
    "paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_8bit", "adamw_torch", "adamw_8bit", "lion_8bit"
]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab", "dvclive"]
"""By transformers' names."""


class TrainSection(Section):
    """The optimisation."""

    epochs: Real = Field(default=1.0, gt=0, le=10**6)
    max_steps: int | None = Field(default=None, ge=1, le=10**9)
    """Optimizer steps; overrides epochs."""
    batch_size: int = Field(default=8, ge=1, le=2**16)
    """Rows in memory at once."""
    gradient_accumulation: int = Field(default=1, ge=1, le=2**16)
    """Batches per optimizer step."""
    learning_rate: PositiveReal | None = None
    """Absent: the adapter method's own, which suits bases of a billion parameters or less; larger ones want less."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0, le=10**9)
    weight_decay: Real = Field(default=0.0, ge=0, le=100)
    max_grad_norm: Real = Field(default=1.0, ge=1e-6)
    optimizer: Optimizer = "paged_adamw_32bit"
    """Paged: states move to host memory when the device is full (QLoRA, Dettmers et al. 2023); unpaged on the CPU. Lion
    (Chen et al. 2023, arXiv:2302.06675) wants a third to a tenth of AdamW's learning rate."""
    packing: bool = False
    """Lay several documents in a row of data.max_length tokens, each kept apart from the others: less padding."""
    neftune_alpha: Annotated[PositiveReal, Field(le=1000)] | None = None
    """Noise on the embeddings while training (NEFTune, Jain et al. 2023, arXiv:2310.05914): 5 to 15; absent: none. It
    is spread over a whole row, so that packed documents get less."""
    dpo_beta: Real = Field(default=0.1, gt=0, le=100)
    """Of preference pairs: how dear it is to leave the base (DPO, Rafailov et al. 2023, arXiv:2305.18290)."""
    trackers: list[Tracker] = Field(default=[])
    """Where each step's figures go besides the log; each needs its own package."""
    logging_dir: FilePath | None = None
    """The folder of TensorBoard's event files."""
    activation_checkpointing: bool = False
    """Compute activations twice to keep fewer of them."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    threads: int | None = Field(default=None, ge=1, le=1024)
    """torch's CPU threads; absent: torch's own choice."""


class EvalSection(Section):
    """When the loss of the held-out rows is taken."""

    every: Steps | None = None
    """Optimizer steps between two; the adapter with the lowest loss is what is written. Absent: once, after the last
    step."""
    patience: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """The run stops early after so many in a row without a lower loss; absent: it never does."""


class OutputSection(Section):
    """Where the artifact goes, and what a run that is cut short leaves."""

    dir: FilePath
    """Must not exist yet, or be empty."""
    checkpoint_every: Steps | None = 500
    """Optimizer steps between two checkpoints, from which `hatrack train resume` goes on; null: none."""
    keep_checkpoints: int = Field(default=2, ge=1, le=10**9)
    """The newest, and the best where `eval.every` looks for it; a finished run keeps none."""


class RegistrationSection(Section):
    """What `--register` does with the finished artifact; the API key is taken from HATRACK_API_KEY."""

    name: Annotated[str, AfterValidator(_adapter_name)] | None = None
    """The adapter's; one that is there already gets its next version."""
    server: str | None = None
    """HOST:PORT; absent: HATRACK_SERVER, or the server on this machine."""
    stage: bool = False
    """Leave the live version as it is: `hatrack adapters promote` comes later."""
    tls: bool = False
    """Use TLS, trusting the system's certificates."""
    tls_ca: FilePath | None = None
    """Use TLS, trusting these certificates (PEM)."""


class TrainConfig(Section):
    """Everything that `hatrack train run` can be told."""

    base: BaseSection
    adapter: SerializeAsAny[Annotated[Method, BeforeValidator(read_method)]] = Lora()
    data: DataSection
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    output: OutputSection
    registration: RegistrationSection = RegistrationSection()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.train.activation_checkpointing and not self.adapter.allows_checkpointing:
            raise ValueError(f"train.activation_checkpointing: does not work with adapter.method {self.adapter.method}")
        if self.train.packing and not self.adapter.allows_packing:
            raise ValueError(f"train.packing: does not work with adapter.method {self.adapter.method}")
        if "tensorboard" in self.train.trackers and self.train.logging_dir is None:
            raise ValueError("train.logging_dir: missing; tensorboard, in train.trackers, writes its files there")
        events = self.train.logging_dir
        # Not Path.resolve, to which a link that leads to itself is an error.
        if events is not None and Path(realpath(events)).is_relative_to(realpath(self.output.dir)):
            raise ValueError("train.logging_dir: must lie outside output.dir, which is written as a whole")
        if self.train.max_steps is not None and self.train.warmup_steps >= self.train.max_steps:
            raise ValueError("train.warmup_steps: must be less than train.max_steps")
        if self.eval.every is not None and self.data.eval is None:
            raise ValueError("eval.every: needs data.eval")
        if self.eval.patience is not None and self.eval.every is None:
            raise ValueError("eval.patience: needs eval.every")
        return self
