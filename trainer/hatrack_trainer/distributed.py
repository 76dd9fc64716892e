"""Several processes that train one adapter, started by `accelerate launch`: each takes its share of every step's rows.

With examples/fsdp.yaml each keeps a share of the base, too (FSDP2: PyTorch FSDP, Zhao et al. 2023, arXiv:2304.11277,
one parameter at a time). Importing this costs no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from hatrack_trainer.errors import UsageError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import Trainer

Found = TypeVar("Found")

GRACE_SECONDS = 10.0


def processes() -> int:
    """How many train together, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return os.environ.get("RANK", "0") == "0"


def shards_base() -> bool:
    """Whether each process is to keep a share of the base; raises UsageError for FSDP's first version.

    That one flattens parameters into one another: of those, neither names nor gradients can be told apart.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise UsageError("accelerate's configuration: must say fsdp_version: 2, as examples/fsdp.yaml does")
    return True


def own_device() -> str:
    """What this process computes on: a GPU of its own where there are any."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def nf4_storage() -> torch.dtype:
    """What packed codes are stored as: FSDP leaves integers whole in every process, and shards bfloat16."""
    import torch

    return torch.bfloat16 if shards_base() else torch.uint8


def prepare_sharding(trainer: Trainer) -> None:
    """Makes accelerate shard the base on a CPU, too, where it would silently copy it, and not round what is no product.

    Left alone, it rounds losses and the sums of gradients to what products are computed in.
    """
    if not shards_base():
        return
    import torch
    from accelerate import DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        trainer.is_fsdp_enabled = True
    if trainer.args.bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        state.fsdp_plugin.mixed_precision_policy = policy


def own_share(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here: all, none, or some rows."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """What it is a share of, or itself. Every process calls it."""
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def shared_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, shared among the processes as `parameter` is. Every process calls it with the same one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def found_by_any(names: set[str]) -> set[str]:
    """What at least one process found. Every process calls it."""
    from accelerate.utils import gather_object

    return set(gather_object(sorted(names)))


def from_first(do: Callable[[], Found]) -> Found:
    """What `do` returns in the first process, which alone does it. Every process calls it."""
    from accelerate.utils import broadcast_object_list

    found = [do() if is_first() else None]
    result: Found = broadcast_object_list(found)[0]
    return result


def gather_adapter(model: PeftModel) -> None:
    """Puts the whole of what is trained in place of this process's share. All call it, after the last step."""
    from torch.nn import Parameter

    model.state_dict()  # makes FSDP take back what its last forward left whole
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad and own_share(parameter) is not parameter:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, Parameter(whole(parameter)))


@contextmanager
def one_voice() -> Iterator[None]:
    """An error of all is told once: the others wait for the first, at whose end the launcher ends them, too.

    One that the first does not have is told after the wait.
    """
    try:
        yield
    except Exception:
        if not is_first():
            time.sleep(GRACE_SECONDS)
        raise
