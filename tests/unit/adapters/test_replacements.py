"""modules_to_save, trainable tokens and copies of the base's own weights: what passes, and what is refused and why."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hatrack_server.adapters import methods
from hatrack_server.adapters.pieces import (
    LowRank,
    Piece,
    ReplacedEmbedding,
    ReplacedHead,
    ReplacedNorm,
    ReplacedScores,
    ReplacedTokens,
)
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, LinearShape

PREFIX = "base_model.model."
EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
PROJECTION = "model.layers.0.self_attn.q_proj"
VOCABULARY, WIDTH = 10, 4
UNTIED = BaseShapes(
    {PROJECTION: LinearShape(6, WIDTH), HEAD: LinearShape(VOCABULARY, WIDTH)},
    EMBEDDING,
    WIDTH,
    (),
    embedding_rows=VOCABULARY,
    embedding_scale=2.0,
    replaceable={
        EMBEDDING: {"weight": (VOCABULARY, WIDTH)},
        HEAD: {"weight": (VOCABULARY, WIDTH)},
        "model.layers.0.input_layernorm": {"weight": (WIDTH,)},
        NORM: {"weight": (WIDTH,), "bias": (WIDTH,)},
    },
    head=HEAD,
)
TIED = replace(UNTIED, tied=True)
BIASED = replace(
    UNTIED, replaceable=UNTIED.replaceable | {HEAD: {"weight": (VOCABULARY, WIDTH), "bias": (VOCABULARY,)}}
)
LORA = {f"{PREFIX}{PROJECTION}.lora_A.weight": (2, WIDTH), f"{PREFIX}{PROJECTION}.lora_B.weight": (6, 2)}
DELTA = "token_adapter.trainable_tokens_delta"


class Layers:
    """A base whose weights are zero, but for the given one of embedding and head."""

    def __init__(self, shapes: BaseShapes, end: Tensor | None = None) -> None:
        self.shapes = shapes
        self._end = torch.zeros(VOCABULARY, WIDTH) if end is None else end

    def project(self, layer: str, rows: Tensor) -> Tensor:
        return torch.zeros(len(rows), self.shapes.linears[layer].out_features)

    def squared_norms(self, layer: str) -> Tensor:
        return torch.ones(self.shapes.linears[layer].out_features)

    def end(self, module: str, parameter: str) -> Tensor:
        return self._end

    def norm_offset(self, norm: str) -> float:
        return float(norm == NORM)

    def bias(self, layer: str) -> Tensor | None:
        return None


def config(**settings: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **settings}


def headers(**tensors: tuple[int, ...]) -> dict[str, TensorHeader]:
    """LoRA's own, and others by what follows the prefix."""
    shapes = LORA | {PREFIX + name: shape for name, shape in tensors.items()}
    return {key: TensorHeader("F32", shape) for key, shape in shapes.items()}


def refusal(base: BaseShapes, tensors: dict[str, tuple[int, ...]], **settings: Any) -> InvalidArtifact:
    with pytest.raises(InvalidArtifact) as caught:
        methods.describe(config(**settings), headers(**tensors), base, max_rank=8)
    return caught.value


def pieces(base: BaseShapes, tensors: dict[str, tuple[int, ...]], **settings: Any) -> dict[tuple[str, type], Any]:
    """By module and kind, of an artifact of ones that must pass the gate."""
    given = headers(**tensors)
    spec = methods.describe(config(**settings), given, base, max_rank=8)
    assert spec.tensors == {key: header.shape for key, header in given.items()}
    ones = {key: torch.ones(header.shape) for key, header in given.items()}
    found = methods.compile(config(**settings), ones, Layers(base))
    resident = sum(tensor.numel() * size(piece, tensor) for _, piece in found for tensor in piece.tensors)
    assert spec.resident_bytes == resident
    return {(module, type(piece)): piece for module, piece in found}


def size(piece: Piece, tensor: Tensor) -> int:
    """Bytes of a number in a pool."""
    return (piece.dtype or torch.bfloat16).itemsize if tensor.is_floating_point() else 8


WHOLE = {
    f"{HEAD}.weight": (VOCABULARY, WIDTH),
    f"{EMBEDDING}.weight": (VOCABULARY, WIDTH),
    f"{NORM}.weight": (WIDTH,),
    f"{NORM}.bias": (WIDTH,),
    "model.layers.0.input_layernorm.weight": (WIDTH,),
}


