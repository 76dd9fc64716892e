"""Copies between the host and a device that nobody waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(values: Tensor | list[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The values on a device, there before whatever is launched next on the current stream.

    By way of pinned memory: of other memory CUDA copies much only once the device has done all that it was given.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """The tensor in the host's memory, there once a later event of the current stream has come."""
    return tensor.to("cpu", non_blocking=True)  # from a GPU, into pinned memory
