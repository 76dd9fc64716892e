"""What the methods on linear layers share: strict reading of PEFT's configuration, and tensors that are exactly those
that it asks for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hatrack.manifest import WEIGHTS_FILE
from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_targets import ModulePatterns, config_field
from hatrack_server.adapters.rank_class import rank_class
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, LinearShape, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
DEFAULT_RANK = 8  # of the methods that RanksAndScales reads
DEFAULT_ALPHA = 8
FLOAT32_MAX = 3.4028234663852886e38

# What any method's configuration may hold without a change of its output: records, and what concerns training alone.
# fan_in_fan_out only says how a base's weight is stored; the adapter's tensors keep their shapes.
HARMLESS_KEYS = frozenset({
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_type", "peft_version",
    "revision", "task_type",
})  # fmt: skip
# Which modules are adapted, in every method's configuration.
TARGET_KEYS = frozenset({
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Adapted:
    """One adapted module: the tensors that its configuration asks for, and what it takes when it is served."""

    module: str  # its full name in the base
    shapes: Mapping[str, tuple[int, ...]]  # by what follows the module in a tensor's name
    rank: int  # of the low-rank piece that serves it
    resident: int  # 16-bit numbers in memory


def low_rank_size(rank: int, linear: LinearShape) -> int:
    """Numbers in memory of a low-rank piece."""
    return rank_class(rank) * (linear.in_features + linear.out_features) if rank else 0


def refuse_unknown(config: Mapping[str, Any], read: Iterable[str], harmless: Iterable[str] = ()) -> None:
    """Raises InvalidArtifact naming the first key that is on and neither `read` nor `harmless` to the output."""
    for key in config.keys() - HARMLESS_KEYS - set(read) - set(harmless):
        if is_on(config[key]):
            raise InvalidArtifact(config_field(key), f"{key} is not supported")


def is_on(value: Any) -> bool:
    """Whether a key that no method here knows asks for something; 0 may, e.g. for one that begins at layer 0."""
    return not (value is None or value is False or value == [])


def flag(config: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """A boolean; raises InvalidArtifact."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise InvalidArtifact(config_field(key), "must be true or false")
    return value


