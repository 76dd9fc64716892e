"""Counting the memory that a computation takes, on any device: what lives at once of what its operators make."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Inside it every tensor that is made is counted; `bytes` is the most that lived at once, without the `existing`.

    What a kernel takes and gives back itself is not seen.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._living = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in existing:
            self._see(tensor)
        self._living = self.bytes = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operator."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        self.bytes = max(self.bytes, self._living)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self._living += size

    def _forget(self, key: int, size: int) -> None:
        del self._seen[key]
        self._living -= size
