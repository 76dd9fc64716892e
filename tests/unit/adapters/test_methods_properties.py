"""Artifacts that a careless or hostile user may send: accepted and right, or refused with a reason; never a crash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hatrack_server.adapters import methods
from hatrack_server.adapters.methods.lokr import factorized
from hatrack_server.adapters.peft_linear import PREFIX
from hatrack_server.adapters.pieces import (
    GeluBottleneck,
    InputScale,
    KeyValuePrefix,
    Kronecker,
    LowRank,
    OutputLowRank,
    OutputScale,
    OutputShift,
    Piece,
    ReplacedEmbedding,
    ReplacedHead,
    ReplacedNorm,
    ReplacedScores,
    ReplacedTokens,
    SoftPrompt,
)
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import AttentionShape, BaseShapes, LinearShape, ProgramSpec

Headers = dict[str, TensorHeader]

WIDTH, VOCABULARY = 8, 11
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
LINEARS = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": LinearShape(12, WIDTH),
        "self_attn.k_proj": LinearShape(4, WIDTH),
        "self_attn.v_proj": LinearShape(4, WIDTH),
        "self_attn.o_proj": LinearShape(WIDTH, 12),
        "mlp.up_proj": LinearShape(16, WIDTH),
    }.items()
} | {HEAD: LinearShape(VOCABULARY, WIDTH)}
ATTENTION = tuple(AttentionShape(f"model.layers.{layer}.self_attn", 2, 2, 2) for layer in (0, 1))
REPLACEABLE = {
    EMBEDDING: {"weight": (VOCABULARY, WIDTH)},
    HEAD: {"weight": (VOCABULARY, WIDTH)},
    "model.layers.0.input_layernorm": {"weight": (WIDTH,), "bias": (WIDTH,)},
    "model.norm": {"weight": (WIDTH,), "bias": (WIDTH,)},
}
BASE = BaseShapes(
    LINEARS, EMBEDDING, WIDTH, ATTENTION, embedding_rows=VOCABULARY, replaceable=REPLACEABLE, head=HEAD, tied=True
)
SETTINGS = settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Layers:
    """A base whose weights are zero."""

    shapes = BASE

    def project(self, layer: str, rows: Tensor) -> Tensor:
        return torch.zeros(len(rows), LINEARS[layer].out_features)

    def squared_norms(self, layer: str) -> Tensor:
        return torch.ones(LINEARS[layer].out_features)

    def end(self, module: str, parameter: str) -> Tensor:
        return torch.zeros(BASE.replaceable[module][parameter])

    def norm_offset(self, norm: str) -> float:
        return float(norm == "model.norm")

    def bias(self, layer: str) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Kind:
    """What a method saves of rank r; the artifacts below begin from this and go wrong from there."""

    of_module: Callable[[LinearShape, int], dict[str, tuple[int, ...]]] = lambda _, __: {}
    of_file: Callable[[list[LinearShape], int], dict[str, tuple[int, ...]]] = lambda _, __: {}  # given all modules
    settings: Callable[[int], dict[str, Any]] = lambda r: {"r": r}
    patterns: bool = False  # whether rank_pattern counts
    targets: bool = True  # whether target_modules does


def low_rank(a: str, b: str) -> Callable[[LinearShape, int], dict[str, tuple[int, ...]]]:
    return lambda shape, r: {a: (r, shape.in_features), b: (shape.out_features, r)}


def loha(shape: LinearShape, r: int) -> dict[str, tuple[int, ...]]:
    return low_rank("hada_w1_b", "hada_w1_a")(shape, r) | low_rank("hada_w2_b", "hada_w2_a")(shape, r)


def lokr(shape: LinearShape, _: int) -> dict[str, tuple[int, ...]]:
    """Both factors whole, as a rank of 64 makes them."""
    (rows1, rows2), (columns1, columns2) = factorized(shape.out_features, -1), factorized(shape.in_features, -1)
    return {"lokr_w1": (rows1, columns1), "lokr_w2": (rows2, columns2)}


def bottleneck(shape: LinearShape, r: int) -> dict[str, tuple[int, ...]]:
    down, up = (
        {"weight": (r, shape.out_features), "bias": (r,)},
        {"weight": (shape.out_features, r), "bias": (shape.out_features,)},
    )
    return {f"bottleneck_{half}.{name}": s for half, own in (("down", down), ("up", up)) for name, s in own.items()}


def norms(_: object, __: int) -> dict[str, tuple[int, ...]]:
    kept = {name: own for name, own in REPLACEABLE.items() if "norm" in name}
    return {f"{PREFIX}{m}.ln_tuning_layers.{name}": shape for m, own in kept.items() for name, shape in own.items()}


KINDS: dict[str, Kind] = {
    "LORA": Kind(low_rank("lora_A.weight", "lora_B.weight"), patterns=True),
    "ADALORA": Kind(
        lambda shape, r: low_rank("lora_A", "lora_B")(shape, r) | {"lora_E": (r, 1)},
        settings=lambda r: {"r": r, "init_r": 6},
    ),
    "LOHA": Kind(loha, patterns=True),
    "LOKR": Kind(lokr, settings=lambda _: {"r": 64}),
    "IA3": Kind(lambda shape, _: {"ia3_l": (shape.out_features, 1)}, settings=lambda _: {"feedforward_modules": []}),
    "MISS": Kind(lambda shape, r: {"miss_block": (r, shape.out_features)}),
    "VERA": Kind(
        lambda shape, r: {"vera_lambda_b": (shape.out_features,), "vera_lambda_d": (r,)},
        lambda shapes, r: {
            "base_model.vera_A": (r, max(shape.in_features for shape in shapes)),
            "base_model.vera_B": (max(shape.out_features for shape in shapes), r),
        },
    ),
    "DELORA": Kind(
        lambda shape, r: (
            low_rank("delora_A", "delora_B")(shape, r) | {"delora_lambda": (1,), "delora_w_norm": (shape.in_features,)}
        ),
        patterns=True,
    ),
    "GRALORA": Kind(
        lambda shape, r: {"gralora_A": (1, shape.in_features, r), "gralora_B": (1, r, shape.out_features)},
        settings=lambda r: {"r": r, "gralora_k": 1},
    ),
    "HRA": Kind(lambda shape, r: {"hra_u": (shape.in_features, r)}),
    "DEFT": Kind(
        lambda shape, r: {
            "deft_P": (shape.out_features, min(r, shape.out_features)),
            "deft_R": (min(r, shape.out_features), shape.in_features),
        }
    ),
    "VBLORA": Kind(
        lambda shape, r: {
            "vblora_logits_A": (r, shape.in_features // 4, 5),
            "vblora_logits_B": (shape.out_features // 4, r, 5),
        },
        lambda _, __: {"base_model.vblora_vector_bank": (5, 4)},
        settings=lambda r: {"r": r, "num_vectors": 5, "vector_length": 4},
    ),
    "UNILORA": Kind(
        of_file=lambda _, __: {"base_model.unilora_theta_d": (7,)}, settings=lambda r: {"r": r, "theta_d_length": 7}
    ),
    "BOTTLENECK": Kind(bottleneck, settings=lambda r: {"r": r, "activation": "gelu"}),
    "LN_TUNING": Kind(of_file=norms, settings=lambda _: {"target_modules": ["input_layernorm", "norm"]}, targets=False),
    "TRAINABLE_TOKENS": Kind(
        of_file=lambda _, r: {f"{PREFIX}{end}.trainable_tokens_delta": (r, WIDTH) for end in (EMBEDDING, HEAD)},
        settings=lambda r: {"target_modules": ["embed_tokens"], "token_indices": [*range(r)]},
        targets=False,
    ),
    "PROMPT_TUNING": Kind(
        of_file=lambda _, r: {"prompt_embeddings": (r, WIDTH)},
        settings=lambda r: {"num_virtual_tokens": r},
        targets=False,
    ),
    "PREFIX_TUNING": Kind(
        of_file=lambda _, r: {"prompt_embeddings": (r, 2 * 2 * 4)},
        settings=lambda r: {"num_virtual_tokens": r},
        targets=False,
    ),
}
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
ODD = st.sampled_from(
    [
        None,
        -1,
        0,
        1,
        3,
        1.5,
        True,
        "",
        "x",
        "all",
        [],
        ["q_proj"],
        {},
        {"q_proj": 2},
        10**30,
        "(a+)+$",
        [1, 2],
        ["norm"],
    ]
)
KEYS = [
    "r", "lora_alpha", "alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "lora_bias", "bias", "layers_to_transform", "layers_pattern", "init_r", "feedforward_modules",
    "modules_to_save", "init_lora_weights", "decompose_factor", "decompose_both", "save_projection",
    "num_virtual_tokens", "peft_type", "fan_in_fan_out", "unheard_of", "trainable_token_indices", "token_indices",
    "ensure_weight_tying", "activation", "gralora_k", "hybrid_r", "apply_GS", "decomposition_method", "para", "topk",
    "vector_length", "num_vectors", "theta_d_length", "proj_seed", "num_transformer_submodules",
]  # fmt: skip
WHOLE = [f"{PREFIX}{module}.{name}" for module, own in REPLACEABLE.items() for name in own]
DELTA = f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta"


def plain(kind: str, rank: int, targets: list[str], ranks: dict[str, int]) -> tuple[dict[str, Any], Headers]:
    """An artifact with nothing wrong."""
    method = KINDS[kind]
    config: dict[str, Any] = {"peft_type": kind, **method.settings(rank)}
    if not method.targets:
        return config, {key: TensorHeader("F32", shape) for key, shape in method.of_file([], rank).items()}
    config["target_modules"] = targets
    if method.patterns and ranks:
        config["rank_pattern"] = ranks
    adapted = [module for module in LINEARS if module.rpartition(".")[2] in targets]
    shapes = method.of_file([LINEARS[module] for module in adapted], rank)
    for module in adapted:
        r = config.get("rank_pattern", {}).get(module.rpartition(".")[2], rank)
        shapes |= {f"{PREFIX}{module}.{name}": s for name, s in method.of_module(LINEARS[module], r).items()}
    return config, {key: TensorHeader("F32", shape) for key, shape in shapes.items()}


@st.composite
def artifacts(draw: st.DrawFn) -> tuple[dict[str, Any], Headers]:
    """A configuration and its tensors, right or with a few things wrong."""
    config, headers = plain(
        draw(st.sampled_from(sorted(KINDS))),
        draw(st.integers(1, 5)),
        draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True)),
        draw(st.dictionaries(st.sampled_from(NAMES), st.integers(1, 5), max_size=2)),
    )
    for _ in range(draw(st.integers(0, 2))):
        match draw(st.sampled_from(["config", "drop", "add", "shape", "whole", "tokens"])):
            case "config":
                config[draw(st.sampled_from(KEYS))] = draw(ODD)
            case "drop" if headers:
                del headers[draw(st.sampled_from(sorted(headers)))]
            case "add":
                key = draw(st.sampled_from(["x", "..", "prompt_embeddings", *WHOLE]))
                headers[key] = TensorHeader("F32", draw(st.sampled_from([(2, 2), (VOCABULARY, WIDTH), (WIDTH,)])))
            case "shape" if headers:
                key = draw(st.sampled_from(sorted(headers)))
                headers[key] = TensorHeader("F32", tuple(draw(st.lists(st.integers(0, 13), max_size=3))))
            case "whole":
                module = draw(st.sampled_from(sorted(REPLACEABLE)))
                config["modules_to_save"] = [module]
                headers |= {f"{PREFIX}{module}.{n}": TensorHeader("F32", s) for n, s in REPLACEABLE[module].items()}
            case "tokens":
                config["trainable_token_indices"] = draw(st.lists(st.integers(-1, VOCABULARY), min_size=1, max_size=3))
                headers[DELTA] = TensorHeader("F32", (len(config["trainable_token_indices"]), WIDTH))
    return config, headers


def described(config: dict[str, Any], headers: Headers) -> ProgramSpec | InvalidArtifact:
    try:
        return methods.describe(config, headers, BASE, max_rank=64)
    except InvalidArtifact as refused:
        return refused


def keys_of_whole(config: dict[str, Any]) -> set[str]:
    """Keys of the modules that the configuration says were trained whole."""
    return {key for name in config.get("modules_to_save") or [] for key in WHOLE if f"{name}." in key}


def fits(module: str, piece: Piece) -> bool:
    match piece:
        case OutputLowRank(a, b, _):
            return a.shape == b.shape == (a.shape[0], LINEARS[module].out_features)
        case LowRank(a, b, _):
            shape = LINEARS[module]
            return (a.shape[1], b.shape[1], a.shape[0]) == (shape.in_features, shape.out_features, b.shape[0])
        case Kronecker(w1, w2):
            inside, outside = w1.shape[1] * w2.shape[1], w1.shape[0] * w2.shape[0]
            return LinearShape(outside, inside) == LINEARS[module]
        case InputScale(vector):
            return len(vector) == LINEARS[module].in_features
        case OutputScale(vector) | OutputShift(vector):
            return len(vector) == LINEARS[module].out_features
        case GeluBottleneck():
            r, out = len(piece.down), LINEARS[module].out_features
            return [tuple(tensor.shape) for tensor in piece.tensors] == [(r, out), (r,), (r, out), (out,)]
        case ReplacedEmbedding() | ReplacedHead() | ReplacedNorm():
            return [tuple(tensor.shape) for tensor in piece.tensors] == [*REPLACEABLE[module].values()]
        case ReplacedTokens(tokens, rows) | ReplacedScores(tokens, rows):
            in_range = bool(((tokens >= 0) & (tokens < VOCABULARY)).all())
            return in_range and rows.shape == (len(tokens), WIDTH) and module in (EMBEDDING, HEAD)
        case SoftPrompt(rows):
            return module == EMBEDDING and rows.shape[1] == WIDTH
        case KeyValuePrefix(keys, values):
            return module in {layer.name for layer in ATTENTION} and keys.shape[1:] == values.shape[1:] == (2, 2)
    return False


@SETTINGS
@given(artifacts())
def test_an_artifact_is_right_or_refused_with_a_reason(artifact: tuple[dict[str, Any], Headers]) -> None:
    config, headers = artifact
    spec = described(config, headers)
    if isinstance(spec, InvalidArtifact):
        assert spec.field.startswith(("adapter_config.json: ", "adapter_model.safetensors: "))
        assert spec.message
        return
    assert spec.tensors == {key: header.shape for key, header in headers.items()}
    assert spec.rank <= 64
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(header.shape, generator=generator) for key, header in headers.items()}
    if any(key in tensors and key not in keys_of_whole(config) for key in WHOLE):  # random numbers are no copy
        with pytest.raises(InvalidArtifact, match="no copy of this base's own"):
            methods.compile(config, tensors, Layers())
        return
    pieces = methods.compile(config, tensors, Layers())
    kinds = [(module, type(piece)) for module, piece in pieces]
    assert len(set(kinds)) == len(kinds)
    for module, piece in pieces:
        assert fits(module, piece), (module, piece)
        assert all(tensor.isfinite().all() for tensor in piece.tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("addition", ["nothing", "a module", "tokens"])
def test_plain_artifacts_of_every_kind_are_accepted(kind: str, addition: str) -> None:
    """The property above would also hold if everything were refused."""
    config, headers = plain(kind, 3, ["q_proj", "up_proj"], {})
    if addition == "a module":
        if not KINDS[kind].targets:
            return
        config["modules_to_save"] = ["model.norm"]
        headers |= {f"{PREFIX}model.norm.{name}": TensorHeader("F32", (WIDTH,)) for name in ("weight", "bias")}
    if addition == "tokens":
        if kind not in ("LORA", "ADALORA"):
            return
        config["trainable_token_indices"] = [1, 4]
        headers[DELTA] = TensorHeader("F32", (2, WIDTH))
    assert methods.describe(config, headers, BASE, max_rank=64).method == kind


def test_the_kinds_here_are_all_but_those_that_need_more_of_a_base() -> None:
    assert methods.methods().keys() - KINDS.keys() == {"P_TUNING", "ADAPTION_PROMPT", "TINYLORA"}
