"""LoRA's `describe` half, held against PEFT itself: the same modules, ranks, scales and tensors, and typed refusals."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel

from hatrack_server.adapters import methods
from hatrack_server.adapters.methods import lora
from hatrack_server.adapters.patterns import Budget
from hatrack_server.adapters.safetensors_header import TensorHeader, read_header
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes, LinearShape

Fresh = Callable[[], PreTrainedModel]


@pytest.fixture(scope="module")
def fresh(tiny_llama: Path) -> Fresh:
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


def shapes_of(model: torch.nn.Module) -> BaseShapes:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    shapes = {name: LinearShape(linear.out_features, linear.in_features) for name, linear in linears.items()}
    return BaseShapes(shapes, "model.embed_tokens", 64, ())


UNSLOTH = (
    r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))"
)

CONFIGS: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "full names": {"target_modules": ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"]},
    "half a name": {"target_modules": ["q_proj", "proj", "up_pro"]},
    "all-linear": {"target_modules": "all-linear"},
    "ALL-linear but": {"target_modules": "ALL-linear", "exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.layers\.1\..*(q|v)_proj"},
    "a trainer's regex": {"target_modules": UNSLOTH},
    "regex excluded": {"target_modules": r".*_proj", "exclude_modules": r".*mlp.*|.*\.0\..*"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "layers of patterns": {
        "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "lay[e]rs"],
    },
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "rank pattern": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 3, "^model.layers.0.self_attn.q_proj": 5, r"layers\.\d+\.mlp\..*": 7, "proj": 9},
    },
    "alpha pattern": {
        "target_modules": ["q_proj", "k_proj"],
        "alpha_pattern": {"model.layers.1.self_attn.k_proj": 3, "q_pro.": 0, "k_proj": 64},
        "lora_alpha": 5,
    },
    "rank-stabilised": {
        "target_modules": ["q_proj"],
        "use_rslora": True,
        "rank_pattern": {"1.*": 3},
        "lora_alpha": 1.5,
    },
    "inits": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.5},
}


def layers_of(model: torch.nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and scale of every module that PEFT has adapted."""
    return {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_selects_ranks_and_scales_as_peft_does(fresh: Fresh, tmp_path: Path, options: dict[str, Any]) -> None:
    base = shapes_of(fresh())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about tied weights and unused options
        model = get_peft_model(fresh(), LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}))
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(fresh(), tmp_path)
    headers = read_header(tmp_path / "adapter_model.safetensors")
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    # PEFT sorts the patterns as it saves, so that another one may come first afterwards; what is loaded counts.
    for config, oracle in ((saved, loaded), ({**saved, **options}, model)):
        spec = methods.describe(config, headers, base, max_rank=16)
        ranks = {
            key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): shape[0]
            for key, shape in spec.tensors.items()
            if key.endswith(".lora_A.weight")
        }
        settings = lora._ranks_and_scales(config, Budget())
        assert {module: (rank, settings.scale(module, rank)) for module, rank in ranks.items()} == layers_of(oracle)
    assert spec.tensors == {key: header.shape for key, header in headers.items()}
    assert spec.rank == max(rank for rank, _ in layers_of(loaded).values())
    assert spec.parameters == model.get_nb_trainable_parameters()[0]


BASE = BaseShapes(
    {f"model.layers.{i}.self_attn.{name}": LinearShape(6, 4) for i in range(2) for name in ("q_proj", "v_proj")},
    "model.embed_tokens",
    4,
    (),
)
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def headers_for(*modules: str) -> dict[str, TensorHeader]:
    shapes = {"lora_A": (2, 4), "lora_B": (6, 2)}
    return {
        f"base_model.model.{module}.{part}.weight": TensorHeader("F32", shape)
        for module in modules
        for part, shape in shapes.items()
    }


