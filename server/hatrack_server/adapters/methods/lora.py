"""LoRA (Hu et al. 2021, arXiv:2106.09685), rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) and DoRA (Liu et al. 2024,
arXiv:2402.09353), as PEFT 0.21 saves them.

Per module `y += scale * (B (A x) + b)`, with A (rank, in_features), B (out_features, rank), the bias b of `lora_bias`,
and scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA. DoRA then multiplies everything but the base's bias with
`magnitude / ‖W0 + scale * B A‖`, row by row, which is computed once, as the adapter is loaded. On the embedding,
`lora_embedding_A` (rank, vocabulary) is looked up by token id: y += scale * B A[:, id].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.peft_linear import (
    PREFIX,
    TARGET_KEYS,
    Adapted,
    RanksAndScales,
    flag,
    low_rank_size,
    modules_in,
    precise,
    refuse_trained_biases,
    refuse_unknown,
    spec_of,
    tensor_of,
)
from hatrack_server.adapters.peft_targets import ALL_LINEAR, config_field, matched_modules
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, ProgramSpec

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

PEFT_TYPE = "LORA"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
A, B, B_BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"

READ_KEYS = TARGET_KEYS | frozenset({
    "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights", "ensure_weight_tying", "trainable_token_indices",
})  # fmt: skip
# Training's own settings, and settings of features that must be off.
HARMLESS_KEYS = frozenset({
    "corda_config", "eva_config", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config",
})  # fmt: skip
# Initialisations that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from them.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


def describe(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    base: BaseShapes,
    *,
    max_rank: int,
) -> ProgramSpec:
    """See `methods.describe`."""
    refuse_unknown(config, READ_KEYS, HARMLESS_KEYS)
    refuse_changed_base(config)
    budget = Budget()
    settings = _ranks_and_scales(config, budget)
    biased, magnitudes = flag(config, "lora_bias"), flag(config, "use_dora")
    tie = base.tied and flag(config, "ensure_weight_tying")
    adapted = []
    for module in matched_modules(config, _candidates(config, base), budget):
        if tie and module in (base.embedding, base.head):
            message = "adapting the embedding and the output head as one is not supported"
            raise InvalidArtifact(config_field("ensure_weight_tying"), message)
        rank = settings.rank(module)
        settings.scale(module, rank)
        if module == base.embedding:
            adapted.append(_embedding(module, rank, base, magnitudes=magnitudes))
            continue
        linear = base.linears[module]
        shapes: dict[str, tuple[int, ...]] = {A: (rank, linear.in_features), B: (linear.out_features, rank)}
        shapes |= {B_BIAS: (linear.out_features,)} if biased else {}
        shapes |= {MAGNITUDE: (linear.out_features,)} if magnitudes else {}
        vectors = 2 if magnitudes else int(biased)  # in float32: scale and shift, or the shift alone
        resident = low_rank_size(rank, linear) + 2 * vectors * linear.out_features
        adapted.append(Adapted(module, shapes, rank, resident))
    return spec_of(PEFT_TYPE, adapted, headers, base, max_rank=max_rank)


def _candidates(config: Mapping[str, Any], base: BaseShapes) -> list[str]:
    wanted = config.get("target_modules")
    all_linear = isinstance(wanted, str) and wanted.lower() == ALL_LINEAR
    return [*base.linears, *([base.embedding] if base.embedding_rows and not all_linear else [])]


def _embedding(module: str, rank: int, base: BaseShapes, *, magnitudes: bool) -> Adapted:
    if magnitudes:
        raise InvalidArtifact(config_field("use_dora"), "DoRA of the embedding is not supported")
    shapes = {EMBEDDING_A: (rank, base.embedding_rows), EMBEDDING_B: (base.width, rank)}
    return Adapted(module, shapes, rank, rank * (base.embedding_rows + base.width))


def _ranks_and_scales(config: Mapping[str, Any], budget: Budget) -> RanksAndScales:
    return RanksAndScales(config, budget, alpha_key="lora_alpha", rank_stabilised=flag(config, "use_rslora"))


def refuse_changed_base(config: Mapping[str, Any]) -> None:
    """Raises InvalidArtifact when the adapter belongs to a base whose weights or biases its training changed."""
    refuse_trained_biases(config)
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool) and not (isinstance(init, str) and init.lower() in PLAIN_INITS):
        message = f"{init!r} changes the base's weights; save with path_initial_model_for_weight_conversion"
        raise InvalidArtifact(config_field("init_lora_weights"), message)


def compile(config: dict[str, Any], tensors: Mapping[str, Tensor], base: BaseLayers) -> Iterator[tuple[str, Piece]]:
    """See `methods.compile`."""
    from hatrack_server.adapters.pieces import EmbeddingLowRank, LowRank, OutputScale, OutputShift

    settings = _ranks_and_scales(config, Budget())
    biased, magnitudes = flag(config, "lora_bias"), flag(config, "use_dora")
    for module, a in modules_in(tensors, EMBEDDING_A):
        scale = settings.scale(module, a.shape[0]) * base.shapes.embedding_scale
        yield module, EmbeddingLowRank(a.mT, scale * tensor_of(tensors, module, EMBEDDING_B).mT)
    for module, a in modules_in(tensors, A):
        scale = settings.scale(module, a.shape[0])
        b = tensors[f"{PREFIX}{module}.{B}"].mT
        yield module, LowRank(a, b, scale)
        shift = scale * tensor_of(tensors, module, B_BIAS) if biased else None
        if magnitudes:
            factor = tensor_of(tensors, module, MAGNITUDE) / _row_norms(base, module, precise(a), scale * precise(b))
            yield module, OutputScale(factor)
            shift = _without_scaled_bias(factor, base.bias(module), shift)
        if shift is not None:
            yield module, OutputShift(shift)


def _row_norms(base: BaseLayers, module: str, a: Tensor, b: Tensor) -> Tensor:
    """‖W0 + bᵀ a‖ of each row of the weight, [out], without making that matrix."""
    squared = base.squared_norms(module)
    squared = squared + 2 * (base.project(module, a) * b).sum(0) + (b * ((a @ a.mT) @ b)).sum(0)
    return squared.clamp(min=0).sqrt()


def _without_scaled_bias(factor: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """What is added after y, the base's bias and the adapter's included, was multiplied with `factor`."""
    scaled = None if shift is None else factor * shift
    if bias is None:
        return scaled
    kept = (1 - factor) * bias
    return kept if scaled is None else kept + scaled