def test_modules_to_save_take_the_place_of_the_bases_own() -> None:
    found = pieces(UNTIED, WHOLE, modules_to_save=["lm_head", "embed_tokens", "norm"], target_modules=["q_proj", HEAD])
    assert found.keys() == {
        (PROJECTION, LowRank),  # none at the head: what is trained whole has no adapter
        (HEAD, ReplacedHead),
        (EMBEDDING, ReplacedEmbedding),
        (NORM, ReplacedNorm),
        ("model.layers.0.input_layernorm", ReplacedNorm),  # PEFT takes every name that ends so
    }
    assert found[EMBEDDING, ReplacedEmbedding].rows.eq(2).all()  # with the embedding's scale
    assert found[NORM, ReplacedNorm].scale.eq(2).all()  # with the norm's offset
    assert found["model.layers.0.input_layernorm", ReplacedNorm].scale.eq(1).all()
    assert found[NORM, ReplacedNorm].bias is not None
    assert found[HEAD, ReplacedHead].bias is None


def test_tokens_of_a_tied_base_are_replaced_at_both_ends() -> None:
    delta = {f"{EMBEDDING}.{DELTA}": (3, WIDTH)}
    own = pieces(UNTIED, delta, trainable_token_indices=[1, 9, 2])
    assert own.keys() == {(PROJECTION, LowRank), (EMBEDDING, ReplacedTokens)}
    assert own[EMBEDDING, ReplacedTokens].tokens.tolist() == [1, 2, 9]
    assert own[EMBEDDING, ReplacedTokens].rows.eq(2).all()  # with the embedding's scale, which the head has not
    for wanted in ([1, 9, 2], {"embed_tokens": [1, 9, 2]}, {"embed_tokens": [1, 9, 2], "lm_head": [1, 9, 2]}):
        both = pieces(TIED, delta, trainable_token_indices=wanted)
        assert both.keys() == own.keys() | {(HEAD, ReplacedScores)}
        assert both[HEAD, ReplacedScores].rows.eq(1).all()


def test_one_weight_trained_as_such_is_replaced_at_both_ends() -> None:
    for wanted in (["embed_tokens"], ["lm_head"]):
        ends = {f"{EMBEDDING}.weight": (VOCABULARY, WIDTH), f"{HEAD}.weight": (VOCABULARY, WIDTH)}
        found = pieces(TIED, ends, modules_to_save=wanted, ensure_weight_tying=True)
        assert found.keys() == {(PROJECTION, LowRank), (EMBEDDING, ReplacedEmbedding), (HEAD, ReplacedHead)}
    shared = {f"{EMBEDDING}.weight": (VOCABULARY, WIDTH)}
    settings = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    assert refusal(TIED, shared, **settings).field == f"adapter_model.safetensors: {PREFIX}{HEAD}.weight"
    alone = pieces(UNTIED, shared, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert alone.keys() == {(PROJECTION, LowRank), (EMBEDDING, ReplacedEmbedding)}


@pytest.mark.parametrize(
    "key",
    [
        f"{HEAD}.base_layer.weight",
        f"{EMBEDDING}.weight",
        f"{HEAD}.weight",
        f"{EMBEDDING}.token_adapter.base_layer.weight",
    ],
)
def test_copies_of_the_bases_weights_are_checked_and_dropped(key: str) -> None:
    given = headers(**{key: (VOCABULARY, WIDTH)})
    spec = methods.describe(config(), given, UNTIED, max_rank=8)
    alone = methods.describe(config(), headers(), UNTIED, max_rank=8)
    assert (spec.resident_bytes, spec.parameters) == (alone.resident_bytes, alone.parameters)
    tensors = {key: torch.zeros(header.shape) for key, header in given.items()}
    assert [type(piece) for _, piece in methods.compile(config(), tensors, Layers(UNTIED))] == [LowRank]
    tensors[PREFIX + key][3, 1] = 0.1
    with pytest.raises(InvalidArtifact, match="no copy of this base's own"):
        methods.compile(config(), tensors, Layers(UNTIED))
    wider = {key: (VOCABULARY + 2, WIDTH)}  # a vocabulary with added tokens
    assert refusal(UNTIED, wider).field == f"adapter_model.safetensors: {PREFIX}{key}"


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (UNTIED, {"modules_to_save": ["q_proj"]}),
        (UNTIED, {"modules_to_save": ["score"]}),
        (UNTIED, {"modules_to_save": [1]}),
        (UNTIED, {"modules_to_save": "lm_head"}),
        (UNTIED, {"trainable_token_indices": [VOCABULARY]}),
        (UNTIED, {"trainable_token_indices": [-1]}),
        (UNTIED, {"trainable_token_indices": [1, 1]}),
        (UNTIED, {"trainable_token_indices": []}),
        (UNTIED, {"trainable_token_indices": [True]}),
        (UNTIED, {"trainable_token_indices": "1"}),
        (UNTIED, {"trainable_token_indices": {"q_proj": [1]}}),
        (BIASED, {"trainable_token_indices": {"lm_head": [1]}}),
        (TIED, {"trainable_token_indices": {"lm_head": [1]}}),
        (TIED, {"trainable_token_indices": {"lm_head": [1], "embed_tokens": [2]}}),
        (TIED, {"ensure_weight_tying": "yes", "modules_to_save": ["lm_head"]}),
        (UNTIED, {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}),
    ],
    ids=str,
)
def test_what_is_malformed_is_refused_by_name(base: BaseShapes, settings: dict[str, Any]) -> None:
    assert refusal(base, {}, **settings).field == f"adapter_config.json: {next(iter(settings))}"


