"""Every row of a mixed batch gives what PEFT gives for that adapter alone on the same base."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracle import Oracle, make_adapter, save_adapter
from parity import PRECISIONS, Case, assert_rows_equal_peft, make_case
from tiny import FAMILIES
from zoo import NOISE, NOT_ON_BFLOAT16_NF4, NOT_ON_NF4, ONLY_ON_LLAMA_AND_MISTRAL, ZOO

# PEFT is right to warn whoever would merge such adapters.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    # It takes the bias of lora_B for its weight.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape"),
]

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


def make_zoo(oracle: Oracle, folder: Path) -> dict[str, Path]:
    more = ONLY_ON_LLAMA_AND_MISTRAL if oracle.base.config.model_type in ("llama", "mistral") else {}
    return {
        name: save_adapter(oracle.plain, folder / name, config, seed=seed, noise=NOISE.get(name, 0.1))
        for seed, (name, config) in enumerate((ZOO | more).items())
    }


@pytest.fixture(scope="module", params=[(f, p) for f in FAMILIES for p in PRECISIONS], ids="-".join)
def loras(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, precision = request.param
    return make_case(tmp_path_factory.mktemp(f"{family}-{precision}"), family, precision, make_loras)


@pytest.fixture(scope="module", params=[(f, p) for f in ZOO_FAMILIES for p in PRECISIONS], ids="-".join)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, precision = request.param
    plain = NOT_ON_BFLOAT16_NF4 if precision == "bfloat16" else NOT_ON_NF4
    folder = tmp_path_factory.mktemp(f"zoo-{family}-{precision}")
    # All prompts in the first step, so that every method is there in each.
    return make_case(folder, family, precision, make_zoo, on_plain_linears=plain, max_step_tokens=1024)


def test_rows_of_a_mixed_batch_equal_peft_alone(loras: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_rows_equal_peft(loras, ROWS, monkeypatch, lambda name: loras.adapters.keys() - {name})


def test_every_method_in_one_batch_equals_peft_alone(zoo: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(zoo.adapters)
    after = dict(zip(names, [*names[1:], names[0]], strict=True))
    assert_rows_equal_peft(zoo, names, monkeypatch, lambda name: {"base", after[name]} - {name})


def test_unquantised_base_equals_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path, "llama", "float32", make_loras, quantization="none")
    assert_rows_equal_peft(case, ROWS, monkeypatch, lambda name: case.adapters.keys() - {name})
