"""Some of the base's own weights, trained as they are, without an adapter beside them: norms (LayerNorm tuning, Zhao et
al. 2023, arXiv:2312.11420), biases (BitFit, Ben Zaken et al. 2022, arXiv:2106.10199), the output head, top layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hatrack_trainer.distributed import shards_base
from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods import CAUSAL_LM, Method

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig

MERGE = (
    "what it trains becomes part of the base, so it can't be served beside others: merge it by `hatrack adapters merge`"
)
UNTIED = "the base's head shares its weight with the embedding: a copy of it is trained, and the embedding stays"


class Partial(Method):
    """The parts are copied in float32 and trained; all else stays quantised as it is.

    Norms alone are served, as LayerNorm tuning. All else is merged. From 7 B parameters on, try a tenth of the default
    learning rate.
    """

    method: Literal["partial"] = "partial"
    # Where no position is rotated into keys, a bias of theirs shifts all scores of a query alike.
    may_lack_gradients: ClassVar[tuple[str, ...]] = ("k_proj.partial_weights.default.bias",)

    parts: list[Literal["norms", "biases", "lm_head"]] = Field(default_factory=list)
    """norms: those of the residual stream. biases: all but the head's. lm_head: the output head."""
    last_layers: int = Field(default=0, ge=0)
    """How many of the top decoder layers are trained whole. They are loaded unquantised, as the head is."""

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if not self.parts and not self.last_layers:
            raise ValueError("partial needs parts, some of norms, biases and lm_head, or last_layers")
        return self

    @property
    def default_learning_rate(self) -> float:  # type: ignore[override]
        """Vectors want more than whole weights, which want a tenth of LoRA's."""
        return 1e-4 if self.last_layers or "lm_head" in self.parts else 2e-2

    @property
    def served(self) -> bool:
        """Norms alone are: the rest changes what all rows of a batch share."""
        return set(self.parts) == {"norms"} and not self.last_layers

    def refuse(self, base: PretrainedConfig) -> None:
        """Raises UsageError for a part that the base lacks, or has quantised on disk, and for the head under FSDP."""
        from hatrack_server.model.load import without_weights
        from hatrack_trainer.tuners.partial import trained_parameters

        if self.last_layers and getattr(base, "quantization_config", None) is not None:
            raise UsageError(
                "adapter.last_layers: the base is quantised on disk, and only original weights can be trained; "
                "take the checkpoint that it was made from"
            )
        if "lm_head" in self.parts and shards_base():
            # TRL's loss makes the head whole by itself, and autograd then sums nothing up (trainer/utils.py).
            raise UsageError(
                "adapter.parts: lm_head can't be trained with FSDP, where each process would learn from its own rows "
                "alone; without, several processes can train it"
            )
        try:
            trained_parameters(without_weights(base), self.parts, self.last_layers)
        except ValueError as error:
            raise UsageError(f"adapter.{error}") from None

    def unquantised(self, base: PretrainedConfig) -> list[str]:
        """See Method."""
        from hatrack_server.model.load import without_weights
        from hatrack_trainer.tuners.partial import head_name, last_blocks

        model = without_weights(base)
        return [*last_blocks(model, self.last_layers), *([head_name(model)] if "lm_head" in self.parts else [])]

    def remarks(self, base: PretrainedConfig) -> list[str]:
        """See Method."""
        tied = "lm_head" in self.parts and base.get_text_config().tie_word_embeddings
        return [f"adapter.parts: lm_head: {UNTIED}"] * tied + [f"adapter: {MERGE}"] * (not self.served)

    def peft_config(self) -> PeftConfig:
        """See Method."""
        if self.served:
            from peft import LNTuningConfig

            import hatrack_trainer.tuners.norms  # noqa: F401

            return LNTuningConfig(task_type=CAUSAL_LM)
        from hatrack_trainer.tuners.partial import PartialConfig

        return PartialConfig(task_type=CAUSAL_LM, parts=sorted(set(self.parts)), last_layers=self.last_layers)

    def prepare(self, model: PeftModel) -> None:
        """TRL has rounded the copies to bfloat16: lets them begin at the base's values again."""
        from hatrack_trainer.tuners.norms import prepare_norms
        from hatrack_trainer.tuners.partial import begin_at_the_base

        begin_at_the_base(model)
        prepare_norms(model)
