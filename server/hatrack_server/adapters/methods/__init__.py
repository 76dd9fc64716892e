"""The PEFT methods that Hatrack serves: each is one module of this package, found by the `PEFT_TYPE` it states.

`describe` needs no torch, so the upload gate may call it; what a method needs torch for, it imports where it needs it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from hatrack.manifest import CONFIG_FILE
from hatrack_server.adapters.peft_linear import check_shapes
from hatrack_server.adapters.replacements import replacements
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


_FULL_RANK = "it changes weights by matrices of full rank, which would have to be kept for every adapter"
_MIXES = "what it gives one request depends on others, or on other adapters"
# Why methods that PEFT knows can't share a batch, for whoever pushes one.
REFUSED = {
    "BOFT": "it rotates what a layer gets, in full",
    "OFT": "it rotates what a layer gets, in full",
    "ROAD": "it rotates what a layer gives",
    **dict.fromkeys(("C3A", "FOURIERFT", "HIRA", "RANDLORA", "SHIRA", "WAVEFT"), _FULL_RANK),
    "PARTIAL": "it changes weights of the base, which all requests share: make a base of it, by hatrack adapters merge",
    **dict.fromkeys(("LILY", "POLY", "SHADOW", "XLORA"), _MIXES),
}


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
        reason = REFUSED.get(str(peft_type), "supported are " + ", ".join(sorted(methods())))
        raise InvalidArtifact(f"{CONFIG_FILE}: peft_type", f"{peft_type!r} is not supported: {reason}")
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
    method = method_of(config)
    replaced = replacements(config, headers, base)
    shapes = {key: shape for one in replaced for key, shape in one.shapes.items()}
    own = {key: header for key, header in headers.items() if key not in shapes}
    spec = method.describe(config, own, base, max_rank=max_rank)
    check_shapes(shapes, headers)
    return replace(
        spec,
        parameters=spec.parameters + sum(one.parameters for one in replaced),
        resident_bytes=spec.resident_bytes + sum(one.resident for one in replaced),
        tensors=spec.tensors | shapes,
    )


def compile(config: dict[str, Any], tensors: Mapping[str, Tensor], base: BaseLayers) -> Pieces:
    """The pieces of an artifact that `describe` let pass, from its tensors in whatever precision they have.

    At most one of a kind at each layer. Raises InvalidArtifact where only the numbers show what is wrong.
    """
    replaced = replacements(config, tensors, base.shapes)
    others = {key for one in replaced for key in one.shapes}
    own = {key: tensor for key, tensor in tensors.items() if key not in others}
    pieces = tuple(method_of(config).compile(config, own, base))
    return pieces + tuple(piece for one in replaced for piece in one.compile(tensors, base))
