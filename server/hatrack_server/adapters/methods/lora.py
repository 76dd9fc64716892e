"""LoRA (Hu et al. 2021, arXiv:2106.09685) and rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), as PEFT 0.21 saves them.

Per module `y += scale * B (A x)`, with A (rank, in_features), B (out_features, rank) and scale = alpha / rank, or
alpha / sqrt(rank) for rsLoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hatrack.manifest import WEIGHTS_FILE
from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_targets import ModulePatterns, config_field, matched_modules
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import LinearShape, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.pieces import Pieces

PEFT_TYPE = "LORA"
PREFIX = "base_model.model."
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
DEFAULT_RANK = 8
DEFAULT_ALPHA = 8
FLOAT32_MAX = 3.4028234663852886e38

# What this module reads.
READ_KEYS = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
})  # fmt: skip
# What can't change the adapter's output whatever its value: records, training's own settings, and settings of features
# that must be off. fan_in_fan_out only says how a base's weight is stored; A and B keep their shapes.
HARMLESS_KEYS = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
})  # fmt: skip
# Every other key, known or of a newer PEFT, must be off.
OFF_VALUES: tuple[object, ...] = (None, False, [])
# Initialisations that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from them.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """One adapted module."""

    module: str  # its full name in the base
    rank: int
    scale: float

    @property
    def a_key(self) -> str:
        """The key of A, (rank, in_features)."""
        return f"{PREFIX}{self.module}{A_SUFFIX}"

    @property
    def b_key(self) -> str:
        """The key of B, (out_features, rank)."""
        return f"{PREFIX}{self.module}{B_SUFFIX}"


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base_linears: Mapping[str, LinearShape],
    *,
    max_rank: int,
) -> ProgramSpec:
    """What the artifact holds; see `targets` for the errors, to which a rank above `max_rank` is added."""
    adapted = targets(config, headers, base_linears)
    highest = max(adapted, key=lambda target: target.rank)
    if highest.rank > max_rank:
        raise InvalidArtifact(
            config_field("r"), f"{highest.module} has rank {highest.rank}; at most {max_rank} is served"
        )
    return ProgramSpec(
        method=PEFT_TYPE,
        rank=highest.rank,
        parameters=sum(header.elements for header in headers.values()),
        resident_bytes=sum(header.nbytes for header in headers.values()),
        tensors={key: header.shape for key, header in headers.items()},
    )


def targets(
    config: dict[str, Any], headers: Mapping[str, TensorHeader], base_linears: Mapping[str, LinearShape]
) -> list[LoraTarget]:
    """The adapted modules with their ranks and scales, in the order of `base_linears`.

    Raises InvalidArtifact naming the key of `config` that is malformed or asks for what isn't served, or the tensor
    that is missing, unexpected or of another shape. At least one module is adapted.
    """
    _check_served(config)
    budget = Budget()
    modules = matched_modules(config, base_linears, budget)
    ranks = ModulePatterns(config, "rank_pattern", budget)
    alphas = ModulePatterns(config, "alpha_pattern", budget)
    default = config.get("r", DEFAULT_RANK)
    adapted = [_target(config, module, ranks.value(module, default), alphas) for module in modules]
    _check_tensors(adapted, headers, base_linears)
    return adapted


def _check_served(config: Mapping[str, Any]) -> None:
    for key in config.keys() - READ_KEYS - HARMLESS_KEYS:
        if config[key] not in OFF_VALUES:
            raise InvalidArtifact(config_field(key), f"{key} is not supported")
    if config.get("bias", "none") != "none":
        raise InvalidArtifact(config_field("bias"), 'trained biases are not supported; only "none" is')
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool) and not (isinstance(init, str) and init.lower() in PLAIN_INITS):
        message = f"{init!r} changes the base's weights; save with path_initial_model_for_weight_conversion"
        raise InvalidArtifact(config_field("init_lora_weights"), message)


def _target(config: Mapping[str, Any], module: str, rank: Any, alphas: ModulePatterns) -> LoraTarget:
    if type(rank) is not int or rank < 1:
        raise InvalidArtifact(config_field("r"), f"the rank of {module} must be a positive integer")
    alpha = alphas.value(module, config.get("lora_alpha", DEFAULT_ALPHA))
    if type(alpha) not in (int, float):
        raise InvalidArtifact(config_field("lora_alpha"), f"the alpha of {module} must be a number")
    rslora = config.get("use_rslora", False)
    if not isinstance(rslora, bool):
        raise InvalidArtifact(config_field("use_rslora"), "must be true or false")
    try:
        scale = alpha / (math.sqrt(rank) if rslora else rank)
    except OverflowError:
        scale = math.inf
    if not abs(scale) <= FLOAT32_MAX:
        raise InvalidArtifact(config_field("lora_alpha"), f"the scale of {module} is not a finite float32")
    return LoraTarget(module, rank, scale)


def _check_tensors(
    adapted: Iterable[LoraTarget], headers: Mapping[str, TensorHeader], base_linears: Mapping[str, LinearShape]
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for target in adapted:
        linear = base_linears[target.module]
        expected[target.a_key] = (target.rank, linear.in_features)
        expected[target.b_key] = (linear.out_features, target.rank)
    for key in headers:
        if key not in expected:
            raise InvalidArtifact(f"{WEIGHTS_FILE}: {key}", _why_unexpected(key, base_linears))
    if not expected:
        raise InvalidArtifact(config_field("target_modules"), "selects no module that can be adapted on this base")
    for key, shape in expected.items():
        if key not in headers:
            raise InvalidArtifact(f"{WEIGHTS_FILE}: {key}", "missing, though the configuration asks for it")
        if headers[key].shape != shape:
            raise InvalidArtifact(
                f"{WEIGHTS_FILE}: {key}", f"its shape is {headers[key].shape}; this base needs {shape}"
            )


def _why_unexpected(key: str, base_linears: Mapping[str, LinearShape]) -> str:
    module, lora, _ = key.removeprefix(PREFIX).partition(".lora_")
    if not lora:  # PEFT adds the embeddings by default when the head is adapted
        return "a copy of the base's weights is not supported: save the adapter with save_embedding_layers=False"
    if key.startswith(PREFIX) and module not in base_linears:
        return f"module {module} can't be adapted on this base"
    return "unexpected: the configuration asks for no such tensor"


def compile(  # noqa: A001 - it is what this does
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    base_linears: Mapping[str, LinearShape],  # noqa: ARG001 - described and checked before
) -> Pieces:
    """One low-rank piece per adapted module, the scale folded into B.

    Which modules those are the tensors' names tell, so that a tenant's patterns are not matched again at each load.
    """
    from hatrack_server.adapters.pieces import LowRank

    alphas = ModulePatterns(config, "alpha_pattern", Budget())
    pieces: dict[str, LowRank] = {}
    for key, a in tensors.items():
        if key.endswith(A_SUFFIX):
            target = _target(config, key.removeprefix(PREFIX).removesuffix(A_SUFFIX), a.shape[0], alphas)
            pieces[target.module] = LowRank(a, target.scale * tensors[target.b_key].float().mT)
    return pieces
