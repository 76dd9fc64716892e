"""What a run optimises follows from its data: preference pairs are learned by DPO, all else by its likelihood.

Importing this needs no torch.
"""

from __future__ import annotations

from hatrack_trainer.config import TrainConfig
from hatrack_trainer.data.read import ExampleSet
from hatrack_trainer.errors import UsageError

DPO_SHARE = 0.1
"""Of a method's own learning rate: DPO unlearns the base's language where likelihood only begins to learn."""


def learning_rate(config: TrainConfig, *, pairs: bool) -> float:
    """What the optimizer begins with: `train.learning_rate`, or the method's own, of which DPO takes a tenth."""
    own = config.adapter.default_learning_rate
    return config.train.learning_rate or (DPO_SHARE * own if pairs else own)


def check_objective(config: TrainConfig, train_set: ExampleSet) -> None:
    """Raises UsageError, naming the key, for settings that the objective can't go with."""
    if not train_set.pairs:
        return
    if config.train.packing:
        raise UsageError("train.packing: does not work with preference pairs, which are compared row by row")
    if config.train.neftune_alpha is not None:
        raise UsageError("train.neftune_alpha: does not work with preference pairs: their reference must be the base")


def objective_remark(config: TrainConfig, train_set: ExampleSet) -> str | None:
    """Says that pairs are learned by DPO, and how; nothing of other data, which is learned as everyone expects."""
    if not train_set.pairs:
        return None
    rate = learning_rate(config, pairs=True)
    undropped = "; adapter.dropout is not applied" if getattr(config.adapter, "dropout", 0) else ""
    return (
        f"{train_set.file}: the adapter learns by DPO to prefer chosen to rejected, "
        f"with train.dpo_beta {config.train.dpo_beta:g} and a learning rate of {rate:g}{undropped}"
    )