def test_a_copy_may_be_rounded_to_another_precision() -> None:
    key, values = f"{PREFIX}{HEAD}.weight", torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
    lora = {name: torch.ones(shape) for name, shape in LORA.items()}
    precisions = (torch.float32, torch.bfloat16, torch.float16)
    for own, copied in itertools.product(precisions, precisions):
        base = Layers(UNTIED, values.to(own))
        assert len(methods.compile(config(), lora | {key: values.to(copied)}, base)) == 1
        other = values.to(copied).clone()
        other[2, 1] += 1e-3 if torch.float32 in (own, copied) and own is copied else 0.1
        with pytest.raises(InvalidArtifact, match="no copy"):
            methods.compile(config(), lora | {key: other}, base)


def test_a_name_that_also_means_what_cannot_be_replaced_is_refused() -> None:
    with_key_norm = WHOLE | {"model.layers.0.self_attn.k_norm.weight": (2,)}
    assert "k_norm" in refusal(UNTIED, with_key_norm, modules_to_save=["norm"]).message


def test_trainable_tokens_alone_are_saved_under_both_names_of_one_weight() -> None:
    settings = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 1], "target_modules": "model.embed_tokens"}
    for base, ends in ((UNTIED, {EMBEDDING}), (TIED, {EMBEDDING, HEAD})):
        given = {f"{PREFIX}{end}.trainable_tokens_delta": TensorHeader("F32", (2, WIDTH)) for end in ends}
        spec = methods.describe(settings, given, base, max_rank=1)
        assert (spec.parameters, len(spec.tensors)) == (2 * WIDTH, len(ends))
        ones = {key: torch.ones(header.shape) for key, header in given.items()}
        assert {module for module, _ in methods.compile(settings, ones, Layers(base))} == ends


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_layernorm_tuning_takes_norms_alone(target: str) -> None:
    module = {"lm_head": HEAD, "embed_tokens": EMBEDDING}[target]
    weight = {f"{PREFIX}{module}.ln_tuning_layers.weight": TensorHeader("F32", (VOCABULARY, WIDTH))}
    with pytest.raises(InvalidArtifact):
        methods.describe({"peft_type": "LN_TUNING", "target_modules": [target]}, weight, UNTIED, max_rank=1)


def test_an_adapter_on_both_ends_of_one_weight_is_refused() -> None:
    settings = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    assert refusal(TIED, {}, **settings).field == "adapter_config.json: ensure_weight_tying"


def test_all_of_a_module_must_be_there() -> None:
    without_bias = {f"{NORM}.weight": (WIDTH,)}
    wanted = f"adapter_model.safetensors: {PREFIX}{NORM}.bias"
    assert refusal(UNTIED, without_bias, modules_to_save=["model.norm"]).field == wanted
