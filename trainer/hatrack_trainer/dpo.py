"""TRL's DPOTrainer, set up for one adapter on the frozen base, which is its own reference: the adapter is left out.

Direct preference optimisation, Rafailov et al. 2023, arXiv:2305.18290.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from hatrack_server.model.load import prepare_for_training
from hatrack_trainer.checkpoints import Resumable
from hatrack_trainer.config import TrainConfig
from hatrack_trainer.data import Example
from hatrack_trainer.sft import OnStep, callbacks, construction, finish, training_arguments, without_old_names


class PairTrainer(Resumable, DPOTrainer):
    """TRL's, on rows of token ids: it would tokenise them itself, otherwise than they are served."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Called by the trainer."""
        with without_old_names():
            return super().compute_loss(*args, **kwargs)


def make_pair_trainer(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Example],
    evaluation: list[Example] | None = None,
    on_step: OnStep | None = None,
) -> PairTrainer:
    """As `sft.make_trainer`, for pairs of examples: the chosen and the rejected, in turn, each behind the same prompt.

    Dropout is off, since the reference has none to be compared with. Raises ValueError as that does.
    """
    prepare_for_training(base)
    with construction() as unused:
        arguments = training_arguments(config, unused, base, pairs=True)
        trainer = PairTrainer(
            model=base,
            args=DPOConfig(**arguments, beta=config.train.dpo_beta, max_length=None),
            train_dataset=_dataset(train),
            eval_dataset=_dataset(evaluation) if evaluation else None,
            processing_class=tokenizer,
            peft_config=config.adapter.peft_config(),
            callbacks=callbacks(config.adapter, on_step),
        )
    finish(trainer, config)
    return trainer


def _dataset(examples: list[Example]) -> Dataset:
    pairs = list(zip(examples[::2], examples[1::2], strict=True))
    return Dataset.from_dict(
        {
            "prompt_ids": [chosen.input_ids[: chosen.start] for chosen, _ in pairs],
            "chosen_ids": [chosen.input_ids[chosen.start :] for chosen, _ in pairs],
            "rejected_ids": [rejected.input_ids[rejected.start :] for _, rejected in pairs],
        }
    )