Q_PROJ = headers_for("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def refusal(changes: dict[str, Any], headers: dict[str, TensorHeader] = Q_PROJ) -> InvalidArtifact:
    with pytest.raises(InvalidArtifact) as caught:
        methods.describe({**CONFIG, **changes}, headers, BASE, max_rank=8)
    return caught.value


def test_the_plain_one_passes() -> None:
    assert methods.describe(CONFIG, Q_PROJ, BASE, max_rank=8).rank == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 1]]),
        ("megatron_config", {"x": 1}),
        ("trainable_token_indices", [1]),
        ("use_qalora", True),
        ("use_bdlora", {}),
        ("kasa_config", {}),
        ("arrow_config", {"top_k": 3}),
        ("velora_config", {"scale": 1.0}),
        ("monteclora_config", {"num_samples": 8}),
        ("an_option_of_a_later_peft", "on"),
        ("an_option_of_a_later_peft", 0),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "OLoRA"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", None),
        ("r", 0),
        ("r", -2),
        ("r", 2.0),
        ("r", True),
        ("r", "2"),
        ("lora_alpha", None),
        ("lora_alpha", "4"),
        ("lora_alpha", True),
        ("lora_alpha", 1e39),
        ("lora_alpha", 10**400),
        ("use_rslora", "yes"),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", [1]),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", "("),
        ("target_modules", "q_proj){e<=9}("),
        ("target_modules", "[[:alpha:]]*"),
        ("target_modules", "(?:(?:a{1000}){1000}){1000}"),
        ("target_modules", "(?:" * 400 + ")" * 400),
        ("exclude_modules", 1),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [True]),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"(": 1}),
    ],
)
def test_what_is_not_served_is_refused_by_its_key(key: str, value: Any) -> None:
    assert refusal({key: value}).field == f"adapter_config.json: {key}"


def test_every_option_of_this_peft_is_known_or_off_by_default() -> None:
    defaults = LoraConfig(target_modules=["q_proj"]).to_dict()
    config = {**defaults, **CONFIG}
    assert methods.describe(config, Q_PROJ, BASE, max_rank=8).rank == 2


def test_a_regex_needs_no_layers() -> None:
    assert refusal({"target_modules": ".*q_proj", "layers_to_transform": [0]}).field.endswith("layers_to_transform")


def test_the_rank_is_bounded() -> None:
    assert refusal({"r": 9}).field == "adapter_model.safetensors: " + next(iter(Q_PROJ))
    wide = {key: TensorHeader("F32", tuple(9 if n == 2 else n for n in header.shape)) for key, header in Q_PROJ.items()}
    assert refusal({"r": 9}, wide).field == "adapter_config.json: r"


def test_tensors_must_be_exactly_those_asked_for() -> None:
    key, header = next(iter(Q_PROJ.items()))
    missing = {other: value for other, value in Q_PROJ.items() if other != key}
    assert refusal({}, missing).field == f"adapter_model.safetensors: {key}"
    misshapen = {**Q_PROJ, key: TensorHeader("F32", header.shape[::-1])}
    assert refusal({}, misshapen).field == f"adapter_model.safetensors: {key}"
    extra = {**Q_PROJ, **headers_for("model.layers.0.self_attn.v_proj")}
    assert "asks for no such tensor" in refusal({}, extra).message
    foreign = {**Q_PROJ, **headers_for("lm_head")}
    assert refusal({"target_modules": ["q_proj", "lm_head"]}, foreign).message == (
        "lm_head.lora_A.weight belongs to no module that can be adapted on this base"
    )
    assert refusal({"target_modules": ["gate_proj"]}, {}).field == "adapter_config.json: target_modules"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "(?:.|.)*" * 100 + "[0-9]{3}"},
        {"exclude_modules": "((.)|(.)|.)*" * 70 + "[0-9]{3}"},
        {"rank_pattern": {"(?:.|.)*" * 100 + "[0-9]{3}": 2}},
        {"layers_to_transform": [0], "layers_pattern": "(?:.|.)*" * 100 + "[0-9]{3}"},
    ],
)
def test_a_pattern_that_would_hang_is_stopped(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    monkeypatch.setattr(lora, "Budget", lambda: Budget(0.1))
    started = time.monotonic()
    assert "too long" in refusal(changes).message
    assert time.monotonic() - started < 5