def count_of(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer; raises InvalidArtifact, also when it is absent and has no default."""
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise InvalidArtifact(config_field(key), "must be a positive integer")
    return value


def seed_of(config: Mapping[str, Any], key: str, default: int) -> int:
    """A seed to which a module's number can be added; raises InvalidArtifact."""
    seed = config.get(key, default)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise InvalidArtifact(config_field(key), "must be an integer of 63 bits")
    return seed


class RanksAndScales:
    """Rank and scale of each module, as `r`, `alpha_key`, rank_pattern and alpha_pattern set them."""

    def __init__(
        self, config: Mapping[str, Any], budget: Budget, *, alpha_key: str, rank_stabilised: bool = False
    ) -> None:
        self._ranks = ModulePatterns(config, "rank_pattern", budget)
        self._alphas = ModulePatterns(config, "alpha_pattern", budget)
        self._rank = config.get("r", DEFAULT_RANK)
        self._alpha = config.get(alpha_key, DEFAULT_ALPHA)
        self._alpha_key = alpha_key
        self._rank_stabilised = rank_stabilised

    def rank(self, module: str) -> int:
        """Raises InvalidArtifact when it is no positive integer."""
        return rank_of(module, self._ranks.value(module, self._rank))

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / √rank; raises InvalidArtifact when that is no finite float32."""
        alpha = self._alphas.value(module, self._alpha)
        return scale_of(module, alpha, math.sqrt(rank) if self._rank_stabilised else rank, self._alpha_key)


def refuse_trained_biases(config: Mapping[str, Any]) -> None:
    """Raises InvalidArtifact when the base's own biases were trained, too."""
    if config.get("bias", "none") != "none":
        raise InvalidArtifact(config_field("bias"), 'trained biases are not supported; only "none" is')


def rank_of(module: str, rank: Any, key: str = "r") -> int:
    """A module's rank, checked; `key` is where it stands in the configuration."""
    if type(rank) is not int or rank < 1:
        raise InvalidArtifact(config_field(key), f"the rank of {module} must be a positive integer")
    return rank


def scale_of(module: str, alpha: Any, divisor: float, key: str) -> float:
    """alpha / divisor, checked; `key` is where alpha stands in the configuration."""
    if type(alpha) not in (int, float):
        raise InvalidArtifact(config_field(key), f"the alpha of {module} must be a number")
    try:
        scale = float(alpha / divisor)
    except OverflowError:
        scale = float("inf")
    if not abs(scale) <= FLOAT32_MAX:
        raise InvalidArtifact(config_field(key), f"the scale of {module} is not a finite float32")
    return scale


def spec_of(
    method: str,
    adapted: list[Adapted],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
    shared: Mapping[str, tuple[int, ...]] | None = None,
) -> ProgramSpec:
    """The spec of a method's adapted modules, whose tensors, with the `shared` ones, must be all that the file holds.

    Raises InvalidArtifact naming what is missing, unexpected or of another shape, or the rank above `max_rank`.
    """
    expected = {f"{PREFIX}{one.module}.{name}": shape for one in adapted for name, shape in one.shapes.items()}
    check_tensors(expected | dict(shared or {}), headers, base)
    highest = max(adapted, key=lambda one: one.rank)
    if highest.rank > max_rank:
        message = f"{highest.module} has rank {highest.rank} when it is served; at most {max_rank} is"
        raise InvalidArtifact(config_field("r"), message)
    return ProgramSpec(
        method=method,
        rank=highest.rank,
        parameters=sum(header.elements for header in headers.values()),
        resident_bytes=2 * sum(one.resident for one in adapted),
        tensors={key: header.shape for key, header in headers.items()},
    )


def modules_in(tensors: Mapping[str, Tensor], name: str) -> Iterator[tuple[str, Tensor]]:
    """(module, its tensor called `name`), for every module that has one.

    Tensors tell which modules are adapted, so that a tenant's patterns need not be matched again at each load.
    """
    for key, tensor in tensors.items():
        if key.startswith(PREFIX) and key.endswith(f".{name}"):
            yield key.removeprefix(PREFIX).removesuffix(f".{name}"), tensor


def tensor_of(tensors: Mapping[str, Tensor], module: str, name: str) -> Tensor:
    """A module's tensor, in float32 or better."""
    return precise(tensors[f"{PREFIX}{module}.{name}"])


def precise(tensor: Tensor) -> Tensor:
    """A tensor of a file in float32 or better."""
    return tensor if tensor.itemsize > 4 else tensor.float()


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], headers: Mapping[str, TensorHeader], base: BaseShapes
) -> None:
    """Raises InvalidArtifact naming a tensor that is missing, unexpected or of another shape."""
    for key in headers:
        if key not in expected:
            raise InvalidArtifact(f"{WEIGHTS_FILE}: {key}", _why_unexpected(key, base.linears))
    if not expected:
        raise InvalidArtifact(config_field("target_modules"), "selects no module that can be adapted on this base")
    check_shapes(expected, headers)


def check_shapes(expected: Mapping[str, tuple[int, ...]], headers: Mapping[str, TensorHeader]) -> None:
    """Raises InvalidArtifact naming a tensor that is missing or of another shape."""
    for key, shape in expected.items():
        if key not in headers:
            raise InvalidArtifact(f"{WEIGHTS_FILE}: {key}", "missing, though the configuration asks for it")
        if headers[key].shape != shape:
            raise InvalidArtifact(
                f"{WEIGHTS_FILE}: {key}", f"its shape is {headers[key].shape}; this base needs {shape}"
            )


def _why_unexpected(key: str, linears: Collection[str]) -> str:
    name = key.removeprefix(PREFIX)
    module = next((name[:end] for end in _dots(name) if name[:end] in linears), None)
    if module is None:
        return f"{name} belongs to no module that can be adapted on this base"
    return "unexpected: the configuration asks for no such tensor"


def _dots(name: str) -> Iterator[int]:
    end = len(name)
    while (end := name.rfind(".", 0, end)) > 0:
        yield end
