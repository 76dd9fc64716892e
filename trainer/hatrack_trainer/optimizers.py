"""Which optimizer really runs, and how much of its state is really paged.

bitsandbytes pages to the host from CUDA alone, and only the states of tensors of 100,000 elements or more
(optim/optimizer.py, `get_state_buffer`): those of a small adapter stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback

PAGED = "paged_"
# Of what bitsandbytes pages; torch's own AdamW is faster than bitsandbytes' in 32 bits on a CPU.
UNPAGED = {"paged_adamw_32bit": "adamw_torch", "paged_adamw_8bit": "adamw_8bit", "paged_lion_8bit": "lion_8bit"}


def runnable(name: str, *, cuda: bool) -> str:
    """The optimizer of that name, or what stands for it on the CPU: the same without pages."""
    return name if cuda else UNPAGED.get(name, name)


def fallback_remark(name: str, *, cuda: bool) -> str | None:
    """Says that another optimizer runs than the configured one, and why."""
    if runnable(name, cuda=cuda) == name:
        return None
    return f"{name} pages CUDA's memory: on the CPU this run uses {runnable(name, cuda=cuda)}, the same unpaged"


@dataclass(frozen=True, slots=True)
class PagedStates:
    """How many of an optimizer's state tensors are paged, and how many bytes these and all have."""

    tensors: int
    of_tensors: int
    bytes: int
    of_bytes: int

    def __str__(self) -> str:
        megabytes = f"{self.bytes / 1e6:.1f} of {self.of_bytes / 1e6:.1f} MB"
        return f"{self.tensors} of {self.of_tensors} optimizer states, {megabytes}"


def paged_states(optimizer: Optimizer) -> PagedStates:
    """Counts them; before the first step there are none."""
    states = list(_states(optimizer))
    paged = [state for state in states if getattr(state, "is_paged", False)]
    sizes = [sum(state.nbytes for state in those) for those in (paged, states)]
    return PagedStates(len(paged), len(states), *sizes)


class PagingReport(TrainerCallback):
    """Says after the first step what of the optimizer is paged, if it should be."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said = False

    def on_step_end(self, args: Any, _state: Any, _control: Any, *, optimizer: Optimizer, **_: Any) -> None:
        """Called by the trainer."""
        if not self._said and args.optim.startswith(PAGED):
            self._say(f"paged: {paged_states(optimizer)}")
        self._said = True


def _states(optimizer: Optimizer) -> Iterator[Tensor]:
    """One for each moment of each tensor; without steps, and without what 8-bit states are decoded with."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name in ("state1", "state2", "exp_avg", "exp_avg_sq"):
                yield value
