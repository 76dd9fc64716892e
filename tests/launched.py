"""What `accelerate launch` starts in tests: a `hatrack train run` for each argument, for a start costs seconds.

An argument is CONFIG, or plain:CONFIG for a run in which each process has a base of its own, as without FSDP.
"""

from __future__ import annotations

import os
import sys

import typer
from peft import PeftModel

from hatrack_client.cli import run
from hatrack_trainer import run as running
from hatrack_trainer.distributed import gather_adapter, is_first, own_share


def tell_share(model: PeftModel) -> None:
    """Prints how much of the base this process has had, before the adapter is gathered."""
    base = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    if is_first():
        typer.echo(f"share {sum(own_share(each).numel() for each in base) / sum(each.numel() for each in base):.2f}")
    gather_adapter(model)


running.gather_adapter = tell_share
for argument in sys.argv[1:]:
    plain, _, config = argument.rpartition(":")
    os.environ["ACCELERATE_USE_FSDP"] = "false" if plain else "true"
    if run(["train", "run", config]):
        sys.exit(1)
