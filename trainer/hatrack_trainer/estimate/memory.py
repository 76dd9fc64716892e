"""The memory that a run needs, known before its base is loaded; and what the device has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Parameter

from hatrack_server.model.load import read_config
from hatrack_trainer.config import TrainConfig
from hatrack_trainer.data.read import ExampleSet
from hatrack_trainer.errors import NoEstimate
from hatrack_trainer.estimate.cgroups import memory_left
from hatrack_trainer.estimate.peak import Peak
from hatrack_trainer.estimate.remedies import check_fits
from hatrack_trainer.estimate.sketch import sketch_adapter, sketch_arguments, sketch_base, sketch_step, tensors_of
from hatrack_trainer.optimizers import runnable

SMALL = 4096
"""Elements below which bitsandbytes keeps a tensor's states in 32 bits (`min_8bit_size`)."""
SCALED = 256
"""Elements of 8-bit states that share a scale of 4 bytes (optim/optimizer.py, `Optimizer2State`)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device, by what they hold."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int  # and all else that a step makes, at its peak

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest one of a run."""

    rows: int
    tokens: int  # of each row, padding included


def largest_batch(config: TrainConfig, train: ExampleSet) -> Batch:
    """A preference pair is two rows; a row of packed documents has `data.max_length` tokens, or those of all."""
    lengths = [len(example.input_ids) for example in train.examples]
    tokens = min(sum(lengths) if config.train.packing else max(lengths), config.data.max_length)
    return Batch(min(config.train.batch_size * (2 if train.pairs else 1), len(lengths)), tokens)


def estimate_memory(config: TrainConfig, checkpoint: Path, batch: Batch, *, cuda: bool) -> Memory:
    """Of a run's first steps, in one process; needs no weights.

    The step is counted with gradients that are there already, as they are from the second batch on. Attention is taken
    for torch's fused one. Raises NoEstimate where a step of this base can't be made without its weights.
    """
    try:
        return _estimate(config, checkpoint, batch, cuda=cuda)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise NoEstimate(f"the memory can't be estimated: {(str(error) or repr(error)).splitlines()[0]}") from error


def check_memory(config: TrainConfig, checkpoint: Path, train: ExampleSet, *, cuda: bool) -> None:
    """Raises UsageError, with settings that would fit, for a run that needs more than is free; and NoEstimate."""

    def needs(candidate: TrainConfig) -> int:
        return estimate_memory(candidate, checkpoint, largest_batch(candidate, train), cuda=cuda).total

    check_fits(config, available_memory(cuda=cuda), needs)


def available_memory(*, cuda: bool) -> int:
    """Bytes that are free on the device; on the CPU, those that its container leaves."""
    free: int = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    left = None if cuda else memory_left()
    return free if left is None else max(0, min(free, left))


def _estimate(config: TrainConfig, checkpoint: Path, batch: Batch, *, cuda: bool) -> Memory:
    unquantised = config.adapter.unquantised(read_config(checkpoint))
    base = sketch_base(checkpoint, config.base.quantization, unquantised)
    before = _bytes(tensors_of(base))
    model = sketch_adapter(base, config.adapter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = runnable(config.train.optimizer, cuda=cuda)
    return Memory(
        base=before,
        adapter=_bytes(tensors_of(model)) - before,
        gradients=_bytes(trained),
        optimizer=sum(_state_bytes(optimizer, parameter) for parameter in trained),
        activations=_step_bytes(config, model, batch, cuda=cuda),
    )


def _step_bytes(config: TrainConfig, model: PeftModel, batch: Batch, *, cuda: bool) -> int:
    autocast = cuda or model.get_base_model().dtype == torch.bfloat16  # see sft.autocasts
    sketch_arguments(model, checkpointing=config.train.activation_checkpointing, autocast=autocast)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    with Peak([*tensors_of(model), *(each.grad for each in trained)]) as peak:
        sketch_step(model, batch.rows, batch.tokens, cuda=cuda)
    return peak.bytes


def _state_bytes(optimizer: str, parameter: Parameter) -> int:
    """A moment or two of every element; paged ones count, too, as they are on the device while it steps."""
    moments, elements = 1 if "lion" in optimizer else 2, parameter.numel()
    if "8bit" in optimizer and elements >= SMALL:
        return moments * (elements + 4 * -(-elements // SCALED))
    return moments * 4 * elements


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
