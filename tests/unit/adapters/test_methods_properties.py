"""Artifacts that a careless or hostile user may send: accepted and right, or refused with a reason; never a crash."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hatrack_server.adapters import methods
from hatrack_server.adapters.pieces import InputScale, Kronecker, LowRank, Piece
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import AttentionShape, BaseShapes, LinearShape, ProgramSpec

LINEARS = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": LinearShape(12, 8),
        "self_attn.k_proj": LinearShape(4, 8),
        "self_attn.v_proj": LinearShape(4, 8),
        "self_attn.o_proj": LinearShape(8, 12),
        "mlp.up_proj": LinearShape(16, 8),
    }.items()
}
ATTENTION = tuple(AttentionShape(f"model.layers.{layer}.self_attn", 2, 2, 2) for layer in (0, 1))
BASE = BaseShapes(LINEARS, "model.embed_tokens", 8, ATTENTION)
SETTINGS = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Layers:
    """A base whose weights are zero."""

    shapes = BASE

    def project(self, layer: str, rows: Tensor) -> Tensor:
        return torch.zeros(len(rows), LINEARS[layer].out_features)

    def squared_norms(self, layer: str) -> Tensor:
        return torch.ones(LINEARS[layer].out_features)

    def parameter(self, module: str, name: str) -> Tensor:
        return torch.zeros(BASE.replaceable[module][name])

    def bias(self, layer: str) -> Tensor | None:
        return None


def low_rank(a: str, b: str) -> Any:
    return lambda shape, r: {a: (r, shape.in_features), b: (shape.out_features, r)}


# What each method saves for one module of rank r; the artifacts below begin from these and go wrong from there.
SAVED: dict[str, Any] = {
    "LORA": low_rank("lora_A.weight", "lora_B.weight"),
    "ADALORA": lambda shape, r: low_rank("lora_A", "lora_B")(shape, r) | {"lora_E": (r, 1)},
    "LOHA": lambda shape, r: (
        low_rank("hada_w1_b", "hada_w1_a")(shape, r) | low_rank("hada_w2_b", "hada_w2_a")(shape, r)
    ),
    "IA3": lambda shape, _: {"ia3_l": (shape.out_features, 1)},
    "MISS": lambda shape, r: {"miss_block": (r, shape.out_features)},
    "VERA": lambda shape, r: {"vera_lambda_b": (shape.out_features,), "vera_lambda_d": (r,)},
}
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
ODD = st.sampled_from(
    [None, -1, 0, 1, 3, 1.5, True, "", "x", "all", [], ["q_proj"], {}, {"q_proj": 2}, 10**30, "(a+)+$"]
)
KEYS = [
    "r", "lora_alpha", "alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "lora_bias", "bias", "layers_to_transform", "layers_pattern", "init_r", "feedforward_modules",
    "modules_to_save", "init_lora_weights", "decompose_factor", "decompose_both", "save_projection",
    "num_virtual_tokens", "peft_type", "fan_in_fan_out", "unheard_of",
]  # fmt: skip


@st.composite
def artifacts(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    """A configuration and its tensors, right or with a few things wrong."""
    kind = draw(st.sampled_from(sorted(SAVED)))
    rank = draw(st.integers(1, 5))
    targets = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    config: dict[str, Any] = {"peft_type": kind, "r": rank, "init_r": 6, "target_modules": targets}
    if kind == "IA3":
        config |= {"feedforward_modules": []}
        del config["r"], config["init_r"]
    elif kind != "ADALORA":
        del config["init_r"]
    pattern = draw(st.dictionaries(st.sampled_from(NAMES), st.integers(1, 5), max_size=2))
    if kind in ("LORA", "LOHA") and pattern:
        config["rank_pattern"] = pattern
    headers: dict[str, TensorHeader] = {}
    adapted = [module for module in LINEARS if module.rpartition(".")[2] in targets]
    for module in adapted:
        r = config.get("rank_pattern", {}).get(module.rpartition(".")[2], rank)
        for name, shape in SAVED[kind](LINEARS[module], r).items():
            headers[f"base_model.model.{module}.{name}"] = TensorHeader("F32", shape)
    if kind == "VERA":
        widest_in = max(LINEARS[module].in_features for module in adapted)
        widest_out = max(LINEARS[module].out_features for module in adapted)
        headers["base_model.vera_A"] = TensorHeader("F32", (rank, widest_in))
        headers["base_model.vera_B"] = TensorHeader("F32", (widest_out, rank))
    for _ in range(draw(st.integers(0, 2))):
        match draw(st.sampled_from(["config", "drop", "add", "shape"])):
            case "config":
                config[draw(st.sampled_from(KEYS))] = draw(ODD)
            case "drop" if headers:
                del headers[draw(st.sampled_from(sorted(headers)))]
            case "add":
                headers[draw(st.sampled_from(["x", "base_model.model.lm_head.weight", "..", "prompt_embeddings"]))] = (
                    TensorHeader("F32", (2, 2))
                )
            case "shape" if headers:
                key = draw(st.sampled_from(sorted(headers)))
                headers[key] = TensorHeader("F32", tuple(draw(st.lists(st.integers(0, 13), max_size=3))))
    return config, headers


def described(config: dict[str, Any], headers: dict[str, TensorHeader]) -> ProgramSpec | InvalidArtifact:
    try:
        return methods.describe(config, headers, BASE, max_rank=16)
    except InvalidArtifact as refused:
        return refused


def fits(module: str, piece: Piece) -> bool:
    shape = LINEARS[module]
    match piece:
        case LowRank(a, b):
            return (a.shape[1], b.shape[1], a.shape[0]) == (shape.in_features, shape.out_features, b.shape[0])
        case Kronecker(w1, w2):
            inside, outside = w1.shape[1] * w2.shape[1], w1.shape[0] * w2.shape[0]
            return (inside, outside) == (shape.in_features, shape.out_features)
        case InputScale(vector):
            return len(vector) == shape.in_features
    return all(len(tensor) == shape.out_features for tensor in piece.tensors)


@SETTINGS
@given(artifacts())
def test_an_artifact_is_right_or_refused_with_a_reason(
    artifact: tuple[dict[str, Any], dict[str, TensorHeader]],
) -> None:
    config, headers = artifact
    spec = described(config, headers)
    if isinstance(spec, InvalidArtifact):
        assert spec.field.startswith(("adapter_config.json: ", "adapter_model.safetensors: "))
        assert spec.message
        return
    assert spec.tensors == {key: header.shape for key, header in headers.items()}
    assert spec.rank <= 16
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(header.shape, generator=generator) for key, header in headers.items()}
    for module, piece in methods.compile(config, tensors, Layers()):
        assert fits(module, piece)
        assert all(tensor.isfinite().all() for tensor in piece.tensors)


def test_plain_artifacts_of_every_kind_are_accepted() -> None:
    """The property above would also hold if everything were refused."""
    for kind, saved in SAVED.items():
        config = {"peft_type": kind, "target_modules": ["q_proj"], "feedforward_modules": [], "r": 3, "init_r": 6}
        config = {key: value for key, value in config.items() if not (kind == "IA3" and key in ("r", "init_r"))}
        if kind != "ADALORA":
            config.pop("init_r", None)
        if kind != "IA3":
            del config["feedforward_modules"]
        headers = {
            f"base_model.model.{module}.{name}": TensorHeader("F32", shape)
            for module in LINEARS
            if module.endswith("q_proj")
            for name, shape in saved(LINEARS[module], 3).items()
        }
        if kind == "VERA":
            headers["base_model.vera_A"] = TensorHeader("F32", (3, 8))
            headers["base_model.vera_B"] = TensorHeader("F32", (12, 3))
        assert methods.describe(config, headers, BASE, max_rank=16).method == kind
