"""Whether an adapter fits a base, and names layers that it has: looked up before the base is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from hatrack_server.model.load import read_config, without_weights
from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods import Method


def check_adapter(adapter: Method, checkpoint: Path) -> None:
    """Raises UsageError naming the first key of `adapter` that this base can't do."""
    adapter.refuse(read_config(checkpoint))
    check_targets(adapter.named_layers(), checkpoint)


def check_targets(targets: list[str] | Literal["all-linear"], checkpoint: Path) -> None:
    """Raises UsageError for the first name that selects no module, or one that is no linear layer of the base's blocks.

    PEFT would ignore a name that selects nothing beside one that does, and train an embedding, which is not supported.
    """
    if not targets or targets == "all-linear":
        return
    base = without_weights(read_config(checkpoint))
    head = base.get_output_embeddings()
    modules = dict(base.named_modules())
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head}
    for target in targets:
        alone = LoraConfig(target_modules=[target])
        selected = {name for name in modules if check_target_module_exists(alone, name)}
        if not selected or selected - linears:
            wrong = "can't have an adapter" if selected else "is no module of the base"
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise UsageError(f"adapter.target_modules: {target} {wrong}; take some of {known}")
