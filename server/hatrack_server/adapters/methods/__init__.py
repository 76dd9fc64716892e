"""The PEFT methods that Hatrack serves: each is one module of this package, found by the `PEFT_TYPE` it states.

`describe` needs no torch, so the upload gate may call it; what a method needs torch for, it imports where it needs it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from hatrack.manifest import CONFIG_FILE
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece, Pieces


class Method(Protocol):
    """What a module of this package offers: one half to the upload gate, the other to the engine's worker."""

    PEFT_TYPE: str

    def describe(
        self,
        config: dict[str, Any],
        headers: Mapping[str, TensorHeader],
        base: BaseShapes,
        *,
        max_rank: int,
    ) -> ProgramSpec:
        """See the function of this name below."""

    def compile(
        self, config: dict[str, Any], tensors: Mapping[str, Tensor], base: BaseLayers
    ) -> Iterable[tuple[str, Piece]]:
        """See the function of this name below."""


@functools.cache
def methods() -> dict[str, Method]:
    """Every method by its PEFT type."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.PEFT_TYPE: cast("Method", module) for module in modules}


def method_of(config: Mapping[str, Any]) -> Method:
    """The method that `config` (adapter_config.json) names; raises InvalidArtifact when it isn't one of ours."""
    peft_type = config.get("peft_type")
    method = methods().get(peft_type) if isinstance(peft_type, str) else None
    if method is None:
        supported = ", ".join(sorted(methods()))
        raise InvalidArtifact(f"{CONFIG_FILE}: peft_type", f"{peft_type!r} is not supported; supported: {supported}")
    return method


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """What the artifact holds, by its method's rules; reads no tensor.

    Raises InvalidArtifact naming the configuration's key or the tensor when the method isn't served, needs something
    this server lacks, exceeds `max_rank`, or when the file's tensors aren't exactly those that `config` asks for on
    this base.
    """
    return method_of(config).describe(config, headers, base, max_rank=max_rank)


def compile(config: dict[str, Any], tensors: Mapping[str, Tensor], base: BaseLayers) -> Pieces:
    """The pieces of an artifact that `describe` let pass, from its tensors in whatever precision they have.

    At most one of a kind at each layer.
    """
    return tuple(method_of(config).compile(config, tensors, base))
