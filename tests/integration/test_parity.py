"""Every row of a mixed batch gives what PEFT gives for that adapter alone on the same base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle, make_adapter
from parity import PRECISIONS, Case, assert_rows_equal_peft, make_case
from tiny import FAMILIES
from zoo import EXPECTED_WARNINGS, make_zoo, not_on

pytestmark = [pytest.mark.filterwarnings(warning) for warning in EXPECTED_WARNINGS]

LORAS = {
    "r4": {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "r8": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "alpha_pattern": {"q_proj": 4}},
    "r64": {
        "r": 64,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": ["k_proj", "v_proj", "down_proj", "fc2", "lm_head"],
        "rank_pattern": {"k_proj": 5},
        "alpha_pattern": {"lm_head": 1},
        "layers_to_transform": [1],
    },
}
ROWS = ["base", "r4", "r8", "r64", "r8", "base", "r4"]
ZOO_FAMILIES = ("llama", "mistral", "gemma2", "phi")  # plain; windows; norms and soft caps, too; biases


def make_loras(oracle: Oracle, folder: Path) -> dict[str, Path]:
    return {
        name: make_adapter(oracle.base, folder / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(LORAS.items())
    }


@pytest.fixture(scope="module", params=[(f, p) for f in FAMILIES for p in PRECISIONS], ids="-".join)
def loras(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, precision = request.param
    return make_case(tmp_path_factory.mktemp(f"{family}-{precision}"), family, precision, make_loras)


@pytest.fixture(scope="module", params=[(f, p) for f in ZOO_FAMILIES for p in PRECISIONS], ids="-".join)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, precision = request.param
    folder = tmp_path_factory.mktemp(f"zoo-{family}-{precision}")
    # All prompts in the first step, so that every method is there in each.
    return make_case(folder, family, precision, make_zoo, on_plain_linears=not_on(precision), max_step_tokens=1024)


def test_rows_of_a_mixed_batch_equal_peft_alone(loras: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_rows_equal_peft(loras, ROWS, monkeypatch, lambda name: loras.adapters.keys() - {name})


def test_every_method_in_one_batch_equals_peft_alone(zoo: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(zoo.adapters)
    after = dict(zip(names, [*names[1:], names[0]], strict=True))
    assert_rows_equal_peft(zoo, names, monkeypatch, lambda name: {"base", after[name]} - {name})


SOME = [*range(0, 250, 3)]
# What the head does when the embedding's weight, or some of its rows, are replaced; Gemma 2 has one weight for both.
REPLACING: dict[str, dict[str, dict[str, Any]]] = {
    "gemma2": {
        "both as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "both, each its own": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "embedding alone": {"modules_to_save": ["embed_tokens"]},
        "head alone": {"modules_to_save": ["lm_head"]},
        "tokens of both": {"trainable_token_indices": {"embed_tokens": SOME, "lm_head": SOME}},
    },
    "opt": {
        "norms": {"modules_to_save": ["final_layer_norm"]},
        "more norms": {"modules_to_save": ["self_attn_layer_norm", "decoder.final_layer_norm"]},
        "head alone": {"modules_to_save": ["lm_head"]},
    },
    "llama": {
        "tokens of the head": {"trainable_token_indices": {"lm_head": SOME}},
        "tokens of each": {"trainable_token_indices": {"embed_tokens": SOME, "lm_head": [1, 3, 4]}},
        "head and norms": {"modules_to_save": ["lm_head", "norm"]},
    },
}


@pytest.mark.parametrize("family", REPLACING)
def test_replaced_embedding_and_head_equal_peft(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(oracle: Oracle, folder: Path) -> dict[str, Path]:
        return {
            name: make_adapter(oracle.base, folder / name, seed=seed, r=2, target_modules=["v_proj"], **settings)
            for seed, (name, settings) in enumerate(REPLACING[family].items())
        }

    case = make_case(tmp_path, family, "float32", make)
    assert_rows_equal_peft(case, list(case.adapters), monkeypatch, lambda name: case.adapters.keys() - {name})


def test_unquantised_base_equals_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path, "llama", "float32", make_loras, quantization="none")
    assert_rows_equal_peft(case, ROWS, monkeypatch, lambda name: case.adapters.keys() - {name})
